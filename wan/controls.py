"""Controls of VACE: from video, mask and reference pictures to what the model takes, through ComfyUI's conditioning.

Source: `WanVace` and `VaceVideoProcessor` of the official repository.
"""
# F pixel frames, H W pixels, C channels, T latent frames, h w latent positions, R reference pictures

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..core.conditioning import ComfyConditioning
from ..core.types import Conditioning, Control, Identity, SampleRequest
from .config import LATENT_CHANNELS
from .pictures import GREY, NEGLIGIBLE, cover
from .requests import clip_size
from .vae import LATENT_FORMAT

WHITE = 1.0  # around reference pictures
ANEW = 0.5  # the mask's value above which a pixel is made anew
CELL = LATENT_FORMAT.spatial_factor
FRAME_CHANNELS, MASK_CHANNELS = 2 * LATENT_CHANNELS, CELL**2

# Options of ComfyUI's conditioning: lists with one entry for each control. The last one is our own.
FRAMES, MASK, STRENGTH, LEAD = OPTIONS = ("vace_frames", "vace_mask", "vace_strength", "wanqwen_vace_lead")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What a control is made from.

    `video` [F, H, W, 3] in [0, 1] is kept where `mask` [F or 1, H, W] is 0, and guides what is made anew where it is 1,
    which is everywhere without one. `references` are pictures [H, W, 3] of what the clip should show.
    """

    video: Tensor | None = None
    mask: Tensor | None = None
    references: tuple[Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A control as ComfyUI passes it on: raw latents [1, 32, R + T, h, w], the mask [1, 64, R + T, h, w], and R.

    The latents are those of what is kept, then those of what guides. `notices` say what was made to fit.
    """

    frames: Tensor
    mask: Tensor
    lead: int
    notices: tuple[str, ...] = ()


def encode(source: Source, vae: Any, width: int, height: int, num_frames: int) -> Encoded:
    """Encode a control for a clip whose sizes the VAE takes: multiples of 16 pixels, 4n + 1 frames."""
    clip_FHWC, mask_FHW, notices = lay_out(source, width, height, num_frames)
    anew = mask_FHW[..., None] > ANEW
    kept, guiding = clip_FHWC.masked_fill(anew, GREY), clip_FHWC.masked_fill(~anew, GREY)
    latents = [_latents(vae, kept)]
    latents.append(latents[0] if torch.equal(kept, guiding) else _latents(vae, guiding))
    references = [_reference(vae, on_canvas(picture, width, height)) for picture in source.references]
    frames = torch.cat((*references, torch.cat(latents, dim=1)), dim=2)
    mask = F.pad(mask_channels(mask_FHW), (0, 0, 0, 0, len(references), 0))
    return Encoded(frames=frames, mask=mask, lead=len(references), notices=tuple(notices))


def lay_out(source: Source, width: int, height: int, num_frames: int) -> tuple[Tensor, Tensor, list[str]]:
    """Return the clip [F, H, W, 3] and its mask [F, H, W] at the size that is made, and what was changed, in words.

    Frames that the video lacks are grey and made anew. Pictures cover the size, their borders being cut off evenly.
    """
    clip = torch.full((num_frames, height, width, 3), GREY)
    mask = torch.ones(num_frames, height, width)
    if source.video is None:
        return clip, mask, ["The mask has no effect without control_video."] if source.mask is not None else []
    notices = []
    given, (rows, columns) = len(source.video), source.video.shape[1:3]
    if (columns, rows) != (width, height):
        notices.append(f"control_video of {columns} x {rows} was made to cover {width} x {height}.")
    if given > num_frames:
        notices.append(f"control_video has {given} frames: the last {given - num_frames} are left out.")
    elif given < num_frames:
        lacking = f"control_video has {given} frames: the other {num_frames - given} are made anew"
        whole = ", and so are its own, without a mask: a black one keeps them." if source.mask is None else "."
        notices.append(lacking + whole)
    given = min(given, num_frames)
    for i, frame in enumerate(source.video[:given]):
        clip[i] = cover(frame[None, ..., :3], width, height)[0]
    if source.mask is not None:
        high, wide = source.mask.shape[-2:]
        if abs(wide * rows / (high * columns) - 1) > NEGLIGIBLE:
            notices.append(
                f"The mask of {wide} x {high} has another shape than control_video: it may not lie where it is meant."
            )
        masks = source.mask.reshape(-1, high, wide, 1)
        masks = masks.expand(given, -1, -1, -1) if len(masks) == 1 else masks[:given]
        if len(masks) < given:
            notices.append(f"The mask has {len(masks)} frames: those of control_video after them are made anew.")
        for i, frame in enumerate(masks):
            mask[i] = cover(frame[None], width, height)[0, ..., 0]
        if not mask.any():
            notices.append("The mask is black everywhere: all of control_video is kept, and nothing made anew.")
    return clip, mask, notices


def on_canvas(picture_HWC: Tensor, width: int, height: int) -> Tensor:
    """Return a picture as large as fits the size, in the middle of a white canvas."""
    rows, columns = picture_HWC.shape[:2]
    picture = picture_HWC[..., :3].float()
    if (columns, rows) == (width, height):
        return picture
    scale = min(height / rows, width / columns)
    size = (max(1, int(rows * scale)), max(1, int(columns * scale)))
    resized = F.interpolate(picture.movedim(-1, 0)[None], size, mode="bilinear", align_corners=False)
    canvas = torch.full((height, width, 3), WHITE)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    canvas[top : top + size[0], left : left + size[1]] = resized[0].movedim(0, -1)
    return canvas


def mask_channels(mask_FHW: Tensor) -> Tensor:
    """Return a mask as the model takes it, [1, 64, T, h, w]: a channel for each pixel of a latent position, by rows.

    Of the frames that one latent frame stands for, the nearest to its middle counts.
    """
    cells = rearrange(mask_FHW, "f (h dy) (w dx) -> 1 (dy dx) f h w", dy=CELL, dx=CELL)
    frames = LATENT_FORMAT.shape(1, len(mask_FHW), 1, 1)[2]
    return F.interpolate(cells, (frames, *cells.shape[-2:]), mode="nearest-exact")


def _reference(vae: Any, picture_HWC: Tensor) -> Tensor:
    """Return a picture's latent, and as the latent of what guides the one that the model takes for zeros."""
    latent = _latents(vae, picture_HWC[None])
    return torch.cat((latent, LATENT_FORMAT.denormalise(torch.zeros_like(latent))), dim=1)


def _latents(vae: Any, pixels_FHWC: Tensor) -> Tensor:
    return vae.encode(pixels_FHWC).to("cpu", torch.float32)


# ComfyUI's conditioning


def with_control(conditioning: ComfyConditioning, encoded: Encoded, strength: float) -> ComfyConditioning:
    """Return prompts with one more control after those that they have already."""
    added = {FRAMES: encoded.frames, MASK: encoded.mask, STRENGTH: strength, LEAD: encoded.lead}
    changed = []
    for rows, options in conditioning:
        # ComfyUI's own node does not say how many of its frames are references.
        before = len(options.get(FRAMES, ()))
        leads = [*options.get(LEAD, ()), *[None] * before][:before]
        lists = {name: [*(leads if name == LEAD else options.get(name, ())), value] for name, value in added.items()}
        changed.append([rows, {**options, **lists}])
    return changed


def lead_of(conditioning: ComfyConditioning) -> int:
    """Return how many latent frames come before the clip, as far as the prompts' controls say."""
    leads = [_leads(options.get(FRAMES) or (), options.get(LEAD) or ()) for _, options in conditioning]
    return max((lead for each in leads for lead in each), default=0)


def controls_of(options: dict[str, Any]) -> tuple[Control, ...]:
    """Return the controls among a prompt's options. Raises ValueError for latents of another model."""
    frames = options.get(FRAMES) or ()
    masks = options.get(MASK) or [torch.ones(1, MASK_CHANNELS, *f.shape[2:]) for f in frames]
    strengths = options.get(STRENGTH) or [1.0] * len(frames)
    if len(masks) != len(frames) or len(strengths) != len(frames):
        raise ValueError(
            f"The conditioning has {len(frames)} control videos of VACE, {len(masks)} masks and {len(strengths)} "
            "strengths, where one each is expected: make them with the node Wan VACE."
        )
    return tuple(map(_control, frames, masks, strengths, _leads(frames, options.get(LEAD) or ())))


def _leads(frames: Sequence[Tensor], told: Sequence[int | None]) -> list[int]:
    """Return how many reference frames each control begins with.

    ComfyUI's own node does not say: as many as a control of the same shape whose node does, else none.
    """
    told = [*told, *[None] * len(frames)][: len(frames)]
    known = {tuple(f.shape): lead for f, lead in zip(frames, told, strict=True) if lead is not None}
    return [known.get(tuple(f.shape), 0) if lead is None else lead for f, lead in zip(frames, told, strict=True)]


def _control(frames: Tensor, mask: Tensor, strength: float, lead: int) -> Control:
    wanted = {"latents": (frames, FRAME_CHANNELS), "mask": (mask, MASK_CHANNELS)}
    for what, (tensor, channels) in wanted.items():
        if tensor.dim() != 5 or tensor.shape[:2] != (1, channels) or tensor.shape[2:] != frames.shape[2:]:
            raise ValueError(
                f"The {what} of a VACE control are {list(tensor.shape)}, [1, {channels}, frames, height / 8, width / 8]"
                " is expected: make it with the node Wan VACE, and the VAE of Wan 2.1."
            )
    parts = [LATENT_FORMAT.normalise(part) for part in frames.cpu().split(LATENT_CHANNELS, dim=1)]
    return Control(context=torch.cat((*parts, mask.to("cpu", torch.float32)), dim=1), strength=strength, lead=lead)


# A request with controls


def controlled(identity: Identity, request: SampleRequest) -> tuple[SampleRequest, list[str]]:
    """Return the request with all controls, the latent and its mask beginning with as many reference frames.

    Both prompts have controls then. Raises ValueError for controls that the model lacks, and for sizes that differ.
    """
    prompts, notices = [p for p in (request.positive, request.negative) if p is not None], []
    if not identity.config.vace_dim:
        return request, notices
    if not request.positive.controls:
        raise ValueError(
            f"Wan 2.1 {identity.variant} takes at least one control, and the positive conditioning has none: put the "
            "node Wan VACE between the prompts and the sampler. Without video and pictures it makes all from text."
        )
    if request.negative is not None and not request.negative.controls:
        notices.append("The negative prompt has no control of VACE: those of the positive one are used for both.")
        prompts[1] = replace(request.negative, controls=request.positive.controls)
    lead = max(prompt.lead for prompt in prompts)
    if lead:
        notices.append(
            f"The finished clip comes without the {lead} frame(s) of reference images: no Trim Video Latent is needed."
        )
    length = _length(request, prompts, lead)
    request = _with_lead(request, prompts, lead, length)
    prompts = [replace(prompt, controls=tuple(_led(c, lead, length) for c in prompt.controls)) for prompt in prompts]
    return replace(request, positive=prompts[0], negative=prompts[1] if len(prompts) > 1 else None), notices


def _length(request: SampleRequest, prompts: Sequence[Conditioning], lead: int) -> int:
    """Return how many latent frames the clip has, without the reference frames. Raises ValueError if sizes differ."""
    controls = [control for prompt in prompts for control in prompt.controls]
    clips = dict.fromkeys(_clip(control.context, control.lead) for control in controls)
    if len(clips) > 1:
        raise ValueError(
            f"The controls of VACE are for clips of {' and '.join(map(clip_size, clips))}: give all nodes Wan VACE in "
            "a row the same width, height and frames. Reference images of ComfyUI's own node count as frames here: "
            "give them to ours."
        )
    [clip] = clips
    # The clip's own frames must not pass for reference frames, which are left out in the end.
    led = lead and (not request.add_noise or not request.latent[:, :, :lead].any())
    if clip not in (_clip(request.latent, 0), _clip(request.latent, lead if led else 0)):
        raise ValueError(
            f"The latent is a clip of {clip_size(_clip(request.latent, 0))}, and the control of VACE is for "
            f"{clip_size(clip)}{f' after {lead} reference frame(s)' if lead else ''}: connect the latent that the "
            "node Wan VACE gives, or one of the same size and length, without reference frames."
        )
    return clip[0]


def _clip(latents: Tensor, lead: int) -> tuple[int, int, int]:
    frames, height, width = latents.shape[2:]
    return frames - lead, height, width


def _led(control: Control, lead: int, length: int) -> Control:
    """Return a control with so many reference frames, empty ones before its own: all zeros, as the model takes them."""
    missing = length + lead - control.context.shape[2]
    return replace(control, context=F.pad(control.context, (0, 0, 0, 0, missing, 0)), lead=lead)


def _with_lead(request: SampleRequest, prompts: Sequence[Conditioning], lead: int, length: int) -> SampleRequest:
    """Return the request with reference frames before the clip, also in its mask, which leaves them free."""
    controls = [control for prompt in prompts for control in prompt.controls]
    latent, mask = request.latent, request.mask
    if lead and latent.shape[2] == length:
        if not request.add_noise:
            raise ValueError(
                f"The latent is noisy already (add_noise is off), and lacks the {lead} frame(s) of the reference "
                "images before the clip: sample it on from a sampler that stopped before its end."
            )
        context = next(control.context for control in controls if control.lead == lead)
        references = LATENT_FORMAT.denormalise(context[:, :LATENT_CHANNELS, :lead])
        latent = torch.cat((references.expand(latent.shape[0], -1, -1, -1, -1).to(latent), latent), dim=2)
    if lead and mask is not None and mask.shape[2] != latent.shape[2]:
        mask = mask.expand(-1, -1, length, -1, -1)
        mask = torch.cat((torch.ones_like(mask[:, :, :1]).expand(-1, -1, lead, -1, -1), mask), dim=2)
    return replace(request, latent=latent, mask=mask)
