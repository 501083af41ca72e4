"""A contact sheet: what was made, what it was asked for and what the judge saw, one row each."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FONTS = ("wqy-microhei.ttc", "NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "simhei.ttf")  # with Chinese
SCALE, MARGIN, TEXT_WIDTH, TEXT_SIZE = 2, 6, 620, 17  # times, pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Pictures [H, W, 3] in [0, 1] side by side, what was asked for (in ASCII as well) and what the judge saw."""

    pictures: tuple[Tensor, ...]
    asked: str
    asked_in_ascii: str
    seen: str
    wrong: tuple[str, ...]


def write(path: Path, rows: list[Row]) -> None:
    """Write a PNG with all rows; their pictures are of one size."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = (SCALE * size for size in rows[0].pictures[0].shape[:2])
    columns = max(len(row.pictures) for row in rows)
    size = ((width + MARGIN) * columns + TEXT_WIDTH, (height + MARGIN) * len(rows) + MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), _font(ImageFont)
    for number, row in enumerate(rows):
        top = MARGIN + (height + MARGIN) * number
        for column, picture in enumerate(row.pictures):
            pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
            enlarged = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (MARGIN + (width + MARGIN) * column, top))
        left, middle = (width + MARGIN) * columns + 2 * MARGIN, top + height // 2
        asked = row.asked if row.asked.isascii() or font is not None else f"(in Chinese) {row.asked_in_ascii}"
        seen = row.seen if row.seen.isascii() or font is not None else ascii(row.seen)
        draw.text((left, middle - 26), asked, fill="black", font=font)
        wrong = f"   WRONG: {', '.join(row.wrong)}" if row.wrong else ""
        draw.text((left, middle), f"seen: {seen}{wrong}", fill="gray", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _font(fonts):
    """Return a font with Chinese glyphs, or None (Pillow's own, which has none) where the machine has no such font."""
    for name in FONTS:
        try:
            return fonts.truetype(name, TEXT_SIZE)
        except OSError:
            continue
    return None
