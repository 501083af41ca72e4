"""Pictures and videos from files and to them. PyAV and Pillow are optional packages, asked for when they are needed."""
# F frames, H W pixels; pixels are RGB in [0, 1]

import importlib.util
import itertools
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def to_bytes(pixels: Tensor) -> np.ndarray:
    """Return uint8 pixels of a video as Wan's own code rounds them: truncated, not rounded."""
    return (pixels.clamp(0, 1) * 255).byte().cpu().numpy()


def write_mp4(path: Path, frames_FHWC: Tensor, fps: float, *, enlarge: int = 1) -> None:
    """Write frames [F, H, W, 3] as H.264; every pixel becomes `enlarge` x `enlarge` of them.

    Raises ValueError when PyAV is missing or the size is odd.
    """
    check_writable(path)
    from fractions import Fraction

    import av

    frames = to_bytes(frames_FHWC).repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"H.264 needs even sizes, got {width} x {height}: choose a size in steps of 16.")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "15"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def check_writable(path: Path) -> None:
    """Raise ValueError or OSError, before any work is done, if the file could not be written."""
    package, name = ("PIL", "pillow") if path.suffix == ".png" else ("av", "av")
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"Writing {path.name} needs a package that is not installed: pip install {name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"The folder {path.parent} can't be written to: choose another with --out.")


def read_image(path: Path) -> Tensor:
    """Return an image file as [H, W, 3] in [0, 1], or 4 with alpha, turned as its camera says.

    Raises ValueError if it can't be read.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ValueError(f"Reading {path.name} needs the package Pillow: pip install pillow") from error
    try:
        with Image.open(path) as image:
            has_alpha = "A" in image.getbands() or "transparency" in image.info
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGBA" if has_alpha else "RGB"))
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no image that Pillow can read: give a PNG, JPEG or WebP file.") from error
    return torch.from_numpy(pixels).float() / 255


def read_video(path: Path, frames: int | None = None) -> Tensor:
    """Return the first frames of a video file, or all of them, as [F, H, W, 3] in [0, 1]; an image is one frame.

    Raises ValueError if it can't be read.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return read_image(path)[None, ..., :3]
    try:
        import av
    except ImportError as error:
        raise ValueError(f"Reading {path.name} needs the package PyAV: pip install av") from error
    try:
        with av.open(str(path)) as container:
            shown = itertools.islice(container.decode(video=0), frames)
            pixels = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in shown]
    except (av.error.InvalidDataError, IndexError) as error:  # IndexError: no video in it
        raise ValueError(f"{path} is no video that PyAV can read: give an MP4, WebM or MOV file, or a PNG.") from error
    if not pixels:
        raise ValueError(f"{path} holds no frames.")
    return torch.stack(pixels).float() / 255


def write_png(path: Path, image_HWC: Tensor) -> None:
    """Write one image [H, W, 3]. Raises ValueError when Pillow is missing."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError(
            "Writing a PNG needs the package Pillow, which is not installed: pip install pillow"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    # Rounded, as Qwen-Image's own code does.
    Image.fromarray(to_bytes(image_HWC + 0.5 / 255)).save(path)
