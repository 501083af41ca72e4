"""The CLIP of Wan: transformers' numbers, every way a file may store it, pictures, caching, memory, ComfyUI's nodes."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from wanqwen.core import host
from wanqwen.core.memory.trace import peak_bytes
from wanqwen.core.ops import formats
from wanqwen.core.text import EmbeddingCache, Part, Placement
from wanqwen.core.types import Checkpoint
from wanqwen.loading import load_image_encoder
from wanqwen.tests.manifests import manifest, write_header, write_sparse
from wanqwen.wan import image_encoder as module
from wanqwen.wan.config import ImageEncoderConfig
from wanqwen.wan.image_encoder import (
    MEAN,
    STD,
    ImageEncoder,
    build,
    encode_with,
    needed,
    preprocess,
    rows_of,
    working_bytes,
)

from ..core.memory.conftest import cuda_runtime  # noqa: F401 - a fixture
from ..core.stand_in import StandIn, limits, nothing_is_left, record_reads, stand_in

CPU = torch.device("cpu")
CONFIG = ImageEncoderConfig(dim=48, dim_ffn=80, num_layers=5, num_heads=3, patch_size=4, num_positions=50)
OTHER = ImageEncoderConfig(dim=30, dim_ffn=36, num_layers=2, num_heads=5, patch_size=6, num_positions=17)
METADATA = {"wanqwen": json.dumps({"num_heads": CONFIG.num_heads})}
MANIFESTS = ("wan21_official_clip_xlm_roberta_vit_h_14", "wan21_comfy_clip_vision_h",
             "wan21_kijai_clip_visual_fp16_INFERRED")  # fmt: skip
FP8 = torch.float8_e4m3fn
LEAVES = ("weight", "bias")
STACKS = ("visual.transformer", "vision_model.encoder.layers")


def random_model(config: ImageEncoderConfig) -> torch.nn.Module:
    """Return transformers' own model with weights that matter."""
    torch.manual_seed(0)
    model = build(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def inner(model) -> dict[str, Tensor]:
    """The weights by transformers' names, below its prefix."""
    return {name.removeprefix("vision_model."): tensor for name, tensor in model.state_dict().items()}


def to_official(inner: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Return weights as the official code names and shapes them, written out by hand."""
    tensors = {
        "visual.cls_embedding": inner["embeddings.class_embedding"][None, None],
        "visual.pos_embedding": inner["embeddings.position_embedding.weight"][None],
        "visual.patch_embedding.weight": inner["embeddings.patch_embedding.weight"],
        "visual.head": torch.ones(2, 2),
        "log_scale": torch.ones(()),
    }
    for leaf in LEAVES:
        tensors[f"visual.pre_norm.{leaf}"] = inner[f"pre_layrnorm.{leaf}"]
        tensors[f"visual.post_norm.{leaf}"] = inner[f"post_layernorm.{leaf}"]
        for i in range(num_layers):
            there, here = f"visual.transformer.{i}", f"encoder.layers.{i}"
            parts = [inner[f"{here}.self_attn.{name}_proj.{leaf}"] for name in "qkv"]
            tensors |= {
                f"{there}.attn.to_qkv.{leaf}": torch.cat(parts),
                f"{there}.attn.proj.{leaf}": inner[f"{here}.self_attn.out_proj.{leaf}"],
                f"{there}.norm1.{leaf}": inner[f"{here}.layer_norm1.{leaf}"],
                f"{there}.norm2.{leaf}": inner[f"{here}.layer_norm2.{leaf}"],
                f"{there}.mlp.0.{leaf}": inner[f"{here}.mlp.fc1.{leaf}"],
                f"{there}.mlp.2.{leaf}": inner[f"{here}.mlp.fc2.{leaf}"],
            }
    return tensors


@pytest.fixture(scope="module")
def official(inner) -> dict[str, Tensor]:
    return to_official(inner, CONFIG.num_layers)


def save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = METADATA) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


@pytest.fixture
def path(tmp_path, official) -> Path:
    return save(official, tmp_path / "official.safetensors")


def make(path: Path, **options) -> ImageEncoder:
    opened = load_image_encoder(path, device="cpu")
    return ImageEncoder(opened.checkpoint, opened.identity, **options)


def pictures(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def shown(images: Tensor, config: ImageEncoderConfig = CONFIG, fit: str = "official") -> Tensor:
    return torch.cat([preprocess(image, config.image_size, fit) for image in images])


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, cuda_runtime: object) -> StandIn:  # noqa: F811
    return stand_in(monkeypatch)


# The numbers.


@pytest.mark.parametrize("config", [CONFIG, OTHER], ids=["five blocks", "two blocks"])
@pytest.mark.parametrize("size", [(28, 28), (31, 90), (9, 5), (224, 112)])
@pytest.mark.parametrize("fit", module.FITS)
def test_rows_are_the_hidden_states_before_the_last_block(tmp_path, config, size, fit):
    model = random_model(config)
    own = {"wanqwen": json.dumps({"num_heads": config.num_heads})}
    encoder = make(save(model.state_dict(), tmp_path / "m.safetensors", own))
    images = pictures(2, *size, 3)
    expected = model(pixel_values=shown(images, config, fit), output_hidden_states=True).hidden_states[-2]
    rows = encoder.encode(images, fit)
    assert rows.shape == (2, config.num_positions, config.dim)
    assert rows.dtype == torch.float32 and rows.device == CPU and not rows.requires_grad
    assert relative_error(rows, expected) <= 2e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_sixteen_bits_are_near_float32(path, dtype, bound):
    images = pictures(1, 40, 30, 3)
    exact, rounded = make(path).encode(images), make(path, dtype=dtype).encode(images)
    error = (rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < bound


def test_norms_are_taken_in_float32(tmp_path, inner):
    """Of values whose squares float16 can't hold."""
    large = dict(inner)
    for name in ("embeddings.class_embedding", "embeddings.position_embedding.weight"):
        large[name] = inner[name] * 20_000
    path, images = save(large, tmp_path / "large.safetensors"), pictures(1, 28, 28, 3)
    exact, rounded = make(path).encode(images), make(path, dtype=torch.float16).encode(images)
    assert relative_error(rounded, exact) < 2e-2


def test_values_that_float16_can_t_hold_are_refused(tmp_path, inner):
    large = inner | {"encoder.layers.2.mlp.fc2.bias": torch.full((CONFIG.dim,), 70_000.0)}
    path, images = save(large, tmp_path / "large.safetensors"), pictures(1, 28, 28, 3)
    assert make(path).encode(images).isfinite().all()
    with pytest.raises(ValueError, match="gave NaN or infinite values in float16: choose precision fp32"):
        make(path, dtype=torch.float16).encode(images)


@pytest.mark.parametrize(
    ("stored", "on", "expected"),
    [
        (torch.float16, "cpu", torch.float32),
        (torch.bfloat16, "cpu", torch.float32),
        (torch.float16, "cuda", torch.float16),
        (torch.float32, "cuda", torch.float16),  # the official file, which the official code runs so
        (torch.bfloat16, "cuda", torch.bfloat16),
    ],
)
def test_what_is_computed_in_follows_file_and_device(tmp_path, official, stored, on, expected):
    path = save({name: tensor.to(stored) for name, tensor in official.items()}, tmp_path / "m.safetensors")
    assert make(path).dtype_on(torch.device(on)) == expected
    assert make(path, dtype=torch.float64).dtype_on(torch.device(on)) == torch.float64


# Files.


def test_every_spelling_and_container_gives_the_same_rows(tmp_path, path, official, inner):
    images = pictures(1, 33, 50, 3)
    expected = make(path).encode(images)
    text = {"textual.embedding.weight": torch.ones(2), "textual.blocks.0.attn.q.weight": torch.ones(2)}
    prefixed = {f"vision_model.{name}": tensor for name, tensor in inner.items()}
    comfy = prefixed | {
        "visual_projection.weight": torch.ones(3, CONFIG.dim),
        "vision_model.embeddings.position_ids": torch.arange(CONFIG.num_positions)[None],
    }
    whole = comfy | {"text_model.final_layer_norm.weight": torch.ones(2), "logit_scale": torch.ones(())}
    files = {
        "official, all of it": save(official | text, tmp_path / "all.safetensors"),
        "ComfyUI's": save(comfy, tmp_path / "comfy.safetensors"),
        "a whole CLIP": save(whole, tmp_path / "whole.safetensors"),
        "without a prefix": save(inner, tmp_path / "bare.safetensors"),
        "a Hugging Face folder": huggingface(tmp_path / "image_encoder", prefixed),
        "one of a whole CLIP": huggingface(tmp_path / "clip", whole, nested=True),
    }
    for what, file in files.items():
        encoder = make(file)
        assert encoder.config == CONFIG and torch.equal(encoder.encode(images), expected), what


def huggingface(folder: Path, tensors: dict[str, Tensor], nested: bool = False, **changes) -> Path:
    folder.mkdir()
    save(tensors, folder / "model.safetensors", {"format": "pt"})
    vision = {"num_attention_heads": CONFIG.num_heads, "hidden_act": "gelu"} | changes
    config = {"model_type": "clip", "vision_config": vision} if nested else {"model_type": "clip_vision_model"} | vision
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_official_pth_gives_the_rows_of_its_numbers(tmp_path, official, stored, dtype):
    kept = {name: tensor.to(stored) for name, tensor in official.items()}
    torch.save(kept | {"textual.token.weight": torch.ones(2)}, tmp_path / "models_clip.pth")
    meant = save({name: tensor.float() for name, tensor in kept.items()}, tmp_path / "meant.safetensors")
    # A .pth holds no metadata; ours of other widths than the published ones are told of by a config.json beside them.
    config = {"model_type": "clip_vision_model", "hidden_act": "gelu", "num_attention_heads": CONFIG.num_heads}
    (tmp_path / "config.json").write_text(json.dumps(config))
    images = pictures(1, 28, 28, 3)
    found = make(tmp_path / "models_clip.pth", dtype=dtype).encode(images)
    assert torch.equal(found, make(meant, dtype=dtype).encode(images))


@pytest.mark.parametrize("per_row", [False, True])
def test_scaled_fp8_equals_the_dequantised_weights(tmp_path, official, per_row):
    stored, meant = {"scaled_fp8": torch.empty(0, dtype=FP8)}, {}
    for name, tensor in official.items():
        stored[name] = meant[name] = tensor
        if name.startswith("visual.transformer") and tensor.dim() == 2:
            scale = (tensor.abs().amax(1) if per_row else tensor.abs().max()) / 448
            stored[name] = (tensor / (scale[:, None] if per_row else scale)).to(FP8)
            stored[name.replace(".weight", ".scale_weight")] = scale
            meant[name] = formats.dequantise(stored[name], scale, torch.float32)
    images = pictures(1, 28, 28, 3)
    found = make(save(stored, tmp_path / "fp8.safetensors")).encode(images)
    assert torch.equal(found, make(save(meant, tmp_path / "meant.safetensors")).encode(images))


@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_published_file_has_a_place_for_every_tensor(tmp_path, name, dtype):
    encoder = load_image_encoder(write_sparse(tmp_path / "clip.safetensors", name))
    assert (encoder.identity.variant, encoder.config) == ("clip-vit-h", ImageEncoderConfig())
    assert encoder.config.image_size == 224
    weights = encoder._load(dtype).loaded.weights
    used = {recipe.tensor for recipe in weights.recipes.values()}
    left = manifest(name)["tensors"].keys() - used - set(encoder.identity.ignored)
    # But for what is ignored by name, only the last block is not read.
    assert left and all(".31." in tensor for tensor in left)
    assert weights.recipes.keys() == dict(weights.module.named_parameters()).keys()
    assert len(weights.module.encoder.layers) == 31


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_published_file_that_lacks_a_tensor_or_has_another_shape_is_refused_by_name(tmp_path, name):
    tensors = manifest(name)["tensors"]
    used = [tensor for tensor in tensors if any(f"{stack}.{i}." in tensor for stack in STACKS for i in (7, 30, 31))]
    assert len(used) >= 3 * 12
    for tensor in used[::7]:
        file = write_header(tmp_path / "cut.safetensors", {t: row for t, row in tensors.items() if t != tensor})
        inner = tensor.removeprefix("vision_model.")
        with pytest.raises(ValueError, match=rf"cut\.safetensors .*lacks 1 tensors \({inner}\)"):
            load_image_encoder(file)
    for tensor in [tensor for tensor in used if ".31." not in tensor][::7]:
        dtype, shape = tensors[tensor]
        other = tensors | {tensor: (dtype, [shape[0] + 1, *shape[1:]])}
        encoder = load_image_encoder(write_header(tmp_path / "other.safetensors", other))
        with pytest.raises(ValueError, match=rf"1 of another shape: .* is \[{shape[0] + 1}"):
            encoder._load(torch.float16)


def test_a_fused_tensor_of_another_shape_is_named_as_the_file_has_it(tmp_path, official):
    name = "visual.transformer.1.attn.to_qkv.weight"
    encoder = make(save(official | {name: torch.zeros(2 * CONFIG.dim, CONFIG.dim)}, tmp_path / "m.safetensors"))
    with pytest.raises(ValueError, match=r"1 of another shape: visual\.transformer\.1\.attn\.to_qkv\.weight is \[96, "):
        encoder.encode(pictures(1, 28, 28, 3))


def clip_header(dim: int, layers: int, patch: int, positions: int, siglip: bool = False) -> dict:
    """Return the tensors of another image encoder in transformers' names, as far as they tell it."""
    tensors = {
        "vision_model.embeddings.patch_embedding.weight": ("F16", (dim, 3, patch, patch)),
        "vision_model.embeddings.position_embedding.weight": ("F16", (positions, dim)),
    }
    if siglip:
        tensors["vision_model.embeddings.patch_embedding.bias"] = ("F16", (dim,))
    else:
        tensors["vision_model.embeddings.class_embedding"] = ("F16", (dim,))
        tensors |= {f"vision_model.pre_layrnorm.{leaf}": ("F16", (dim,)) for leaf in LEAVES}
    for i in range(layers):
        block = f"vision_model.encoder.layers.{i}"
        shapes = {f"self_attn.{name}_proj": (dim, dim) for name in ("q", "k", "v", "out")}
        shapes |= {"mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim), "layer_norm1": (dim,), "layer_norm2": (dim,)}
        for path, shape in shapes.items():
            tensors |= {f"{block}.{path}.weight": ("F16", shape), f"{block}.{path}.bias": ("F16", shape[:1])}
    return tensors


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((1024, 24, 14, 257), r"another CLIP than Wan's: clip-vit-l, 24 blocks that give 257 rows of 1024"),
        ((1664, 48, 14, 257), r"another CLIP than Wan's: clip-vit-bigg, 48 blocks that give 257 rows of 1664"),
        ((768, 12, 32, 50), r"clip-vit-b, 12 blocks that give 50 rows of 768"),
        ((1280, 32, 14, 730), r"clip-vit-h-custom, 32 blocks that give 730 rows of 1280"),
        ((1280, 31, 14, 257), r"clip-vit-h-custom, 31 blocks"),
    ],
)
def test_another_clip_says_what_it_is_and_what_is_expected(tmp_path, sizes, said):
    file = write_header(tmp_path / "other.safetensors", clip_header(*sizes))
    with pytest.raises(ValueError, match=rf"other.safetensors is {said}|is another CLIP.*{said}") as caught:
        load_image_encoder(file)
    assert "32 blocks and 257 rows of 1280: clip_vision_h.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (clip_header(1152, 27, 14, 729, siglip=True), "an image encoder, but no CLIP"),
        (
            {"visual.transformer.resblocks.0.attn.in_proj_weight": ("F16", (3840, 1280))},
            "a CLIP in open_clip's own naming",
        ),
        ({"encoder.layer.0.layer_scale2.lambda1": ("F16", (1536,))}, "a DINOv2 image encoder"),
    ],
    ids=["SigLIP", "open_clip", "DINOv2"],
)
def test_an_image_encoder_that_is_no_clip_says_what_it_seems_to_be(tmp_path, tensors, said):
    file = write_header(tmp_path / "strange.safetensors", tensors)
    with pytest.raises(ValueError, match=rf"it looks like {said}: Wan takes clip_vision_h.safetensors"):
        load_image_encoder(file)


def test_what_shapes_don_t_tell_is_asked_for(tmp_path, inner):
    silent = save(inner, tmp_path / "silent.safetensors", None)
    with pytest.raises(ValueError, match=r'heads its width of 48 has; its metadata needs wanqwen = {"num_heads": N}'):
        load_image_encoder(silent)
    with pytest.raises(ValueError, match=r"width 48 does not split into 7 heads"):
        load_image_encoder(save(inner, tmp_path / "seven.safetensors", {"wanqwen": '{"num_heads": 7}'}))
    with pytest.raises(ValueError, match=r"config.json: this image encoder was trained with quick_gelu, the CLIP"):
        load_image_encoder(huggingface(tmp_path / "openai", inner, hidden_act="quick_gelu"))
    positions = inner["embeddings.position_embedding.weight"]
    odd = inner | {"embeddings.position_embedding.weight": positions[:48]}
    with pytest.raises(ValueError, match=r"odd.safetensors: .* for each patch of a square, not 48"):
        load_image_encoder(save(odd, tmp_path / "odd.safetensors"))


# Pictures.


def test_official_is_a_squash_of_the_whole_picture_without_antialiasing():
    image = pictures(50, 90, 3)
    planes = image.movedim(-1, 0)[None] * 2 - 1
    squashed = F.interpolate(planes, size=(28, 28), mode="bicubic", align_corners=False)
    expected = (squashed * 0.5 + 0.5 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert relative_error(preprocess(image, 28, "official"), expected) <= 1e-6
    smooth = F.interpolate(planes, size=(28, 28), mode="bicubic", align_corners=False, antialias=True)
    assert (smooth - squashed).abs().max() > 0.1  # or the line above would prove nothing


def test_official_does_not_clamp_what_bicubic_overshoots():
    edge = torch.zeros(40, 40, 3)
    edge[:, 20:] = 1
    pixels = preprocess(edge, 28, "official") * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    assert pixels.min() < -0.01 and pixels.max() > 1.01


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (28, 28), (21, 33)])
def test_crop_is_the_middle_as_pillow_resizes_it(size):
    image = ((0.3 + 0.4 * pictures(*size, 3)) * 255).round() / 255  # Pillow clamps between its two passes
    scale = 28 / min(size)
    height, width = (round(scale * side) for side in size)
    whole = Image.fromarray((image * 255).round().byte().numpy()).resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - 28) // 2, (width - 28) // 2
    expected = torch.tensor(list(whole.crop((left, top, left + 28, top + 28)).tobytes())).view(28, 28, 3)
    found = preprocess(image, 28, "crop")[0] * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    assert (found.movedim(0, -1) * 255 - expected).abs().max() < 1.01  # and rounds there


def test_crop_does_not_see_what_official_does(path):
    image = pictures(1, 30, 90, 3)
    other = image.clone()
    other[:, :, :25] = 1
    encoder = make(path)
    assert torch.equal(encoder.encode(image, "crop"), encoder.encode(other, "crop"))
    assert not torch.equal(encoder.encode(image), encoder.encode(other))
    with pytest.raises(ValueError, match="in the ways official, crop, not 'stretch'"):
        encoder.encode(image, "stretch")


def test_alpha_is_dropped_with_a_notice(path, caplog):
    images = pictures(2, 30, 40, 4)
    with caplog.at_level(logging.WARNING):
        found = make(path).encode(images)
    assert torch.equal(found, make(path).encode(images[..., :3]))
    assert [record.message for record in caplog.records] == [
        "Image encoder: the picture has an alpha channel, which is dropped."
    ]


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.zeros(0, 8, 8, 3), r"pictures of shape \(0, 8, 8, 3\)"),
        (torch.zeros(1, 0, 8, 3), r"pictures of shape \(1, 0, 8, 3\)"),
        (torch.zeros(8, 8, 3), r"shape \(8, 8, 3\); \[pictures, height, width, 3 \(RGB\) or 4 \(with alpha\)\] is exp"),
        (torch.zeros(1, 3, 8, 8), r"pictures of shape \(1, 3, 8, 8\)"),
        (torch.full((1, 8, 8, 3), torch.nan), "the picture holds NaN or infinite values"),
        (torch.full((1, 8, 8, 3), torch.inf), "the picture holds NaN or infinite values"),
    ],
)
def test_what_is_no_picture_is_refused_unread(path, monkeypatch, images, said):
    read, encoder = record_reads(monkeypatch), make(path)
    with pytest.raises(ValueError, match=said):
        encoder.encode(images)
    with pytest.raises(ValueError, match=said):
        encode_with(encoder, images)
    assert read == []


def test_pictures_in_half_precision_are_taken(path):
    images = pictures(1, 30, 40, 3).half()
    assert torch.equal(make(path).encode(images), make(path).encode(images.float()))


# Reading, caching, memory.


def test_weights_are_read_for_a_new_picture_only_and_never_the_last_block(path, monkeypatch):
    read, cache, images = record_reads(monkeypatch), EmbeddingCache(), pictures(3, 28, 28, 3)
    encoder = make(path, cache=cache)
    encoder.footprint()
    assert read == []
    first = encoder.encode(images[:2])
    assert read and not any(".transformer.4." in name or "post_norm" in name or "head" in name for name in read)
    assert {f"visual.transformer.{i}.attn.to_qkv.weight" for i in range(4)} <= set(read)
    read.clear()
    assert torch.equal(encoder.encode(images[:2].clone()), first)
    assert torch.equal(make(path, cache=cache).encode(images[1:2]), first[1:2])  # the same file opened once more
    assert read == []
    assert torch.equal(encoder.encode(images)[:2], first) and read


def test_the_same_picture_twice_is_run_once(path, monkeypatch):
    runs, original = [], module._Tower.forward
    monkeypatch.setattr(module._Tower, "forward", lambda self, x: (runs.append(len(x)), original(self, x))[1])
    image = pictures(1, 28, 28, 3)
    rows = make(path).encode(torch.cat((image, image)))
    assert runs == [1] and torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("change", ["file", "dtype", "fit"])
def test_what_the_cache_holds_is_of_the_same_kind(tmp_path, path, official, change):
    cache, images = EmbeddingCache(), pictures(1, 20, 40, 3)
    before = make(path, cache=cache).encode(images)
    if change == "file":
        changed = official | {"visual.pre_norm.bias": official["visual.pre_norm.bias"] + 1}
        after = make(save(changed, tmp_path / "other.safetensors"), cache=cache).encode(images)
    elif change == "dtype":
        after = make(path, cache=cache, dtype=torch.bfloat16).encode(images)
    else:
        after = make(path, cache=cache).encode(images, "crop")
    assert not torch.equal(before, after)


@pytest.fixture
def parts(monkeypatch) -> list[Part]:
    """The parts that encoders open from now on."""
    opened, original = [], ImageEncoder._load
    monkeypatch.setattr(ImageEncoder, "_load", lambda self, dtype: opened.append(original(self, dtype)) or opened[-1])
    return opened


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("spelt", ["official", "huggingface"])
def test_blocks_that_stay_or_stream_give_the_rows_of_a_run_in_ram(
    tmp_path, official, inner, device, parts, monkeypatch, dtype, spelt
):
    tensors = official if spelt == "official" else inner
    path = save({name: t.half() for name, t in tensors.items()}, tmp_path / "m.safetensors")
    images, rows = pictures(2, 28, 28, 3), []
    part = make(path, dtype=dtype)._load(dtype)
    for limit, (num_streaming, num_slots) in limits(part, working_bytes(CONFIG, dtype)).items():
        placement = Placement(max_vram_bytes=limit)
        rows.append(make(path, dtype=dtype, placement=placement).encode(images))
        assert (len(device.plans[-1].streaming), device.plans[-1].num_slots) == (num_streaming, num_slots)
        assert all(parameter.is_meta for parameter in parts[-1].loaded.module.parameters())
        assert nothing_is_left(parts[-1])
        device.spoil()
    monkeypatch.undo()
    rows.append(make(path, dtype=dtype).encode(images))
    assert all(torch.equal(found, rows[0]) for found in rows)


def test_the_room_that_is_asked_for_is_what_weights_and_work_take(path, device):
    encoder = make(path)
    encoder.encode(pictures(1, 28, 28, 3))
    assert device.asked and device.asked[0] >= encoder.footprint().whole > encoder.footprint().working > 0


def test_an_interrupt_leaves_nothing_behind(path, device, parts, monkeypatch):
    def interrupt() -> None:
        raise KeyboardInterrupt

    encoder, images = make(path), pictures(1, 28, 28, 3)
    monkeypatch.setattr(host, "check_interrupt", interrupt)
    with pytest.raises(KeyboardInterrupt):
        encoder.encode(images)
    assert nothing_is_left(parts[-1])
    monkeypatch.setattr(host, "check_interrupt", lambda: None)
    assert encoder.encode(images).isfinite().all()


def test_inference_mode_does_not_spoil_the_encoder(path):
    encoder, images = make(path, cache=EmbeddingCache(max_bytes=0)), pictures(1, 28, 28, 3)
    with torch.inference_mode():  # as ComfyUI runs its nodes
        inside = encoder.encode(images)
    assert torch.equal(inside, encoder.encode(images))


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, patch_size=2, num_positions=401, dim=24, dim_ffn=200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_work_space_is_what_a_run_takes(config, dtype):
    tower = module._Tower(config).to(dtype)
    pixels = torch.zeros(1, 3, config.image_size, config.image_size)
    measured = peak_bytes(lambda: tower(pixels.clone()), CPU)
    assert measured <= working_bytes(config, dtype) <= 1.05 * measured


def test_the_published_encoder_takes_little_more_than_its_weights():
    footprint = needed(ImageEncoderConfig(), torch.float16)
    block = 2 * (4 * 1280 * 1280 + 2 * 1280 * 5120 + 4 * 1280 + 1280 + 5120 + 4 * 1280)
    assert footprint.blocks == (block,) * 31
    print(f"{footprint.whole / 2**20:.0f} MiB, {footprint.working / 2**20:.0f} of them beside the weights")
    assert footprint.working < 32 << 20 and footprint.whole < 1.25e9


# ComfyUI's nodes, and those that take what they give.


def test_stock_nodes_get_rows_and_a_clear_word_on_what_there_is_not(path):
    encoder, images = make(path), pictures(2, 30, 90, 3)
    output = encoder.encode_image(images)  # as ComfyUI's node calls it
    assert torch.equal(output.penultimate_hidden_states, encoder.encode(images, "crop"))
    assert output["penultimate_hidden_states"] is output.penultimate_hidden_states
    whole = encoder.encode_image(images, crop=False)
    assert torch.equal(whole.penultimate_hidden_states, encoder.encode(images, "official"))
    for name in ("last_hidden_state", "image_embeds", "mm_projected"):
        assert not hasattr(output, name)
        with pytest.raises(AttributeError, match=rf"{name} is not computed by the image encoder of Wan, .*Load CLIP V"):
            output[name]


def test_rows_in_half_precision_are_taken():
    rows = pictures(2, 5, 8).half()
    found = rows_of(SimpleNamespace(penultimate_hidden_states=rows))
    assert found.dtype == torch.float32 and torch.equal(found, rows.float())


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (
            SimpleNamespace(penultimate_hidden_states=torch.ones(257, 1280)),
            r"no rows of a picture .* but \(257, 1280\)",
        ),
        (SimpleNamespace(image_embeds=torch.ones(1, 1024)), "no rows of a picture .* but SimpleNamespace"),
        (None, "no rows of a picture .* but NoneType"),
        (SimpleNamespace(penultimate_hidden_states=torch.full((1, 2, 1280), torch.nan)), "NaN or infinite values"),
    ],
)
def test_an_output_that_is_not_of_this_encoder_is_refused(output, said):
    with pytest.raises(ValueError, match=said):
        rows_of(output)


def test_ours_and_comfyui_s_encoders_are_called_alike(path):
    encoder, images, calls = make(path), pictures(2, 30, 40, 3), []

    class Stock:
        def encode_image(self, image, crop=True):
            calls.append((tuple(image.shape), crop))
            return encoder.encode_image(image, crop)

    ours, theirs = (encode_with(one, images) for one in (encoder, Stock()))
    assert ours.shape == (1, 2 * CONFIG.num_positions, CONFIG.dim) and torch.equal(ours, theirs)
    assert torch.equal(ours[0, CONFIG.num_positions :], encoder.encode(images[1:])[0])
    assert calls == [((2, 30, 40, 3), False)]


def test_a_checkpoint_of_another_kind_is_no_image_encoder(path) -> None:
    opened = load_image_encoder(path)
    checkpoint: Checkpoint = opened.checkpoint
    with pytest.raises(ValueError, match=r"official.safetensors is another CLIP than Wan's: clip-vit-l"):
        ImageEncoder(checkpoint, replace(opened.identity, variant="clip-vit-l"))
