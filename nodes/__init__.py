"""The nodes, as ComfyUI lists them. Each is a schema plus one call; ComfyUI is known here and in core/host.py only."""

from comfy_api.latest import ComfyExtension, io

from .clips import ContinueClip, JoinClips
from .decode import InpaintLatent, VAEDecode, VAEEncode
from .download import Download
from .load import (
    LoadQwenImageModel,
    LoadQwenImageTextEncoder,
    LoadWanImageEncoder,
    LoadWanModel,
    LoadWanTextEncoder,
    LoadWanVAE,
)
from .lora import LoRA
from .model import ComfyModel
from .options import BlockSwap, ChooseFastPaths
from .pictures import WanFirstLastFrameToVideo, WanImageSize, WanImageToVideo, WanVideoToVideo
from .qwen_image import EmptyQwenImageLatent, QwenImageEditEncode, QwenImageTextEncode
from .sample import Sampler
from .text import WanTextEncode
from .vace import WanVACE
from .wan import EmptyWanLatent

NODES: tuple[type[io.ComfyNode], ...] = (
    LoadWanModel,
    LoadWanTextEncoder,
    LoadWanVAE,
    WanTextEncode,
    EmptyWanLatent,
    Sampler,
    VAEDecode,
    VAEEncode,
    LoadQwenImageModel,
    LoadQwenImageTextEncoder,
    QwenImageTextEncode,
    QwenImageEditEncode,
    EmptyQwenImageLatent,
    InpaintLatent,
    BlockSwap,
    ContinueClip,
    JoinClips,
    LoadWanImageEncoder,
    WanImageSize,
    WanImageToVideo,
    WanFirstLastFrameToVideo,
    WanVideoToVideo,
    WanVACE,
    LoRA,
    Download,
    ChooseFastPaths,
    ComfyModel,
)


class Extension(ComfyExtension):
    """What `comfy_entrypoint` gives to ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return every node class of this pack."""
        return list(NODES)
