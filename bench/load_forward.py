"""How long from a file to the first velocity, beside diffusers at the same weights?

    python -m wanqwen.bench.load_forward [--model wan qwen] [--rounds 3] [--layers N] [--folder DIR]

Writes random bf16 weights in the shapes of Wan 2.1 T2V-1.3B (whole, or so many layers of it), as the official file for
`from_single_file` and as a diffusers folder for `from_pretrained`, and of Qwen-Image (2 of its 60 layers) as a
diffusers folder; reads each once so that the system has it in memory; then by turns, each in a process of its own,
loads it and runs one forward in bf16 on the CPU. Ours reads the very same files. Times begin after the imports. Our
weights are mapped, so that what reading them takes is in the forward: compare the sums.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.blocks import Run
from ..core.runtime import loaded_of
from ..core.weights.keymap import Renamer
from ..loading import load_model
from ..qwen_image.config import PATCH, QwenImageConfig
from ..wan.keymap import DIFFUSION_MODEL_SPELLINGS
from .files import shapes_of, write_random
from .models import QWEN_IMAGE, WAN, WAN_1_3B

DTYPE = torch.bfloat16
SHAPES = {"wan": (1, 16, 3, 16, 16), "qwen": (1, 16, 1, 32, 32)}  # latents: 192 and 256 tokens
TEXT_ROWS = 40
QWEN_LAYERS = 2
WEIGHTS = "diffusion_pytorch_model.safetensors"  # of a diffusers folder
Row = tuple[float, float]  # seconds of loading and of the forward


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A file or folder, and how diffusers reads it."""

    title: str
    model: str
    path: Path
    theirs: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Write, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=("wan", "qwen"), default=["wan", "qwen"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, help="of Wan (default: all 30)")
    parser.add_argument("--folder", type=Path, help="where the files may lie (default: a temporary folder)")
    parser.add_argument("--one", nargs=4, metavar=("WAY", "MODEL", "PATH", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        way, model, path, out = options.one
        sys.stdout.write(json.dumps(measured(way, model, Path(path), Path(out))))
        return
    for model in options.model:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            for case in WRITERS[model](Path(folder), options.layers):
                sys.stdout.write(report(case, options.rounds))
                sys.stdout.flush()


def write_wan(folder: Path, layers: int | None) -> list[Case]:
    """Write Wan's two files."""
    config = replace(WAN_1_3B, num_layers=layers or WAN_1_3B.num_layers)
    shapes, title = shapes_of(WAN, config), f"Wan 2.1, width {config.dim}, {config.num_layers} layers"
    stated = {
        "_class_name": "WanTransformer3DModel", "num_attention_heads": config.num_heads, "ffn_dim": config.ffn_dim,
        "attention_head_dim": config.dim // config.num_heads, "num_layers": config.num_layers,
        "text_dim": config.text_dim,
    }  # fmt: skip
    single, theirs = folder / "single", folder / "diffusers"
    for one in (single, theirs):
        one.mkdir()
        (one / "config.json").write_text(json.dumps(stated))
    rename = Renamer(next(s for s in DIFFUSION_MODEL_SPELLINGS if s.name == "diffusers").table)
    file = write_random(single / "wan2.1_t2v_1.3B_bf16.safetensors", shapes)
    write_random(theirs / WEIGHTS, {str(rename(name)): shape for name, shape in shapes.items()})
    return [
        Case(title=f"{title}, official file", model="wan", path=file, theirs="from_single_file"),
        Case(title=f"{title}, diffusers folder", model="wan", path=theirs, theirs="from_pretrained"),
    ]


def write_qwen(folder: Path, layers: int | None) -> list[Case]:
    """Write Qwen-Image's folder."""
    config = QwenImageConfig(num_layers=QWEN_LAYERS)
    write_random(folder / WEIGHTS, shapes_of(QWEN_IMAGE, config))
    stated = {"_class_name": "QwenImageTransformer2DModel", "num_layers": config.num_layers, "guidance_embeds": False}
    (folder / "config.json").write_text(json.dumps(stated))
    title = f"Qwen-Image, width {config.dim}, {config.num_layers} layers, diffusers folder"
    return [Case(title=title, model="qwen", path=folder, theirs="from_pretrained")]


WRITERS: dict[str, Callable[[Path, int | None], list[Case]]] = {"wan": write_wan, "qwen": write_qwen}


def report(case: Case, rounds: int) -> str:
    """Run both by turns and return what came of it as text."""
    files = sorted(case.path.glob("*.safetensors")) if case.path.is_dir() else [case.path]
    for file in files:
        file.read_bytes()
    rows: dict[str, list[Row]] = {"ours": [], case.theirs: []}
    with tempfile.TemporaryDirectory() as folder:
        outs = {way: Path(folder) / f"{way}.pt" for way in rows}
        for i in range(rounds):
            for way in list(rows)[:: 1 if i % 2 else -1]:
                one = ["--one", way, case.model, str(case.path), str(outs[way])]
                found = subprocess.run([sys.executable, "-m", __spec__.name, *one], check=True, capture_output=True)
                rows[way].append(json.loads(found.stdout))
        ours, theirs = (torch.load(out, weights_only=True).float() for out in outs.values())
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    size = sum(file.stat().st_size for file in files) / 1e9
    lines = [f"{case.title}, {size:.2f} GB; medians of {rounds} (differs by {error:.1e})"]
    sums = {way: statistics.median(map(sum, found)) for way, found in rows.items()}
    for way, found in rows.items():
        load, forward = (statistics.median(column) for column in zip(*found, strict=True))
        ratio = f"   ours/{way} {sums['ours'] / sums[way]:.2f}" if way != "ours" else ""
        lines.append(f"  {way:<18}{sums[way]:7.2f} s   load {load:6.2f} s, forward {forward:6.2f} s{ratio}")
    return "\n".join(lines) + "\n"


@torch.inference_mode()
def measured(way: str, model: str, path: Path, out: Path) -> Row:
    """Return the seconds of loading and of the first forward, whose result is written to `out`."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SHAPES[model], generator=generator)
    width = WAN_1_3B.text_dim if model == "wan" else QwenImageConfig().text_dim
    text = torch.randn(1, TEXT_ROWS, width, generator=generator)
    theirs = None if way == "ours" else _diffusers(model)
    started = time.perf_counter()
    if theirs is None:
        handle = load_model(path, DTYPE)
        network = loaded_of(handle, DTYPE).in_ram()
    elif way == "from_single_file":
        network = theirs.from_single_file(str(path), config=str(path.parent), torch_dtype=DTYPE)
    else:
        network = theirs.from_pretrained(str(path), torch_dtype=DTYPE)
    loaded = time.perf_counter()
    forward = _ours if theirs is None else _theirs_wan if model == "wan" else _theirs_qwen
    velocity = forward(network, x, text)
    done = time.perf_counter()
    torch.save(velocity.clone(), out)
    return loaded - started, done - loaded


def _diffusers(model: str) -> Any:
    from diffusers import QwenImageTransformer2DModel, WanTransformer3DModel

    return WanTransformer3DModel if model == "wan" else QwenImageTransformer2DModel


def _ours(network: Any, x: Tensor, text: Tensor) -> Tensor:
    run = Run(dtype=DTYPE)
    return network(x, torch.tensor([750.0]), network.prompt(text, run), run)


def _theirs_wan(network: Any, x: Tensor, text: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(text, (0, 0, 0, WAN_1_3B.text_len - TEXT_ROWS)).to(DTYPE)
    return network(x.to(DTYPE), torch.tensor([750.0]), padded, return_dict=False)[0]


def _theirs_qwen(network: Any, x: Tensor, text: Tensor) -> Tensor:
    batch, channels, _, height, width = x.shape
    rows, columns = height // PATCH, width // PATCH
    packed = x.view(batch, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 64)
    sizes = [[(1, rows, columns)]]
    out = network(packed.to(DTYPE), text.to(DTYPE), None, torch.tensor([0.75]), sizes, return_dict=False)[0]
    pieces = out.view(batch, rows, columns, channels, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return pieces.reshape(x.shape)


if __name__ == "__main__":
    main()
