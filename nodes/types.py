"""What all nodes share with ComfyUI: sockets of our own, dropdowns of model files, notices to the user."""

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import folder_paths
from comfy_api.latest import io
from torch import Tensor

from ..core.weights.reader import GGUF, PICKLES, SAFETENSORS
from ..downloads.catalog import set_with
from ..loading import DEMO_FOLDER
from ..wan.family import LATENT_FORMAT

CATEGORY = "WanQwen"
T = TypeVar("T")

WanModel = io.Custom("WANQWEN_MODEL")  # carries a core.types.ModelHandle
WanTextEncoder = io.Custom("WANQWEN_TEXT_ENCODER")  # carries a wan.text_encoder.TextEncoder
QwenTextEncoder = io.Custom("WANQWEN_QWEN_TEXT_ENCODER")  # carries a qwen_image.text_encoder.TextEncoder

FINISH = "wanqwen_finish"  # in a LATENT of ours: a core.picture.Finish, which VAE Decode carries out

OTHER_VAE = (
    "This VAE is for other models: use Load Wan / Qwen-Image VAE, or Load VAE with wan_2.1_vae.safetensors or "
    "qwen_image_vae.safetensors."
)
READABLE = (SAFETENSORS, GGUF, *PICKLES)
DEMO_PREFIX = "demo/"
# ComfyUI's name of a folder -> the miniatures that are listed with its files.
DEMO_FILES = {
    "diffusion_models": ("wan_dit", "wan_i2v_dit", "wan_flf2v_dit", "qwen_dit", "qwen_edit_dit"),
    "text_encoders": ("wan_text_encoder", "qwen_text_encoder"),
    "vae": ("wan_vae", "qwen_vae"),
    "clip_vision": ("wan_image_encoder",),
    "loras": (),
}


def found_by(*words: str) -> dict[str, list[str]]:
    """Return what a schema takes so that its node is found by other words too; nothing, for a ComfyUI without that."""
    known = "search_aliases" in inspect.signature(io.Schema).parameters
    return {"search_aliases": list(words)} if known else {}


def prompt_inputs(*, positive: str, negative: str, default_negative: str) -> list[io.Input]:
    """Return the two prompts of a run, with what their tooltips say."""
    return [
        io.String.Input("positive", multiline=True, dynamic_prompts=True, default="", tooltip=positive),
        io.String.Input("negative", multiline=True, default=default_negative, tooltip=negative),
    ]


def prompt_outputs() -> list[io.Output]:
    """Return what prompts become."""
    return [
        io.Conditioning.Output(display_name="positive", tooltip="For the sampler's positive input."),
        io.Conditioning.Output(display_name="negative", tooltip="For the sampler's negative input."),
    ]


def encode_prompts(
    node_id: str | None, text_encoder: Any, positive: str, negative: str, to_comfy: Callable, max_tokens: int
) -> io.NodeOutput:
    """Encode both prompts, and say on the node how long they are: without what the encoder puts around any text."""
    texts, around = {"positive": positive, "negative": negative}, len(text_encoder.tokenise("").ids)
    prompts = text_encoder.encode(list(texts.values()))
    lines = []
    for name, text in texts.items():
        tokens = text_encoder.tokenise(text)
        lines.append(f"{name}: {tokens.notice or f'{len(tokens.ids) - around} of {max_tokens} tokens'}")
    return io.NodeOutput(*(to_comfy([prompt]) for prompt in prompts), ui=tell(node_id, lines))


def list_files(folder: str, demo: str = "") -> list[str]:
    """Return what a dropdown offers: the readable files of one of ComfyUI's model folders, then the miniatures.

    Of those only the ones whose names begin with `demo`.
    """
    found = {name for name in folder_paths.get_filename_list(folder) if name.lower().endswith(READABLE)}
    for place in folder_paths.get_folder_paths(folder):  # ComfyUI's own lists leave GGUF out
        files, _ = folder_paths.recursive_search(place, excluded_dir_names=[".git"])
        found.update(folder_paths.filter_files_extensions(files, {GGUF}))
    names = sorted(found)
    bundled = [name for name in _bundled(folder) if name.startswith(DEMO_PREFIX + demo) and _demo_path(name).is_file()]
    return names + [name for name in bundled if name not in names]


def find_file(folder: str, name: str) -> Path:
    """Return the path of a dropdown's entry; a user's own file comes before the miniature of the same name.

    Raises ValueError if there is no such file.
    """
    if found := folder_paths.get_full_path(folder, name):
        return Path(found)
    if name in _bundled(folder) and _demo_path(name).is_file():
        return _demo_path(name)
    places = " or ".join(folder_paths.get_folder_paths(folder))
    known = set_with(name.replace("\\", "/").rpartition("/")[2])
    hint = f" The node Download (WanQwen) can fetch it: it belongs to {known.title!r}." if known else ""
    raise ValueError(
        f"{name} was not found: put the file into {places} and press R to refresh, or choose another.{hint}"
    )


def file_stamp(folder: str, name: str | None, beside: str | None = None) -> str:
    """Return what changes when a file is replaced by another of the same name, so that its loader runs again.

    Likewise for a file `beside` it, if that is there.
    """
    if name is None:  # the dropdown is fed by a link
        return ""
    file = find_file(folder, name)
    files = [file] if beside is None else [file, file.with_name(beside)]
    found = [one.stat() for one in files if one.is_file()]
    return " ".join(f"{facts.st_size} {facts.st_mtime_ns}" for facts in found)


def check_file(folder: str, name: str | None) -> str | None:
    """Return what is wrong with a dropdown's entry, None if it is fine or comes through a link."""
    try:
        if name is not None:
            find_file(folder, name)
    except ValueError as error:
        return str(error)
    return None


def check_choice(name: str, value: str | None, choices: Iterable[str]) -> str | None:
    """Return what is wrong with the value of a fixed list; ComfyUI itself does not look at those of V3 nodes."""
    choices = list(choices)
    if value is None or value in choices:
        return None
    return f"{name} is {value!r}: choose one of {', '.join(choices)}."


def chosen(name: str, value: str, choices: Mapping[str, T]) -> T:
    """Return what an entry of a fixed list stands for. Raises ValueError for any other: older ComfyUI lets it pass."""
    if value not in choices:
        raise ValueError(check_choice(name, str(value), choices))
    return choices[value]


def clip_of(latent: dict[str, Any]) -> Tensor:
    """Return the latents [B, C, T, h, w] of a LATENT; a picture [B, C, h, w] becomes one frame."""
    samples = latent["samples"]
    return samples[:, :, None] if samples.dim() == 4 else samples


def check_is_for_video(vae: Any) -> None:
    """Raise ValueError for a VAE of ComfyUI's that is not of the kind that Wan and Qwen-Image have."""
    if vae.latent_dim != 3:
        raise ValueError(OTHER_VAE)


def check_is_rgb(vae: Any) -> None:
    """Raise ValueError for a VAE that is not one of Wan's or Qwen-Image's kind, or is that of layers with alpha."""
    check_is_for_video(vae)
    if vae.latent_channels != LATENT_FORMAT.channels:  # that of Wan 2.2 has more
        raise ValueError(OTHER_VAE)
    if vae.output_channels != 3:
        raise ValueError(
            f"This VAE makes pictures of {vae.output_channels} channels, as the layers of Qwen-Image-Layered have "
            "them, and here RGB is meant: load the VAE of Qwen-Image or Wan."
        )


def dropped_alpha(images: Tensor, vae: Any) -> list[str]:
    """Return what to tell of images [..., channels] that have an alpha channel which the VAE does not take."""
    return ["The image's alpha channel was dropped."] if images.shape[-1] > vae.output_channels else []


def verdict(*problems: str | None) -> bool | str:
    """Return what `validate_inputs` must: True, or the problems in words."""
    return " ".join(filter(None, problems)) or True


def tell(node_id: str | None, lines: Sequence[str]) -> dict[str, list[str]]:
    """Show on the node what it did, and return that for the history, which callers of the API read.

    A node that may have something to say always says something: an old notice would stay on it otherwise.
    """
    server = sys.modules.get("server")
    if node_id is not None and server is not None:
        server.PromptServer.instance.send_progress_text("\n".join(lines), node_id)
    return {"text": list(lines)}


def _bundled(folder: str) -> list[str]:
    return [f"{DEMO_PREFIX}{name}.safetensors" for name in DEMO_FILES[folder]]


def _demo_path(name: str) -> Path:
    return DEMO_FOLDER / name.removeprefix(DEMO_PREFIX)
