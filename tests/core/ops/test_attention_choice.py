"""Which attention a run takes: what was chosen, where it works; PyTorch's own otherwise, and why is said."""

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor
from wanqwen import kernels
from wanqwen.core import planning, runtime
from wanqwen.core.memory.trace import peak_bytes
from wanqwen.core.ops import attention_choice
from wanqwen.core.ops.attention import attention, attention_int8
from wanqwen.core.ops.attention_choice import BACKENDS, Attended, Faster, choose_attention
from wanqwen.core.types import ATTENTION_CHOICES, Conditioning, FastPaths, SampleRequest
from wanqwen.loading import DEMO_FOLDER, load_model

CPU, BF16 = torch.device("cpu"), torch.bfloat16
ASKED = frozenset([Attended(queries=70, keys=90), Attended(queries=70, keys=33, is_biased=True)])


@pytest.fixture(autouse=True)
def few_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    attention_choice.try_attention.cache_clear()
    monkeypatch.setattr(attention_choice, "LEAST_KEYS", 20)
    monkeypatch.setattr(attention_choice, "USUAL", (33, 40))
    yield
    attention_choice.try_attention.cache_clear()


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU pass for a card where it is asked for packages."""
    monkeypatch.setattr(attention_choice, "_device_type", lambda device: "cuda")


def offer(monkeypatch: pytest.MonkeyPatch, call: Callable) -> None:
    """Let a function be found as the int8 kernel."""
    monkeypatch.setattr(kernels, "find", lambda name, *tensors: (call, f"kernel {name}"))


def install(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Callable) -> None:
    """Let a package be there that holds these functions."""
    module = ModuleType(name)
    module.__spec__ = torch.__spec__  # not None: it can be found
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


def refusal(mode: str, width: int = 64, dtype: torch.dtype = BF16) -> str:
    found, said = choose_attention(mode, width, dtype, CPU, ASKED)
    assert found is attention and len(said) == 1
    return said[0]


@pytest.mark.parametrize("mode", ["auto", "sdpa"])
def test_nobody_gets_8_bits_who_did_not_choose_them(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, attention_int8)
    assert choose_attention(mode, 64, BF16, torch.device("cuda"), ASKED) == (attention, [])
    assert FastPaths().attention == "auto" and {"auto", "sdpa", *BACKENDS} == set(ATTENTION_CHOICES)


def test_a_choice_that_can_t_be_had_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "in place of flash-attn: runs on CUDA cards, not on cpu." in refusal("flash")
    monkeypatch.setattr(kernels, "is_interpreted", lambda: False)
    monkeypatch.setattr(kernels, "triton_version", lambda: None)
    assert "in place of the int8 kernel: Triton is not installed" in refusal("int8")
    monkeypatch.setattr(attention_choice, "_device_type", lambda device: "cuda")
    monkeypatch.setattr(attention_choice, "find_spec", lambda name: None)
    assert "in place of SageAttention: the package sageattention is not installed." in refusal("sage")
    assert "the package flash_attn is not installed" in refusal("flash")
    assert "takes bfloat16 and float16, not float32" in refusal("sage", dtype=torch.float32)
    assert "at most 128 numbers, not 192" in refusal("flash", width=192)


def test_what_works_is_taken_for_what_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []

    def counted(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        lengths.append((q.shape[1], k.shape[1], bias is not None))
        return attention_int8(q, k, v, bias)

    offer(monkeypatch, counted)
    found, said = choose_attention("int8", 64, BF16, CPU, ASKED)
    assert isinstance(found, Faster) and found.call is counted
    assert said[0].startswith("Attention to 20 tokens or more by the int8 kernel: on random numbers 0.")
    assert lengths == [(70, 33, True), (70, 90, False)], "tried on the lengths of the run"
    assert choose_attention("int8", 64, BF16, CPU, ASKED) == (found, said) and len(lengths) == 2, "tried once"
    q, k, v = torch.randn(3, 1, 40, 2, 64)
    lengths.clear()
    assert torch.equal(found(q, k[:, :19], v[:, :19]), attention(q, k[:, :19], v[:, :19])) and not lengths
    assert torch.equal(found(q, k, v, torch.zeros(1, 40)), attention_int8(q, k, v)) and len(lengths) == 1


def test_keys_with_a_bias_go_to_pytorch_s_own_where_a_package_takes_none() -> None:
    q, k, v = torch.randn(3, 1, 40, 2, 64)
    bias = torch.randn(1, 40)
    faster = Faster(
        name="flash", call=lambda *arguments: pytest.fail("it takes no bias"), takes_bias=False, least_keys=1
    )
    assert torch.equal(faster(q, k, v, bias), attention(q, k, v, bias))


def test_a_run_without_anything_to_serve_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, attention_int8)
    found, said = choose_attention("int8", 64, BF16, CPU, frozenset([Attended(queries=900, keys=19)]))
    assert found is attention and "none in this run is one that the int8 kernel serves" in said[0]


def _raises(*arguments):
    raise RuntimeError("no compiler\nat all")


def _is_full(*arguments):
    raise RuntimeError("Triton Error [CUDA]: out of memory")


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (_is_full, "could not be tried: the card had no memory left"),
        (_raises, "failed with RuntimeError: no compiler"),
        (
            lambda q, k, v, bias=None: torch.full_like(q, torch.nan),
            "differs by nan of the result's size for 70 queries",
        ),
        (lambda q, k, v, bias=None: torch.zeros_like(q), "differs by 1 of the result's size"),
        (lambda q, k, v, bias=None: attention(q, k.flip(2), v.flip(2), bias), "differs by"),
        (lambda q, k, v, bias=None: attention(q, k, v, bias).transpose(1, 2), "gave (1, 2, 70, 64)"),
        (lambda q, k, v, bias=None: attention(q, k, v, bias).float(), "gave (1, 70, 2, 64) in torch.float32"),
        (lambda q, k, v, bias=None: attention_int8(q, k, v), "differs by"),
    ],
    ids=["full", "raises", "NaN", "black", "wrong heads", "shape", "dtype", "bias forgotten"],
)
def test_what_does_not_work_is_not_taken_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: Callable, complaint: str
) -> None:
    offer(monkeypatch, broken)
    with caplog.at_level(logging.WARNING):
        said = refusal("int8")
    assert f"PyTorch's own in place of the int8 kernel, which {complaint}" in said
    assert complaint in caplog.text and "takes its place" in caplog.text


@pytest.mark.usefixtures("on_a_card")
def test_sageattention_is_called_as_its_signature_says(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
        """The signature of sageattention 2.2; "NHD" is [batch, tokens, heads, width]."""
        calls.append((tensor_layout, is_causal, q.shape, k.shape, kwargs))
        assert q.dtype in (torch.float16, torch.bfloat16) and not kwargs
        return attention_int8(q, k, v) if tensor_layout == "NHD" else q

    install(monkeypatch, "sageattention", sageattn=sageattn)
    found, said = choose_attention("sage", 64, BF16, CPU, ASKED)
    assert "by SageAttention: on random numbers 0." in said[0]
    q, k = torch.randn(2, 30, 3, 64).bfloat16(), torch.randn(1, 41, 3, 64).bfloat16()
    assert torch.equal(found(q, k, k), attention_int8(q, k, k))
    assert calls == [
        ("NHD", False, (1, 70, 2, 64), (1, 90, 2, 64), {}), ("NHD", False, (2, 30, 3, 64), (2, 41, 3, 64), {}),
    ]  # fmt: skip
    meta = found(q.to("meta"), k.to("meta"), k.to("meta"))
    assert meta.shape == q.shape and meta.is_meta and len(calls) == 2


@pytest.mark.usefixtures("on_a_card")
def test_flash_attn_is_called_as_its_signature_says(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        """The signature of flash-attn 2.8; tensors are [batch, tokens, heads, width], in batches of the same number."""
        assert not causal and not dropout_p and q.dtype == BF16 and len(q) == len(k) == len(v)
        shapes.append(k.shape)
        return attention(q, k, v)

    install(monkeypatch, "flash_attn", flash_attn_func=flash_attn_func)
    found, said = choose_attention("flash", 64, BF16, CPU, ASKED)
    assert "by flash-attn: on random numbers 0.00%" in said[0]
    q, k = torch.randn(2, 30, 3, 64).bfloat16(), torch.randn(1, 41, 3, 64).bfloat16()
    assert torch.equal(found(q, k, k), attention(q, k, k)) and shapes[-1] == (2, 41, 3, 64)


@pytest.mark.usefixtures("on_a_card")
def test_a_package_that_can_t_be_imported_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "sageattention")

    def fail(name: str) -> ModuleType:
        raise ImportError("undefined symbol: torch")

    monkeypatch.setattr(attention_choice, "import_module", fail)
    assert "can't be imported: ImportError: undefined symbol: torch" in refusal("sage")
    monkeypatch.undo()


@pytest.mark.parametrize(("file", "width", "frames"), [("wan_dit", 96, 3), ("qwen_dit", 128, 1)])
def test_a_run_is_tried_on_its_own_lengths_and_says_so(
    file: str, width: int, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = load_model(DEMO_FOLDER / f"{file}.safetensors")
    prompts = [Conditioning(text=torch.randn(1, rows, width)) for rows in (40, 4)]
    request = SampleRequest(
        latent=torch.zeros(1, 16, frames, 16, 8), positive=prompts[0], negative=prompts[1], steps=2, guidance=(2.0,)
    )
    scene = runtime.scene_of(handle, request, torch.float32)
    asked = planning.attended(runtime.loaded_of(handle, torch.float32).module, scene)
    tokens = frames * 32
    if file == "wan_dit":
        assert {(one.queries, one.keys) for one in asked} >= {(tokens, tokens)}
    else:
        assert {(one.queries, one.keys) for one in asked} == {
            (rows, tokens + text) for text in (40, 4) for rows in (tokens, tokens + text)
        }
    offer(monkeypatch, attention_int8)
    said: list[str] = []
    found = runtime.generate(replace(handle, fast=FastPaths(attention="int8")), request, tell=said.append)
    assert any("by the int8 kernel" in line for line in said)
    exact = runtime.generate(handle, request)
    assert not torch.equal(found, exact) and (found - exact).norm() < 0.02 * exact.norm()
    offer(monkeypatch, lambda q, *others: q * torch.nan)
    attention_choice.try_attention.cache_clear()
    assert torch.equal(runtime.generate(replace(handle, fast=FastPaths(attention="int8")), request), exact)


def test_the_memory_of_int8_is_planned() -> None:
    pytest.importorskip("triton")
    handle = load_model(DEMO_FOLDER / "wan_dit.safetensors")
    config, shape = handle.identity.config, (1, 16, 9, 64, 64)
    conditionings = planning.conditionings_of(handle.family, config, shape, (5, 4))
    scene = planning.Scene(
        family=handle.family, config=config, latent_shape=shape, dtype=BF16, conditionings=conditionings
    )
    kernel = kernels.KERNELS["attention_int8"].load("attention_int8")
    faster = Faster(name="int8", call=kernel, takes_bias=True, least_keys=1)
    loaded = runtime.loaded_of(handle, BF16)
    plain, int8 = (
        planning.working_bytes(loaded, replace(scene, ops=replace(scene.ops, attention=call)), interleaved=False)
        for call in (attention, faster)
    )
    assert plain < int8
    q = torch.empty(2, 300, 3, 64, dtype=BF16, device="meta")
    rounded, means = 2 * 2 * 300 * 3 * (64 + 4), 2 * 3 * 64 * 4  # q and k, each row with a scale; keys' means
    assert peak_bytes(lambda: faster(q, q, q)) == rounded + means + q.nbytes


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="attention is 'fast': choose auto, sdpa, flash, sage, int8"):
        FastPaths(attention="fast")
