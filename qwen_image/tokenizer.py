"""Prompts as Qwen2.5-VL reads them for Qwen-Image: in a template, pictures as runs of placeholders, as ids."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.text import Reader, Tokens, download, fast_tokenizer, read_tokenizer_json
from ..core.types import Checkpoint
from ..core.weights.vocabulary import CONTROL, NORMAL, USER_DEFINED, Vocabulary, read_vocabulary
from .keymap import TOKENIZER as EMBEDDED_NAME

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
SPECIAL = (IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD)

HUB_REPOSITORY = "Qwen/Qwen2.5-VL-7B-Instruct"
HUB_REVISION = "cc594898137f460bfe9f0759e9844b3ce807cfb5"  # its main branch; has tokenizer.json
FAST, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
ADDED = ("tokenizer_config.json", "added_tokens.json")  # either says which tokens are special, in two ways
# Where a tokenizer lies, seen from the checkpoint's folder: beside it, or in a diffusers repository.
FOLDERS = (".", "tokenizer", "processor", "../tokenizer", "../processor")

# How Qwen2's tokenizer cuts text before it merges bytes; source: tokenizer.json of Qwen2.5-VL.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

MAX_TEXT_TOKENS = 1024  # of a prompt without pictures; the published pipeline's limit
MAX_EDIT_ROWS = 4096  # of a prompt with its pictures; as far as the published transformer's position table goes


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """How a prompt is put to the model: the system's instruction, and what goes before each picture.

    A picture is shown at about `area` pixels. 0 is a template without pictures, `max_images` None one for any number.
    """

    system: str
    label: str = ""
    area: int = 0
    max_images: int | None = 0


_EDIT = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)
# Source: the published pipelines of Qwen-Image, -Edit and -Edit-2509. The models were trained with these very words.
TEMPLATES = {
    "t2i": Template(
        system="Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships "
        "of the objects and background:"
    ),
    "edit": Template(system=_EDIT, area=1024 * 1024, max_images=1),
    "edit-plus": Template(system=_EDIT, label="Picture {}: ", area=384 * 384, max_images=None),
}


class Tokenizer:
    """Turn prompts into ids of Qwen2.5's vocabulary. Make one with `from_json`, `from_folder`, `from_hub` or `find`.

    `size` is one more than the largest id, `identity` tells one vocabulary from another, `source` says where it came
    from. `special` holds the ids of the five tokens that templates are made of.

    Text is always read as plain text: a user's `<|im_end|>` becomes the letters of which it is made, never the token,
    so that no prompt can break out of its template.
    """

    comfy_folder = "text_encoders/qwen25_tokenizer"  # ComfyUI's own copy

    def __init__(
        self,
        plain: Callable[[str], list[int]],
        special: Mapping[str, int],
        *,
        size: int,
        identity: str,
        source: str,
    ):
        self._plain, self.special = plain, dict(special)
        self.size, self.identity, self.source = size, identity, source

    @classmethod
    def from_json(cls, content: bytes, source: str = "the given bytes") -> "Tokenizer":
        """Read the content of a tokenizer.json; raises ValueError if it is none, or not one of Qwen2.5-VL."""
        return cls._from_parts(read_tokenizer_json(content, source), hashlib.sha256(content), source)

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer.json; raises ValueError if it is none, or not one of Qwen2.5-VL."""
        return cls.from_json(path.read_bytes(), str(path))

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read the tokenizer in a folder: tokenizer.json, or vocab.json and merges.txt with a tokenizer_config.json.

        Raises ValueError if the folder has neither, or it is not one of Qwen2.5-VL.
        """
        if (folder / FAST).is_file():
            return cls.from_file(folder / FAST)
        added = next((folder / name for name in ADDED if (folder / name).is_file()), None)
        if not _is_tokenizer(folder):
            raise ValueError(f"No tokenizer in {folder}: expected {FAST}, or {VOCAB}, {MERGES} and {ADDED[0]} there.")
        files = [(path.name, path.read_bytes()) for path in (folder / VOCAB, folder / MERGES, added)]
        digest = hashlib.sha256(b"".join(content for _, content in files))
        return cls._from_parts(_assemble(folder, dict(files)), digest, str(folder))

    @classmethod
    def from_hub(cls, repository: str = HUB_REPOSITORY, revision: str = HUB_REVISION) -> "Tokenizer":
        """Download the tokenizer from the Hugging Face hub; call it only when the user asked for a download.

        `revision` is the full commit hash. Raises ValueError if it is not, or if the download fails.
        """
        return cls.from_file(download(repository, FAST, revision))

    @classmethod
    def find(cls, checkpoint: Checkpoint, read: Reader, further: Sequence[Path] = ()) -> "Tokenizer":
        """Return the tokenizer of a text encoder: inside the file, in a folder near it, or in one of `further` folders.

        `read` is `core.weights.tensors.read_tensors`. Never downloads. Raises ValueError with the places looked at.
        """
        if EMBEDDED_NAME in checkpoint.tensors:
            [(_, content)] = read(checkpoint, [EMBEDDED_NAME])
            return cls.from_json(content.numpy().tobytes(), f"{checkpoint.path} ({EMBEDDED_NAME})")
        vocabulary = read_vocabulary(checkpoint)
        lacking = None if vocabulary is None else _lacking(vocabulary)
        if vocabulary is not None and lacking is None:
            content = _from_vocabulary(vocabulary)
            return cls._from_parts(content, hashlib.sha256(json.dumps(content).encode()), vocabulary.source)
        home = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
        folders = [*((home / name).resolve() for name in FOLDERS), *further]
        for folder in folders:
            if _is_tokenizer(folder):
                return cls.from_folder(folder)
        carries = f"carries a tokenizer that can't be used ({lacking})" if lacking else "carries no tokenizer"
        raise ValueError(
            f"{checkpoint.path} {carries} and there is none near it. Looked for {FAST}, or {VOCAB} with"
            f" {MERGES} and {ADDED[0]}, in {', '.join(map(str, folders))}. Put the {FAST} of {HUB_REPOSITORY}"
            " next to the file; or choose tokenizer: hub, which downloads it (--tokenizer hub on the command line)."
        )

    def __call__(self, text: str, template: str = "t2i", image_tokens: Sequence[int] = ()) -> Tokens:
        """Return the ids of a prompt in its template; each picture is a run of `image_tokens[k]` placeholders.

        Without pictures the text is cut to 1024 tokens, with a notice; the template's end is always kept. With
        pictures nothing is cut. Raises ValueError for more than 4096 rows, or pictures that the template has no place
        for.
        """
        form = _template(template, len(image_tokens))
        start, end = self.special[IM_START], self.special[IM_END]
        newline = self.plain("\n")
        prefix = [start, *self.plain(f"system\n{form.system}"), end, *newline, start]
        # Counted, not 34 or 64, which hold for the published tokenizer only. Newlines at the start of a prompt become
        # one token with that after "user"; it counts as the template's, as in the published code.
        num_dropped = len(prefix) + len(self.plain("user\n"))
        ids, pending = prefix, "user\n"
        for k, num_tokens in enumerate(image_tokens, start=1):
            ids += self.plain(pending + form.label.format(k))
            ids += [self.special[VISION_START], *[self.special[IMAGE_PAD]] * num_tokens, self.special[VISION_END]]
            pending = ""
        ids += self.plain(pending + text)
        suffix = [end, *newline, start, *self.plain("assistant\n")]
        kept, notice = ids[num_dropped:], None
        if not image_tokens and len(kept) > MAX_TEXT_TOKENS:
            cut = len(kept) - MAX_TEXT_TOKENS
            found = f"The prompt has {len(kept)} tokens and Qwen-Image reads {MAX_TEXT_TOKENS}"
            notice = f"{found}: the last {cut} were cut off."
            kept = kept[:MAX_TEXT_TOKENS]
        if len(kept) + len(suffix) > MAX_EDIT_ROWS:
            raise ValueError(
                f"The prompt has {len(kept) + len(suffix)} tokens with its images ({sum(image_tokens)} of them),"
                f" Qwen-Image reads up to {MAX_EDIT_ROWS}: shorten the text, or give fewer images."
            )
        return Tokens(text=text, ids=(*kept, *suffix), prefix=tuple(ids[:num_dropped]), notice=notice)

    def plain(self, text: str) -> list[int]:
        """Return the ids of a text in which nothing is special.

        Raises ValueError if the vocabulary has no other way to write it than as a special token.
        """
        ids = self._plain(text)
        taken = [token for token, i in self.special.items() if i in ids]
        if taken:
            raise ValueError(f"The prompt holds {', '.join(taken)}, which {self.source} can't read as text: remove it.")
        return ids

    @classmethod
    def _from_parts(cls, content: dict[str, Any], digest: "hashlib._Hash", source: str) -> "Tokenizer":
        # Without its added tokens, a tokenizer finds none in a text. Those of a template are put in by their ids.
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
        fast = fast_tokenizer({**content, "added_tokens": []})
        special = {token: added.get(token, fast.token_to_id(token)) for token in SPECIAL}
        missing = [token for token, i in special.items() if i is None]
        if missing:
            raise ValueError(
                f"{source} is not a tokenizer of Qwen2.5-VL: it lacks {', '.join(missing)}. Take that of"
                f" {HUB_REPOSITORY}."
            )
        return cls(
            lambda text: fast.encode(text, add_special_tokens=False).ids,
            special,
            size=max(fast.get_vocab_size(), *(i + 1 for i in (*special.values(), *added.values()))),
            identity=f"qwen-{digest.hexdigest()[:16]}",
            source=source,
        )


def _template(name: str, num_images: int) -> Template:
    if name not in TEMPLATES:
        raise ValueError(f"There is no template {name!r} of Qwen-Image: choose {', '.join(TEMPLATES)}.")
    template = TEMPLATES[name]
    if template.max_images == 0 and num_images:
        raise ValueError(f"The template {name} takes no images, {num_images} given: choose an edit model and template.")
    if template.max_images != 0 and not num_images:
        raise ValueError(f"The template {name} needs an image: connect one, or choose a text-to-image model.")
    if template.max_images and num_images > template.max_images:
        raise ValueError(
            f"The template {name} takes {template.max_images} image, {num_images} given: Qwen-Image-Edit-2509 and 2511"
            " take several."
        )
    return template


def _is_tokenizer(folder: Path) -> bool:
    parts = all((folder / name).is_file() for name in (VOCAB, MERGES)) and any((folder / n).is_file() for n in ADDED)
    return parts or (folder / FAST).is_file()


def _assemble(folder: Path, files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the tokenizer.json that says the same as the separate files of Qwen2's older tokenizer."""
    try:
        vocab = json.loads(files[VOCAB])
        lines = files[MERGES].decode("utf-8").replace("\r\n", "\n").split("\n")
        [[kind, content]] = [(name, json.loads(files[name])) for name in ADDED if name in files]
        if kind == ADDED[0]:
            added = {token["content"]: int(i) for i, token in content["added_tokens_decoder"].items()}
        else:
            added = dict(content)
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The tokenizer files in {folder} can't be read ({error!r:.120}): download {VOCAB}, {MERGES} and"
            f" {ADDED[0]} again."
        ) from error
    return _content(vocab, [line for line in lines if line and not line.startswith("#version")], added)


def _lacking(vocabulary: Vocabulary) -> str | None:
    """Return why a vocabulary does not make this tokenizer, None if it does."""
    if (vocabulary.kind, vocabulary.splitting) != ("gpt2", "qwen2"):
        found = f"{vocabulary.kind} {vocabulary.splitting or 'without a name'}"
        return f"it reads text in the way of {found}, expected gpt2 qwen2"
    return None if vocabulary.merges else "it has no merges"


def _from_vocabulary(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the tokenizer.json that says the same as a vocabulary."""
    by_type: dict[int, dict[str, int]] = {}
    for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        by_type.setdefault(kind, {})[token] = i
    added = by_type.get(CONTROL, {}) | by_type.get(USER_DEFINED, {})
    return _content(by_type.get(NORMAL, {}), list(vocabulary.merges), added)


def _content(vocab: Mapping[str, int], merges: list[str], added: Mapping[str, int]) -> dict[str, Any]:
    """Return a tokenizer.json of Qwen2's kind."""
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": token} for token, i in added.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
