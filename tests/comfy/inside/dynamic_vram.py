"""Our memory beside ComfyUI's dynamic VRAM: its own code and library, on a card that is RAM (`cuda_in_ram.c`).

ComfyUI's device is `cpu:0` here, which it does not take for the CPU, and whose memory is the card's. The pages of its
dynamic models are on the card; what PyTorch would have there, our slots among it, is in RAM and not counted.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import comfy.memory_management
import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy_aimdo.control
import comfy_aimdo.torch
import psutil
import stock_model
import torch
from memory import demo, ours, sample
from wanqwen.core import host, runtime
from wanqwen.core.memory import kept

CARD, CPU = torch.device("cpu", 0), torch.device("cpu")
PAGE = 32 << 20  # bytes
NUM_PAGES = 16  # of the card, of which the library leaves about half free
NUM_LAYERS, WIDTH = 4, 2800  # of a model: a page each
WEIGHT = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)) / WIDTH**0.5
driver = ctypes.CDLL("libcuda.so.1")
driver.card_used.restype = ctypes.c_size_t


def start() -> None:
    """Do what ComfyUI's main.py does on a card that it takes for dynamic VRAM, and have it take ours for one."""
    driver.card_size(ctypes.c_size_t(NUM_PAGES * PAGE))
    assert comfy_aimdo.control.init_device(0)
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
    management.vram_state = management.VRAMState.NORMAL_VRAM
    management.MAX_PINNED_MEMORY = 1 << 30
    management.get_torch_device = lambda: CARD
    management.is_device_cpu = lambda device: device.type == "cpu" and device.index is None
    management.minimum_inference_memory = lambda: PAGE
    management.get_free_memory = free_memory
    torch.cuda.cudart = lambda: SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    comfy_aimdo.torch.get_tensor_from_raw_ptr = lambda start, size, device: torch.frombuffer(
        (ctypes.c_uint8 * size).from_address(start), dtype=torch.uint8
    )
    cast = comfy.ops.cast_bias_weight
    comfy.ops.cast_bias_weight = lambda layer, input=None, dtype=None, device=None, **options: cast(
        layer, input, dtype, CARD, **options
    )


def free_memory(device: torch.device | None = None, torch_free_too: bool = False) -> Any:
    free = psutil.virtual_memory().available if device == CPU else NUM_PAGES * PAGE - driver.card_used()
    return (free, 0) if torch_free_too else free


start()


def pages() -> float:
    """How many pages of the card are taken."""
    return driver.card_used() / PAGE


def dynamic_model() -> comfy.model_patcher.ModelPatcher:
    """A model of ComfyUI's own layers, as its loaders make it."""
    layers = torch.nn.Sequential(*(comfy.ops.manual_cast.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS)))
    layers.load_state_dict({f"{i}.weight": WEIGHT.clone() for i in range(NUM_LAYERS)}, assign=True)
    return comfy.model_patcher.CoreModelPatcher(layers, load_device=CARD, offload_device=CPU)


def is_full() -> bool:
    """Whether the card holds one model and not all of three."""
    return NUM_LAYERS < pages() < 3 * NUM_LAYERS


def run(model: comfy.model_patcher.ModelPatcher) -> torch.Tensor:
    """Load it as ComfyUI does, compute with it, and do what follows every node."""
    management.load_models_gpu([model])
    made = model.model(torch.ones(1, WIDTH))
    management.reset_cast_buffers()
    return made


@contextmanager
def available_ram(nbytes: int) -> Iterator[None]:
    """Have ComfyUI and us find that much of it."""
    original = psutil.virtual_memory
    psutil.virtual_memory = lambda: SimpleNamespace(available=nbytes, total=original().total)
    try:
        yield
    finally:
        psutil.virtual_memory = original


def test_ours_and_a_dynamic_model_are_there_together() -> None:
    management.unload_all_models()
    handle, model = demo("wan_dit"), dynamic_model()
    before, held = sample(handle), kept.idle_bytes()
    made = run(model)
    assert model.is_dynamic() and pages() == NUM_LAYERS and model.loaded_ram_size() > 0
    assert torch.allclose(made, plainly(model), atol=1e-4)
    assert torch.equal(sample(handle), before) and torch.equal(run(model), made)
    [entry] = ours()
    assert entry.is_dynamic() and entry.model_size() == kept.idle_bytes() == held > 0
    assert set(management.loaded_models()) == {entry, model}


def plainly(model: comfy.model_patcher.ModelPatcher) -> torch.Tensor:
    x = torch.ones(1, WIDTH)
    for layer in model.model:
        x = x @ layer.weight.T
    return x


def test_dynamic_models_make_room_when_ours_asks() -> None:
    management.unload_all_models()
    models = [dynamic_model() for _ in range(3)]
    made = [run(model) for model in models]
    assert is_full()
    wanted = free_memory(CARD) + 2 * PAGE
    host.make_room(wanted, CARD)
    assert free_memory(CARD) >= wanted and pages() > 0
    host.make_room(NUM_PAGES * PAGE, CARD)
    assert pages() == 0
    assert all(torch.equal(run(model), before) for model, before in zip(models, made, strict=True))


def test_what_ours_keeps_takes_nothing_of_the_card_to_be_listed() -> None:
    management.unload_all_models()
    handle, models = demo("wan_dit"), [dynamic_model() for _ in range(3)]
    sample(handle)
    management.current_loaded_models.clear()
    for model in models:
        run(model)
    before = pages()
    management.minimum_inference_memory = lambda: NUM_PAGES * PAGE
    try:
        kept.show()
    finally:
        management.minimum_inference_memory = lambda: PAGE
    assert is_full() and pages() == before and len(ours()) == 1


def test_a_full_card_does_not_take_ours_from_ram() -> None:
    management.unload_all_models()
    handle, models = demo("wan_dit"), [dynamic_model() for _ in range(3)]
    sample(handle)
    held = kept.idle_bytes()
    for model in models:
        run(model)
    assert is_full() and kept.idle_bytes() == held > 0


def test_a_dynamic_model_that_finds_no_ram_gets_as_much_of_ours_as_it_needs() -> None:
    management.unload_all_models()
    handle = demo("wan_dit")
    before, held = sample(handle), kept.idle_bytes()
    slabs = runtime.loaded_of(handle, torch.float32).masters
    first = next(iter(slabs.values())).bytes.numel()
    assert management.free_pins(1) == held - first and len(slabs) == 1
    assert torch.equal(sample(handle), before) and kept.idle_bytes() == held
    with available_ram(1 << 30):
        run(dynamic_model())
    assert kept.idle_bytes() == 0
    assert torch.equal(sample(handle), before)


def test_free_model_and_cache_frees_both_to_the_byte() -> None:
    handle, model = demo("wan_dit"), dynamic_model()
    sample(handle)
    run(model)
    assert kept.idle_bytes() > 0 and pages() > 0
    management.unload_all_models()
    assert kept.idle_bytes() == pages() == model.loaded_ram_size() == 0 and not management.current_loaded_models


def test_our_model_runs_under_comfyui_s_samplers() -> None:
    management.unload_all_models()
    other = dynamic_model()
    handle = demo("wan_dit")
    model = stock_model.stock_model(handle, 3.0)
    assert not model.is_dynamic() and not model.clone().is_dynamic()
    run(other)
    made = stock_model.theirs(model, 4.0)
    assert stock_model.are_near(made, stock_model.ours(handle, 4.0))
    run(other)
    assert torch.equal(stock_model.theirs(model, 4.0), made) and kept.idle_bytes() > 0
    management.unload_all_models()
    assert kept.idle_bytes() == pages() == 0


def test_taking_turns_does_not_grow() -> None:
    management.unload_all_models()
    handle, model, seen = demo("wan_dit"), dynamic_model(), []
    for _ in range(20):
        sample(handle)
        run(model)
        seen.append((kept.idle_bytes(), pages(), len(management.current_loaded_models), management.TOTAL_PINNED_MEMORY))
    assert set(seen) == {seen[1]} and seen[1][0] > 0 and seen[1][1:3] == (NUM_LAYERS, 2), seen
