"""The glyphs that the miniature Qwen-Image writes, as committed bitmaps: neither running nor scoring needs a font.

    python -m wanqwen.demo.cards.glyphs FONT    # draw glyphs.npz again

The committed file was drawn from WenQuanYi Micro Hei (Debian fonts-wqy-microhei; Apache-2.0, or GPL-3 with the font
embedding exception).
"""
# N glyphs, H W pixels of a cell

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GLYPHS = "0123456789ACKLTX风山水日大"  # no twins such as O and 0, I and 1, Z and 2
CELL = 16  # pixels, both sides, that a glyph has to itself: those of one token
HEIGHT, WIDTH = 14, 13  # pixels of the largest glyph in it
FILE = Path(__file__).parent / "glyphs.npz"


def bitmaps() -> Tensor:
    """Return the coverage [N, 16, 16] of every glyph in its cell, in [0, 1], in the order of `GLYPHS`."""
    with np.load(FILE) as archive:
        return torch.from_numpy(archive["cover"]).float() / 255


def draw(font: Path) -> None:
    """Write `glyphs.npz`: each glyph scaled to the height of a cell, not wider than it, somewhat bold."""
    from PIL import Image, ImageDraw, ImageFont

    face, cells = ImageFont.truetype(str(font), 160), []
    for glyph in GLYPHS:
        page = Image.new("L", (320, 320))
        ImageDraw.Draw(page).text((60, 40), glyph, fill=255, font=face, stroke_width=5)
        ink = page.crop(page.getbbox())
        size = (min(WIDTH, max(4, round(ink.width * HEIGHT / ink.height))), HEIGHT)
        cell = Image.new("L", (CELL, CELL))
        place = ((CELL - size[0]) // 2, (CELL - size[1]) // 2)
        cell.paste(ink.resize(size, Image.Resampling.BOX), place)
        cells.append(np.asarray(cell))
    np.savez_compressed(FILE, cover=np.stack(cells))


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
