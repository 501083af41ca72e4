"""What the transformer learns from is what the text encoder gives it afterwards, to the last token."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from wanqwen.core.weights.identity import METADATA_KEY
from wanqwen.demo.cards import corpus, recipe, text, train_text
from wanqwen.demo.cards.glyphs import GLYPHS
from wanqwen.loading import load_text_encoder
from wanqwen.qwen_image.tokenizer import EMBEDDED_NAME, Tokenizer

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer_json() -> bytes:
    return text.train_tokenizer()


def test_every_glyph_is_one_token_wherever_it_stands(tokenizer_json: bytes) -> None:
    tokenizer, rng = Tokenizer.from_json(tokenizer_json), random.Random(0)
    ids = {glyph: tokenizer.plain(glyph) for glyph in GLYPHS}
    assert {len(found) for found in ids.values()} == {1}
    for i in range(300):
        scene = corpus.draw_scene(rng, held_out=i % 2 == 0)
        found, wanted = tokenizer(scene.caption(rng, chinese=i % 3 == 0)).ids, [ids[glyph][0] for glyph in scene.word]
        assert any(list(found[j : j + len(wanted)]) == wanted for j in range(len(found))), scene


def test_rows_in_training_equal_those_of_the_text_encoder(tokenizer_json: bytes, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = text.VisionLanguage(Tokenizer.from_json(tokenizer_json)).requires_grad_(False)
    for parameter in model.parameters():  # norms and biases that do something
        if parameter.dim() == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    weights[EMBEDDED_NAME] = torch.frombuffer(bytearray(tokenizer_json), dtype=torch.uint8)
    save_file(weights, tmp_path / "encoder.safetensors", {METADATA_KEY: json.dumps(recipe.encoder_facts())})
    encoder = load_text_encoder(tmp_path / "encoder.safetensors", dtype=torch.float32, device="cpu")

    captions = ["the word 风7 in red, top left, on a white card", " ", "白色卡片的左上角写着红色的风7A"]
    check(model(captions), [row.text for row in encoder.encode(captions)])
    rng, instructions = random.Random(0), ["make the text green", " ", "把卡片改成黑色"]
    scenes = [corpus.draw_scene(rng, held_out=True) for _ in instructions]
    pictures = corpus.render(scenes, [corpus.draw_setting(rng) for _ in scenes]).movedim(1, -1) / 2 + 0.5
    rows = [
        encoder.encode_edit([words], [picture], "edit")[0].text
        for words, picture in zip(instructions, pictures, strict=True)
    ]
    check(model(instructions, torch.stack([text.seen(picture) for picture in pictures])), rows)


def check(trained: tuple[torch.Tensor, torch.Tensor], wanted: list[torch.Tensor]) -> None:
    rows, valid = trained
    for row, is_kept, expected in zip(rows, valid, wanted, strict=True):
        assert row[is_kept].shape == expected[0].shape
        assert (row[is_kept] - expected[0]).abs().max() <= 1e-4


def test_what_the_text_encoder_learns_to_read_is_where_and_what_the_caption_says(tokenizer_json: bytes) -> None:
    reader, rng = train_text.Reader(Tokenizer.from_json(tokenizer_json)), random.Random(0)
    prompts, answers, seen = train_text.batch("t2i", rng, None)
    _, glyphs, slots = reader.glyph_rows(prompts)
    words = "".join(GLYPHS[glyph] for glyph in glyphs)
    starts = [i for i, slot in enumerate(slots.tolist()) if slot == 0] + [len(words)]
    for prompt, start, end, length in zip(prompts, starts[:-1], starts[1:], answers["length"].tolist(), strict=True):
        assert words[start:end] in prompt and end - start == length + 1
    assert seen is None and set(answers) == set(train_text.QUESTIONS["t2i"])
    loss, right = reader("t2i", prompts, answers, seen)
    loss.backward()
    assert len(right) == len(answers) + 2 and reader.text_encoder.model.embed_tokens.weight.grad.abs().max() > 0
