"""Qwen2.5-VL, the text encoder of Qwen-Image: prompts, and the pictures of an edit, to one row per token.

Built by transformers, loaded by us. Only what is needed runs: the language model up to its final norm, and the vision
tower where there are pictures. Positions are ours: which of transformers' versions builds them, and when, varies.
"""
# L tokens of a prompt with its template, S of them kept, E width, P patches, M merged cells

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ..core.text import META, Design, Encoder, Footprint, Key, Part, Placement, Tokens, log
from ..core.types import Conditioning
from . import images as pictures
from .tokenizer import IMAGE_PAD, TEMPLATES
from .vl_config import VisionConfig, VLConfig

LANGUAGE, VISION = "model.", "visual."  # what precedes the official names of the two parts
VISION_THETA = 10000.0  # of the vision tower's rotation; the same in every Qwen2.5-VL, not in the checkpoint
SHALLOW = 2  # layers of the twins whose memory is counted
NO_TOWER = "pictures are refused where there is nothing to see them"
FREQUENCIES = ("inv_freq", "original_inv_freq")  # transformers' names for the buffers of a rotation

Size = tuple[int, int]  # rows, columns


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A picture [H, W, 3] in [0, 1] that a prompt refers to, shown to the vision tower at about `area` pixels.

    `cells` are the rows and columns of merged patches, one token each. `identity` tells its content from others'.
    """

    image_HWC: Tensor
    area: int
    cells: Size
    identity: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt in its template, with the pictures that it refers to."""

    tokens: Tokens
    template: str
    pictures: tuple[Picture, ...] = ()

    @property
    def key(self) -> Key:
        """What tells it from other prompts."""
        return self.tokens.text, self.template, *(picture.identity for picture in self.pictures)

    @property
    def ids(self) -> tuple[int, ...]:
        """All that is run, what is dropped afterwards included."""
        return self.tokens.prefix + self.tokens.ids


class TextEncoder(Encoder[Prompt]):
    """Turn prompts, and prompts about pictures, into `Conditioning`; see `core.text.Encoder`."""

    title = "Qwen2.5-VL, the text encoder of Qwen-Image"
    examples = "qwen_2.5_vl_7b.safetensors or qwen_2.5_vl_7b_fp8_scaled.safetensors"

    def tokenise(self, text: str) -> Tokens:
        """Return the ids of a prompt without pictures, and what to tell the user if it was too long."""
        return self.tokenizer(text)

    def encode(self, texts: Sequence[str], placement: Placement | None = None) -> list[Conditioning]:
        """Encode each text on its own; rows [1, S, E] of its tokens and the template's end, float32 on the CPU.

        An empty text is legal and gives the rows of the template's end. A text of more than 1024 tokens is cut, and
        the log says so. Raises ValueError if `max_vram_bytes` is too little.
        """
        return self._encode([Prompt(tokens=self.tokenise(text), template="t2i") for text in texts], placement)

    def encode_edit(
        self, texts: Sequence[str], images: Sequence[Tensor], template: str, placement: Placement | None = None
    ) -> list[Conditioning]:
        """Encode each text as an instruction about all the images; rows [1, S, E], those of the images included.

        `images` are [H, W, 3] in [0, 1]. `template` is "edit" (one image, seen at about 1024 x 1024) or "edit-plus"
        (several, seen at about 384 x 384 each). Raises ValueError for other templates, for images that they don't
        take, for a text encoder without a vision tower, and if `max_vram_bytes` is too little.
        """
        if template not in TEMPLATES or not TEMPLATES[template].area:
            raise ValueError(f"There is no template {template!r} for edits: choose edit or edit-plus.")
        shown = tuple(self._picture(image, TEMPLATES[template].area) for image in images)
        sizes = [picture.cells[0] * picture.cells[1] for picture in shown]
        prompts = [
            Prompt(tokens=self.tokenizer(text, template, sizes), template=template, pictures=shown) for text in texts
        ]
        return self._encode(prompts, placement)

    def footprints(self, num_tokens: int, cells: Sequence[Size] = ()) -> tuple[Footprint, ...]:
        """Return what a prompt of so many tokens, and then each of its pictures of so many cells, take on the device.

        They are never there together. No weight is read for it.
        """
        dtype = self.dtype_on(self.placement.device)
        seeing = (needed_to_see(self.config, dtype, size) for size in cells)
        return needed_to_read(self.config, dtype, num_tokens), *seeing

    def _picture(self, image_HWC: Tensor, area: int) -> Picture:
        rgb, notice = pictures.to_rgb(image_HWC)
        if notice:
            log.warning(notice)
        _, (width, height) = pictures.shown_size(rgb.shape[1], rgb.shape[0], area, self.config)
        cell = self.config.vision.patch_size * self.config.vision.merge
        content = hashlib.sha256(rgb.contiguous().cpu().numpy().tobytes()).hexdigest()
        return Picture(
            image_HWC=rgb.cpu(),
            area=area,
            cells=(height // cell, width // cell),
            identity=f"{content}-{rgb.shape[0]}x{rgb.shape[1]}-{area}",
        )

    def _compute(self, prompts: Sequence[Prompt], dtype: torch.dtype, placement: Placement) -> list[Tensor]:
        """Return the rows of prompts; the two parts are never on the device together."""
        seen = self._see({p.identity: p for prompt in prompts for p in prompt.pictures}, dtype, placement)
        language = self._hold("the language model", dtype, lambda: self._load(LANGUAGE, dtype))
        longest, rows = max(len(prompt.ids) for prompt in prompts), []
        with language.on(placement, lambda: language_bytes(self.config, dtype, longest)) as run:
            for prompt in prompts:
                pad = self.tokenizer.special[IMAGE_PAD]
                embedded_1LE = language.embed(prompt.ids)
                if prompt.pictures:
                    is_picture = torch.tensor(prompt.ids) == pad
                    embedded_1LE[0, is_picture] = torch.cat([seen[p.identity] for p in prompt.pictures])
                positions_31L = positions(prompt.ids, pad, [p.cells for p in prompt.pictures])[:, None]
                found = run(embedded_1LE.to(placement.device), positions_31L.to(placement.device))
                rows.append(found[:, len(prompt.tokens.prefix) :].float().cpu())
        return rows

    def _see(self, shown: Mapping[str, Picture], dtype: torch.dtype, placement: Placement) -> dict[str, Tensor]:
        """Return the rows [M, E] of pictures, on the CPU."""
        if not shown:
            return {}
        tower = self._hold("the vision tower", dtype, lambda: self._load(VISION, dtype))
        vision, rows = self.config.vision, {}
        sizes = {picture.cells for picture in shown.values()}
        with tower.on(placement, lambda: max(vision_bytes(self.config, dtype, cells) for cells in sizes)) as run:
            for identity, picture in shown.items():
                patches = pictures.vision_patches(picture.image_HWC, picture.area, self.config).to(dtype)
                grid = torch.tensor([[1, *(size * vision.merge for size in picture.cells)]])
                rows[identity] = run(patches.to(placement.device), grid.to(placement.device)).cpu()
        return rows

    def _load(self, prefix: str, dtype: torch.dtype) -> Part:
        names = self.identity.names
        inside = {official: name for official, name in names.items() if official.startswith(prefix)}
        ignored = {*self.identity.ignored, *names.values()} - set(inside.values())
        return design(self.config, prefix).open(self.checkpoint, inside, dtype=dtype, ignored=ignored)


class _Language(nn.Module):
    """The language model: embedded tokens [1, L, E] and positions [3, 1, L] to rows [1, L, E] after the final norm."""

    def __init__(self, config: VLConfig):
        super().__init__()
        self.model = build_language(config)

    def forward(self, embedded_1LE: Tensor, positions_31L: Tensor) -> Tensor:
        # Nothing is masked. The mask is given all the same: without one, transformers 4.53 to 4.55 take positions that
        # don't count up by one for several packed sequences.
        mask_1L = torch.ones(embedded_1LE.shape[:2], dtype=torch.long, device=embedded_1LE.device)
        found = self.model(
            inputs_embeds=embedded_1LE, attention_mask=mask_1L, position_ids=positions_31L, use_cache=False
        )
        return found.last_hidden_state


class _Tower(nn.Module):
    """The vision tower: patches [P, 1176] and their grid [1, 3] (frames, rows, columns) to rows [M, E]."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.visual = build_vision(config)

    def forward(self, patches: Tensor, grid_13: Tensor) -> Tensor:
        found = self.visual(patches, grid_thw=grid_13)
        return found if isinstance(found, Tensor) else found.pooler_output  # the latter since transformers 5


def positions(ids: Sequence[int], image_pad: int, cells: Sequence[Size]) -> Tensor:
    """Return the positions [3, L] (time, row, column) of tokens; the k-th run of `image_pad` is a picture of cells[k].

    Text counts on along all three. A picture stands at one time, its cells at their rows and columns from there; the
    text after it resumes past its longer side. Source: Qwen2-VL (2024), section 2.1, multimodal rotary embedding.
    """
    parts, following, sizes = [], 0, iter(cells)
    for is_picture, run in groupby(ids, key=lambda i: i == image_pad):
        length = len(list(run))
        if not is_picture:
            parts.append((torch.arange(length) + following).expand(3, -1))
            following += length
            continue
        rows, columns = next(sizes)
        assert length == rows * columns, "a picture is one run of as many placeholders as it has cells"
        grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")).flatten(1)
        parts.append(torch.cat((torch.zeros(1, length, dtype=grid.dtype), grid)) + following)
        following += max(rows, columns)
    return torch.cat(parts, dim=1)


def design(config: VLConfig, prefix: str) -> Design:
    """Return how one of the two parts is built; its parameters are called as the official files call them."""
    vision = config.vision
    if prefix == LANGUAGE:
        return Design(
            name="text encoder", build=lambda: _Language(config), blocks="model.layers", table="model.embed_tokens"
        )
    assert vision is not None, NO_TOWER
    return Design(name="text encoder's vision tower", build=lambda: _Tower(vision), blocks="visual.blocks")


def build_language(config: VLConfig) -> nn.Module:
    """Return transformers' language model of this size, without weights; its rotation is filled in."""
    from transformers import __version__
    from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl as configs
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as models

    # Until 4.51 one class was both the whole and its language model; transformers 5 tells the rotation another way.
    has_own_class = hasattr(models, "Qwen2_5_VLTextModel")
    config_class = configs.Qwen2_5_VLTextConfig if has_own_class else configs.Qwen2_5_VLConfig
    model_class = models.Qwen2_5_VLTextModel if has_own_class else models.Qwen2_5_VLModel
    rope: dict[str, Any] = {"rope_type": "default", "mrope_section": list(config.mrope_section)}
    if int(__version__.partition(".")[0]) >= 5:
        rotation = {"rope_parameters": {**rope, "rope_theta": config.rope_theta}}
    else:
        rotation = {"rope_scaling": {**rope, "type": "default"}, "rope_theta": config.rope_theta}
    options = config_class(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        rms_norm_eps=config.eps,
        use_cache=False,
        bos_token_id=None,  # for writing text, which nobody does here
        eos_token_id=None,
        **rotation,
    )
    with torch.device("meta"):
        model = model_class(options).eval()
    fill_rotation(model, config.rope_theta, config.head_width)
    return model


def build_vision(config: VisionConfig) -> nn.Module:
    """Return transformers' vision tower of this size, without weights; its rotation is filled in."""
    from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl as configs
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as models

    options = configs.Qwen2_5_VLVisionConfig(
        depth=config.depth,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_heads=config.num_heads,
        out_hidden_size=config.out_hidden,
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch,
        spatial_merge_size=config.merge,
        window_size=config.window,
        fullatt_block_indexes=list(config.full_attention),
    )
    with torch.device("meta"):
        model = models.Qwen2_5_VisionTransformerPretrainedModel(options).eval()
    # Half of a head turns with the row and half with the column.
    fill_rotation(model, VISION_THETA, config.hidden // config.num_heads // 2)
    return model


def fill_rotation(model: nn.Module, theta: float, width: int) -> None:
    """Set the frequencies `theta ** (-2j / width)`, which no checkpoint carries, in a model built without memory.

    They are ours, so that every version of transformers turns by the same angles.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            assert name in FREQUENCIES and buffer.shape == frequencies.shape, f"unknown buffer {name}"
            setattr(module, name, frequencies.clone())


def needed_to_read(config: VLConfig, dtype: torch.dtype, num_tokens: int) -> Footprint:
    """Return what the language model takes on a device for a prompt of so many tokens, the template's included."""
    working = language_bytes(config, dtype, num_tokens)
    return _shallow(config, LANGUAGE).footprint(dtype, config.num_layers, working)


def needed_to_see(config: VLConfig, dtype: torch.dtype, cells: Size) -> Footprint:
    """Return what the vision tower takes on a device for a picture of so many rows and columns of merged patches."""
    assert config.vision is not None, NO_TOWER
    return _shallow(config, VISION).footprint(dtype, config.vision.depth, vision_bytes(config, dtype, cells))


@lru_cache(maxsize=64)
def language_bytes(config: VLConfig, dtype: torch.dtype, num_tokens: int) -> int:
    """Return the work space of the language model beside its weights, counted on the meta device."""
    embedded_1LE = torch.empty(1, num_tokens, config.hidden, dtype=dtype, device=META)
    return _shallow(config, LANGUAGE).working_bytes(dtype, embedded_1LE, torch.arange(num_tokens).expand(3, 1, -1))


@lru_cache(maxsize=64)
def vision_bytes(config: VLConfig, dtype: torch.dtype, cells: Size) -> int:
    """Return the work space of the vision tower beside its weights, counted on the meta device."""
    vision = config.vision
    assert vision is not None, NO_TOWER
    rows, columns = (size * vision.merge for size in cells)
    patch = 3 * vision.temporal_patch * vision.patch_size**2
    patches = torch.empty(rows * columns, patch, dtype=dtype, device=META)
    return _shallow(config, VISION).working_bytes(dtype, patches, torch.tensor([[1, rows, columns]]))


def _shallow(config: VLConfig, prefix: str) -> Design:
    """Return a part with a layer of each kind."""
    vision = config.vision
    if vision is not None:
        depth = min(vision.depth, SHALLOW)
        vision = replace(vision, depth=depth, full_attention=(depth - 1,) if vision.full_attention else ())
    return design(replace(config, num_layers=min(config.num_layers, SHALLOW), vision=vision), prefix)
