"""Qwen2.5-VL: the mathematics written out a second time, transformers itself, pictures, files, caching, streaming."""
# L tokens, E width, P patches, N heads, D head width

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import __version__ as transformers_version
from wanqwen.core import host
from wanqwen.core.memory.trace import peak_bytes
from wanqwen.core.ops import formats
from wanqwen.core.text import EmbeddingCache, Footprint, Part, Placement
from wanqwen.core.weights.reader import open_checkpoint
from wanqwen.loading import load_text_encoder
from wanqwen.qwen_image import text_encoder as module
from wanqwen.qwen_image.identify import identify
from wanqwen.qwen_image.images import dims, vision_patches, vision_size
from wanqwen.qwen_image.text_encoder import TextEncoder, needed_to_read, needed_to_see, positions
from wanqwen.qwen_image.tokenizer import IMAGE_PAD, VISION_START, Tokenizer
from wanqwen.qwen_image.vl_config import VisionConfig, VLConfig

from ..core.memory.conftest import cuda_runtime  # noqa: F401 - a fixture
from ..core.stand_in import StandIn, limits, nothing_is_left, record_reads, rest, stand_in
from ..manifests import manifest
from .test_tokenizer import tiny_tokenizer

TOLERANCE = 2e-5  # max |out - ref| / max |ref|, float32
CPU = torch.device("cpu")
PROMPTS = ["a red 风 on a white card", "the text 7, bottom right"]
CONFIG = VLConfig(
    hidden=48, intermediate=64, num_layers=3, num_heads=6, num_kv_heads=2, vocab_size=700, mrope_section=(1, 1, 2),
    rope_theta=1e5, max_pixels=160 * 160,
    vision=VisionConfig(
        depth=3, hidden=32, intermediate=40, num_heads=4, out_hidden=48, window=56, full_attention=(1,)
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_json(tiny_tokenizer())


def parts_of(config: VLConfig) -> dict[str, torch.nn.Module]:
    return {module.LANGUAGE: module.build_language(config), module.VISION: module.build_vision(config.vision)}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    parts = parts_of(CONFIG)
    generator, made = torch.Generator().manual_seed(0), {}
    for prefix, part in parts.items():
        for name, tensor in part.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            is_norm = "norm" in name or "ln_q" in name
            made[prefix + name] = 1 + 0.2 * noise if is_norm else noise * 0.7 / tensor[0].numel() ** 0.5
    return made


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(size, generator=generator) for size in ((90, 150, 3), (64, 64, 3))]


METADATA = {
    "wanqwen": json.dumps(
        {"num_heads": CONFIG.num_heads, "num_kv_heads": CONFIG.num_kv_heads, "mrope_section": CONFIG.mrope_section,
         "rope_theta": CONFIG.rope_theta, "max_pixels": CONFIG.max_pixels, "vision_heads": CONFIG.vision.num_heads,
         "window": CONFIG.vision.window, "full_attention": CONFIG.vision.full_attention}
    )
}  # fmt: skip


def make_encoder(path: Path, tokenizer: Tokenizer, **options) -> TextEncoder:
    checkpoint = open_checkpoint(path)
    return TextEncoder(checkpoint, identify(checkpoint), tokenizer, **options)


def save(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, METADATA)
    return path


@pytest.fixture
def official(tmp_path, weights) -> Path:
    return save(weights, tmp_path / "official.safetensors")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, cuda_runtime: object) -> StandIn:  # noqa: F811
    return stand_in(monkeypatch)


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def rows_of(encoder: TextEncoder, images: list[Tensor], placement: Placement | None = None) -> list[Tensor]:
    conditionings = encoder.encode_edit(PROMPTS, images, "edit-plus", placement)
    return [conditioning.text for conditioning in conditionings]


# The published mathematics once more: no transformers, no code of ours.


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turn(x_NLD: Tensor, angles_LP: Tensor) -> Tensor:
    first, second = x_NLD.chunk(2, -1)
    cos, sin = angles_LP.cos(), angles_LP.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def attend(q_NLD: Tensor, k_NLD: Tensor, v_NLD: Tensor, allowed_LL: Tensor) -> Tensor:
    scores = q_NLD @ k_NLD.transpose(1, 2) / q_NLD.shape[-1] ** 0.5
    out_NLD = scores.masked_fill(~allowed_LL, float("-inf")).softmax(-1) @ v_NLD
    return out_NLD.transpose(0, 1).flatten(1)


def gated_mlp(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    gate = F.silu(linear(weights, f"{name}.gate_proj", x)) * linear(weights, f"{name}.up_proj", x)
    return linear(weights, f"{name}.down_proj", gate)


def spec_language(weights: dict[str, Tensor], x_LE: Tensor, positions_3L: Tensor) -> Tensor:
    length, heads, groups, pairs = len(x_LE), CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.head_width // 2
    time, height, _ = CONFIG.mrope_section
    axis = [0 if j < time else 1 if j < time + height else 2 for j in range(pairs)]
    frequencies = torch.tensor([CONFIG.rope_theta ** (-2 * j / CONFIG.head_width) for j in range(pairs)])
    angles_LP = positions_3L[axis].T * frequencies
    causal_LL = torch.ones(length, length).tril().bool()
    for i in range(CONFIG.num_layers):
        layer = f"model.layers.{i}"
        normed = rms(x_LE, weights[f"{layer}.input_layernorm.weight"])
        q, k, v = (
            linear(weights, f"{layer}.self_attn.{n}_proj", normed).unflatten(1, (-1, 2 * pairs)).transpose(0, 1)
            for n in "qkv"
        )
        k, v = (t.repeat_interleave(heads // groups, 0) for t in (turn(k, angles_LP), v))
        x_LE = x_LE + linear(weights, f"{layer}.self_attn.o_proj", attend(turn(q, angles_LP), k, v, causal_LL))
        normed = rms(x_LE, weights[f"{layer}.post_attention_layernorm.weight"])
        x_LE = x_LE + gated_mlp(weights, f"{layer}.mlp", normed)
    return rms(x_LE, weights["model.norm.weight"])


def spec_vision(weights: dict[str, Tensor], image_HWC: Tensor) -> Tensor:
    """Run the tower over patches in raster order, windows being a mask; `image_HWC` is normalised."""
    vision = CONFIG.vision
    rows, columns = image_HWC.shape[0] // 14, image_HWC.shape[1] // 14
    row, column = (t.flatten() for t in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    kernel = weights["visual.patch_embed.proj.weight"].sum(2)  # both frames of a still picture are the same
    x_PE = F.conv2d(image_HWC.permute(2, 0, 1)[None], kernel, stride=14)[0].flatten(1).T
    head = vision.hidden // vision.num_heads
    frequencies = torch.tensor([10000 ** (-2 * j / (head / 2)) for j in range(head // 4)])
    angles = torch.cat((row[:, None] * frequencies, column[:, None] * frequencies), 1)
    side = vision.window // 14
    window = (row // side) * 1000 + column // side
    for i in range(vision.depth):
        block = f"visual.blocks.{i}"
        qkv = linear(weights, f"{block}.attn.qkv", rms(x_PE, weights[f"{block}.norm1.weight"]))
        q, k, v = (t.transpose(0, 1) for t in qkv.unflatten(1, (3, vision.num_heads, head)).unbind(1))
        allowed = window[:, None] == window if i not in vision.full_attention else torch.tensor(True)
        x_PE = x_PE + linear(weights, f"{block}.attn.proj", attend(turn(q, angles), turn(k, angles), v, allowed))
        x_PE = x_PE + gated_mlp(weights, f"{block}.mlp", rms(x_PE, weights[f"{block}.norm2.weight"]))
    merged = rms(x_PE, weights["visual.merger.ln_q.weight"]).view(rows // 2, 2, columns // 2, 2, -1)
    merged = merged.transpose(1, 2).reshape(rows * columns // 4, -1)
    return linear(weights, "visual.merger.mlp.2", F.gelu(linear(weights, "visual.merger.mlp.0", merged)))


def normalised(patches: Tensor, width: int, height: int) -> Tensor:
    """Put patches of the vision tower together again as a picture [H, W, 3]."""
    cells = patches.view(height // 28, width // 28, 2, 2, 3, 2, 14, 14)[..., 0, :, :]
    return cells.permute(0, 2, 5, 1, 3, 6, 4).reshape(height, width, 3)


def spec_edit(weights: dict[str, Tensor], encoder: TextEncoder, prompt: str, images: list[Tensor]) -> Tensor:
    """Encode an "edit-plus" prompt the plain way."""
    seen, cells = [], []
    for image in images:
        size = vision_size(*dims(CONFIG.max_pixels, image.shape[1] / image.shape[0]), CONFIG)
        seen.append(spec_vision(weights, normalised(vision_patches(image, 384 * 384, CONFIG), *size)))
        cells.append((size[1] // 28, size[0] // 28))
    tokens = encoder.tokenizer(prompt, "edit-plus", [h * w for h, w in cells])
    ids = torch.tensor(tokens.prefix + tokens.ids)
    x_LE = weights["model.embed_tokens.weight"][ids]
    is_pad = ids == encoder.tokenizer.special[IMAGE_PAD]
    x_LE[is_pad] = torch.cat(seen)
    place, following, positions_3L, pads = 0, 0, torch.zeros(3, len(ids)), list(cells)
    while place < len(ids):
        if not is_pad[place]:
            positions_3L[:, place] = following
            place, following = place + 1, following + 1
            continue
        h, w = pads.pop(0)
        for y in range(h):
            for x in range(w):
                positions_3L[:, place] = torch.tensor([following, following + y, following + x])
                place += 1
        following += max(h, w)
    return spec_language(weights, x_LE, positions_3L)[len(tokens.prefix) :][None]


def test_text_equals_the_formulas(official, weights, tokenizer):
    for conditioning, prompt in zip(make_encoder(official, tokenizer).encode(PROMPTS), PROMPTS, strict=True):
        tokens = tokenizer(prompt)
        ids = torch.tensor(tokens.prefix + tokens.ids)
        expected = spec_language(
            weights, weights["model.embed_tokens.weight"][ids], torch.arange(len(ids)).expand(3, -1)
        )
        rows = conditioning.text
        assert rows.shape == (1, len(tokens.ids), CONFIG.hidden) and not rows.requires_grad
        assert rows.dtype == torch.float32 and rows.device == CPU
        assert relative_error(rows[0], expected[len(tokens.prefix) :]) <= TOLERANCE


def test_vision_tower_equals_the_formulas(official, weights, tokenizer):
    encoder = make_encoder(official, tokenizer)
    image = torch.rand(140, 196, 3, generator=torch.Generator().manual_seed(3))  # 5 x 7 cells in windows of 2 x 2
    tower = encoder._load(module.VISION, torch.float32)
    with torch.no_grad(), tower.on(Placement(), lambda: 0) as run:
        found = run(module.pictures.cut(image, CONFIG.vision), torch.tensor([[1, 10, 14]]))
    assert relative_error(found, spec_vision(weights, image)) <= TOLERANCE


@pytest.mark.parametrize("count", [1, 2])
def test_edit_equals_the_formulas(official, weights, tokenizer, images, count):
    encoder = make_encoder(official, tokenizer)
    for rows, prompt in zip(rows_of(encoder, images[:count]), PROMPTS, strict=True):
        assert relative_error(rows, spec_edit(weights, encoder, prompt, images[:count])) <= TOLERANCE


def theirs(weights: dict[str, Tensor], tokenizer: Tokenizer):
    """Return transformers' own whole model with these weights, and its function for positions."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    language, vision = module.build_language(CONFIG).config.to_dict(), module.build_vision(CONFIG.vision).config
    for name in ("vision_config", "model_type", "architectures", "transformers_version", "tie_word_embeddings"):
        language.pop(name, None)
    ids = {"image_token_id": tokenizer.special[IMAGE_PAD], "vision_start_token_id": tokenizer.special[VISION_START]}
    ids["video_token_id"] = CONFIG.vocab_size - 1  # never used, but asked for
    is_nested = "text_config" in Qwen2_5_VLConfig().to_dict()  # since 4.52
    text = {"text_config": language} if is_nested else language
    config = Qwen2_5_VLConfig(**text, **ids, vision_config=vision.to_dict(), tie_word_embeddings=False)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    renamed = {"lm_head.weight": weights["model.embed_tokens.weight"]}
    for name, tensor in weights.items():
        part = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else f"model.{name}"
        renamed[part if is_nested else name] = tensor
    model.load_state_dict(renamed, strict=True)
    return model, (model.model if is_nested else model).get_rope_index


def wants_kinds(get_rope_index: Callable) -> bool:
    """Say whether transformers (since 5) gives pictures the positions of text, unless told the kinds of tokens."""
    return "mm_token_type_ids" in signature(get_rope_index).parameters


def test_edit_equals_transformers_own_model(official, weights, tokenizer, images):
    model, get_rope_index = theirs(weights, tokenizer)
    encoder = make_encoder(official, tokenizer)
    shown = [encoder._picture(image, 384 * 384) for image in images]
    tokens = tokenizer(PROMPTS[0], "edit-plus", [p.cells[0] * p.cells[1] for p in shown])
    ids = torch.tensor([tokens.prefix + tokens.ids])
    kinds = {"mm_token_type_ids": (ids == tokenizer.special[IMAGE_PAD]).int()} if wants_kinds(get_rope_index) else {}
    with torch.no_grad():
        out = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True,
            pixel_values=torch.cat([vision_patches(p.image_HWC, p.area, CONFIG) for p in shown]),
            image_grid_thw=torch.tensor([[1, p.cells[0] * 2, p.cells[1] * 2] for p in shown]), **kinds,
        )  # fmt: skip
    expected = out.hidden_states[-1][:, len(tokens.prefix) :]
    assert relative_error(rows_of(encoder, images)[0], expected) <= TOLERANCE


@pytest.mark.parametrize("cells", [[(3, 5)], [(7, 2), (1, 1), (4, 4)]])
def test_positions_equal_transformers(weights, tokenizer, cells):
    _, get_rope_index = theirs(weights, tokenizer)
    pad = tokenizer.special[IMAGE_PAD]
    tokens = tokenizer("some text", "edit-plus", [h * w for h, w in cells])
    ids = torch.tensor([tokens.prefix + tokens.ids])
    grids = torch.tensor([[1, 2 * h, 2 * w] for h, w in cells])
    kinds = [(ids == pad).int()] if wants_kinds(get_rope_index) else []
    expected, _ = get_rope_index(ids, *kinds, grids)
    assert torch.equal(positions(ids[0].tolist(), pad, cells), expected[:, 0])


def test_positions_of_text_count_on():
    assert torch.equal(positions([4, 5, 6], 9, []), torch.arange(3).expand(3, 3))


def test_published_rotation_is_what_the_model_turns_by():
    model = module.build_language(replace(VLConfig(), num_layers=1, vocab_size=8))
    expected = 1e6 ** (-2 * torch.arange(64).double() / 128)
    assert (model.rotary_emb.inv_freq / expected - 1).abs().max() < 1e-6 and model.rotary_emb.inv_freq.device == CPU
    vision = module.build_vision(replace(VisionConfig(), depth=1, full_attention=()))
    expected = 10000 ** (-2 * torch.arange(20).double() / 40)
    assert (vision.rotary_pos_emb.inv_freq / expected - 1).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["qwen_diffusers_text_encoder", "qwen_comfy_qwen_2.5_vl_7b_bf16"])
def test_published_files_hold_exactly_these_weights(name):
    listed = {key: shape for key, (_, shape) in manifest(name)["tensors"].items()}
    assert listed.pop("lm_head.weight") == [152064, 3584]  # never run, never read
    expected = {
        prefix + key: list(tensor.shape)
        for prefix, part in parts_of(VLConfig()).items()
        for key, tensor in part.state_dict().items()
    }
    assert listed == expected


def test_weights_are_read_at_the_first_new_prompt_only(official, tokenizer, images, monkeypatch):
    read, runs = record_reads(monkeypatch), []
    original = module._Language.forward
    monkeypatch.setattr(module._Language, "forward", lambda self, *x: (runs.append(1), original(self, *x))[1])
    cache = EmbeddingCache()
    encoder = make_encoder(official, tokenizer, cache=cache)
    encoder.tokenise(PROMPTS[0])
    encoder.footprints(30, [(2, 3)])
    assert read == [] and not runs.clear()
    encoder.encode(PROMPTS)
    assert len(runs) == 2 and read and not any(name.startswith("visual.") for name in read)
    encoder.encode([*PROMPTS, PROMPTS[0]])
    assert len(runs) == 2
    first = rows_of(encoder, images)
    assert len(runs) == 4 and sorted(read) == sorted(encoder.identity.names.values())
    again = rows_of(encoder, [image.clone() for image in images])
    assert len(runs) == 4 and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    read.clear()  # the same file opened once more, with the cache that is still there
    rows_of(make_encoder(official, tokenizer, cache=cache), images)
    assert read == [] and len(runs) == 4
    make_encoder(official, tokenizer, dtype=torch.bfloat16, cache=cache).encode(PROMPTS[:1])
    assert len(runs) == 5


def test_other_pictures_templates_and_orders_are_other_prompts(official, tokenizer, images):
    encoder = make_encoder(official, tokenizer)
    one = encoder.encode_edit(PROMPTS[:1], images[:1], "edit")[0].text
    changed = images[0].clone()
    changed[3, 4] = 1 - changed[3, 4]
    others = [
        encoder.encode(PROMPTS[:1])[0].text,
        encoder.encode_edit(PROMPTS[:1], images[:1], "edit-plus")[0].text,
        encoder.encode_edit(PROMPTS[:1], [changed], "edit")[0].text,
        encoder.encode_edit(PROMPTS[:1], images, "edit-plus")[0].text,
        encoder.encode_edit(PROMPTS[:1], images[::-1], "edit-plus")[0].text,
        encoder.encode_edit(PROMPTS[:1], [images[0].flatten().view(images[0].shape[::-1]).view(150, 90, 3)], "edit")[
            0
        ].text,
    ]
    for other in others:
        assert other.shape != one.shape or not torch.equal(other, one)


def test_a_picture_is_looked_at_once_for_both_prompts(official, tokenizer, images, monkeypatch):
    runs, original = [], module._Tower.forward
    monkeypatch.setattr(module._Tower, "forward", lambda self, *x: (runs.append(1), original(self, *x))[1])
    rows_of(make_encoder(official, tokenizer), [images[0], images[1], images[0]])
    assert len(runs) == 2


def test_alpha_is_dropped_and_logged(official, tokenizer, images, caplog):
    encoder = make_encoder(official, tokenizer)
    expected = encoder.encode_edit(PROMPTS[:1], images[:1], "edit")[0].text
    with caplog.at_level(logging.WARNING):
        rgba = torch.cat((images[0], torch.rand(90, 150, 1)), dim=2)
        assert torch.equal(encoder.encode_edit(PROMPTS[:1], [rgba], "edit")[0].text, expected)
    assert any("transparency was dropped" in record.message for record in caplog.records)


def quantise(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a scaled fp8 file of the weights as ComfyUI's is, and the weights that it stands for."""
    stored, meant = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in weights.items():
        if tensor.dim() == 2 and "embed" not in name:
            scale = tensor.abs().max() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[name.replace(".weight", ".scale_weight")] = scale
            stored[name.replace(".weight", ".scale_input")] = torch.ones(())
            meant[name] = formats.dequantise(stored[name], scale, torch.float32)
        else:
            stored[name] = tensor.bfloat16()
            meant[name] = stored[name].float()
    return stored, meant


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_fp8_equals_the_dequantised_weights(tmp_path, weights, tokenizer, images, dtype):
    stored, meant = quantise(weights)
    scaled = make_encoder(save(stored, tmp_path / "fp8.safetensors"), tokenizer, dtype=dtype)
    plain = make_encoder(save(meant, tmp_path / "meant.safetensors"), tokenizer, dtype=dtype)
    assert scaled.identity.weight_format == "fp8_scaled"
    for found, expected in zip(rows_of(scaled, images), rows_of(plain, images), strict=True):
        assert torch.equal(found, expected)


def test_every_spelling_gives_the_same_rows(tmp_path, official, weights, tokenizer, images):
    expected = rows_of(make_encoder(official, tokenizer), images)
    new = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else f"model.{name}": tensor
        for name, tensor in weights.items()
    }
    head = {"lm_head.weight": torch.zeros(CONFIG.vocab_size, CONFIG.hidden)}
    for tensors in (new | head, weights | head):
        found = rows_of(make_encoder(save(tensors, tmp_path / "other.safetensors"), tokenizer), images)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_bfloat16_is_near_float32(official, tokenizer, images):
    encoder = make_encoder(official, tokenizer, dtype=torch.bfloat16)
    exact = rows_of(make_encoder(official, tokenizer), images)
    for found, expected in zip(rows_of(encoder, images), exact, strict=True):
        error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert 0 < error < 5e-2
    parts = encoder._held.values()
    assert {p.dtype for part in parts for p in part.loaded.module.parameters()} == {torch.bfloat16}
    assert {b.dtype for part in parts for b in part.loaded.module.buffers()} == {torch.float32}


def stored(weights: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return the weights as a file of this kind holds them."""
    if kind == "fp8 scaled":
        return quantise(weights)[0]
    return {name: tensor.to(getattr(torch, kind)) for name, tensor in weights.items()}


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "fp8 scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_that_stay_or_stream_give_the_rows_of_a_run_in_ram(
    tmp_path, weights, tokenizer, images, device, monkeypatch, kind, dtype
):
    # What is computed must not hide that the weights don't fit.
    monkeypatch.setattr(module, "language_bytes", lambda config, dtype, num: 1000)
    monkeypatch.setattr(module, "vision_bytes", lambda config, dtype, cells: 1000)
    path = save(stored(weights, kind), tmp_path / "stored.safetensors")
    encoder = make_encoder(path, tokenizer, dtype=dtype, cache=EmbeddingCache(max_bytes=0))
    parts, rows = {prefix: encoder._load(prefix, dtype) for prefix in (module.VISION, module.LANGUAGE)}, []
    least = max(footprint_of(part).streamed(1) for part in parts.values())
    for prefix, part in parts.items():
        for limit, (num_streaming, num_slots) in limits(part, 1000).items():
            if limit < least:
                continue  # the other part would not run in that
            rows.append(rows_of(encoder, images, Placement(max_vram_bytes=limit)))
            plan = device.plans[-2 if prefix == module.VISION else -1]
            assert (len(plan.streaming), plan.num_slots) == (num_streaming, num_slots)
            for held in encoder._held.values():
                assert all(p.is_meta for p in held.loaded.module.parameters()) and nothing_is_left(held)
            device.spoil()
    assert {len(plan.streaming) for plan in device.plans} == {0, 3} and {p.num_slots for p in device.plans} == {0, 1, 2}
    with torch.inference_mode():  # as ComfyUI runs its nodes
        rows.append(rows_of(encoder, images, Placement(max_vram_bytes=least)))
    monkeypatch.undo()
    rows += [rows_of(encoder, images), rows_of(make_encoder(path, tokenizer, dtype=dtype), images)]
    for found in rows:
        assert all(torch.equal(a, b) for a, b in zip(found, rows[0], strict=True))


def footprint_of(part: Part) -> Footprint:
    *blocks, others = (layout.nbytes for layout in part.loaded.layouts())
    return Footprint(blocks=tuple(blocks), others=others, working=1000)


def test_a_stop_in_the_middle_leaves_the_encoder_usable(official, tokenizer, images, device, monkeypatch):
    encoder = make_encoder(official, tokenizer, cache=EmbeddingCache(max_bytes=0))
    expected, asked = rows_of(encoder, images), []
    before = {key: rest(part) for key, part in encoder._held.items()}

    def interrupt() -> None:
        asked.append(1)
        if len(asked) == failing:
            raise InterruptedError

    monkeypatch.setattr(host, "check_interrupt", interrupt)
    for failing in (2, 9):  # noqa: B007 - in the tower; in the language model, after two pictures through three blocks
        asked.clear()
        with pytest.raises(InterruptedError):
            rows_of(encoder, images)
        assert {key: rest(part) for key, part in encoder._held.items()} == before
        assert all(nothing_is_left(part) for part in encoder._held.values())
    failing = 0
    assert all(torch.equal(a, b) for a, b in zip(rows_of(encoder, images), expected, strict=True))


def test_too_little_memory_is_said_before_anything_moves(official, tokenizer, images, device):
    encoder = make_encoder(official, tokenizer)
    with pytest.raises(ValueError, match=r"The text encoder can't run in 1000 bytes .* or run it on the CPU"):
        encoder.encode(PROMPTS, Placement(max_vram_bytes=1000))
    with pytest.raises(ValueError, match=r"text encoder's vision tower can't run in 1000 bytes"):
        rows_of(encoder, images, Placement(max_vram_bytes=1000))
    assert not device.links and len(encoder.encode(PROMPTS, Placement())) == 2


def test_the_published_model_streams_within_two_gigabytes():
    width, height = vision_size(1024, 1024, VLConfig())
    cells = (height // 28, width // 28)
    seeing = needed_to_see(VLConfig(), torch.bfloat16, cells)
    # Before 4.52 the tower attends to all patches under a mask with which PyTorch may hold all scores.
    holds_scores = tuple(int(part) for part in transformers_version.split(".")[:2]) < (4, 52)
    for footprint, limit in (
        (needed_to_read(VLConfig(), torch.bfloat16, 1024), 2 << 30),
        (needed_to_read(VLConfig(), torch.bfloat16, 1024 + cells[0] * cells[1]), 2 << 30),
        (seeing, 5 << 30 if holds_scores else 2 << 30),
    ):
        work, peak = (size / 2**20 for size in (footprint.working, footprint.streamed(2)))
        print(f"{work:.0f} MiB beside the weights, {peak:.0f} with two slots")
        assert footprint.streamed(2) < limit


def test_footprints_are_those_of_the_loaded_parts(official, tokenizer):
    encoder = make_encoder(official, tokenizer)
    for prefix, footprint in zip((module.LANGUAGE, module.VISION), encoder.footprints(30, [(2, 3)]), strict=True):
        sizes = footprint_of(encoder._load(prefix, torch.float32))
        assert replace(footprint, working=1000) == sizes and footprint.working > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cells", [(1, 1), (5, 7), (8, 8)])
def test_the_work_space_is_what_a_run_takes(official, tokenizer, dtype, cells, monkeypatch):
    encoder = make_encoder(official, tokenizer, dtype=dtype)
    num_tokens, grid = cells[0] * cells[1] + 20, torch.tensor([[1, 2 * cells[0], 2 * cells[1]]])
    inputs = {
        module.LANGUAGE: (
            torch.rand(1, num_tokens, CONFIG.hidden).to(dtype),
            torch.arange(num_tokens).expand(3, 1, -1),
        ),
        module.VISION: (torch.rand(4 * cells[0] * cells[1], 1176).to(dtype), grid),
    }
    for (prefix, given), footprint in zip(inputs.items(), encoder.footprints(num_tokens, [cells]), strict=True):
        copies, attend = [0], F.scaled_dot_product_attention

        def noted(*args: Tensor, copies=copies, attend=attend, **options) -> Tensor:
            mask = (*args, options.get("attn_mask"))[3]
            if mask is not None:  # devices may copy it, as numbers, its rows filled up to 8
                copies.append(mask[..., 0].numel() * (mask.shape[-1] + 7) * dtype.itemsize)
            return attend(*args, **options)

        with monkeypatch.context() as patch, encoder._load(prefix, dtype).on(Placement(), lambda: 0) as run:
            patch.setattr(F, "scaled_dot_product_attention", noted)
            measured = peak_bytes(lambda run=run, given=given: run(*(tensor.clone() for tensor in given)))
        assert measured <= footprint.working <= 1.05 * measured + max(copies)


def test_an_empty_prompt_is_the_end_of_the_template(official, tokenizer):
    rows = make_encoder(official, tokenizer).encode(["", " "])
    assert rows[0].text.shape[1] == len(tokenizer("").ids) == rows[1].text.shape[1] - 1


def test_a_long_prompt_is_cut_with_a_notice(official, tokenizer, caplog):
    encoder = make_encoder(official, tokenizer)
    with caplog.at_level(logging.WARNING):
        [conditioning] = encoder.encode(["red " * 2000])
    assert conditioning.text.shape[1] == 1024 + len(tokenizer("").ids)
    assert any("were cut off" in record.message for record in caplog.records)


def test_a_text_only_file_writes_but_does_not_see(tmp_path, official, weights, tokenizer, images):
    language = {name: tensor for name, tensor in weights.items() if name.startswith(module.LANGUAGE)}
    encoder = make_encoder(save(language, tmp_path / "language.safetensors"), tokenizer)
    expected = make_encoder(official, tokenizer).encode(PROMPTS)
    for found, whole in zip(encoder.encode(PROMPTS), expected, strict=True):
        assert torch.equal(found.text, whole.text)
    with pytest.raises(ValueError, match=r"no vision tower .* use a whole Qwen2\.5-VL-7B"):
        encoder.encode_edit(PROMPTS, images[:1], "edit")


def test_what_no_edit_takes_is_refused_unread(official, tokenizer, images, monkeypatch):
    encoder, read = make_encoder(official, tokenizer), record_reads(monkeypatch)
    for shown, template, complaint in (
        ([], "edit", "needs an image"),
        (images, "edit", "takes 1 image, 2 given"),
        (images, "t2i", "no template 't2i' for edits"),
        ([torch.rand(16, 4096, 3)], "edit", "sides of 256:1"),
        ([torch.rand(1, 8, 8, 3)], "edit", r"must be \[height, width, 3\]"),
    ):
        with pytest.raises(ValueError, match=complaint):
            encoder.encode_edit(PROMPTS, shown, template)
    assert read == []


def test_loading_finds_family_and_tokenizer(tmp_path, weights, official, tokenizer, monkeypatch):
    embedded = {"tokenizer_json": torch.frombuffer(bytearray(tiny_tokenizer()), dtype=torch.uint8)}
    path = save(weights | embedded, tmp_path / "whole.safetensors")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(tiny_tokenizer())
    expected = make_encoder(official, tokenizer).encode(PROMPTS)
    for encoder in (
        load_text_encoder(path, device="cpu", family="qwen-image"),
        load_text_encoder(official, device="cpu", tokenizer=folder),
        load_text_encoder(official, device="cpu", tokenizer=folder / "tokenizer.json"),
    ):
        assert isinstance(encoder, TextEncoder)
        assert all(torch.equal(a.text, b.text) for a, b in zip(encoder.encode(PROMPTS), expected, strict=True))
    with pytest.raises(ValueError, match="carries no tokenizer"):
        load_text_encoder(official)
    monkeypatch.setattr(host, "comfy_folder", lambda relative: folder)
    assert str(folder) in load_text_encoder(official).tokenizer.source
    with pytest.raises(ValueError, match=r"whole\.safetensors belongs to qwen-image .* this loader is for wan21"):
        load_text_encoder(path, family="wan21")
    with pytest.raises(ValueError, match="no tokenizer at nowhere"):
        load_text_encoder(path, tokenizer="nowhere")


def test_incomplete_or_strange_files_are_refused(tmp_path, official, weights, tokenizer):
    lacking = {name: tensor for name, tensor in weights.items() if name != "visual.blocks.1.attn.proj.bias"}
    with pytest.raises(ValueError, match=r"not complete as Qwen2\.5-VL.* Missing: visual\.blocks\.1\.attn\.proj\.bias"):
        make_encoder(save(lacking, tmp_path / "lacking.safetensors"), tokenizer)
    bent = weights | {"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match=r"up_proj\.weight is \[3, 3\] instead of \[64, 48\]"):
        make_encoder(save(bent, tmp_path / "bent.safetensors"), tokenizer).encode(PROMPTS)
    checkpoint = open_checkpoint(official)
    with pytest.raises(ValueError, match=r"is a vae \(vae\), expected a text encoder: Qwen2\.5-VL"):
        TextEncoder(checkpoint, replace(identify(checkpoint), role="vae", variant="vae"), tokenizer)
    other = Tokenizer(tokenizer.plain, tokenizer.special, size=151665, identity="x", source="big")
    with pytest.raises(ValueError, match=r"big has 151665 pieces, .* knows 700: they don't belong together"):
        make_encoder(official, other)
