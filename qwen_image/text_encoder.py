"""Qwen2.5-VL, the text encoder of Qwen-Image: prompts, and the pictures of an edit, to one row per token.

Built by transformers, loaded by us. Only what is needed runs: the language model up to its final norm, and the vision
tower where there are pictures. Positions are ours: which of transformers' versions builds them, and when, varies.
"""
# L tokens of a prompt with its template, S of them kept, E width, P patches, M merged cells

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ..core.text import Encoder, Key, Named, Part, Placement, Tokens, load_state, log
from ..core.types import Conditioning
from . import images as pictures
from .tokenizer import IMAGE_PAD, TEMPLATES
from .vl_config import VisionConfig, VLConfig

LANGUAGE, VISION = "model.", "visual."  # what precedes the official names of the two parts
VISION_THETA = 10000.0  # of the vision tower's rotation; the same in every Qwen2.5-VL, not in the checkpoint
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
        with language.on(placement, language_bytes(self.config, longest)) as run:
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
        largest = max(p.cells[0] * p.cells[1] for p in shown.values()) * vision.merge**2
        with tower.on(placement, vision_bytes(vision, largest)) as run:
            for identity, picture in shown.items():
                patches = pictures.vision_patches(picture.image_HWC, picture.area, self.config).to(dtype)
                grid = torch.tensor([[1, *(size * vision.merge for size in picture.cells)]])
                rows[identity] = run(patches.to(placement.device), grid.to(placement.device)).cpu()
        return rows

    def _load(self, prefix: str, dtype: torch.dtype) -> Part:
        load = {LANGUAGE: load_language, VISION: load_vision}[prefix]
        scales, weights = self._weights(lambda official: official.startswith(prefix))
        return load(self.config, scales, weights, dtype=dtype)


class _Language(nn.Module):
    """The language model: embedded tokens [1, L, E] and positions [3, 1, L] to rows [1, L, E] after the final norm."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

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

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, patches: Tensor, grid_13: Tensor) -> Tensor:
        found = self.model(patches, grid_thw=grid_13)
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


def load_language(config: VLConfig, scales: Named, weights: Named, *, dtype: torch.dtype) -> Part:
    """Return the language model with these weights (official names) in `dtype`.

    Raises ValueError for missing, unexpected or misshapen weights.
    """
    model = build_language(config)
    title = f"the language model of {config}"
    load_state(model, _after(LANGUAGE), scales, weights, dtype=dtype, title=title)
    table_VE = model.embed_tokens.weight.detach()
    del model.embed_tokens  # what comes in is embedded already
    return Part(name="text encoder", module=_Language(model), blocks=model.layers, table_VE=table_VE)


def load_vision(config: VLConfig, scales: Named, weights: Named, *, dtype: torch.dtype) -> Part:
    """Return the vision tower with these weights (official names) in `dtype`; errors as `load_language`."""
    model = build_vision(config.vision)
    load_state(model, _after(VISION), scales, weights, dtype=dtype, title=f"the vision tower of {config.vision}")
    return Part(name="text encoder's vision tower", module=_Tower(model), blocks=model.blocks)


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
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            assert name in FREQUENCIES and buffer.shape == frequencies.shape, f"unknown buffer {name}"
            setattr(module, name, frequencies.clone())


def language_bytes(config: VLConfig, num_tokens: int) -> int:
    """Return an upper estimate of the work space of one layer: mask, then the widest rows; scores are never whole."""
    return num_tokens * (6 * num_tokens + 4 * (3 * config.intermediate + 10 * config.hidden))


def vision_bytes(config: VisionConfig, num_patches: int) -> int:
    """Return an upper estimate of the work space of one layer: mask, then the widest rows; scores are never whole."""
    merged = 3 * config.hidden * config.merge
    return num_patches * (6 * num_patches + 4 * (3 * config.intermediate + 10 * config.hidden + merged))


def _after(prefix: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(prefix)
