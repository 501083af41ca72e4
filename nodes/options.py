"""Options of a model that change how it runs and not what it shows."""

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..core import host
from ..core.runtime import spelled
from ..core.types import (
    ATTENTION_CHOICES,
    COMPILE_CHOICES,
    COMPILE_OFF,
    KERNEL_CHOICES,
    PRODUCT_CHOICES,
    SOURCES,
    FastPaths,
    MemoryOptions,
    ModelHandle,
)
from ..plans import GIB, plan_here
from .types import CATEGORY, WanModel, check_choice, found_by, tell, verdict

AUTO = "auto"
PLANNED = -1
INTERLEAVE = {AUTO: None, "on": True, "off": False}


class BlockSwap(io.ComfyNode):
    """Fixes parts of the plan by which blocks stream; without it everything is planned."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenBlockSwap",
            display_name="Block Swap (WanQwen)",
            **found_by("offload", "low vram", "out of memory", "oom", "memory"),
            category=CATEGORY,
            description="Models larger than the card run without this node: the sampler plans which blocks stay on the "
            "card and which stream in while others compute. Here any part of that plan can be fixed by hand, and with "
            "a latent connected the plan for that size is shown. The result has the same bits whatever the plan.",
            inputs=_swap_inputs(),
            outputs=[WanModel.Output(display_name="model", tooltip="The same model with these options, for Sampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, source: str | None = None, interleave: str | None = None) -> bool | str:
        return verdict(
            check_choice("source", source, (AUTO, *SOURCES)), check_choice("interleave", interleave, INTERLEAVE)
        )

    @classmethod
    def execute(
        cls,
        model: ModelHandle,
        blocks_to_swap: int,
        slots: int,
        source: str,
        interleave: str,
        chunk_rows: int,
        headroom_gb: float,
        max_vram_gb: float,
        max_pinned_gb: float,
        latent: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        options = MemoryOptions(
            swapped=None if blocks_to_swap == PLANNED else blocks_to_swap,
            slots=slots or None,
            source=None if source == AUTO else source,
            interleave=INTERLEAVE[interleave],
            chunk_rows=chunk_rows,
            headroom=None if headroom_gb == PLANNED else int(headroom_gb * GIB),
            vram=int(max_vram_gb * GIB) or None,
            pinned=None if max_pinned_gb == PLANNED else int(max_pinned_gb * GIB),
        )
        model = replace(model, memory=options)
        lines = ["Connect a latent to see the plan for its size."]
        if latent is not None:
            samples = latent["samples"]
            shape = tuple(samples.shape if samples.dim() == 5 else samples[:, :, None].shape)
            lines = plan_here(model, shape)
        return io.NodeOutput(model, ui=tell(cls.hidden.unique_id, lines))


def _swap_inputs() -> list[io.Input]:
    return [
        WanModel.Input("model", tooltip="From Load Wan Model or Load Qwen-Image Model."),
        io.Int.Input(
            "blocks_to_swap", default=PLANNED, min=PLANNED, max=1000,
            tooltip="How many of the model's blocks stream in from RAM or disk instead of staying on the card. -1 "
            "plans it: as many stay as fit beside the computation. 0 keeps all on the card.",
        ),
        io.Int.Input(
            "slots", default=0, min=0, max=16,
            tooltip="How many places on the card the streaming blocks share, so that one comes in while another "
            "computes. 0 plans it: 2, or 3 where a disk is read.",
        ),
        io.Combo.Input(
            "source", options=[AUTO, *SOURCES], default=AUTO,
            tooltip="Where streaming blocks wait. pinned: RAM that the card reads by itself, fastest. staged: other "
            "RAM. disk: the model's file, which takes no RAM. auto: as many pinned as RAM allows, the others on disk.",
        ),
        io.Combo.Input(
            "interleave", options=list(INTERLEAVE), default=AUTO,
            tooltip="Take the prompt's and the negative prompt's pass through a block together, so that each block "
            "comes in once a step instead of twice. Takes a little more VRAM. auto: where it is faster.",
        ),
        io.Int.Input(
            "chunk_rows", default=0, min=0, max=1 << 20,
            tooltip="How many tokens a block works on at once outside of attention. 0: a twelfth, 2048 or more. Fewer "
            "take a little less VRAM; the result may differ in the last bits.",
        ),
        io.Float.Input(
            "headroom_gb", default=float(PLANNED), min=float(PLANNED), max=256.0, step=0.1,
            tooltip="VRAM to leave free, in GB, for other programs and for what can't be planned. -1: 0.5, on Windows "
            "1. More if the card runs out of memory.",
        ),
        io.Float.Input(
            "max_vram_gb", default=0.0, min=0.0, max=1024.0, step=0.5,
            tooltip="The most VRAM that this model may take, in GB. 0: all that is free.",
        ),
        io.Float.Input(
            "max_pinned_gb", default=float(PLANNED), min=float(PLANNED), max=4096.0, step=0.5,
            tooltip="The most RAM that may be pinned, in GB: what is pinned no other program can have. -1 leaves 8 GB "
            "unpinned, on Windows half of all RAM.",
        ),
        io.Latent.Input(
            "latent", optional=True,
            tooltip="The latent that will be sampled: with it, this node shows the plan for its size.",
        ),
    ]  # fmt: skip


class ChooseFastPaths(io.ComfyNode):
    """Says which faster ways a model may take; without it, all that work on this machine."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenFastPaths",
            display_name="Fast Paths (WanQwen)",
            **found_by("kernels", "triton", "speed", "exact", "attention", "sage", "flash", "compile", "int8"),
            category=CATEGORY,
            description="On NVIDIA cards with Triton the sampler takes fused kernels for what lies between the matrix "
            "products, each tried beside plain PyTorch before the run, and says which. They sum in another order: the "
            "picture is the same to the eye and not to the last bit. Here they can be switched off, for results that "
            "must have the bits of plain PyTorch, or to see whether a fault is theirs. Matrix products and attention "
            "in 8 bits, and torch.compile, are chosen here too.",
            inputs=[
                WanModel.Input("model", tooltip="From Load Wan Model or Load Qwen-Image Model."),
                io.Combo.Input(
                    "kernels", options=list(KERNEL_CHOICES), default=AUTO,
                    tooltip="auto: the fused kernels that work on this machine. exact: plain PyTorch, bit for bit.",
                ),
                io.Combo.Input(
                    "products", options=list(PRODUCT_CHOICES), default=AUTO, optional=True,
                    tooltip="Matrix products with weights stored in fp8 or int8. auto: in fp8 where card and file are "
                    "made for it, else in 16 bits. exact: in 16 bits. 8bit: in 8 bits wherever that works, int8 too, "
                    "which is fast and shows more.",
                ),
                io.Combo.Input(
                    "attention", options=list(ATTENTION_CHOICES), default=AUTO, optional=True,
                    tooltip="auto and sdpa: PyTorch's own, exact. flash: the package flash-attn, as exact. sage: the "
                    "package sageattention, in 8 bits. int8: the pack's own kernel in 8 bits, in bf16 and fp16. 8 bits "
                    "are for speed in videos and large pictures, and may show. What does not work here is said, and "
                    "PyTorch's own takes its place.",
                ),
                io.Combo.Input(
                    "compile", options=list(COMPILE_CHOICES), default=COMPILE_OFF, optional=True,
                    tooltip="blocks: what lies between the products is fused by torch.compile instead of the kernels. "
                    "The first step of a first run waits for it, a minute or more; other sizes and LoRAs, a second "
                    "length of text in Qwen-Image and each strength of a DoRA wait once more; other strengths, prompts "
                    "and plans don't. If it fails, blocks run as they are.",
                ),
            ],
            outputs=[WanModel.Output(display_name="model", tooltip="The same model with these options, for Sampler.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls,
        kernels: str | None = None,
        products: str | None = AUTO,
        attention: str | None = AUTO,
        compile: str | None = COMPILE_OFF,
    ) -> bool | str:
        return verdict(
            check_choice("kernels", kernels, KERNEL_CHOICES),
            check_choice("products", products, PRODUCT_CHOICES),
            check_choice("attention", attention, ATTENTION_CHOICES),
            check_choice("compile", compile, COMPILE_CHOICES),
        )

    @classmethod
    def execute(
        cls, model: ModelHandle, kernels: str, products: str = AUTO, attention: str = AUTO, compile: str = COMPILE_OFF
    ) -> io.NodeOutput:
        fast = FastPaths(kernels=kernels, products=products, attention=attention, compile=compile)
        model, device = replace(model, fast=fast), host.device()
        lines = spelled(model, device)[1] or [f"This machine computes on its {device.type}, with plain PyTorch."]
        return io.NodeOutput(model, ui=tell(cls.hidden.unique_id, lines))
