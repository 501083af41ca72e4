"""Cleaning, ids, truncation, and where a tokenizer is looked for."""

import io
import json
import logging
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from wanqwen.core.weights.reader import open_checkpoint
from wanqwen.core.weights.tensors import read_tensors
from wanqwen.core.weights.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, read_vocabulary
from wanqwen.wan import tokenizer as module
from wanqwen.wan.tokenizer import EMBEDDED_NAME, EOS_ID, Tokenizer, repair_text, spiece_of, text_cleaner

from ..gguf_files import write

# Of the official repository's shared configuration.
OFFICIAL_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
TEXTS = [
    OFFICIAL_NEGATIVE,
    "  A cat,\r\n\twalking   on  the \u2028grass. ",
    "“Curly” and ‘single’ quotes, l’été, naïve café",
    "cafe\u0301 decomposed, ﬁne ﬂow ﬀ, Ĳ ŉ Ǆ, ﬅop",
    "ＦＵＬＬ　ｗｉｄｔｈ！？（１２３）：；",
    "ﾊﾛｰ ﾜｰﾙﾄﾞ, 镜头晃动，《书名》、「引号」。……——",
    "fish &amp; chips &lt;b&gt; &quot;x&quot; &ldquo;y&rdquo; &amp;amp;",
    "a < b &ldquo;not here&rdquo;",
    "bell\x07 zero\u200bwidth \ufeffmark and 😀 emoji",
    "",
]
SENTENCES = [
    *(f"a {colour} {shape} moves {way}"
      for colour in ("red", "green", "blue") for shape in ("disc", "square", "star") for way in ("left", "up")),
    "红色的圆向左移动", "蓝色的方块向上移动",
]  # fmt: skip


@pytest.fixture(scope="session")
def spiece() -> bytes:
    return train_spiece()


def train_spiece(eos_id: int = EOS_ID) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, vocab_size=300, hard_vocab_limit=False,
        character_coverage=1.0, byte_fallback=True, pad_id=0, eos_id=eos_id, unk_id=2 if eos_id == 1 else 1, bos_id=-1,
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def write_fast(path: Path, spiece: bytes) -> None:
    """Write the tokenizer.json that says the same as a sentencepiece model."""
    import sentencepiece
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers

    pieces = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    fast = Fast(models.Unigram(vocab, unk_id=pieces.unk_id(), byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.save(str(path))


def write_checkpoint(folder: Path, spiece: bytes | None = None) -> Path:
    tensors = {"norm.weight": torch.ones(2)}
    if spiece is not None:
        tensors[EMBEDDED_NAME] = torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "umt5.safetensors")
    return folder / "umt5.safetensors"


def find(path: Path) -> Tokenizer:
    return Tokenizer.find(open_checkpoint(path), read_tensors)


@pytest.mark.parametrize("text", TEXTS)
def test_reduced_cleaning_equals_ftfy_on_common_text(text):
    ftfy = pytest.importorskip("ftfy")
    assert module._clean(text, repair_text) == module._clean(text, ftfy.fix_text)


def test_cleaning_makes_chinese_commas_ascii_and_collapses_space():
    clean = text_cleaner()
    assert clean(OFFICIAL_NEGATIVE) == OFFICIAL_NEGATIVE.replace("，", ",")
    assert clean(" a\r\n\u3000b &amp;amp; c ") == "a b & c"


def test_missing_ftfy_is_logged_and_replaced(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with caplog.at_level(logging.WARNING):
        clean = text_cleaner()
        assert clean(OFFICIAL_NEGATIVE) == OFFICIAL_NEGATIVE.replace("，", ",")
        clean("again")
    assert [record.message for record in caplog.records if "ftfy" in record.message] == [
        "ftfy is not installed: prompts get a smaller clean-up (no repair of wrongly decoded text)."
    ]


def test_ids_are_the_pieces_and_eos(spiece):
    import sentencepiece

    tokens = Tokenizer.from_spiece(spiece)("a red disc moves left")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=spiece).encode("a red disc moves left")
    assert tokens.ids == (*pieces, EOS_ID) and tokens.notice is None and 0 not in tokens.ids
    assert Tokenizer.from_spiece(spiece)("").ids == (EOS_ID,)


def test_truncation_keeps_eos_and_says_so(spiece):
    tokenizer = Tokenizer.from_spiece(spiece)
    num_pieces = len(tokenizer("red " * 10_000, 10**6).ids) - 1
    tokens = tokenizer("red " * 10_000)
    assert len(tokens.ids) == 512 and tokens.ids[-1] == EOS_ID and EOS_ID not in tokens.ids[:-1]
    assert tokens.notice == (
        f"The prompt has {num_pieces} tokens and Wan reads 511: the last {num_pieces - 511} were cut off."
    )
    full = tokenizer("red " * 10_000, num_pieces + 1)
    assert full.notice is None and len(full.ids) == num_pieces + 1


def test_embedded_tokenizer_goes_first(tmp_path, spiece):
    path = write_checkpoint(tmp_path, spiece)
    (tmp_path / "spiece.model").write_bytes(b"never read")
    found = find(path)
    assert EMBEDDED_NAME in found.source and found("a red disc").ids == Tokenizer.from_spiece(spiece)("a red disc").ids


@pytest.mark.parametrize("folder", [".", "google/umt5-xxl", "../tokenizer"])
@pytest.mark.parametrize("kind", ["spiece.model", "tokenizer.json"])
def test_tokenizer_is_found_near_the_file(tmp_path, spiece, folder, kind):
    path = write_checkpoint(tmp_path / "text_encoder")
    home = path.parent / folder
    home.mkdir(parents=True, exist_ok=True)
    if kind == "spiece.model":
        (home / kind).write_bytes(spiece)
    else:
        write_fast(home / kind, spiece)
    found = find(path)
    assert found("a red disc moves left").ids == Tokenizer.from_spiece(spiece)("a red disc moves left").ids
    assert found.size == Tokenizer.from_spiece(spiece).size


def test_without_sentencepiece_the_fast_tokenizer_serves(tmp_path, spiece, monkeypatch):
    path = write_checkpoint(tmp_path, spiece)
    expected = Tokenizer.from_spiece(spiece)("a red disc").ids
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match="pip install sentencepiece"):
        find(path)
    with pytest.raises(ValueError, match="pip install sentencepiece"):
        Tokenizer.from_spiece(spiece)
    monkeypatch.undo()
    write_fast(tmp_path / "tokenizer.json", spiece)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert find(path)("a red disc").ids == expected


def test_no_tokenizer_names_the_ways_out(tmp_path):
    with pytest.raises(ValueError, match=r"carries no tokenizer(.|\n)*single file(.|\n)*next to the file(.|\n)*hub"):
        find(write_checkpoint(tmp_path))


def test_other_tokenizers_and_garbage_are_refused(tmp_path, spiece):
    with pytest.raises(ValueError, match="not a umT5 tokenizer: its `</s>` has id 2, expected 1"):
        Tokenizer.from_spiece(train_spiece(eos_id=2))
    with pytest.raises(ValueError, match="no sentencepiece model"):
        Tokenizer.from_spiece(b"garbage" * 40)
    (tmp_path / "tokenizer.json").write_text("not json")
    with pytest.raises(ValueError, match="no tokenizer file"):
        Tokenizer.from_folder(tmp_path)
    write_fast(tmp_path / "tokenizer.json", spiece)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"][EOS_ID][0] = "<end>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has id None"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(ValueError, match="No tokenizer in"):
        Tokenizer.from_folder(tmp_path / "nowhere")


def test_one_file_is_read_by_its_ending(tmp_path, spiece):
    (tmp_path / "spiece.model").write_bytes(spiece)
    write_fast(tmp_path / "tokenizer.json", spiece)
    expected = Tokenizer.from_spiece(spiece)("a red disc").ids
    for name in ("spiece.model", "tokenizer.json"):
        assert Tokenizer.from_file(tmp_path / name)("a red disc").ids == expected


def test_hub_download_takes_the_pinned_commit_only(tmp_path, spiece, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repository, name, *, revision):
        asked.append((repository, name, revision))
        (tmp_path / name).write_bytes(spiece)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ValueError, match="full commit hash"):
        Tokenizer.from_hub(revision="main")
    assert asked == []
    assert Tokenizer.from_hub().size == Tokenizer.from_spiece(spiece).size
    assert asked == [("google/umt5-xxl", "spiece.model", module.HUB_REVISION)]


def test_a_failed_download_says_what_to_do(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ValueError, match=r"no network\. Put that file next to the text encoder"):
        Tokenizer.from_hub()


def parsed(message: bytes) -> dict[int, list[int | bytes]]:
    """Return the fields of a protocol buffer by number; numbers of four bytes as bytes."""
    found: dict[int, list[int | bytes]] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte, at = message[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            found.setdefault(number, []).append(varint())
        else:
            length = {2: varint, 5: lambda: 4, 1: lambda: 8}[wire_type]()
            found.setdefault(number, []).append(message[at : at + length])
            at += length
    return found


def gguf_facts(spiece: bytes) -> dict:
    """Return what llama.cpp's tools write of a sentencepiece model."""
    model = parsed(spiece)
    pieces = [parsed(piece) for piece in model[1]]
    [normaliser] = (parsed(field) for field in model[3])
    return {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece[1][0].decode() for piece in pieces],
        "tokenizer.ggml.scores": [struct.unpack("<f", piece[2][0])[0] for piece in pieces],
        "tokenizer.ggml.token_type": [piece.get(3, [NORMAL])[0] for piece in pieces],
        "tokenizer.ggml.precompiled_charsmap": list(normaliser[2][0]),
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.remove_extra_whitespaces": True,
    }


def write_gguf(path: Path, facts: dict) -> Path:
    return write(path, {"enc.output_norm.weight": torch.ones(32)}, facts, arch="t5encoder")


def test_the_tokenizer_of_a_gguf_file_is_the_one_it_was_made_from(tmp_path, spiece):
    facts = gguf_facts(spiece)
    assert {UNKNOWN, CONTROL, BYTE, NORMAL} <= set(facts["tokenizer.ggml.token_type"])
    own, original = find(write_gguf(tmp_path / "umt5.gguf", facts)), Tokenizer.from_spiece(spiece)
    assert own.source == f"{tmp_path / 'umt5.gguf'} (tokenizer.ggml.*)" and own.size == original.size
    texts = [*TEXTS, *SENTENCES, "</s> <unk> <pad> <0x41> \u2581x", "  two  spaces  ", "ﬃ Ⅷ ① ㍿", "\u200b"]
    assert [own(text).ids for text in texts] == [original(text).ids for text in texts]
    assert len({own(text).ids for text in texts}) > len(SENTENCES)


def test_the_sentencepiece_model_of_a_gguf_file_has_what_the_original_says(tmp_path, spiece):
    vocabulary = read_vocabulary(open_checkpoint(write_gguf(tmp_path / "umt5.gguf", gguf_facts(spiece))))
    made, original = parsed(spiece_of(vocabulary)), parsed(spiece)
    assert [parsed(p) | {3: parsed(p).get(3, [NORMAL])} for p in original[1]] == [parsed(p) for p in made[1]]
    assert parsed(made[3][0])[2] == parsed(original[3][0])[2]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokenizer.ggml.precompiled_charsmap": None}, "lacks the table .* precompiled_charsmap"),
        ({"tokenizer.ggml.precompiled_charsmap": ["A", "A"]}, "lacks the table .* precompiled_charsmap"),
        ({"tokenizer.ggml.scores": None}, "has no scores"),
        ({"tokenizer.ggml.token_type": None}, "has not one token for what is unknown"),
        ({"tokenizer.ggml.model": "llama"}, "of the kind llama, expected t5"),
    ],
)
def test_a_gguf_file_that_says_too_little_is_no_tokenizer(tmp_path, spiece, change, reason):
    facts = {key: value for key, value in (gguf_facts(spiece) | change).items() if value is not None}
    path = write_gguf(tmp_path / "umt5.gguf", facts)
    with pytest.raises(ValueError, match=rf"umt5\.gguf carries a tokenizer that can't be used \(it .*{reason}.*hub"):
        find(path)
    (tmp_path / "spiece.model").write_bytes(spiece)
    assert find(path).source == str(tmp_path / "spiece.model")


@pytest.mark.parametrize("change", [{"tokens": [1, 2]}, {"token_type": [1]}, {"scores": [0.5]}, {"tokens": None}])
def test_a_damaged_vocabulary_is_refused(tmp_path, spiece, change):
    facts = gguf_facts(spiece) | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    facts = {key: value for key, value in facts.items() if value is not None}
    with pytest.raises(ValueError, match=r"umt5\.gguf \(tokenizer.* can't be right: .*Download"):
        find(write_gguf(tmp_path / "umt5.gguf", facts))


def test_sentencepiece_is_asked_for_where_the_vocabulary_needs_it(tmp_path, spiece, monkeypatch):
    path = write_gguf(tmp_path / "umt5.gguf", gguf_facts(spiece))
    monkeypatch.setattr(module, "has_sentencepiece", lambda: False)
    with pytest.raises(ValueError, match="pip install sentencepiece"):
        find(path)
