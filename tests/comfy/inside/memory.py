"""What ComfyUI is told of our memory, and what it gets back. Blocks stream here, from RAM to RAM."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import comfy.model_management as management
import comfy.model_patcher
import torch
from wanqwen.core import host, planning, runtime
from wanqwen.core.memory import kept, resident
from wanqwen.core.types import Conditioning, MemoryOptions, ModelHandle, SampleRequest
from wanqwen.loading import DEMO_FOLDER, load_model, load_vae

CPU = torch.device("cpu")
STREAMED = MemoryOptions(swapped=2, source="staged")
resident.computes_in_ram = lambda device: False
runtime.machine_of = lambda device: replace(planning.machine_of(device), needs_pinning=True)


def demo(name: str, memory: MemoryOptions = STREAMED) -> ModelHandle:
    return replace(load_model(DEMO_FOLDER / f"{name}.safetensors"), memory=memory)


def sample(handle: ModelHandle) -> torch.Tensor:
    text = torch.ones(1, 3, handle.identity.config.text_dim)
    latent = torch.zeros(1, 16, 1, 8, 8)
    return runtime.generate(handle, SampleRequest(latent=latent, positive=Conditioning(text=text), steps=1))


def ours() -> list[object]:
    return [model for model in management.loaded_models() if getattr(model, "is_needed_by_wanqwen", False)]


@contextmanager
def full_device() -> Iterator[None]:
    """Have ComfyUI find no free memory."""
    original = management.get_free_memory
    management.get_free_memory = lambda device=None, torch_free_too=False: (0, 0) if torch_free_too else 0
    try:
        yield
    finally:
        management.get_free_memory = original


def stock_model() -> comfy.model_patcher.ModelPatcher:
    return comfy.model_patcher.ModelPatcher(torch.nn.Linear(8, 8), load_device=CPU, offload_device=CPU)


def test_what_a_run_keeps_is_listed_and_unloading_models_gives_it_back() -> None:
    management.unload_all_models()
    handle = demo("wan_dit")
    before = sample(handle)
    [entry] = ours()
    loaded = runtime.loaded_of(handle, torch.float32)
    blocks = [layout.nbytes for layout in loaded.layouts()[:-1]]
    assert entry.model_size() == kept.idle_bytes() == loaded.kept_bytes
    assert loaded.kept_bytes in {a + b for i, a in enumerate(blocks) for b in blocks[i + 1 :]}
    assert entry.loaded_size() == 0
    management.unload_all_models()
    assert not ours() and kept.idle_bytes() == 0 and not loaded.masters
    assert torch.equal(sample(handle), before) and len(ours()) == 1


def test_weights_that_were_converted_for_a_cpu_are_given_back_too() -> None:
    management.unload_all_models()
    resident.computes_in_ram = lambda device: True
    try:
        handle = replace(demo("qwen_dit"), dtype=torch.bfloat16)
        before = sample(handle)
        held = kept.idle_bytes()
        assert held > 0 and ours()[0].model_size() == held
        management.unload_all_models()
        assert kept.idle_bytes() == 0
        assert all(tensor.is_meta for tensor in runtime.loaded_of(handle, torch.bfloat16).module.parameters())
        assert torch.equal(sample(handle), before) and kept.idle_bytes() == held
    finally:
        resident.computes_in_ram = lambda device: False


def test_a_vae_is_given_back_and_comes_again() -> None:
    management.unload_all_models()
    vae = load_vae(DEMO_FOLDER / "wan_vae.safetensors")
    latent = torch.randn(1, 16, 2, 4, 4)
    before = vae.decode(latent)
    assert ours()[0].model_size() == vae.kept_bytes > 0
    management.unload_all_models()
    assert kept.idle_bytes() == 0 and vae.kept_bytes == 0
    assert torch.equal(vae.decode(latent), before)


def test_another_model_that_needs_room_gets_as_much_of_ours_as_it_needs() -> None:
    """ComfyUI's own loading, on a device that says it is full."""
    management.unload_all_models()
    handle = demo("wan_dit")
    before = sample(handle)
    masters = runtime.loaded_of(handle, torch.float32).masters
    first, last = (slab.bytes.numel() for slab in masters.values())
    with full_device():
        management.free_memory(stock_model().model_size(), CPU)
    assert kept.idle_bytes() == first and len(ours()) == 1 and len(masters) == 1
    assert torch.equal(sample(handle), before) and kept.idle_bytes() == first + last
    with full_device():
        management.free_memory(first + last, CPU)
    assert kept.idle_bytes() == 0 and not ours()


def test_what_leaves_a_card_takes_ours_only_where_ram_has_no_room_for_it() -> None:
    management.unload_all_models()
    handle = demo("wan_dit")
    sample(handle)
    held, spare = kept.idle_bytes(), host.available_ram
    [entry] = [listed for listed in management.current_loaded_models if listed.model in ours()]
    entry.device = torch.device("meta")  # any that is not RAM
    try:
        with full_device():
            management.free_memory(1 << 20, entry.device)
            assert kept.idle_bytes() == held
            host.available_ram = lambda: host.MIN_RAM
            management.free_memory(1 << 20, entry.device)
            assert 0 < kept.idle_bytes() < held
            management.free_memory(1 << 40, entry.device)
            assert kept.idle_bytes() == 0 and not ours()
    finally:
        host.available_ram, entry.device = spare, CPU


def test_our_own_runs_do_not_throw_out_what_the_next_one_counts_on() -> None:
    management.unload_all_models()
    one, two = demo("wan_dit"), demo("qwen_dit")
    sample(one)
    held = kept.idle_bytes()
    other = stock_model()
    management.load_models_gpu([other])
    with full_device():
        host.make_room(1 << 40, CPU)
    assert kept.idle_bytes() == held
    assert management.loaded_models() == ours(), "others leave"
    sample(two)
    assert kept.idle_bytes() > held and len(ours()) == 1


def test_two_models_taking_turns_do_not_grow() -> None:
    management.unload_all_models()
    pair, held = (demo("wan_dit"), demo("qwen_dit")), []
    for _ in range(20):
        for handle in pair:
            sample(handle)
        held.append((kept.idle_bytes(), len(management.current_loaded_models)))
    assert set(held[1:]) == {held[1]} and held[1][1] == 1, held


def test_what_nobody_holds_any_more_is_not_listed() -> None:
    """As after `free model and cache`: the outputs of loaders are gone, and with them all of ours."""
    management.unload_all_models()
    handle = demo("wan_dit")
    sample(handle)
    [entry] = ours()
    assert entry.model_size() > 0
    del handle
    gc.collect()
    assert entry.model_size() == kept.idle_bytes() == 0


def test_nothing_is_taken_from_a_run() -> None:
    """ComfyUI may ask for room while we compute; what computes stays."""
    management.unload_all_models()
    handle = demo("wan_dit")
    before = sample(handle)
    steps = SimpleNamespace(update=lambda *_: management.unload_all_models())
    text = torch.ones(1, 3, handle.identity.config.text_dim)
    request = SampleRequest(latent=torch.zeros(1, 16, 1, 8, 8), positive=Conditioning(text=text), steps=1)
    assert torch.equal(runtime.generate(handle, request, steps), before)
    assert kept.idle_bytes() > 0
