"""The tokenizer that a GGUF file carries in its metadata, as llama.cpp's tools write it (`tokenizer.ggml.*`)."""

import math
from dataclasses import dataclass
from typing import Any

from ..types import Checkpoint
from .gguf import read_lists

PREFIX = "tokenizer.ggml."
KIND = PREFIX + "model"
LISTS = ("tokens", "token_type", "scores", "merges", "precompiled_charsmap")
# What a token may be; the numbers are sentencepiece's too.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """The tokens of a tokenizer by their ids, and what else a file says of it.

    `kind` is llama.cpp's name of the way to read text (t5, gpt2), `splitting` of the way to cut it into words before.
    `types` are of the tokens, `scores` too, if there are any. `charsmap` is sentencepiece's table that makes characters
    alike, None where the file has none. `source` says where all this is.
    """

    source: str
    kind: str
    splitting: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    charsmap: bytes | None
    adds_space: bool
    strips_spaces: bool


def read_vocabulary(checkpoint: Checkpoint) -> Vocabulary | None:
    """Return the vocabulary in a checkpoint's files, None if there is none. Raises ValueError for a damaged one."""
    facts = checkpoint.metadata
    if KIND not in facts:
        return None
    source = f"{checkpoint.path} ({PREFIX}*)"
    found: dict[str, tuple[Any, ...]] = {}
    for file in sorted(set(checkpoint.location.values())):
        found |= read_lists(file, [PREFIX + name for name in LISTS])
    tokens, types, scores, merges, charsmap = (found.get(PREFIX + name, ()) for name in LISTS)
    types = types or (NORMAL,) * len(tokens)
    right = (
        all(isinstance(text, str) for text in (*tokens, *merges))
        and all(type(kind) is int and NORMAL <= kind <= BYTE for kind in types)
        and all(isinstance(score, float) and math.isfinite(score) for score in scores)
        and len(types) == len(tokens) > 0
        and len(scores) in (0, len(tokens))
    )
    if not right:
        raise ValueError(
            f"The tokenizer in {source} can't be right: {len(tokens)} tokens, {len(types)} types, {len(scores)} "
            "scores, or other things among them. Download the file again."
        )
    is_bytes = charsmap and all(type(n) is int and -128 <= n < 256 for n in charsmap)
    return Vocabulary(
        source=source,
        kind=facts[KIND],
        splitting=facts.get(PREFIX + "pre", ""),
        tokens=tokens,
        types=types,
        scores=scores,
        merges=merges,
        charsmap=bytes(n % 256 for n in charsmap) if is_bytes else None,
        adds_space=facts.get(PREFIX + "add_space_prefix", "True") == "True",
        strips_spaces=facts.get(PREFIX + "remove_extra_whitespaces", "True") == "True",
    )
