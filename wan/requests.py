"""Whether a request fits the model it is given to, asked before any weight is read."""
# B batch, N rows, E width, C channels, T latent frames, h w latent positions

from torch import Tensor

from ..core.types import Conditioning, Identity, SampleRequest
from .config import WanConfig
from .vae import LATENT_FORMAT

I2V_FILES = "wan2.1_i2v_480p_14B or wan2.1_i2v_720p_14B"
T2V_FILES = "wan2.1_t2v_1.3B or wan2.1_t2v_14B"
PICTURE_NODES = "Wan Image to Video or Wan First-Last Frame to Video"


def check_request(identity: Identity, request: SampleRequest) -> None:
    """Raise ValueError for prompts that the model does not take, or whose pictures it lacks.

    The message says which input of the sampler, what it has, what this model takes, and what would fit.
    """
    for which, conditioning in (("positive", request.positive), ("negative", request.negative)):
        if conditioning is not None:
            who = f"this is Wan 2.1 {identity.variant}, and the sampler's {which} input"
            _check_text(identity, conditioning, who)
            _check_controls(identity, conditioning)
            _check_known(identity.config, conditioning.extra, tuple(request.latent.shape), who)
            _check_image(identity.config, conditioning.image, who)


def _check_text(identity: Identity, conditioning: Conditioning, who: str) -> None:
    width, wanted = conditioning.text.shape[-1], identity.config.text_dim
    if width != wanted:
        raise ValueError(
            f"{who} has text rows of width {width}, where {wanted} (umT5) are expected: encode the prompt with the "
            "text encoder that belongs to this model."
        )
    if conditioning.references:
        raise ValueError(
            f"Wan 2.1 {identity.variant} takes no reference pictures, and the conditioning has some: encode the prompt "
            "with Wan Text Encode, or choose a Qwen-Image-Edit model."
        )


def _check_controls(identity: Identity, conditioning: Conditioning) -> None:
    if conditioning.controls and not identity.config.vace_dim:
        raise ValueError(
            f"Wan 2.1 {identity.variant} takes no control, and the conditioning has one of VACE (video, mask or "
            "references): load a VACE model (wan2.1_vace_1.3B or wan2.1_vace_14B), or leave out the node Wan VACE."
        )


def _check_known(config: WanConfig, extra_BCTHW: Tensor | None, latent_shape: tuple[int, ...], who: str) -> None:
    if extra_BCTHW is None and config.extra_dim:
        raise ValueError(
            f"{who} has no encoded picture, which a model of this kind starts from: put {PICTURE_NODES} before the "
            f"sampler, with a picture and both prompts; or choose a file of text to video, such as {T2V_FILES}."
        )
    if extra_BCTHW is None:
        return
    if not config.extra_dim:
        raise ValueError(
            f"{who} has an encoded picture, which a model of this kind does not take: choose a file of image to video, "
            f"such as {I2V_FILES}, or remove the node before the sampler that adds it ({PICTURE_NODES})."
        )
    if extra_BCTHW.shape[1] != config.extra_dim:
        raise ValueError(
            f"{who} has {extra_BCTHW.shape[1]} channels of an encoded picture, and this file takes {config.extra_dim}: "
            "it was made for another kind of control, which is not carried out here."
        )
    if len(extra_BCTHW) not in (1, latent_shape[0]):
        raise ValueError(
            f"{who} has encoded pictures for {len(extra_BCTHW)} videos, and the latent is {latent_shape[0]} of them: "
            "give one for all, or connect the latent that comes out of the same node as the prompts."
        )
    found, wanted = (clip_size(shape) for shape in (tuple(extra_BCTHW.shape), latent_shape))
    if found != wanted:
        raise ValueError(
            f"{who} has pictures that were encoded for {found}, and the latent is {wanted}: connect the latent that "
            f"comes out of the same node as the prompts ({PICTURE_NODES})."
        )


def _check_image(config: WanConfig, image_BNE: Tensor | None, who: str) -> None:
    if image_BNE is None and config.image_dim:
        raise ValueError(
            f"{who} has no rows of the image encoder, by which this model sees the picture: connect Load Wan Image "
            f"Encoder (clip_vision_h) to clip_vision of {PICTURE_NODES}."
        )
    if image_BNE is None:
        return
    if not config.image_dim:
        raise ValueError(
            f"{who} has rows of the image encoder, which this model does not take: disconnect clip_vision and "
            f"clip_vision_output, or choose a file of image to video, such as {I2V_FILES}."
        )
    _, rows, width = image_BNE.shape
    if width != config.image_dim:
        raise ValueError(
            f"{who} has image rows of width {width}, where {config.image_dim} are expected: the image encoder of Wan "
            "2.1 is CLIP ViT-H (clip_vision_h), not that of another model."
        )
    if config.image_positions and rows > config.image_positions:
        raise ValueError(
            f"{who} has {rows} image rows, and this model has room for {config.image_positions}: give a first and a "
            "last picture, and no more."
        )


def clip_size(latent_shape: tuple[int, ...]) -> str:
    """Say the size of a clip whose latents' shape ends with T, h, w."""
    *_, frames, height, width = latent_shape
    space, count = LATENT_FORMAT.spatial_factor, LATENT_FORMAT.pixel_frames(frames)
    return f"{width * space} x {height * space} pixels, {count} frame{'s' if count > 1 else ''}"
