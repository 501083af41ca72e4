"""Text as the Wan text encoder wants it: cleaned, cut into sentencepiece ids, closed with `</s>`, at most 512."""

import hashlib
import html
import importlib.util
import logging
import re
import struct
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from ..core.text import Reader, Tokens, download, fast_tokenizer, read_tokenizer_json
from ..core.types import Checkpoint
from ..core.weights.vocabulary import BYTE, UNKNOWN, Vocabulary, read_vocabulary
from .config import TEXT_LEN

log = logging.getLogger(__name__)

EOS_ID = 1  # `</s>` of every T5 vocabulary; the pad, 0, is never written because only valid tokens are run
EMBEDDED_NAME = "spiece_model"  # U8 tensor in ComfyUI's umt5 files: the bytes of spiece.model
HUB_REPOSITORY = "google/umt5-xxl"
HUB_REVISION = "66cb9e7e85526fe440a945569e42c72fb6cbc0ad"  # its main branch; has both spiece.model and tokenizer.json
SPIECE, FAST = "spiece.model", "tokenizer.json"
# Where a tokenizer lies, seen from the checkpoint's folder: beside it, in an official download, in a diffusers folder.
FOLDERS = (".", "google/umt5-xxl", "umt5-xxl", "tokenizer", "../tokenizer")


class Tokenizer:
    """Turn text into ids of the umT5 vocabulary. Make one with `from_spiece`, `from_folder`, `from_hub` or `find`.

    `size` is the number of pieces, `identity` tells one vocabulary from another, `source` says where it came from.
    """

    comfy_folder = None  # ComfyUI has no copy of this one outside its text encoder files

    def __init__(self, pieces: Callable[[str], list[int]], *, size: int, identity: str, source: str):
        self._pieces = pieces
        self.size, self.identity, self.source = size, identity, source

    @classmethod
    def from_spiece(cls, model: bytes, source: str = "the given bytes") -> "Tokenizer":
        """Read a sentencepiece model (the content of a `spiece.model` file).

        Raises ValueError if sentencepiece is not installed, or the bytes are no sentencepiece model of a T5.
        """
        if not has_sentencepiece():
            raise ValueError(f"The tokenizer in {source} needs the package sentencepiece: `pip install sentencepiece`.")
        import sentencepiece

        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"{source} holds no sentencepiece model ({len(model)} bytes): {error}") from error
        _check_eos(processor.eos_id(), source)
        identity = "spiece-" + hashlib.sha256(model).hexdigest()[:16]
        return cls(processor.encode, size=processor.get_piece_size(), identity=identity, source=source)

    @classmethod
    def from_fast(cls, path: Path) -> "Tokenizer":
        """Read a `tokenizer.json`; raises ValueError if it is none, or not one of a T5."""
        content = path.read_bytes()
        fast = fast_tokenizer(read_tokenizer_json(content, str(path)))
        _check_eos(fast.token_to_id("</s>"), str(path))
        identity = "fast-" + hashlib.sha256(content).hexdigest()[:16]
        return cls(
            lambda text: fast.encode(text, add_special_tokens=False).ids,
            size=fast.get_vocab_size(),
            identity=identity,
            source=str(path),
        )

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """Read a `spiece.model` or a `tokenizer.json`; raises ValueError if it is neither, or not one of a T5."""
        return cls.from_fast(path) if path.suffix == ".json" else cls.from_spiece(path.read_bytes(), str(path))

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read the tokenizer in a folder: `spiece.model`, or `tokenizer.json` where that or sentencepiece is missing.

        Raises ValueError if the folder has neither.
        """
        spiece, fast = folder / SPIECE, folder / FAST
        if spiece.is_file() and (has_sentencepiece() or not fast.is_file()):
            return cls.from_spiece(spiece.read_bytes(), str(spiece))
        if fast.is_file():
            return cls.from_fast(fast)
        raise ValueError(f"No tokenizer in {folder}: expected {SPIECE} or {FAST} there.")

    @classmethod
    def from_hub(cls, repository: str = HUB_REPOSITORY, revision: str = HUB_REVISION) -> "Tokenizer":
        """Download the tokenizer from the Hugging Face hub; call it only when the user asked for a download.

        `revision` is the full commit hash, so that the file can't change under us. Raises ValueError if it is not, or
        if the download fails.
        """
        path = download(repository, SPIECE if has_sentencepiece() else FAST, revision)
        return cls.from_folder(path.parent)

    @classmethod
    def find(cls, checkpoint: Checkpoint, read: Reader, further: Sequence[Path] = ()) -> "Tokenizer":
        """Return the tokenizer that came with a text encoder: inside the file, in a folder near it, or a `further` one.

        `read` is `core.weights.tensors.read_tensors`. Never downloads. Raises ValueError with the ways out.
        """
        if EMBEDDED_NAME in checkpoint.tensors and has_sentencepiece():
            [(_, spiece)] = read(checkpoint, [EMBEDDED_NAME])
            return cls.from_spiece(spiece.numpy().tobytes(), f"{checkpoint.path} ({EMBEDDED_NAME})")
        vocabulary = read_vocabulary(checkpoint)
        lacking = None if vocabulary is None else _lacking(vocabulary)
        if vocabulary is not None and lacking is None:
            return cls.from_spiece(spiece_of(vocabulary), vocabulary.source)
        home = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
        for folder in (*(home / name for name in FOLDERS), *further):
            if (folder / FAST).is_file() or (folder / SPIECE).is_file():
                return cls.from_folder(folder)
        if EMBEDDED_NAME in checkpoint.tensors:
            raise ValueError(
                f"{checkpoint.path} carries its tokenizer as a sentencepiece model, which needs the package"
                f" sentencepiece: `pip install sentencepiece`, or put the {FAST} of {HUB_REPOSITORY} next to the file."
            )
        carries = f"carries a tokenizer that can't be used ({lacking})" if lacking else "carries no tokenizer"
        raise ValueError(
            f"{checkpoint.path} {carries} and there is none near it ({SPIECE} or {FAST} in {home} or its"
            f" google/umt5-xxl). Either use ComfyUI's single file (umt5_xxl_*.safetensors), which carries one; or put"
            f" the {SPIECE} of {HUB_REPOSITORY} next to the file; or choose"
            " tokenizer: hub, which downloads it (--tokenizer hub on the command line)."
        )

    def __call__(self, text: str, max_tokens: int = TEXT_LEN) -> Tokens:
        """Return the ids of cleaned text, `</s>` always last; what does not fit is cut off, and the notice says so."""
        pieces = self._pieces(text)
        kept = pieces[: max_tokens - 1]
        cut = len(pieces) - len(kept)
        notice = f"The prompt has {len(pieces)} tokens and Wan reads {len(kept)}: the last {cut} were cut off."
        return Tokens(text=text, ids=(*kept, EOS_ID), notice=notice if cut else None)


def spiece_of(vocabulary: Vocabulary) -> bytes:
    """Return the sentencepiece model that a vocabulary with scores was made from.

    Format: protocol buffers, with the field numbers of sentencepiece_model.proto.
    """
    pieces = (
        _field(1, token.encode()) + _key(2, 5) + struct.pack("<f", score) + _field(3, kind)
        for token, score, kind in zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True)
    )
    unigram, falls_back = 1, int(BYTE in vocabulary.types)
    trainer = _field(3, unigram) + _field(4, len(vocabulary.tokens)) + _field(35, falls_back)
    normaliser = (
        _field(2, vocabulary.charsmap or b"")
        + _field(3, int(vocabulary.adds_space))
        + _field(4, int(vocabulary.strips_spaces))
        + _field(5, 1)  # spaces are written as U+2581
    )
    return b"".join(_field(1, piece) for piece in pieces) + _field(2, trainer) + _field(3, normaliser)


def _lacking(vocabulary: Vocabulary) -> str | None:
    """Return why a vocabulary does not make this tokenizer, None if it does."""
    if vocabulary.kind != "t5":
        return f"it is of the kind {vocabulary.kind}, expected t5"
    if not vocabulary.scores:
        return "it has no scores"
    if vocabulary.types.count(UNKNOWN) != 1:
        return "it has not one token for what is unknown"
    if vocabulary.charsmap is None:
        return "it lacks the table that makes characters alike, precompiled_charsmap"
    return None if has_sentencepiece() else "that needs the package sentencepiece: `pip install sentencepiece`"


def _field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return _key(number, 0) + _varint(value)
    return _key(number, 2) + _varint(len(value)) + value


def _key(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes((*found, value))


def has_sentencepiece() -> bool:
    """Say whether the optional package sentencepiece is installed."""
    return importlib.util.find_spec("sentencepiece") is not None


def text_cleaner() -> Callable[[str], str]:
    """Return the function that cleans prompts as for the training of Wan: `ftfy.fix_text`, HTML entities, white space.

    Without the optional package ftfy a smaller repair takes its place, and the log says so. Source: the "whitespace"
    cleaning of the official tokenizer wrapper.
    """
    if importlib.util.find_spec("ftfy") is None:
        log.warning("ftfy is not installed: prompts get a smaller clean-up (no repair of wrongly decoded text).")
        return lambda text: _clean(text, repair_text)
    import ftfy

    return lambda text: _clean(text, ftfy.fix_text)


def _clean(text: str, repair: Callable[[str], str]) -> str:
    return re.sub(r"\s+", " ", html.unescape(html.unescape(repair(text)))).strip()


def repair_text(text: str) -> str:
    """Do what `ftfy.fix_text` does, but for wrongly decoded text (mojibake) and terminal escapes.

    HTML entities (unless there is a `<`), full-width and half-width forms, typographic quotes, Latin ligatures,
    control characters and surrogates; NFC at the end. It matters: Chinese commas become ASCII ones.
    """
    if "<" not in text:
        text = html.unescape(text)
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").translate(_character_repairs())
    return unicodedata.normalize("NFC", text)


def _character_repairs() -> dict[int, str]:
    """Return the table of characters that are replaced or dropped one by one."""
    quotes = dict.fromkeys([0x02BC, *range(0x2018, 0x201C)], "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
    dropped = [*range(0x09), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]
    # Full-width ASCII, half-width kana and Hangul; Latin ligatures; digraph letters, which stand for two letters.
    forms = [
        0x3000,
        *range(0xFF01, 0xFFF0),
        *range(0xFB00, 0xFB07),
        0x132,
        0x133,
        *range(0x1C4, 0x1CD),
        *range(0x1F1, 0x1F4),
    ]
    table = {code: unicodedata.normalize("NFKC", chr(code)) for code in forms} | quotes | dict.fromkeys(dropped, "")
    return table | {0x0149: "'n", 0xFB05: "\u017ft"}  # the two where ftfy departs from NFKC


def _check_eos(found: int | None, source: str) -> None:
    if found != EOS_ID:
        raise ValueError(f"{source} is not a umT5 tokenizer: its `</s>` has id {found}, expected {EOS_ID}.")
