"""Latents to pictures and back, with our VAE or ComfyUI's."""

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from .types import CATEGORY, check_choice, tell, verdict

TILING = ("auto", "tiled")


class VAEDecode(io.ComfyNode):
    """Latents to frames."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenVAEDecode",
            display_name="VAE Decode (WanQwen)",
            category=CATEGORY,
            description="Turns latents into the frames of the video. Memory does not grow with the number of frames, "
            "and time is never cut.",
            inputs=[
                io.Latent.Input("latent", tooltip="From the sampler."),
                io.Vae.Input("vae", tooltip="From Load Wan VAE, or ComfyUI's Load VAE."),
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
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The frames; the clips of a batch one after another.")
            ],
        )

    @classmethod
    def validate_inputs(cls, tiling: str | None) -> bool | str:
        return verdict(check_choice("tiling", tiling, TILING))

    @classmethod
    def execute(cls, latent: dict[str, Any], vae: Any, tiling: str, tile_size: int, tile_overlap: int) -> io.NodeOutput:
        samples = latent["samples"]
        _check_is_for_video(vae)
        if samples.shape[1] != vae.latent_channels:
            raise ValueError(
                f"The latent has {samples.shape[1]} channels and this VAE takes {vae.latent_channels}: use the VAE "
                "that belongs to the sampler's model (wan_2.1_vae.safetensors for Wan 2.1)."
            )
        if tiling == "tiled":
            space = vae.spacial_compression_decode()
            tile = tile_size // space
            frames = vae.decode_tiled(samples, tile_x=tile, tile_y=tile, overlap=tile_overlap // space)
        else:
            frames = vae.decode(samples)
        return io.NodeOutput(frames.reshape(-1, *frames.shape[-3:]))


class VAEEncode(io.ComfyNode):
    """Frames to latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQwenVAEEncode",
            display_name="VAE Encode (WanQwen)",
            category=CATEGORY,
            description="Turns images, taken as the frames of one clip, into a latent.",
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="The frames of one clip: 4n + 1 of them (1, 5, 9...), width and height multiples of 8. "
                    "What is too much is cut off, and a message on the node says so.",
                ),
                io.Vae.Input("vae", tooltip="From Load Wan VAE, or ComfyUI's Load VAE."),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For the sampler's latent input.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images: Tensor, vae: Any) -> io.NodeOutput:
        _check_is_for_video(vae)
        samples = vae.encode(images[..., :3])
        return io.NodeOutput({"samples": samples}, ui=tell(cls.hidden.unique_id, _encoded(images, samples, vae)))


def _check_is_for_video(vae: Any) -> None:
    if vae.latent_dim != 3:
        raise ValueError(
            "This VAE is for pictures, not for video: use Load Wan VAE, or Load VAE with wan_2.1_vae.safetensors."
        )


def _encoded(images_FHWC: Tensor, samples: Tensor, vae: Any) -> list[str]:
    """Say what of a clip is in its latent, and what it was cut from."""
    frames, height, width = vae.upscale_ratio
    given = tuple(images_FHWC.shape[:3])
    kept = (frames(samples.shape[-3]), samples.shape[-2] * height, samples.shape[-1] * width)
    shown = ["{0} frames of {2} x {1}".format(*size) for size in (kept, given)]
    return shown[:1] if given == kept else [f"{shown[0]}, cut from {shown[1]} (4n + 1 frames, sizes in steps of 8)"]
