"""Prompts through ComfyUI's own text encoders, and through ours of the same files: the same rows, the same latents."""

import json
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from wanqwen.core.conditioning import ComfyConditioning
from wanqwen.core.types import Conditioning
from wanqwen.qwen_image.conditioning import from_comfy as from_qwen
from wanqwen.qwen_image.vl_config import VLConfig
from wanqwen.tests.nodes import tiny as checkpoints
from wanqwen.wan.conditioning import from_comfy as from_wan
from wanqwen.wan.config import NEGATIVE_PROMPT

from .convert import MODEL, PROMPT, SAMPLER, TEXT_ENCODER
from .test_qwen_image import EDIT, ENCODER, LOADER, VAE, only
from .test_qwen_image import SAMPLER as QWEN_SAMPLER
from .test_qwen_image import TEXT as QWEN_PROMPT
from .test_qwen_image import tiny as qwen  # noqa: F401 a fixture
from .test_stock_model import LEVELS, STOCK, beside, both

SMALL, SMALL_QWEN = "small.safetensors", "small_qwen.safetensors"
CLIP, CHANGED, PICTURE, LATENT, SHIFTED = map(str, range(70, 75))
Pair = dict[str, Any]  # something for the positive prompt and for the negative one
WRITTEN: Pair = {"positive": "75", "negative": "76"}
REFERRED: Pair = {"positive": "77", "negative": "78"}
KEPT: Pair = {"positive": "79", "negative": "80"}

UMT5 = replace(checkpoints.TEXT, dim=4096)  # the width that ComfyUI's own Wan takes
WAN = replace(checkpoints.MODEL, dim=128, num_heads=1, freq_dim=256, text_dim=UMT5.dim)
# ComfyUI reads every Qwen2.5-VL with the published tokenizer, and shows it pictures in the published sizes.
VL = replace(checkpoints.VL, vocab_size=VLConfig().vocab_size, max_pixels=VLConfig().max_pixels)
TEXTS: Pair = {"positive": "a red star moving left on a white background, 星", "negative": f"a disc, {NEGATIVE_PROMPT}"}

# Of the spread, both of rows and of latents. The sums of thousands of products are taken in other orders here and
# there, in float32: rows are up to 1.5e-5 apart, latents up to 1.6e-5, and with the two prompts swapped 0.15 or more.
ROUNDING = 1e-4
# Of the rows' spread, where a picture varies: ours is resampled by Lanczos and cubic filters in 8 bits as published,
# theirs linearly. Rows are up to 0.034 apart by that, and 2.1 with those of a picture in another order.
RESAMPLING = 0.1
UNORDERED = (0, 3, 64)  # the last ComfyUI known to leave a picture's rows in the order of the tower's windows


@pytest.fixture(scope="module", autouse=True)
def files(server) -> None:
    """Write text encoders that ComfyUI's own code takes, see `small_encoders.py`, and a Wan model that it takes."""
    models, vision = server.base / "models", VL.vision
    checkpoints.write_model(models / "diffusion_models" / SMALL, WAN)
    umt5 = {
        "d_model": UMT5.dim, "d_kv": UMT5.dim_attn // UMT5.num_heads, "d_ff": UMT5.dim_ffn,
        "num_heads": UMT5.num_heads, "num_layers": UMT5.num_layers, "vocab_size": UMT5.vocab_size,
    }  # fmt: skip
    path = checkpoints.write_text_encoder(models / "text_encoders" / SMALL, UMT5)
    tell(path, {"detected": "T5_XXL", "name": "umt5xxl", "model": umt5})
    language = {
        "hidden_size": VL.hidden, "intermediate_size": VL.intermediate, "num_hidden_layers": VL.num_layers,
        "num_attention_heads": VL.num_heads, "num_key_value_heads": VL.num_kv_heads, "vocab_size": VL.vocab_size,
    }  # fmt: skip
    tower = {
        "hidden_size": vision.hidden, "intermediate_size": vision.intermediate, "num_heads": vision.num_heads,
        "num_layers": vision.depth, "window_size": vision.window, "full_attention": vision.full_attention,
    }  # fmt: skip
    head = {"head_dim": VL.head_width, "rope_dims": VL.mrope_section}
    path = checkpoints.write_qwen_text_encoder(models / "text_encoders" / SMALL_QWEN, VL, has_tokenizer=False)
    tell(path, {"detected": "QWEN25_7B", "name": "qwen25_7b", "model": language, "head": head, "vision": tower})


def tell(path: Path, sizes: dict[str, Any]) -> None:
    """Add sizes to a file's metadata."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    save_file(load_file(path), path, metadata | {"sizes": json.dumps(sizes)})


def nodes(of: dict[str, tuple[str, dict]]) -> dict:
    return {node: {"class_type": kind, "inputs": inputs} for node, (kind, inputs) in of.items()}


def clip(file: str, kind: str, option: tuple[str, int] | None = None) -> tuple[dict, list]:
    """Return the nodes of ComfyUI's text encoder, its tokenizer as it is or with an option, and where it comes out."""
    loader = {CLIP: ("CLIPLoader", {"clip_name": file, "type": kind})}
    if option is None:
        return nodes(loader), [CLIP, 0]
    changed = {CHANGED: ("TestTokenizerOption", {"clip": [CLIP, 0], "name": option[0], "value": option[1]})}
    return nodes(loader | changed), [CHANGED, 0]


def written(*of: Any) -> dict:
    """Return the nodes that encode both texts with ComfyUI's text encoder."""
    loader, source = clip(*of)
    return loader | nodes({node: ("CLIPTextEncode", {"clip": source, "text": TEXTS[w]}) for w, node in WRITTEN.items()})


def reconnected(prompt: dict, sources: Pair) -> dict:
    """Return the prompt with other conditioning wherever there is some."""
    prompt = deepcopy(prompt)
    for node in prompt.values():
        for which, source in sources.items():
            if isinstance(node["inputs"].get(which), list):
                node["inputs"][which] = [source, 0]
    return prompt


def keepers(links: Pair) -> dict:
    return nodes({KEPT[w]: ("TestKeepRows", {"conditioning": link, "name": w}) for w, link in links.items()})


def kept(server) -> dict[str, ComfyConditioning]:
    """Return the conditioning that the last run kept."""
    found = {}
    for which in KEPT:
        path = server.base / "output" / f"{which}.safetensors"
        options = load_file(path)
        path.unlink()  # a run that keeps nothing can't pass for one that does
        found[which] = [[options.pop("rows"), options]]
    return found


def made(server, prompt: dict, sampler: str) -> tuple[list[torch.Tensor], dict[str, ComfyConditioning]]:
    """Return the latents of our sampler and of the stock one, and the conditioning that both had."""
    given = prompt[sampler]["inputs"]
    latents = both(server, prompt | keepers({which: given[which] for which in KEPT}))
    return latents, kept(server)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max() / one.std())


def assert_same(
    server, prompt: dict, sampler: str, sources: Pair, added: dict, read: Callable[[Any], list[Conditioning]]
) -> dict[str, ComfyConditioning]:
    """Compare a prompt with what it is with other conditioning, which is returned; swapped, it must not be the same."""
    (latent, *others), ours = made(server, prompt, sampler)
    more, theirs = made(server, reconnected(prompt, sources) | added, sampler)
    for which in KEPT:
        [mine], [other] = read(ours[which]), read(theirs[which])
        assert distance(mine.text, other.text) < ROUNDING
    assert max(distance(latent, other) for other in (*others, *more)) < ROUNDING
    swapped = dict(zip(sources, reversed(sources.values()), strict=True))
    others, _ = made(server, reconnected(prompt, swapped) | added, sampler)
    assert min(distance(latent, other) for other in others) > 100 * ROUNDING
    return theirs


@pytest.fixture
def wan(tiny):
    """The demo workflow with the small files, a stock sampler beside ours."""
    for loader in (MODEL, TEXT_ENCODER):
        tiny[loader]["inputs"]["file"] = SMALL
    tiny[PROMPT]["inputs"] |= TEXTS
    return beside(tiny)


def read_wan(conditioning: ComfyConditioning) -> list[Conditioning]:
    return from_wan(conditioning, WAN)


def read_qwen(conditioning: ComfyConditioning) -> list[Conditioning]:
    return from_qwen(conditioning, VL.hidden)


@pytest.mark.parametrize(("option", "rows"), [(None, 512), (("umt5xxl_min_length", 0), 34)])
def test_wan(server, wan, option, rows):
    """ComfyUI's rows are filled up with zeros, or not."""
    theirs = assert_same(server, wan, SAMPLER, WRITTEN, written(SMALL, "wan", option), read_wan)
    [[tensor, _]] = theirs["positive"]
    assert tensor.shape[1] == rows and read_wan(theirs["positive"])[0].text.shape[1] == 34


def test_wan_with_a_stock_model_too(server, wan):
    """Noise levels are whole timesteps here, to which our Wan is cut as published, and ComfyUI's is not."""
    loader = ("UNETLoader", {"unet_name": SMALL, "weight_dtype": "default"})
    wan |= nodes({STOCK: loader, SHIFTED: ("ModelSamplingSD3", {"model": [STOCK, 0], "shift": 1.0})})
    wan[LEVELS]["inputs"] |= {"model": [SHIFTED, 0], "steps": 4}
    assert_same(server, wan, SAMPLER, WRITTEN, written(SMALL, "wan"), read_wan)


@pytest.mark.parametrize(("option", "rows"), [(None, 17), (("qwen25_7b_min_length", 200), 166)])
def test_qwen_image(server, qwen, option, rows):  # noqa: F811
    """The template's first 34 tokens are dropped; ComfyUI masks what a longer prompt is filled up with."""
    prompt = qwen("qwen_image_text_to_image")
    prompt[only(prompt, ENCODER)]["inputs"]["file"] = SMALL_QWEN
    prompt[only(prompt, QWEN_PROMPT)]["inputs"] |= TEXTS
    sampler = only(prompt, QWEN_SAMPLER)
    added = written(SMALL_QWEN, "qwen_image", option)
    theirs = assert_same(server, beside(prompt, sampler), sampler, WRITTEN, added, read_qwen)
    [[tensor, options]] = theirs["positive"]
    assert tensor.shape[1] == rows and bool(options) == bool(option)
    assert read_qwen(theirs["positive"])[0].text.shape[1] == 17


STOCK_EDITS = {
    "qwen_edit.safetensors": ("TextEncodeQwenImageEdit", ["image"]),
    "qwen_edit-2509.safetensors": ("TextEncodeQwenImageEditPlus", ["image1", "image2"]),
}


@pytest.fixture
def edit(qwen):  # noqa: F811
    """Return the edit workflow with pictures of nodes, and ComfyUI's nodes that show them to its text encoder."""

    def of(file: str, pictures: dict[str, tuple[str, dict]]) -> tuple[dict, dict]:
        prompt = qwen("qwen_image_edit") | nodes(pictures)
        prompt[only(prompt, ENCODER)]["inputs"]["file"] = SMALL_QWEN
        prompt[only(prompt, LOADER)]["inputs"]["file"] = file
        prompt[only(prompt, EDIT)]["inputs"] |= TEXTS | {f"image_{k}": [p, 0] for k, p in enumerate(pictures, start=1)}
        (kind, names), (loader, source) = STOCK_EDITS[file], clip(SMALL_QWEN, "qwen_image")
        seen = {name: [picture, 0] for name, picture in zip(names, pictures, strict=False)}
        encode = {node: (kind, {"clip": source, "prompt": TEXTS[which]} | seen) for which, node in WRITTEN.items()}
        return prompt, loader | nodes(encode)

    return of


def plain(width: int, height: int, color: int) -> tuple[str, dict]:
    """Return a picture of one colour, which is the same in any size: how it is resampled does not matter."""
    return "EmptyImage", {"width": width, "height": height, "batch_size": 1, "color": color}


@pytest.mark.parametrize("file", STOCK_EDITS)
def test_an_edit(server, edit, file):
    prompt, added = edit(file, {PICTURE: plain(48, 32, 0x3366CC)})
    vae, sampler = prompt[only(prompt, EDIT)]["inputs"]["vae"], only(prompt, QWEN_SAMPLER)
    refer = {
        REFERRED[which]: ("ReferenceLatent", {"conditioning": [node, 0], "latent": [LATENT, 0]})
        for which, node in WRITTEN.items()
    }
    added |= nodes({LATENT: ("VAEEncode", {"pixels": [PICTURE, 0], "vae": vae})} | refer)
    assert_same(server, beside(prompt, sampler), sampler, REFERRED, added, read_qwen)


def rows_of_edit(server, prompt: dict, added: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Return our rows of the instruction and ComfyUI's, without sampling."""
    encode = only(prompt, EDIT)
    prompt = {node: given for node, given in prompt.items() if given["class_type"] in (*BEFORE_EDIT, EDIT)} | added
    links = {"positive": [encode, 0], "negative": [WRITTEN["positive"], 0]}
    job = server.run(prompt | keepers(links))
    assert job.end == "execution_success", job.error
    return tuple(read_qwen(conditioning)[0].text for conditioning in kept(server).values())


BEFORE_EDIT = (ENCODER, LOADER, VAE, "EmptyImage", "LoadImage")


def test_two_pictures_stand_in_the_same_rows(server, edit):
    pictures = {PICTURE: plain(48, 32, 0x3366CC), LATENT: plain(32, 48, 0xCC9911)}
    ours, theirs = rows_of_edit(server, *edit("qwen_edit-2509.safetensors", pictures))
    assert distance(ours, theirs) < ROUNDING


def test_a_picture_is_seen_the_same_way_up(server, edit):
    version = server.get("/system_stats")["system"]["comfyui_version"]
    if tuple(map(int, re.findall(r"\d+", version)[:3])) <= UNORDERED:
        pytest.skip(f"ComfyUI {version} leaves a picture's rows in the order of the vision tower's windows")
    across, down = torch.linspace(0, 1, 384)[None], torch.linspace(0, 1, 384)[:, None]
    colours = [torch.sin(3 * across + 2 * down), torch.cos(2 * across - 4 * down), across * down - 0.5]
    picture = torch.stack(colours, dim=-1).mul(100).add(128).byte().numpy()
    Image.fromarray(picture, "RGB").save(server.base / "input" / "smooth.png")
    ours, theirs = rows_of_edit(
        server, *edit("qwen_edit-2509.safetensors", {PICTURE: ("LoadImage", {"image": "smooth.png"})})
    )
    assert distance(ours, theirs) < RESAMPLING
