"""Small models converted as a user does it, loaded, run, and converted back."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from wanqwen import conversion
from wanqwen.__main__ import main
from wanqwen.conversion import EXPORTS, convert
from wanqwen.core.types import Identity, TensorInfo
from wanqwen.core.weights.convert import CONVERTED_KEY, Wish, make_plan
from wanqwen.core.weights.reader import open_checkpoint
from wanqwen.core.weights.targets import TARGETS, Layer, Target
from wanqwen.core.weights.tensors import read_tensors
from wanqwen.families import identify
from wanqwen.loading import load_image_encoder, load_text_encoder, load_vae
from wanqwen.qwen_image.files import NAME as QWEN_IMAGE
from wanqwen.wan.family import FAMILY as WAN

from .core.weights.test_gguf_models import MODELS, opened, state_of, velocity
from .gguf_files import quantised, write
from .manifests import write_sparse
from .nodes import tiny

QUANTISED = [name for name, target in TARGETS.items() if target.planes is not None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.write_all(folder)
    for name, model in MODELS.items():
        state = state_of(model)
        save_file(state, folder / f"{name}_fp32.safetensors", {"title": "mine"})
        save_file({n: t.bfloat16() for n, t in state.items()}, folder / f"{name}_bf16.safetensors")
    return folder


def converted(source: Path, out: Path, target: str = "same", **wish: object) -> Path:
    return convert(source, out, Wish(target=target, **wish), lambda text: None)


def suffix(target: str) -> str:
    return TARGETS[target].container.suffix


def contents(path: Path) -> dict[str, Tensor]:
    found = open_checkpoint(path)
    return {name: tensor.clone() for name, tensor in read_tensors(found, found.tensors)}


def assert_same(one: Path, other: Path) -> None:
    """The files hold the same tensors, to the bit."""
    a, b = open_checkpoint(one), open_checkpoint(other)
    assert a.tensors == b.tensors
    bits = [{name: tensor.flatten().view(torch.uint8) for name, tensor in contents(path).items()}
            for path in (one, other)]  # fmt: skip
    assert all(torch.equal(found, bits[1][name]) for name, found in bits[0].items())


def identified(path: Path) -> Identity:
    return identify(open_checkpoint(path))


CHAINS = {
    "model": ("diffusers", "comfyui", "official"),
    "vae": ("diffusers", "kijai", "official"),
    "qwen_vae": ("official", "diffusers"),
    "qwen_model": ("comfyui", "diffusers"),
    "qwen_text": ("transformers-5", "official"),
}


@pytest.mark.parametrize("name", CHAINS)
def test_spellings_lead_back_to_the_same_bits(folder: Path, tmp_path: Path, name: str) -> None:
    source = at = converted(folder / f"{name}.safetensors", tmp_path / "0.safetensors", "bf16")
    for i, spelling in enumerate(CHAINS[name], 1):
        prefix = "model.diffusion_model." if spelling == "comfyui" else None
        at = converted(at, tmp_path / f"{i}.safetensors", spelling=spelling, prefix=prefix)
    assert_same(at, source)
    others = {str(open_checkpoint(tmp_path / f"{i}.safetensors").tensors) for i in range(len(CHAINS[name]))}
    assert len(others) > 1, "one of them is another spelling"


def test_the_image_encoder_is_put_together_and_taken_apart(folder: Path, tmp_path: Path) -> None:
    source = folder / "image.safetensors"
    fused = converted(source, tmp_path / "fused.safetensors", spelling="official")
    apart = converted(fused, tmp_path / "apart.safetensors", spelling="huggingface")
    assert_same(converted(apart, tmp_path / "again.safetensors", spelling="official"), fused)
    state, found = load_file(source), load_file(fused)
    name = "encoder.layers.1.self_attn.{}_proj.{}"
    original = {key.removeprefix("vision_model."): tensor for key, tensor in state.items()}
    for leaf in ("weight", "bias"):
        rows = torch.cat([original[name.format(part, leaf)] for part in "qkv"])
        assert torch.equal(found[f"visual.transformer.1.attn.to_qkv.{leaf}"], rows)
    assert found["visual.cls_embedding"].shape == (1, 1, tiny.IMAGE.dim)
    picture = torch.rand(1, 20, 30, 3)
    rows = [load_image_encoder(path).encode(picture) for path in (source, fused, apart)]
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])


def test_umt5_leads_back_and_keeps_its_tokenizer(folder: Path, tmp_path: Path) -> None:
    source = folder / "text.safetensors"
    official = converted(source, tmp_path / "official.safetensors", spelling="official")
    back = converted(official, tmp_path / "back.safetensors", spelling="comfyui")
    assert_same(back, source)
    rows = [load_text_encoder(path).encode(["a red star"])[0].text for path in (source, official)]
    assert torch.equal(*rows)


def output(path: Path, name: str = "wan") -> Tensor:
    """Return what a model makes of a prompt, in float32."""
    return velocity(MODELS[name], opened(path, torch.float32), torch.float32)


@pytest.mark.parametrize("target", QUANTISED)
@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_gives_what_its_dequantised_copy_gives(
    folder: Path, tmp_path: Path, name: str, target: str
) -> None:
    small = converted(folder / f"{name}_fp32.safetensors", tmp_path / f"small{suffix(target)}", target)
    copy = converted(small, tmp_path / "copy.safetensors", "fp32")
    before, after = output(folder / f"{name}_fp32.safetensors", name), output(small, name)
    assert torch.equal(after, output(copy, name))
    assert 0 < (after - before).abs().max() < (0.3 if "q4" in target or "q5" in target else 0.1) * before.abs().max()
    old, new = identified(folder / f"{name}_fp32.safetensors"), identified(small)
    assert (old.variant, old.config) == (new.variant, new.config) and not new.unexpected


def test_what_stays_precise_is_what_runs_in_float32(folder: Path, tmp_path: Path) -> None:
    small = open_checkpoint(converted(folder / "wan_fp32.safetensors", tmp_path / "small.safetensors", "fp8_scaled"))
    original = contents(folder / "wan_fp32.safetensors")
    for name, tensor in contents(small.path).items():
        if name in original and small.tensors[name].dtype != "F8_E4M3":
            wanted = original[name] if WAN.float32(name) else original[name].bfloat16()
            assert torch.equal(tensor, wanted), name
    rounded = {name for name, info in small.tensors.items() if info.dtype == "F8_E4M3"} - {"scaled_fp8"}
    assert rounded == {n for n, t in original.items() if n.startswith("blocks.") and t.dim() == 2}


def test_bf16_and_fp16_round_once(folder: Path, tmp_path: Path) -> None:
    original = contents(folder / "qwen_image_fp32.safetensors")
    for target, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        found = contents(converted(folder / "qwen_image_fp32.safetensors", tmp_path / f"{target}.safetensors", target))
        assert found.keys() == original.keys()
        assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in original.items())


def test_kept_layers_stay_as_they_are(folder: Path, tmp_path: Path) -> None:
    source = folder / "wan_fp32.safetensors"
    keep = ("blocks.0.ffn.*", "*.self_attn.q.weight")
    found = contents(converted(source, tmp_path / "a.safetensors", "fp8_scaled", keep=keep))
    for name, tensor in contents(source).items():
        if name.startswith("blocks.0.ffn.") or name.endswith("self_attn.q.weight"):
            assert torch.equal(found[name], tensor), name
    assert found["blocks.1.ffn.0.weight"].dtype == torch.float8_e4m3fn
    with pytest.raises(ValueError, match=r"no tensor that fits --keep blocks\.7\.\*: names are such as"):
        converted(source, tmp_path / "b.safetensors", "fp8_scaled", keep=("blocks.7.*",))


def test_another_spelling_keeps_quantised_layers_as_they_are(folder: Path, tmp_path: Path) -> None:
    for target in ("fp8_scaled", "fp8_scaled_tensor", "int8", "gguf_q4_0"):
        end = suffix(target)
        small = converted(folder / "wan_bf16.safetensors", tmp_path / f"{target}{end}", target)
        same = converted(small, tmp_path / f"{target}_same{end}")
        assert_same(small, same)
        if end == ".safetensors":
            other = converted(small, tmp_path / f"{target}_other{end}", spelling="diffusers")
            assert "blocks.0.attn1.to_q.weight" in open_checkpoint(other).tensors
            assert torch.equal(output(other), output(small))
            assert_same(converted(other, tmp_path / f"{target}_back{end}", spelling="official"), small)


def test_records_in_the_metadata_follow_their_layers(folder: Path, tmp_path: Path) -> None:
    tensors = contents(converted(folder / "wan_bf16.safetensors", tmp_path / "small.safetensors", "int8"))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".comfy_quant")}
    layers = {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    records = {"format_version": "1.0", "layers": {layer: {"format": "int8_tensorwise"} for layer in layers}}
    source = tmp_path / "source.safetensors"
    save_file(tensors, source, {"_quantization_metadata": json.dumps(records)})
    other = converted(source, tmp_path / "other.safetensors", spelling="diffusers")
    assert torch.equal(output(other), output(source))
    said = json.loads(open_checkpoint(other).metadata["_quantization_metadata"])
    assert "blocks.0.attn1.to_q" in said["layers"] and len(said["layers"]) == len(layers)
    plain = open_checkpoint(converted(source, tmp_path / "plain.safetensors", "bf16"))
    assert "_quantization_metadata" not in plain.metadata


def test_gguf_becomes_safetensors_with_whole_shapes(folder: Path, tmp_path: Path) -> None:
    """Tools that write GGUF leave out leading ones, which other readers of safetensors want back."""
    state = load_file(folder / "wan_bf16.safetensors")
    blocks = {
        name: quantised(tensor, "Q8_0") if name.startswith("blocks.") and tensor.dim() == 2
        else tensor.float().reshape(tensor.shape[1:] if tensor.shape[0] == 1 else tensor.shape)
        for name, tensor in state.items()
    }  # fmt: skip
    source = write(tmp_path / "source.gguf", blocks)
    plain = open_checkpoint(converted(source, tmp_path / "plain.safetensors", "bf16"))
    assert {name: info.shape for name, info in plain.tensors.items()} == {n: tuple(t.shape) for n, t in state.items()}
    assert torch.equal(contents(plain.path)["blocks.0.modulation"], state["blocks.0.modulation"])


def test_what_is_rounded_already_is_not_rounded_again_unasked(folder: Path, tmp_path: Path) -> None:
    q8 = converted(folder / "wan_bf16.safetensors", tmp_path / "q8.gguf", "gguf_q8_0")
    with pytest.raises(ValueError, match=r"is quantised already \(20 layers in Q8_0\).* or give --requantise"):
        converted(q8, tmp_path / "fp8.safetensors", "fp8_scaled")
    assert not (tmp_path / "fp8.safetensors").exists()
    again = converted(q8, tmp_path / "fp8.safetensors", "fp8_scaled", requantise=True)
    assert 0 < (output(again) - output(q8)).abs().max() < 0.1 * output(q8).abs().max()
    converted(q8, tmp_path / "wide.gguf", "gguf_bf16")


def test_other_containers_are_sources_too(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "wan_bf16.safetensors")
    torch.save({"state_dict": state}, tmp_path / "model.pth")
    names = sorted(state)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, inside in shards.items():
        save_file({name: state[name] for name in inside}, tmp_path / file)
    wanted = contents(converted(folder / "wan_bf16.safetensors", tmp_path / "wanted.safetensors", "fp8_scaled"))
    index = {"weight_map": {name: file for file, inside in shards.items() for name in inside}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for i, source in enumerate((tmp_path / "model.pth", tmp_path / next(iter(shards)))):
        found = contents(converted(source, tmp_path / f"{i}.safetensors"))
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
        found = contents(converted(source, tmp_path / f"{i}_small.safetensors", "fp8_scaled"))
        assert found.keys() == wanted.keys() and all(torch.equal(found[n].float(), wanted[n].float()) for n in wanted)


def test_a_folder_that_is_read_stays_a_model(folder: Path, tmp_path: Path) -> None:
    source = shutil.copy(folder / "vae.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="would hold two models then"):
        converted(tmp_path, tmp_path / "new.safetensors", "bf16")
    (tmp_path / "beside").mkdir()
    assert identified(converted(tmp_path, tmp_path / "beside" / "new.safetensors", "bf16")).weight_format == "bf16"
    assert identified(tmp_path) == identified(Path(source))


def told(source: Path, out: Path, target: str, **options: object) -> str:
    lines: list[str] = []
    convert(source, out, Wish(target=target), lines.append, **options)
    return "".join(lines)


def test_what_a_user_would_miss_later_is_said(folder: Path, tmp_path: Path) -> None:
    model, text, tokenizer = folder / "wan_bf16.safetensors", folder / "text.safetensors", "left out: its tokenizer"
    assert "ComfyUI's own loader does not" in told(model, tmp_path / "rows.safetensors", "fp8_scaled")
    assert "leave the scales out" in told(model, tmp_path / "int8.safetensors", "int8")
    assert "ComfyUI" not in told(model, tmp_path / "one.safetensors", "fp8_scaled_tensor")
    assert tokenizer not in told(text, tmp_path / "text.safetensors", "bf16")
    assert tokenizer in told(text, tmp_path / "text.gguf", "gguf_fp16")
    facts = {"tokenizer.ggml.model": "t5"}
    carries = write(tmp_path / "carries.gguf", contents(tmp_path / "text.gguf"), facts=facts)
    assert tokenizer in told(carries, tmp_path / "again.safetensors", "bf16")


def test_what_a_killed_conversion_left_is_named_and_kept(folder: Path, tmp_path: Path) -> None:
    left, other = tmp_path / ".vae [1].safetensors.0badf00d.part", tmp_path / ".vae 1.safetensors.0badf00d.part"
    left.write_bytes(b"half")
    other.write_bytes(b"of another file")
    said = told(folder / "vae.safetensors", tmp_path / "vae [1].safetensors", "bf16")
    assert (
        f"{left} (0.00 GB) is left of a conversion that did not end well: delete it" in said and str(other) not in said
    )
    assert left.read_bytes() == b"half"


def test_a_format_may_take_layers_together_and_end_up_smaller(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As compressed ones do, which know their size when they are done."""

    def planes(layers: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
        block = ".".join(next(iter(layers)).split(".")[:2])
        numbers = sum(prod(shape) for shape in layers.values())
        return {f"{block}.packed": TensorInfo("U8", (4 * numbers,))}

    def pack(layers: Mapping[str, Layer]) -> Iterator[tuple[str, Tensor]]:
        [name] = planes({path: layer.shape for path, layer in layers.items()})
        exponents = [layer.at(torch.bfloat16).flatten().view(torch.int16) >> 7 for layer in layers.values()]
        yield name, torch.cat(exponents).to(torch.uint8)

    together = Target(title="", planes=planes, pack=pack, unit=lambda path: ".".join(path.split(".")[:2]))
    monkeypatch.setitem(TARGETS, "together", together)
    source = open_checkpoint(folder / "wan_bf16.safetensors")
    identity = identify(source)
    plan = make_plan(source, identity, EXPORTS["wan21"](source, identity), Wish(target="together"))
    out = tmp_path / "out.safetensors"
    plan.write(out)
    found = open_checkpoint(out)
    assert [name for name in found.tensors if name.endswith("packed")] == ["blocks.0.packed", "blocks.1.packed"]
    assert found.tensors["blocks.1.packed"].shape[0] * 4 == plan.tensors["blocks.1.packed"].shape[0]
    assert out.stat().st_size < plan.size / 2
    for name in ("blocks.1.ffn.2.bias", "head.head.weight"):  # they come after what is smaller than planned
        assert torch.equal(contents(out)[name], contents(source.path)[name])


def test_the_file_says_where_it_came_from(folder: Path, tmp_path: Path) -> None:
    source = folder / "wan_fp32.safetensors"
    first = converted(source, tmp_path / "first.safetensors", "bf16", spelling="diffusers")
    second = open_checkpoint(converted(first, tmp_path / "second.gguf", "gguf_q8_0", keep=("*.ffn.*",)))
    assert second.metadata["title"] == "mine" and open_checkpoint(first).metadata["format"] == "pt"
    assert second.metadata["general.architecture"] == "wan" and "format" not in second.metadata
    one, two = json.loads(second.metadata[CONVERTED_KEY])
    assert one["source"] == source.name and one["bytes"] == source.stat().st_size and one["to"] == "bf16"
    assert (one["format"], one["to_spelling"]) == ("fp32", "diffusers") and len(one["header_sha256"]) == 64
    assert two["source"] == first.name and two["keep"] == ["*.ffn.*"] and two["spelling"] == "diffusers"


def test_digests_of_the_old_bytes_do_not_go_along(tmp_path: Path) -> None:
    digests = {
        "modelspec.hash_sha256": "0",
        "sshs_model_hash": "0",
        "general.file_type": "1",
        "modelspec.title": "kept",
    }
    save_file(state_of(MODELS["wan"]), tmp_path / "a.safetensors", digests)
    found = open_checkpoint(converted(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "bf16")).metadata
    assert found.keys() & digests.keys() == {"modelspec.title"}


def test_a_file_that_would_be_taken_for_another_model_is_not_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = EXPORTS[QWEN_IMAGE]
    untold = {**EXPORTS, QWEN_IMAGE: lambda *of: replace(known(*of), told={})}
    monkeypatch.setattr(conversion, "EXPORTS", untold)
    with pytest.raises(ValueError, match=r"could not tell: it would be taken for "):
        convert(folder / "qwen_image_bf16.safetensors", tmp_path / "o.safetensors", Wish(), str, variant="edit")
    assert not list(tmp_path.iterdir())


# How a file tells that it holds an Edit model, and what becomes of that.
def test_edit_models_stay_edit_models(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "qwen_image_bf16.safetensors")
    (tmp_path / "transformer").mkdir()
    by_name = tmp_path / "qwen_image_edit_2509_bf16.safetensors"
    by_folder, by_mark = tmp_path / "transformer" / "model.safetensors", tmp_path / "x.safetensors"
    save_file(state, by_name)
    save_file(state, by_folder)
    (tmp_path / "transformer" / "config.json").write_text(
        json.dumps({"_class_name": "QwenImageTransformer2DModel", "zero_cond_t": True})
    )
    save_file(state | {"__index_timestep_zero__": torch.zeros(0)}, by_mark)
    out = tmp_path / "out"
    out.mkdir()
    for source, variant in ((by_name, "edit-2509"), (by_folder, "edit-2511"), (by_mark, "edit-2511")):
        assert identified(source).variant == variant
        for target, spelling in (
            ("bf16", "diffusers"), ("fp8_scaled", "comfyui"), ("gguf_q8_0", None), ("same", None), ("fp32", None)
        ):  # fmt: skip
            made = out / f"{source.stem[0]}{target}{variant[-1]}{suffix(target)}"
            new = identified(converted(source, made, target, spelling=spelling))
            assert new.variant == variant and new.config.zero_cond_t == (variant == "edit-2511"), (source, target)
            has_mark = "__index_timestep_zero__" in open_checkpoint(made).tensors
            if spelling == "comfyui" or target.startswith("gguf"):
                assert has_mark == (variant == "edit-2511"), "what ComfyUI tells it by"
            else:
                assert has_mark == (source is by_mark and spelling is None), "diffusers knows no such tensor"
            made.unlink()
    said = convert(folder / "qwen_image_bf16.safetensors", out / "a.safetensors", Wish(), str, variant="edit")
    assert identified(said).variant == "edit"


REFUSED: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "no such format": (lambda f, t: converted(f / "wan_bf16.safetensors", t / "o.safetensors", "q9"), "no format 'q9'"),
    "no such spelling": (
        lambda f, t: converted(f / "vae.safetensors", t / "o.safetensors", spelling="x"),
        "no spelling 'x': choose one of official, diffusers",
    ),
    "fp8 of a VAE": (
        lambda f, t: converted(f / "vae.safetensors", t / "o.safetensors", "fp8_scaled"),
        "has no layers that fp8_scaled",
    ),
    "GGUF of a VAE": (
        lambda f, t: converted(f / "vae.safetensors", t / "o.gguf", "gguf_q8_0"),
        r"\(vae\) are not in use: choose bf16 or fp16",
    ),
    "GGUF without a vision tower": (
        lambda f, t: converted(f / "qwen_text.safetensors", t / "o.gguf", "gguf_q8_0"),
        "hold the language model alone",
    ),
    "GGUF in diffusers' names": (
        lambda f, t: converted(f / "wan_bf16.safetensors", t / "o.gguf", "gguf_q8_0", spelling="diffusers"),
        "names of their own",
    ),
    "wrong ending": (
        lambda f, t: converted(f / "wan_bf16.safetensors", t / "o.safetensors", "gguf_q8_0"),
        r"written as \.gguf, name it o\.gguf",
    ),
    "onto itself": (
        lambda f, t: convert(f / "vae.safetensors", f / "vae.safetensors", Wish(target="bf16"), str, replace=True),
        "is the file that is read",
    ),
    "a prefix that nobody knows": (
        lambda f, t: converted(f / "wan_bf16.safetensors", t / "o.safetensors", prefix="mine."),
        r"nobody would know names such as mine\.blocks.* Choose another prefix",
    ),
    "named like a shard": (
        lambda f, t: converted(f / "vae.safetensors", t / "o-00002-of-00003.safetensors"),
        "name of one shard of several",
    ),
    "a folder of several": (lambda f, t: converted(f, t / "o.safetensors", "bf16"), "holds several checkpoints"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_not_be_is_refused_before_anything_is_written(folder: Path, tmp_path: Path, what: str) -> None:
    attempt, complaint = REFUSED[what]
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match=complaint):
        attempt(folder, tmp_path)
    assert not list(tmp_path.iterdir()) and sorted(folder.iterdir()) == before


def test_files_that_are_no_models_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "wan_bf16.safetensors")
    lora = {f"blocks.0.self_attn.q.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"}
    part = {name: tensor for name, tensor in state.items() if name != "blocks.1.ffn.0.weight"}
    for i, (tensors, complaint) in enumerate((
        (lora, "is a LoRA, not a model"),
        ({"x": torch.zeros(1)}, "is none of the models"),
        (part, r"lacks 1 tensors \(blocks\.1\.ffn\.0\.weight\)"),
    )):  # fmt: skip
        source = tmp_path / f"{i}.safetensors"
        save_file(tensors, source)
        with pytest.raises(ValueError, match=complaint):
            converted(source, tmp_path / "out.safetensors", "bf16")
        assert not (tmp_path / "out.safetensors").exists()
    with pytest.raises(ValueError, match=r"df\.safetensors: .*split_positions divides .*download it again"):
        converted(write_sparse(tmp_path / "df.safetensors", "qwen_df11_transformer"), tmp_path / "out.safetensors")


def test_a_source_that_ends_early_or_holds_nan_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "wan_bf16.safetensors")
    state["blocks.1.ffn.2.weight"][3, 3] = float("nan")
    source, out = tmp_path / "source.safetensors", tmp_path / "out"
    save_file(state, source)
    out.mkdir()
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.2\.weight holds infinite numbers or NaN"):
        converted(source, out / "a.safetensors", "fp8_scaled")
    assert not list(out.iterdir())
    kept = converted(source, out / "b.safetensors", "fp8_scaled", keep=("blocks.1.ffn.2.weight",))
    assert contents(kept)["blocks.1.ffn.2.weight"].isnan().sum() == 1


def test_a_source_that_is_written_to_meanwhile_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    source, out = shutil.copy(folder / "vae.safetensors", tmp_path / "source.safetensors"), tmp_path / "out"
    out.mkdir()

    def tell(text: str) -> None:
        if "%" in text:
            with open(source, "r+b") as file:  # its size stays, as that of a download that has taken its room before
                file.seek(-4, 2)
                file.write(b"late")

    with pytest.raises(ValueError, match="has changed since it was opened: run again"):
        convert(source, out / "vae.safetensors", Wish(target="bf16"), tell)
    assert not list(out.iterdir())


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = folder / "wan_bf16.safetensors", tmp_path / "with space.safetensors"
    digest = hashlib.sha256(source.read_bytes()).digest()
    assert main(["convert", str(source), "--to", "FP8_scaled", "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{out.resolve()}\n"
    assert "wan_bf16.safetensors: wan21 custom, bf16, official" in shown.err
    assert "20 layers quantised" in shown.err and "100% of" in shown.err
    assert main(["inspect", str(out)]) == 0 and "fp8_scaled" in capsys.readouterr().out
    assert main(["convert", str(source), "--to", "bf16", "--out", str(out)]) == 2
    assert "exists: choose another name, or give --force" in capsys.readouterr().err
    assert main(["convert", str(source), "--to", "bf16", "--out", str(out), "--force"]) == 0
    assert identified(out).weight_format == "bf16"
    assert hashlib.sha256(source.read_bytes()).digest() == digest
    assert [file.name for file in tmp_path.iterdir()] == [out.name]


def test_a_vae_runs_the_same_in_other_names(folder: Path, tmp_path: Path) -> None:
    other = converted(folder / "vae.safetensors", tmp_path / "vae.safetensors", spelling="diffusers")
    latent = torch.randn(1, tiny.VAE.z_dim, 1, 4, 4)
    assert torch.equal(load_vae(other).decode(latent), load_vae(folder / "vae.safetensors").decode(latent))
