import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from wanqwen.core import host, storage
from wanqwen.core.blocks import Run
from wanqwen.core.ops import formats
from wanqwen.core.ops.linear import Linear
from wanqwen.core.weights.assemble import assemble, prepare, wants_whole_products
from wanqwen.core.weights.keymap import Renamer, Share
from wanqwen.core.weights.reader import open_checkpoint
from wanqwen.families import identify
from wanqwen.wan.config import VAEConfig, WanConfig
from wanqwen.wan.family import keep_float32
from wanqwen.wan.keymap import DIFFUSION_MODEL_SPELLINGS, vae_spellings
from wanqwen.wan.transformer import WanTransformer
from wanqwen.wan.vae import WanVAE

CONFIG = WanConfig(dim=24, ffn_dim=40, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, text_len=6)
METADATA = {"wanqwen": json.dumps({"num_heads": 2, "text_len": 6})}
FP8 = torch.float8_e4m3fn


@pytest.fixture
def state():
    torch.manual_seed(0)
    return {name: torch.randn_like(p) * 0.1 for name, p in WanTransformer(CONFIG).state_dict().items()}


def save(path, tensors, metadata=METADATA):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def load(path, dtype=torch.float32):
    checkpoint = open_checkpoint(path)
    identity = identify(checkpoint)
    assert identity.config == CONFIG
    weights = prepare(
        lambda: WanTransformer(CONFIG),
        identity.names,
        checkpoint,
        float32=keep_float32,
        dtype=dtype,
        ignored=identity.ignored,
    )
    filled = {name: torch.empty_like(tensor, device="cpu") for name, tensor in weights.module.state_dict().items()}
    weights.fill(filled)
    module = weights.materialise()
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == filled[name].dtype
        assert torch.equal(tensor.view(-1).view(torch.uint8), filled[name].view(-1).view(torch.uint8)), name
    return module


def spelt(tensors, spelling, prefix):
    rename = Renamer(spelling.table)
    return {prefix + rename(name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "transformer."])
@pytest.mark.parametrize("spelling", DIFFUSION_MODEL_SPELLINGS, ids=lambda s: s.name)
def test_every_spelling_gives_the_same_module(tmp_path, state, spelling, prefix):
    model = load(save(tmp_path / "m.safetensors", spelt(state, spelling, prefix)))
    found = model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_shards_and_pickle_give_the_same_module(tmp_path, state):
    names = list(state)
    parts = {"m-00001-of-00002.safetensors": names[::2], "m-00002-of-00002.safetensors": names[1::2]}
    for file, inside in parts.items():
        save(tmp_path / file, {name: state[name] for name in inside})
    weight_map = {name: file for file, inside in parts.items() for name in inside}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = load(tmp_path).state_dict()
    assert all(torch.equal(found[name], state[name]) for name in state)

    torch.save(state, tmp_path / "m.pth")
    checkpoint = open_checkpoint(tmp_path / "m.pth")
    model = assemble(
        lambda: WanTransformer(CONFIG), {n: n for n in state}, checkpoint, float32=keep_float32, dtype=torch.float32
    )
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    weights = prepare(
        lambda: WanTransformer(CONFIG), {n: n for n in state}, checkpoint, float32=keep_float32, dtype=torch.bfloat16
    )
    for name in ("blocks.1.ffn.0.weight", "blocks.1.norm3.bias"):  # one is converted, one is not
        out = torch.empty_like(weights.module.get_parameter(name), device="cpu")
        weights.fill({name: out})
        assert torch.equal(out, state[name].to(out.dtype))


@pytest.mark.parametrize("num_res_blocks", [1, 2, 3])
def test_every_spelling_of_the_vae_gives_the_same_module(tmp_path, num_res_blocks):
    config = VAEConfig(
        dim=4, z_dim=2, dim_mult=(1, 2, 2), num_res_blocks=num_res_blocks, temporal_downsample=(True, False)
    )
    torch.manual_seed(0)
    state = {name: torch.randn_like(p) for name, p in WanVAE(config).state_dict().items()}
    for spelling in vae_spellings(num_res_blocks):
        checkpoint = open_checkpoint(save(tmp_path / f"{spelling.name}.safetensors", spelt(state, spelling, ""), None))
        identity = identify(checkpoint)
        assert (identity.config, identity.spelling) == (config, spelling.name)
        assert not identity.missing and not identity.unexpected
        model = assemble(
            lambda: WanVAE(config), identity.names, checkpoint, float32=lambda name: False, dtype=torch.float32
        )
        assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_storage_dtype(tmp_path, state, stored, dtype):
    path = save(tmp_path / "m.safetensors", {name: tensor.to(stored) for name, tensor in state.items()})
    for name, found in load(path, dtype).state_dict().items():
        assert found.dtype == (torch.float32 if keep_float32(name) else dtype)
        assert torch.equal(found, state[name].to(stored).to(found.dtype))


def quantised(state, scale_suffix, rows=False):
    """Return the state with block weights in scaled fp8, and what they stand for."""
    stored, meant = {}, {}
    for name, tensor in state.items():
        stored[name] = meant[name] = tensor
        if tensor.dim() == 2 and ("blocks." in name or name == "head.head.weight"):
            largest = tensor.abs().amax(1) if rows else tensor.abs().max()
            scale = (largest / 448).float()
            stored[name] = (tensor / (scale[:, None] if rows else scale)).to(FP8)
            stored[name.removesuffix("weight") + scale_suffix] = scale
            meant[name] = formats.dequantise(stored[name], scale, torch.float32)
    return stored, meant


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("spelling", DIFFUSION_MODEL_SPELLINGS, ids=lambda s: s.name)
def test_scaled_fp8_equals_its_dequantised_weights(tmp_path, state, suffix, rows, spelling):
    stored, meant = quantised(state, suffix, rows)
    layers = [name.removesuffix(f".{suffix}") for name in stored if name.endswith(suffix)]
    assert layers
    extra = {f"{layer}.{suffix.replace('weight', 'input')}": torch.tensor(1.0) for layer in layers}
    if suffix == "weight_scale":
        record = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
        extra |= {f"{layer}.comfy_quant": record.clone() for layer in layers}
    tensors = spelt(stored | extra, spelling, "") | {"scaled_fp8": torch.zeros(2).to(FP8)}
    model = load(save(tmp_path / "fp8.safetensors", tensors))
    linears = [m for m in model.modules() if isinstance(m, Linear) and m.weight.dtype == FP8]
    assert len(linears) == sum("blocks." in layer for layer in layers)
    assert all(linear.weight_scale.dtype == torch.float32 for linear in linears)
    # The head is kept in float32, so its scale is applied when it is read.
    assert torch.equal(model.head.head.weight, meant["head.head.weight"])

    for name, module in model.named_modules():
        if isinstance(module, Linear):
            weight = formats.dequantise(module.weight, module.weight_scale, torch.float32)
            assert torch.equal(weight, meant[f"{name}.weight"])

    plain = load(save(tmp_path / "plain.safetensors", meant))
    x, t, text = torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 3, CONFIG.text_dim)
    run = Run()
    with torch.no_grad():
        # Copies, since products with memory mapped from a file round otherwise where its alignment differs.
        out, wanted = (m(x, t, m.prompt(text, run), run) for m in map(copy.deepcopy, (model, plain)))
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("spelling", DIFFUSION_MODEL_SPELLINGS, ids=lambda s: s.name)
def test_files_say_whether_their_products_may_be_in_8_bits(tmp_path, state, spelling):
    stored, _ = quantised(state, "weight_scale", rows=False)

    def wants(extra, metadata=None, **marker):
        path = tmp_path / "fp8.safetensors"
        save(path, spelt(stored | extra, spelling, "") | marker, METADATA | (metadata or {}))
        checkpoint = open_checkpoint(path)
        return wants_whole_products(checkpoint, identify(checkpoint).names)

    def record(**more):
        return {"format": "float8_e4m3fn", **more}

    def beside(**more):
        return {
            "blocks.0.ffn.0.comfy_quant": torch.tensor(list(json.dumps(record(**more)).encode()), dtype=torch.uint8)
        }

    assert not wants({}) and not wants(beside()) and not wants(beside(full_precision_matrix_mult=False))
    assert wants(beside(full_precision_matrix_mult=True))
    layers = {"layers": {"blocks.0.ffn.0": record(full_precision_matrix_mult=True)}}
    assert wants({}, {"_quantization_metadata": json.dumps(layers)})
    assert wants({}, scaled_fp8=torch.zeros(2).to(FP8)) and not wants({}, scaled_fp8=torch.zeros(0).to(FP8))


def test_plain_fp8_keeps_matrices_only(tmp_path, state):
    stored = {name: tensor.to(FP8) for name, tensor in state.items()}
    found = load(save(tmp_path / "m.safetensors", stored), torch.bfloat16).state_dict()
    for name, tensor in found.items():
        if keep_float32(name):
            assert tensor.dtype == torch.float32
        else:
            assert tensor.dtype == (FP8 if tensor.dim() == 2 else torch.bfloat16)
        assert torch.equal(tensor.float(), stored[name].float())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("blocks.1.ffn.2.bias"), r"1 missing: blocks\.1\.ffn\.2\.bias"),
        (
            lambda s: s.update({"blocks.0.extra.weight": torch.zeros(1)}),
            r"1 not part of this model: blocks\.0\.extra\.weight",
        ),
        (lambda s: s.update({"blocks.0.cross_attn.k_img.weight": torch.zeros(24, 24)}), r"not part of this model"),
        (
            lambda s: s.update({"blocks.0.ffn.0.weight": torch.zeros(40, 25)}),
            r"blocks\.0\.ffn\.0\.weight is \[40, 25\] instead of \[40, 24\]",
        ),
        (lambda s: s.update({"blocks.0.norm3.bias": torch.zeros(24, dtype=torch.int8)}), r"can't be read: I8"),
        (
            lambda s: s.update({"blocks.0.ffn.0.weight_scale": torch.zeros(40, 2)}),
            r"blocks\.0\.ffn\.0\.weight_scale \(F32 \[40, 2\]\)",
        ),
        (
            lambda s: s.update(
                {"blocks.0.ffn.0.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}
            ),
            r"quantised as 'nvfp4'",
        ),
        (
            lambda s: s.update({"blocks.0.ffn.0.comfy_quant": torch.tensor([1, 2], dtype=torch.uint8)}),
            r"is not JSON",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, state, change, said):
    change(state)
    with pytest.raises(ValueError, match=said):
        load(save(tmp_path / "m.safetensors", state))


def test_format_in_the_metadata_is_heeded(tmp_path, state):
    record = json.dumps({"layers": {"blocks.0.ffn.0": {"format": "mxfp8"}}})
    with pytest.raises(ValueError, match="quantised as 'mxfp8'"):
        load(save(tmp_path / "m.safetensors", state, METADATA | {storage.METADATA_RECORD: record}))


def test_long_lists_are_cut(tmp_path, state):
    path = save(tmp_path / "m.safetensors", {"a": torch.zeros(1)})
    checkpoint = open_checkpoint(path)
    with pytest.raises(ValueError) as error:
        assemble(lambda: WanTransformer(CONFIG), {}, checkpoint, float32=keep_float32, dtype=torch.float32)
    assert f"{len(state)} missing" in str(error.value)
    assert str(error.value).count("blocks.") <= 8


def test_scale_of_a_plain_module_is_applied_when_it_is_read(tmp_path):
    """transformers' modules have no scale of their own."""
    weight, scale = torch.randn(3, 4).to(FP8), torch.tensor(0.5)
    path = save(tmp_path / "m.safetensors", {"0.weight": weight, "0.scale_weight": scale})
    names = {name: name for name in ("0.weight", "0.scale_weight")}
    model = assemble(
        lambda: nn.Sequential(nn.Linear(4, 3, bias=False)),
        names,
        open_checkpoint(path),
        float32=lambda name: False,
        dtype=torch.bfloat16,
    )
    assert torch.equal(model[0].weight, (weight.float() * 0.5).bfloat16())


def test_ram_that_does_not_suffice_is_said_before_anything_is_read(tmp_path, state, monkeypatch):
    path = save(tmp_path / "half.safetensors", {name: tensor.bfloat16() for name, tensor in state.items()})
    needed = sum(tensor.numel() * 4 for tensor in state.values())
    monkeypatch.setattr(host, "available_ram", lambda: needed)
    load(path)
    monkeypatch.setattr(host, "available_ram", lambda: needed - 1)
    with pytest.raises(ValueError, match=r"half\.safetensors stores its weights in another way than float32, .* free"):
        load(path)
    monkeypatch.setattr(host, "available_ram", lambda: 0)
    load(save(tmp_path / "whole.safetensors", state))  # used as it is


FUSED = ("q", "k", "v")


def fused_state(dtype):
    """Return layers whose rows lie together in one tensor, a table with a dimension too many, and both as meant."""
    generator = torch.Generator().manual_seed(0)
    meant = {f"{name}.weight": torch.randn(4, 6, generator=generator).to(dtype) for name in FUSED}
    meant |= {f"{name}.bias": torch.randn(4, generator=generator).to(dtype) for name in FUSED}
    meant |= {"table.weight": torch.randn(5, 6, generator=generator).to(dtype)}
    stored = {f"qkv.{leaf}": torch.cat([meant[f"{name}.{leaf}"] for name in FUSED]) for leaf in ("weight", "bias")}
    return stored | {"table": meant["table.weight"][None]}, meant


def prepare_fused(checkpoint, dtype, more=None):
    names = {f"{name}.{leaf}": f"qkv.{leaf}" for name in FUSED for leaf in ("weight", "bias")}
    shares = {f"{name}.{leaf}": Share(index=i, count=3) for i, name in enumerate(FUSED) for leaf in ("weight", "bias")}
    return prepare(
        lambda: nn.ModuleDict({**{name: nn.Linear(6, 4) for name in FUSED}, "table": nn.Embedding(5, 6)}),
        names | {"table.weight": "table"} | (more or {}),
        checkpoint,
        float32=lambda name: False,
        dtype=dtype,
        shares=shares | {"table.weight": Share()},
    )


def filled(weights):
    out = {name: torch.empty_like(tensor, device="cpu") for name, tensor in weights.module.state_dict().items()}
    weights.fill(out)
    return out


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layers_that_share_a_tensor_get_their_own_rows(tmp_path, stored, dtype, ending):
    tensors, meant = fused_state(stored)
    path = tmp_path / f"m.{ending}"
    torch.save(tensors, path) if ending == "pth" else save(path, tensors)
    weights = prepare_fused(open_checkpoint(path), dtype)
    for found in (filled(weights), weights.materialise().state_dict()):
        assert found.keys() == meant.keys()
        assert all(torch.equal(found[name], meant[name].to(dtype)) for name in meant)


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.arange(1.0, 13.0)], ids=["one", "per row"])
def test_layers_that_share_a_scaled_tensor_get_their_own_scales(tmp_path, scale):
    tensors, _ = fused_state(torch.float32)
    tensors |= {"qkv.weight": tensors["qkv.weight"].to(FP8), "qkv.scale_weight": scale}
    checkpoint = open_checkpoint(save(tmp_path / "m.safetensors", tensors))
    weights = prepare_fused(checkpoint, torch.float32, {f"{name}.scale_weight": "qkv.scale_weight" for name in FUSED})
    whole = formats.dequantise(tensors["qkv.weight"], scale, torch.float32)
    for found in (filled(weights), weights.materialise().state_dict()):
        assert torch.equal(torch.cat([found[f"{name}.weight"] for name in FUSED]), whole)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("qkv.weight", (8, 6), r"1 of another shape: qkv\.weight is \[8, 6\] instead of \[12, 6\]"),
        ("table", (2, 5, 6), r"table is \[2, 5, 6\] instead of \[5, 6\]"),
        ("table", (1, 6, 5), r"table is \[1, 6, 5\] instead of \[5, 6\]"),
    ],
)
def test_a_shared_tensor_of_another_shape_is_named_once(tmp_path, name, shape, said):
    tensors, _ = fused_state(torch.float32)
    checkpoint = open_checkpoint(save(tmp_path / "m.safetensors", tensors | {name: torch.zeros(shape)}))
    with pytest.raises(ValueError, match=said):
        prepare_fused(checkpoint, torch.float32)
