"""The frozen records that cross folders. They hold what is, not how it is done, and are there without PyTorch."""
# B batch, C latent channels, T latent frames, h w latent positions, S text tokens, E width

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentFormat:
    """The latent space of a family: its geometry, its statistics and a linear picture of it.

    Raw latents are what the VAE gives (and what a ComfyUI LATENT holds); the transformer works on normalised ones,
    `(raw - mean) / std` per channel. `rgb` is [channels][3] and `rgb_bias`: colours in [-1, 1] of normalised latents,
    for previews; without them ComfyUI's own previewer is asked for the space it calls `comfy_name`. `tiny_decoders` are
    how names of files begin that hold a tiny decoder of these latents, the best first.
    """

    channels: int
    spatial_factor: int
    temporal_factor: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rgb: tuple[tuple[float, float, float], ...] = ()
    rgb_bias: tuple[float, float, float] = (0.0, 0.0, 0.0)
    comfy_name: str = ""
    tiny_decoders: tuple[str, ...] = ()

    def shape(self, batch: int, frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape [B, C, T, h, w] of the latents of clips; what does not fit the factors is rounded down."""
        latent_frames = (frames - 1) // self.temporal_factor + 1
        return batch, self.channels, latent_frames, height // self.spatial_factor, width // self.spatial_factor

    def pixel_frames(self, latent_frames: int) -> int:
        """Return how many frames a clip of so many latent frames has: the first one holds one frame alone."""
        return (latent_frames - 1) * self.temporal_factor + 1

    def normalise(self, raw: Tensor) -> Tensor:
        """Return `(raw - mean) / std` of latents [B, C, ...], in float32."""
        mean, std = self._statistics(raw.float())
        return (raw.float() - mean) / std

    def denormalise(self, latent: Tensor) -> Tensor:
        """Return `latent * std + mean` of latents [B, C, ...], in float32."""
        mean, std = self._statistics(latent.float())
        return latent.float() * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = [1, self.channels] + [1] * (like.dim() - 2)
        return tuple(like.new_tensor(row).view(shape) for row in (self.mean, self.std))


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint as its header states it; `dtype` is the safetensors name (F32, BF16, F8_E4M3...).

    `start` is where in its file its bytes begin, None where they don't lie there as they are (in some .pth).
    """

    dtype: str
    shape: tuple[int, ...]
    start: int | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint whose header has been read and nothing else: one file, shards, or a folder.

    `location` maps each tensor name to the file that holds it. `identity` tells one content from another (paths, sizes
    and modification times): a key for caches. Where weights are stored together (DFloat11), `groups` has by what their
    names begin with the weights of each group in order, and `planes` the tensors of the file that hold them.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    location: Mapping[str, Path]
    metadata: Mapping[str, str] = field(default_factory=dict)
    identity: str = ""
    planes: Mapping[str, TensorInfo] = field(default_factory=dict)
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spelling:
    """One way to name the tensors of an architecture.

    `table` maps every official module path to this spelling's, `{}` standing for a layer index; what follows the path
    (`.weight`, `.bias`, a scale, a LoRA's factor) is the same in all spellings. `prefix` comes before every name in the
    file (ComfyUI's `model.diffusion_model.`).
    """

    name: str
    table: Mapping[str, str]
    prefix: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What a checkpoint is. `config` is the family's own record for that role.

    `names` maps official to file names, the scales of quantised weights included. Of the file's other names `ignored`
    are known and not needed, `unexpected` are not known; `missing` are official names that the file lacks.
    """

    family: str
    role: str  # diffusion_model, vae, text_encoder, image_encoder
    variant: str  # t2v-1.3B, i2v-14B, vae, umt5-xxl, ...; (i2v-)custom for sizes nobody published
    weight_format: str  # fp32, bf16, fp16, fp8_e4m3fn, fp8_scaled, "fp32 and bf16"...
    spelling: str
    config: Any
    names: Mapping[str, str]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    prefix: str = ""  # of the file's names


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """Pictures that guide a run from beside (VACE): channels [1, X, T, h, w] as the model takes them.

    Their hints are added `strength` times. The first `lead` latent frames are reference pictures: they come before the
    clip, are sampled with it, and are no part of it.
    """

    context: Tensor
    strength: float = 1.0
    lead: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditioning:
    """What steers a run, without its strength.

    `text` holds text encoder rows [1, S, E], valid rows only, never padded. `references` are raw latents
    [1, C, 1, h, w] of the pictures that an edit refers to, in order, each of its own size. `image` holds image encoder
    rows [1, N, E]; `extra` channels [1 or B, X, T, h, w], as the model takes them, that join the noisy latent's.
    `controls` guide from beside.
    """

    text: Tensor
    references: tuple[Tensor, ...] = ()
    image: Tensor | None = None
    extra: Tensor | None = None
    controls: tuple[Control, ...] = ()

    @property
    def lead(self) -> int:
        """How many latent frames come before the clip."""
        return max((control.lead for control in self.controls), default=0)


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Say whether two parts of prompts are equal, bit for bit, or both not there."""
    if one is None or other is None:
        return one is other
    return one is other or one.equal(other)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRequest:
    """One sampling job. `latent` is raw [B, C, T, h, w]; zeros mean "nothing yet".

    `guidance` holds one value for all steps or one per step. `sigmas`, if given, replaces the schedule of `steps` and
    `shift` (descending, last 0 unless the run ends early). `denoise` < 1 starts from `latent` noised part of the way.
    `start_step` and `end_step` run a part of the schedule; with `add_noise` False the latent is taken as noisy already.
    `noise_device` is "cpu" (same noise on every machine) or "gpu" (drawn on the device, as the official code does).
    `mask` [B or 1, 1, T or 1, h, w], if given, says what to make anew: 1 there, 0 where `latent` stays as it is.
    """

    latent: Tensor
    positive: Conditioning
    negative: Conditioning | None = None
    seed: int = 0
    steps: int = 30
    shift: float | None = None
    guidance: tuple[float, ...] = (5.0,)
    solver: str = "unipc"
    sigmas: tuple[float, ...] | None = None
    denoise: float = 1.0
    start_step: int = 0
    end_step: int | None = None
    add_noise: bool = True
    noise_device: str = "cpu"
    mask: Tensor | None = None

    @property
    def num_steps(self) -> int:
        """How many steps the whole schedule has, of which `start_step` and `end_step` take a part."""
        return self.steps if self.sigmas is None else len(self.sigmas) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The noise levels that a model was published with, as `sampling.schedule` makes them.

    `shift` moves levels towards noise. `terminal` is the last sigma before 0, or None to take what the shift gives.
    `whole_timesteps` cuts the fraction off the timestep that the model sees; the solver keeps the exact sigma.
    """

    shift: float
    terminal: float | None = None
    whole_timesteps: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Settings that a distilled model was made for and that only work together.

    Files whose names have all of `words` in them, in any case, want it.
    """

    steps: int
    shift: float
    guidance: float
    solver: str
    words: tuple[str, ...] = ()


Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyFiles:
    """What the files of a family's diffusion models look like; `config` is the family's own record.

    `parameters(config)` are the names and shapes of a model's parameters. `spellings` are the ways to name its modules,
    in checkpoints and in LoRAs; `parts` says in words what a module belongs to that not every model has, by a piece of
    its name. `variants` are the published configs, `presets` what distilled models were made for.
    """

    name: str
    parameters: Callable[[Any], Shapes]
    spellings: tuple[Spelling, ...]
    variants: Mapping[str, Any]
    presets: Mapping[str, Preset] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)


# (normalised x [B, C, T, h, w], timestep [B] in 0..1000, indices of conditionings) -> the velocity of each of those,
# all of them taken through each block together, in one walk over the blocks
Denoiser = Callable[["Tensor", "Tensor", tuple[int, ...]], "list[Tensor]"]
Combine = Callable[["Tensor", "Tensor", float], "Tensor"]  # (with the prompt, without it, strength) -> velocity


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What core needs to know of a family to run its diffusion model; `config` is the family's own record.

    `build(config)` makes the module, `blocks(module)` are its blocks in the order in which `run_blocks` visits them.
    `heads(config)` are the number of heads that the tokens' width divides into, and the width of each.
    `shallow(config, depth)` is the config with so many main blocks, and the least of whatever accompanies them.
    `float32(name)` says which parameters stay in float32 whatever the compute dtype, `dtypes` what it may be.
    `schedule(config, latent shape)` is the published one.
    `denoiser(model, run, conditionings, device)` returns the `Denoiser` of all conditionings, which share work where
    equal; asked for one after the other or together, they get the same bits.
    `guidance_patch(config)` is None for plain classifier-free guidance; n keeps the length of every token of n x n
    latent positions as the prompt alone has it. `block_operations(config, latent shape, conditioning)` are the floating
    point operations of one pass through one block, on the average: in matrix products, and in attention.
    `conditionings(config, rows)` reads what ComfyUI passes between nodes.
    `planned(config, latent shape, conditioning)` adds to a prompt whatever else the model takes, with no content.
    `prepare(identity, request)` raises ValueError for a request that the model can't run, and returns the request as it
    will be run with what was corrected, in words.
    """

    files: FamilyFiles
    latent_format: LatentFormat
    build: Callable[[Any], nn.Module]
    blocks: Callable[[nn.Module], Sequence[nn.Module]]
    heads: Callable[[Any], tuple[int, int]]
    shallow: Callable[[Any, int], Any]
    float32: Callable[[str], bool]
    schedule: Callable[[Any, tuple[int, ...]], Schedule]
    denoiser: Callable[..., Denoiser]
    guidance_patch: Callable[[Any], int | None]
    block_operations: Callable[[Any, tuple[int, ...], Conditioning], tuple[int, int]]
    conditionings: Callable[[Any, Any], list[Conditioning]]
    planned: Callable[[Any, tuple[int, ...], Conditioning], Conditioning]
    prepare: Callable[[Identity, SampleRequest], tuple[SampleRequest, list[str]]]
    dtypes: tuple[torch.dtype, ...]

    @property
    def name(self) -> str:
        """What users know the family by."""
        return self.files.name


Weights = TypeVar("Weights")


class Assembled:
    """Where a model's assembled weights are kept between runs; every copy of a handle shares one."""

    def __init__(self) -> None:
        self._key: object = None
        self._weights: Any = None

    def get(self, key: object, assemble: Callable[[], Weights]) -> Weights:
        """Return the weights, assembling them if there are none yet or `key` (their dtype) differs from last time's."""
        if self._weights is None or key != self._key:
            self._weights = None  # let the old ones go before the new ones come
            self._weights, self._key = assemble(), key
        return self._weights


AUTO_KERNELS, EXACT_KERNELS = KERNEL_CHOICES = ("auto", "exact")
AUTO_PRODUCTS, EXACT_PRODUCTS, EIGHT_BIT_PRODUCTS = PRODUCT_CHOICES = ("auto", "exact", "8bit")
AUTO_ATTENTION, SDPA_ATTENTION, *_ = ATTENTION_CHOICES = ("auto", "sdpa", "flash", "sage", "int8")
COMPILE_OFF, COMPILE_BLOCKS = COMPILE_CHOICES = ("off", "blocks")


@dataclass(frozen=True, kw_only=True, slots=True)
class FastPaths:
    """Which faster ways a run may take.

    `kernels` is "auto", the fused ones that work on this machine, or "exact", the bits of plain PyTorch. `products` is
    how rows are multiplied with weights that are stored in 8 bits: "exact" in 16 bits or more, "8bit" in 8 bits
    wherever that works, "auto" where it costs little, see `core.ops.product_choice`, and "exact" with exact kernels.
    `attention` is "sdpa", PyTorch's own, "flash" or "sage", those of installed packages, or "int8", ours in 8 bits;
    "auto" is exact. `compile` is "blocks", each block's operations through torch.compile, or "off".
    """

    kernels: str = AUTO_KERNELS
    products: str = AUTO_PRODUCTS
    attention: str = AUTO_ATTENTION
    compile: str = COMPILE_OFF

    def __post_init__(self) -> None:
        if self.kernels not in KERNEL_CHOICES:
            raise ValueError(f"Fast Paths: kernels is {self.kernels!r}: choose {' or '.join(KERNEL_CHOICES)}.")
        if self.kernels == EXACT_KERNELS and self.products == AUTO_PRODUCTS:
            object.__setattr__(self, "products", EXACT_PRODUCTS)
        if self.products not in PRODUCT_CHOICES:
            raise ValueError(f"Fast Paths: products is {self.products!r}: choose {', '.join(PRODUCT_CHOICES)}.")
        if self.attention not in ATTENTION_CHOICES:
            raise ValueError(f"Fast Paths: attention is {self.attention!r}: choose {', '.join(ATTENTION_CHOICES)}.")
        if self.compile not in COMPILE_CHOICES:
            raise ValueError(f"Fast Paths: compile is {self.compile!r}: choose {' or '.join(COMPILE_CHOICES)}.")

    @property
    def uses_kernels(self) -> bool:
        """Say whether fused kernels are used; torch.compile fuses by itself."""
        return self.kernels == AUTO_KERNELS and self.compile == COMPILE_OFF


TOLERANCE = 1e-6  # steps: a share such as 0.3 of 10 steps is to be 3 whatever the last bit says
SOURCES = ("pinned", "staged", "disk")  # where blocks that stream wait; see `memory.supply.Source`


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryOptions:
    """What a user fixes of the plan of a run; None is planned. Sizes are bytes.

    `swapped` blocks stream, through `slots` slots on the device, from `source`. `interleave` takes both guidance passes
    through each block before it goes. `headroom` of VRAM stays free; at most `vram` of it is used, and at most `pinned`
    of RAM is pinned. `chunk_rows` tokens are worked on at once outside of attention, 0 being a share of all.
    """

    swapped: int | None = None
    slots: int | None = None
    source: str | None = None
    interleave: bool | None = None
    headroom: int | None = None
    vram: int | None = None
    pinned: int | None = None
    chunk_rows: int = 0

    def __post_init__(self) -> None:
        if self.source is not None and self.source not in SOURCES:
            raise ValueError(f"Block Swap: source is {self.source!r}: choose {', '.join(SOURCES)}, or auto.")
        if self.slots is not None and self.slots < 1:
            raise ValueError(f"Block Swap: {self.slots} slots: give 1 or more, or leave it to the plan.")
        for name in ("swapped", "headroom", "vram", "pinned", "chunk_rows"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"Block Swap: {name} is {value}: give 0 or more, or leave it to the plan.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """A LoRA as it goes with a model: `parts` maps each parameter it changes to what the file has for it.

    That is by role (up, down, alpha, diff...; see `weights.lora`) the name of a tensor in the file. It works `strength`
    times, in the steps from the share `start` of the schedule up to, and without, the share `end`.
    """

    checkpoint: Checkpoint
    parts: Mapping[str, Mapping[str, str]]
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        name = self.checkpoint.path.name
        if not math.isfinite(self.strength):
            raise ValueError(f"LoRA {name}: strength is {self.strength}: give a number, 1 being as it was made.")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"LoRA {name}: start {self.start:g} and end {self.end:g}: give shares of the steps from 0 to 1, the "
                "start before the end."
            )

    def is_active(self, step: int, steps: int) -> bool:
        """Say whether it works in a step, counted from 0, of a schedule of so many."""
        first, after = (math.ceil(share * steps - TOLERANCE) for share in (self.start, self.end))
        return self.strength != 0 and first <= step < after


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelHandle:
    """A diffusion model as it travels between nodes: which file, read how. Copy-on-write: use `dataclasses.replace`.

    Nothing touches the weights until `core.runtime` opens the handle. `dtype` is what the large products compute in;
    None means bfloat16 where the device has it, float32 on a CPU.
    """

    checkpoint: Checkpoint
    identity: Identity
    family: Family
    dtype: torch.dtype | None = None
    memory: MemoryOptions = MemoryOptions()
    loras: tuple[Lora, ...] = ()
    fast: FastPaths = FastPaths()
    weights: Assembled = field(default_factory=Assembled)
