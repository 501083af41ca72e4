"""The UMT5 encoder: the reference's numbers, every way a file may store them, laziness, caching, streaming."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from wanqwen.core import host
from wanqwen.core.memory.trace import peak_bytes
from wanqwen.core.ops import formats
from wanqwen.core.text import EmbeddingCache, Footprint, Part, Placement
from wanqwen.core.weights import keymap
from wanqwen.core.weights.reader import open_checkpoint
from wanqwen.core.weights.tensors import read_tensors
from wanqwen.wan import text_encoder as module
from wanqwen.wan.config import TextEncoderConfig
from wanqwen.wan.identify import identify
from wanqwen.wan.keymap import TEXT_ENCODER
from wanqwen.wan.text_encoder import TextEncoder, needed, working_bytes
from wanqwen.wan.tokenizer import Tokenizer

from ..core.memory.conftest import cuda_runtime  # noqa: F401 - a fixture
from ..core.stand_in import StandIn, limits, nothing_is_left, record_reads, rest, stand_in
from .test_tokenizer import spiece  # noqa: F401 - a fixture

GOLDEN = Path(__file__).parents[1] / "fixtures/goldens/umt5_encoder_tiny.safetensors"
TOLERANCE = 2e-5  # max |out - ref| / max |ref|, float32
CPU = torch.device("cpu")
PROMPTS = ["a red disc moves left", "a blue star moves up and a green square moves down"]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with safe_open(GOLDEN, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


@pytest.fixture(scope="module")
def weights(golden) -> dict[str, Tensor]:
    return {name.removeprefix("weights/"): t for name, t in golden.items() if name.startswith("weights/")}


@pytest.fixture(scope="module")
def config() -> TextEncoderConfig:
    with safe_open(GOLDEN, "pt") as file:
        stated = json.loads(file.metadata()["config"])
    return TextEncoderConfig(**{name: stated[name] for name in TextEncoderConfig.__dataclass_fields__})


def to_huggingface(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    rename = keymap.Renamer(keymap.table(TEXT_ENCODER))
    return {rename(name): tensor for name, tensor in weights.items()}


def quantise(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a scaled fp8 file of the weights as ComfyUI's is, and the weights that it stands for."""
    stored, meant = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in to_huggingface(weights).items():
        if tensor.dim() == 2 and "shared" not in name and "relative" not in name:
            scale = tensor.abs().max() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[name.replace(".weight", ".scale_weight")] = scale
            meant[name] = formats.dequantise(stored[name], scale, torch.float32)
        else:
            stored[name] = tensor.half()
            meant[name] = stored[name].float()
    return stored, meant


def make_encoder(path: Path, tokenizer: Tokenizer, **options) -> TextEncoder:
    checkpoint = open_checkpoint(path)
    return TextEncoder(checkpoint, identify(checkpoint), tokenizer, **options)


def save(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(spiece) -> Tokenizer:  # noqa: F811
    return Tokenizer.from_spiece(spiece)


@pytest.fixture
def official(tmp_path, weights) -> Path:
    return save(weights, tmp_path / "official.safetensors")


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def rows_of(encoder: TextEncoder, placement: Placement | None = None) -> list[Tensor]:
    return [conditioning.text for conditioning in encoder.encode(PROMPTS, placement)]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, cuda_runtime: object) -> StandIn:  # noqa: F811
    return stand_in(monkeypatch)


@pytest.fixture
def load(tmp_path: Path, config: TextEncoderConfig) -> Callable[[dict[str, Tensor], torch.dtype], Part]:
    """Open weights under their official names."""

    def load(weights: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Part:
        checkpoint = open_checkpoint(save(weights, tmp_path / "loaded.safetensors"))
        return module.load(config, checkpoint, {name: name for name in weights}, dtype=dtype)

    return load


def run(part: Part, ids: list[int]) -> Tensor:
    with torch.no_grad(), part.on(Placement(), lambda: 0) as encode:
        return encode(part.embed(ids))


@pytest.mark.parametrize("row", [0, 1])
def test_valid_tokens_alone_equal_the_trimmed_reference(golden, weights, load, row):
    num_valid = int(golden["in/padded/mask"][row].sum())
    ids = golden["in/padded/ids"][row, :num_valid].tolist()
    expected = golden[f"out/padded/trimmed{row}"]
    assert expected.shape[0] == num_valid
    assert relative_error(run(load(weights), ids)[0], expected) <= TOLERANCE


def test_long_text_equals_the_reference(golden, weights, load):
    found = run(load(weights), golden["in/long/ids"][0].tolist())
    assert relative_error(found, golden["out/long/full"]) <= TOLERANCE


def test_bfloat16_is_near_float32(golden, weights, load):
    part = load(weights, torch.bfloat16)
    assert {p.dtype for p in part.loaded.module.parameters()} == {torch.bfloat16}
    found = run(part, golden["in/long/ids"][0].tolist()).float()
    error = (found - golden["out/long/full"]).square().mean().sqrt() / golden["out/long/full"].square().mean().sqrt()
    assert error < 2e-2


def test_encode_gives_float32_rows_of_the_valid_tokens(official, tokenizer):
    encoder = make_encoder(official, tokenizer)
    for prompt, rows in zip(PROMPTS, rows_of(encoder), strict=True):
        assert rows.shape == (1, len(encoder.tokenise(prompt).ids), 32)
        assert rows.dtype == torch.float32 and rows.device == CPU and not rows.requires_grad
        assert rows.std() > 0.1


def test_every_spelling_and_container_gives_the_same_rows(tmp_path, official, weights, tokenizer, spiece):  # noqa: F811
    expected = rows_of(make_encoder(official, tokenizer))
    huggingface = to_huggingface(weights)
    torch.save(weights, tmp_path / "models_t5.pth")
    comfy = huggingface | {"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}
    both_embeddings = huggingface | {"encoder.embed_tokens.weight": huggingface["shared.weight"].clone()}
    second_embedding = {name: tensor for name, tensor in both_embeddings.items() if name != "shared.weight"}
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    save(huggingface, folder / "model.safetensors")
    files = [
        tmp_path / "models_t5.pth",
        save(comfy, tmp_path / "comfy.safetensors"),
        save(both_embeddings, tmp_path / "tied.safetensors"),
        save(second_embedding, tmp_path / "second.safetensors"),
        folder,
    ]
    for path in files:
        for found, rows in zip(rows_of(make_encoder(path, tokenizer)), expected, strict=True):
            assert torch.equal(found, rows), path


def test_embedded_tokenizer_and_weights_come_from_one_file(tmp_path, weights, spiece):  # noqa: F811
    tensors = to_huggingface(weights) | {"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}
    checkpoint = open_checkpoint(save(tensors, tmp_path / "comfy.safetensors"))
    encoder = TextEncoder(checkpoint, identify(checkpoint), Tokenizer.find(checkpoint, read_tensors))
    assert rows_of(encoder)[0].shape == (1, len(encoder.tokenise(PROMPTS[0]).ids), 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_fp8_equals_the_dequantised_weights(tmp_path, weights, tokenizer, dtype):
    stored, meant = quantise(weights)
    scaled = make_encoder(save(stored, tmp_path / "fp8.safetensors"), tokenizer, dtype=dtype)
    plain = make_encoder(save(meant, tmp_path / "meant.safetensors"), tokenizer, dtype=dtype)
    assert scaled.identity.weight_format == "fp8_scaled"
    for found, expected in zip(rows_of(scaled), rows_of(plain), strict=True):
        assert torch.equal(found, expected)


def test_plain_fp8_equals_its_upcast(tmp_path, weights, tokenizer):
    stored = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in weights.items()}
    cast = {name: tensor.to(torch.float32) for name, tensor in stored.items()}
    found = rows_of(make_encoder(save(stored, tmp_path / "fp8.safetensors"), tokenizer))
    expected = rows_of(make_encoder(save(cast, tmp_path / "cast.safetensors"), tokenizer))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_weights_are_read_at_the_first_new_prompt_only(official, tokenizer, monkeypatch):
    read, runs = record_reads(monkeypatch), []
    original = module._Rows.forward
    monkeypatch.setattr(module._Rows, "forward", lambda self, x: (runs.append(1), original(self, x))[1])
    cache = EmbeddingCache()
    encoder = make_encoder(official, tokenizer, cache=cache)
    encoder.tokenise(PROMPTS[0])
    encoder.footprints()
    assert read == [] and not runs.clear()
    first = rows_of(encoder)
    assert len(runs) == 2 and sorted(read) == sorted(encoder.identity.names.values())
    again = rows_of(encoder)
    assert len(runs) == 2 and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    encoder.encode(["  a red   disc moves\nleft ", PROMPTS[1]])  # the same once cleaned
    assert len(runs) == 2
    encoder.encode(["a red disc", "a red disc"])
    assert len(runs) == 3

    read.clear()  # the same file opened once more, with the cache that is still there
    rows_of(make_encoder(official, tokenizer, cache=cache))
    assert read == [] and len(runs) == 3
    make_encoder(official, tokenizer, dtype=torch.bfloat16, cache=cache).encode(PROMPTS[:1])
    assert len(runs) == 4


def test_another_file_is_not_served_from_the_cache(tmp_path, official, weights, tokenizer):
    changed = {name: tensor * 1.5 if "fc2" in name else tensor for name, tensor in weights.items()}
    cache = EmbeddingCache()
    first = rows_of(make_encoder(official, tokenizer, cache=cache))
    second = rows_of(make_encoder(save(changed, tmp_path / "changed.safetensors"), tokenizer, cache=cache))
    assert not torch.equal(first[0], second[0])


def test_prompts_beyond_the_cache_are_still_returned(official, tokenizer):
    encoder = make_encoder(official, tokenizer, cache=EmbeddingCache(max_bytes=0))
    expected = rows_of(make_encoder(official, tokenizer))
    assert all(torch.equal(a, b) for a, b in zip(rows_of(encoder), expected, strict=True))


def held(encoder: TextEncoder) -> Part:
    [part] = encoder._held.values()
    return part


def footprint(encoder: TextEncoder) -> Footprint:
    """Return what the prompts take."""
    return needed(encoder.config, encoder.dtype_on(CPU), max(len(encoder.tokenise(prompt).ids) for prompt in PROMPTS))


def stored(weights: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return the weights as a file of this kind holds them."""
    if kind == "fp8 scaled":
        return quantise(weights)[0]
    return {name: tensor.to(getattr(torch, kind)) for name, tensor in weights.items()}


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "fp8 scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_that_stay_or_stream_give_the_rows_of_a_run_in_ram(
    tmp_path, weights, tokenizer, device, monkeypatch, kind, dtype
):
    path = save(stored(weights, kind), tmp_path / "stored.safetensors")
    encoder = make_encoder(path, tokenizer, dtype=dtype, cache=EmbeddingCache(max_bytes=0))
    rows = []
    for limit, (num_streaming, num_slots) in limits(encoder._load(dtype), footprint(encoder).working).items():
        rows.append(rows_of(encoder, Placement(max_vram_bytes=limit)))
        assert (len(device.plans[-1].streaming), device.plans[-1].num_slots) == (num_streaming, num_slots)
        assert all(p.is_meta for p in held(encoder).loaded.module.parameters())
        assert nothing_is_left(held(encoder))
        device.spoil()
    with torch.inference_mode():  # as ComfyUI runs its nodes
        rows.append(rows_of(encoder, Placement(max_vram_bytes=limit)))
    monkeypatch.undo()
    rows += [rows_of(encoder), rows_of(make_encoder(path, tokenizer, dtype=dtype))]
    for found in rows:
        assert all(torch.equal(a, b) for a, b in zip(found, rows[0], strict=True))


def test_an_exception_while_streaming_leaves_the_encoder_usable(official, tokenizer, device, monkeypatch):
    encoder = make_encoder(official, tokenizer, cache=EmbeddingCache(max_bytes=0))
    limit = Placement(max_vram_bytes=footprint(encoder).streamed(1))
    expected, before = rows_of(encoder, limit), rest(held(encoder))

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(host, "check_interrupt", interrupt)
    with pytest.raises(KeyboardInterrupt):
        encoder.encode(PROMPTS, limit)
    assert rest(held(encoder)) == before and nothing_is_left(held(encoder))
    monkeypatch.setattr(host, "check_interrupt", lambda: None)
    assert all(torch.equal(a, b) for a, b in zip(rows_of(encoder, limit), expected, strict=True))


def test_too_little_memory_is_said_before_anything_moves(official, tokenizer, device):
    with pytest.raises(ValueError, match=r"The text encoder can't run in 1000 bytes .* or run it on the CPU"):
        make_encoder(official, tokenizer).encode(PROMPTS, Placement(max_vram_bytes=1000))
    encoder = make_encoder(official, tokenizer, placement=Placement(max_vram_bytes=1000))
    with pytest.raises(ValueError, match="can't run in 1000 bytes"):
        encoder.encode(PROMPTS)
    assert len(encoder.encode(PROMPTS, Placement())) == 2


def test_inference_mode_does_not_spoil_the_encoder(official, tokenizer):
    expected = rows_of(make_encoder(official, tokenizer))
    encoder = make_encoder(official, tokenizer, cache=EmbeddingCache(max_bytes=0))
    with torch.inference_mode():  # as ComfyUI runs its nodes
        inside = rows_of(encoder)
    for rows in (inside, rows_of(encoder)):
        assert all(torch.equal(a, b) for a, b in zip(rows, expected, strict=True))


def test_release_frees_the_weights_and_the_next_prompt_reads_them_again(official, tokenizer, monkeypatch):
    read = record_reads(monkeypatch)
    encoder = make_encoder(official, tokenizer, cache=EmbeddingCache(max_bytes=0))
    first = rows_of(encoder)
    encoder.release()
    assert encoder._held == {}
    assert torch.equal(rows_of(encoder)[1], first[1]) and len(read) == 2 * len(encoder.identity.names)


def test_ten_thousand_words_are_cut_to_512_with_a_notice(official, tokenizer, caplog):
    encoder = make_encoder(official, tokenizer)
    with caplog.at_level(logging.WARNING):
        [conditioning] = encoder.encode(["red " * 10_000])
    assert conditioning.text.shape == (1, 512, 32)
    assert any("were cut off" in record.message for record in caplog.records)
    assert "were cut off" in encoder.tokenise("red " * 10_000).notice


def test_umt5_xxl_streams_within_two_gigabytes():
    footprint = needed(TextEncoderConfig(), torch.bfloat16)
    block_bytes = 2 * (4 * 4096 * 4096 + 3 * 4096 * 10240 + 2 * 4096 + 32 * 64)
    assert footprint.blocks == (block_bytes,) * 24
    print(f"{footprint.working / 2**20:.0f} MiB beside the weights, {footprint.streamed(2) / 2**20:.0f} with two slots")
    assert footprint.streamed(2) < 2 << 30


@pytest.mark.parametrize("num_tokens", [7, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_work_space_is_what_a_run_takes(weights, load, config, dtype, num_tokens):
    part = load(weights, dtype)
    rows = part.embed([5] * num_tokens)
    with part.on(Placement(), lambda: 0) as encode:
        measured = peak_bytes(lambda: encode(rows.clone()), CPU)
    assert measured <= working_bytes(config, dtype, num_tokens) <= 1.05 * measured


def test_incomplete_or_strange_weights_are_named(load, weights):
    lacking = {name: tensor for name, tensor in weights.items() if name != "blocks.1.attn.q.weight"}
    with pytest.raises(ValueError, match=r"1 missing: encoder\.block\.1\.layer\.0\.SelfAttention\.q\.weight"):
        load(lacking)
    with pytest.raises(ValueError, match=r"1 not part of this model: blocks\.9\.norm1\.weight"):
        load(weights | {"blocks.9.norm1.weight": torch.ones(32)})
    with pytest.raises(ValueError, match=r"final_layer_norm\.weight is \[31\] instead of \[32\]"):
        load(weights | {"norm.weight": torch.ones(31)})
    with pytest.raises(ValueError, match=r"stored in a way that can't be read: I8"):
        load(weights | {"norm.weight": torch.ones(32, dtype=torch.int8)})
    with pytest.raises(ValueError, match=r"can't be read: encoder\.block\.9\.layer\.0\.SelfAttention\.q\.scale_weight"):
        load(weights | {"blocks.9.attn.q.scale_weight": torch.ones(())})


def test_a_file_that_lacks_weights_or_is_another_model_is_refused_unread(
    tmp_path, official, weights, tokenizer, monkeypatch
):
    read = record_reads(monkeypatch)
    lacking = {name: tensor for name, tensor in weights.items() if name != "blocks.1.attn.o.weight"}
    with pytest.raises(
        ValueError, match=r"not complete as the UMT5 encoder of Wan 2\.1\. Missing: blocks\.1\.attn\.o\.weight"
    ):
        make_encoder(save(lacking, tmp_path / "lacking.safetensors"), tokenizer)
    checkpoint = open_checkpoint(official)
    vae = replace(identify(checkpoint), role="vae", variant="vae")
    with pytest.raises(ValueError, match=r"is a vae \(vae\), expected a text encoder"):
        TextEncoder(checkpoint, vae, tokenizer)
    assert read == []


def test_tokenizer_of_another_vocabulary_is_refused(official, tokenizer):
    other = Tokenizer(lambda text: [3], size=32_100, identity="t5", source="t5")
    with pytest.raises(ValueError, match=r"t5 has 32100 pieces, .* knows 300: they don't belong together"):
        make_encoder(official, other)
