"""Latents to pictures and back, with our VAE or ComfyUI's."""

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..core.codec import VideoCodec
from ..core.past import MODES as VAE_MODES
from ..core.picture import Finish, lay_out_inpainting
from .types import (
    CATEGORY,
    FINISH,
    check_choice,
    check_is_for_video,
    check_is_rgb,
    dropped_alpha,
    found_by,
    tell,
    verdict,
)

AUTO = "auto"
TILING = (AUTO, "tiled")
MODES = {mode.name: mode for mode in VAE_MODES}
BATCHES = ("clip", "pictures")


class VAEDecode(io.ComfyNode):
    """Latents to frames."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenVAEDecode",
            display_name="VAE Decode (WanQwen)",
            **found_by("decode latent", "latent to image", "tiled decode"),
            category=CATEGORY,
            description="Turns latents into pictures or the frames of a video. Memory does not grow with the number of "
            "frames, and time is never cut. The padding of Edit Encode is cut off; what Inpaint Latent keeps is put "
            "back exactly.",
            inputs=[
                io.Latent.Input("latent", tooltip="From the sampler."),
                io.Vae.Input("vae", tooltip="From Load Wan / Qwen-Image VAE, or ComfyUI's Load VAE."),
                io.Combo.Input(
                    "tiling",
                    options=list(TILING),
                    default="auto",
                    tooltip="auto decodes whole frames, and tiles only when memory is short. tiled always cuts frames "
                    "into tiles with blended borders: least memory.",
                ),
                io.Int.Input(
                    "tile_size",
                    default=256,
                    min=64,
                    max=4096,
                    step=32,
                    tooltip="Width and height of a tile in pixels, for tiling: tiled.",
                ),
                io.Int.Input(
                    "tile_overlap",
                    default=64,
                    min=0,
                    max=1024,
                    step=16,
                    tooltip="How many pixels neighbouring tiles share, for tiling: tiled. Too few show seams.",
                ),
                io.Combo.Input(
                    "memory",
                    options=[AUTO, *MODES],
                    default=AUTO,
                    optional=True,
                    tooltip="For tiling: auto. Ways to decode whole frames that give the same picture and take less "
                    "and less VRAM: whole, split, offloaded, smallest. auto takes the first that fits. ComfyUI's own "
                    "VAE has its own ways.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The frames; the clips of a batch one after another.")
            ],
        )

    @classmethod
    def validate_inputs(cls, tiling: str | None = None, memory: str | None = None) -> bool | str:
        return verdict(check_choice("tiling", tiling, TILING), check_choice("memory", memory, (AUTO, *MODES)))

    @classmethod
    def execute(
        cls,
        latent: dict[str, Any],
        vae: Any,
        tiling: str,
        tile_size: int,
        tile_overlap: int,
        memory: str = AUTO,
    ) -> io.NodeOutput:
        samples = latent["samples"]
        check_is_for_video(vae)
        if samples.shape[1] != vae.latent_channels:
            raise ValueError(
                f"The latent has {samples.shape[1]} channels and this VAE takes {vae.latent_channels}: use the VAE "
                "that belongs to the sampler's model (wan_2.1_vae or qwen_image_vae)."
            )
        if tiling == "tiled":
            space = vae.spacial_compression_decode()
            tile = tile_size // space
            frames = vae.decode_tiled(samples, tile_x=tile, tile_y=tile, overlap=tile_overlap // space)
        elif isinstance(vae, VideoCodec):
            frames = vae.decode(samples, mode=MODES.get(memory))
        else:
            frames = vae.decode(samples)
        pictures = frames.reshape(-1, *frames.shape[-3:])
        finish: Finish | None = latent.get(FINISH)
        if finish is None:
            return io.NodeOutput(pictures)
        numbers = latent.get("batch_index", ())  # of Latent Batch, which keeps what belongs to its first latent alone
        if finish.source is not None and len(set(numbers)) < len(numbers):
            raise ValueError(
                "The latent joins several, of which at least one is inpainted, and what is put back around the mask "
                "is known for the first only: decode each of them on its own, and join the pictures."
            )
        return io.NodeOutput(finish.apply(pictures))


class VAEEncode(io.ComfyNode):
    """Frames to latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenVAEEncode",
            display_name="VAE Encode (WanQwen)",
            **found_by("encode image", "image to latent"),
            category=CATEGORY,
            description="Turns images into latents: as the frames of one clip, or each as a picture of its own.",
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="The frames of one clip: 4n + 1 of them (1, 5, 9...), width and height multiples of 8. "
                    "What is too much is cut off, and a message on the node says so.",
                ),
                io.Vae.Input("vae", tooltip="From Load Wan / Qwen-Image VAE, or ComfyUI's Load VAE."),
                io.Combo.Input(
                    "batch",
                    options=list(BATCHES),
                    default="clip",
                    optional=True,
                    tooltip="What a batch of images is. clip: the frames of one video. pictures: each on "
                    "its own, one latent each, as for Qwen-Image.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For the sampler's latent input.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, batch: str | None = None) -> bool | str:
        return verdict(check_choice("batch", batch, BATCHES))

    @classmethod
    def execute(cls, images: Tensor, vae: Any, batch: str = "clip") -> io.NodeOutput:
        check_is_for_video(vae)
        seen = images[..., : vae.output_channels]  # ComfyUI's own VAE does not drop alpha by itself
        if batch == "pictures":
            samples = torch.cat([vae.encode(picture) for picture in seen.split(1)])
        else:
            samples = vae.encode(seen)
        lines = _encoded(images, samples, vae, batch) + dropped_alpha(images, vae)
        return io.NodeOutput({"samples": samples}, ui=tell(cls.hidden.unique_id, lines))


class InpaintLatent(io.ComfyNode):
    """A picture of which a part is made anew."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenInpaintLatent",
            display_name="Inpaint Latent (WanQwen)",
            **found_by("inpainting", "mask", "replace part", "set latent noise mask"),
            category=CATEGORY,
            description="Makes a latent of a picture of which the sampler remakes only what the mask covers. Our VAE "
            "Decode puts everything else back exactly as it was, pixel by pixel.",
            inputs=[
                io.Image.Input("image", tooltip="One picture, of any size."),
                io.Mask.Input("mask", tooltip="What to make anew: white. Paint it with Open in MaskEditor."),
                io.Vae.Input("vae", tooltip="From Load Wan / Qwen-Image VAE, or ComfyUI's Load VAE."),
                io.Int.Input(
                    "soft_edge",
                    default=8,
                    min=0,
                    max=256,
                    tooltip="Over how many pixels inside the mask's edge new and old are blended. Outside the mask "
                    "nothing changes.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For the sampler's latent input.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, image: Tensor, mask: Tensor, vae: Any, soft_edge: int) -> io.NodeOutput:
        check_is_rgb(vae)
        layout = lay_out_inpainting(image, mask, soft_edge)
        samples = vae.encode(layout.padded[None])
        latent = {"samples": samples, "noise_mask": layout.noise_mask, FINISH: layout.finish}
        width, height = layout.finish.kept
        share = layout.noise_mask[..., :height, :width].gt(0).float().mean().item()
        made = f"{width} x {height}, {share:.0%} of it made anew"
        lines = [made, *layout.notices, *dropped_alpha(image, vae)]
        return io.NodeOutput(latent, ui=tell(cls.hidden.unique_id, lines))


def _encoded(images_FHWC: Tensor, samples: Tensor, vae: Any, batch: str) -> list[str]:
    """Say what of the images is in their latent, and what it was cut from."""
    frames, height, width = vae.upscale_ratio
    is_clip = batch == "clip"
    given = tuple(images_FHWC.shape[:3])
    kept = (
        frames(samples.shape[-3]) if is_clip else samples.shape[0],
        samples.shape[-2] * height,
        samples.shape[-1] * width,
    )
    what, rule = ("frames", "4n + 1 frames, sizes in steps of 8") if is_clip else ("pictures", "sizes in steps of 8")
    shown = [f"{size[0]} {what} of {size[2]} x {size[1]}" for size in (kept, given)]
    return shown[:1] if given == kept else [f"{shown[0]}, cut from {shown[1]} ({rule})"]
