"""Draw the pictures that ComfyUI's template browser shows beside our workflows.

    .venv/bin/python workflows/previews.py [FOLDER]

A miniature's picture is what its workflow made: FOLDER is ComfyUI's output folder after a run of all of them; without
it these pictures stay. The others' weights are large, so that theirs say in signs what goes in and comes out.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
WIDTH, HEIGHT = 512, 288
GROUND, PAPER, INK, WAN, QWEN, STEPS = "#20262f", "#f4f1ea", "#3b4654", "#4f9dde", "#9b7ede", "#e8a33d"
SKY, SUN, HILL, NEAR, NEW = "#bcd9ea", "#f3c14b", "#6e9f7c", "#47745a", "#d9607e"
BAND = 62  # pixels under the signs, for the title
TILE = (120, 96)

# What a workflow takes and makes, in signs, and what it is called.
TASKS = {
    "wan21_text_to_video": (("text",), "video", "text to video"),
    "wan21_text_to_image": (("text",), "picture", "text to image"),
    "wan21_image_to_video": (("picture", "text"), "video", "image to video"),
    "wan21_first_last_frame": (("picture", "last"), "between", "first and last frame"),
    "wan21_video_to_video": (("video", "text"), "changed", "video to video"),
    "wan21_vace": (("subject", "text"), "starring", "VACE: reference to video"),
    "wan21_vace_inpaint": (("masked", "text"), "patched", "VACE: inpainting"),
    "wan21_long_video": (("picture", "text"), "long", "a longer video"),
    "qwen_image_text_to_image": (("text",), "picture", "text to image"),
    "qwen_image_edit": (("picture", "text"), "repainted", "edit"),
    "qwen_image_edit_multiple": (("subject", "picture", "text"), "placed", "edit with several pictures"),
    "qwen_image_inpaint": (("hole", "text"), "patch", "inpainting"),
}
# What a miniature's workflow saved, and what it shows.
DEMOS = {
    "demo_text_to_video": ("video/wanqwen_demo_0*.mp4", "text to video"),
    "demo_image_to_video": ("video/wanqwen_demo_i2v_*.mp4", "image to video"),
    "demo_first_last_frame": ("video/wanqwen_demo_flf2v_*.mp4", "first and last frame"),
    "demo_long_video": ("video/wanqwen_demo_long_*.mp4", "two clips in a row"),
    "demo_video_to_video": ("video/wanqwen_demo_v2v_*.mp4", "video to video"),
    "demo_text_to_image": ("wanqwen_demo_0*.png", "text to image"),
    "demo_edit": ("wanqwen_demo_edit_*.png", "edit"),
}
SHOWN = 5  # frames of a miniature's video
Size = tuple[int, int]
Draw = ImageDraw.ImageDraw


def scene(
    size: Size, sun: float = 0.72, sky: str = SKY, subject: float | None = None, blank: str | None = None
) -> Image.Image:
    """Return a landscape; `sun` is where it stands, `subject` a figure before it, `blank` the colour of a patch."""
    width, height = size
    image = Image.new("RGB", (width * 2, height * 2), sky)
    draw = ImageDraw.Draw(image)
    x, y, r = sun * width * 2, height * 0.55, height * 0.2
    draw.ellipse((x - r, y - r, x + r, y + r), fill=SUN)
    far = ((0, 2), (0, 1.3), (0.7, 0.75), (1.6, 2))  # corners, in widths and heights
    near = ((0.7, 2), (1.5, 1), (2, 1.5), (2, 2))
    for corners, colour in ((far, HILL), (near, NEAR)):
        draw.polygon([(x * width, y * height) for x, y in corners], fill=colour)
    if subject is not None:
        figure(draw, subject * width * 2, height * 1.85, height * 0.9)
    if blank is not None:
        draw.rounded_rectangle((width * 0.2, height * 0.25, width * 0.8, height), height * 0.12, fill=blank)
    return image.resize(size, Image.LANCZOS)


def figure(draw: Draw, x: float, foot: float, tall: float) -> None:
    draw.ellipse((x - tall * 0.17, foot - tall, x + tall * 0.17, foot - tall * 0.66), fill=NEW)
    draw.pieslice((x - tall * 0.32, foot - tall * 0.62, x + tall * 0.32, foot + tall * 0.6), 180, 360, fill=NEW)


def film(size: Size, frames: list[Callable[[Size], Image.Image]]) -> Image.Image:
    """Return frames in a row on a strip with holes."""
    width, height = size
    strip = Image.new("RGB", size, "#11151a")
    draw = ImageDraw.Draw(strip)
    for x in range(5, width, 12):
        for y in (3, height - 9):
            draw.rectangle((x, y, x + 5, y + 5), fill=PAPER)
    each = (width - 4) // len(frames)
    for i, frame in enumerate(frames):
        strip.paste(frame((each - 4, height - 24)), (4 + i * each, 12))
    return strip


def subject_alone(size: Size) -> Image.Image:
    image = Image.new("RGB", size, "white")
    figure(ImageDraw.Draw(image), size[0] / 2, size[1] * 0.92, size[1] * 0.8)
    return image


def written(size: Size) -> Image.Image:
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    for i, long in enumerate((0.78, 0.7, 0.8, 0.45)):
        y = size[1] * (0.22 + 0.18 * i)
        draw.rounded_rectangle((size[0] * 0.1, y, size[0] * (0.1 + long), y + 6), 3, fill=INK)
    return image


def moving(**options: str | float) -> list[Callable[[Size], Image.Image]]:
    return [lambda size, sun=sun: scene(size, sun, **options) for sun in (0.3, 0.5, 0.7)]


SIGNS = {
    "text": written,
    "picture": scene,
    "last": lambda size: scene(size, 0.25, "#f0c4a4"),
    "repainted": lambda size: scene(size, sky="#2f3d66"),
    "placed": lambda size: scene(size, subject=0.3),
    "subject": subject_alone,
    "hole": lambda size: scene(size, blank="white"),
    "patch": lambda size: scene(size, blank=NEW),
    "video": lambda size: film(size, moving()),
    "changed": lambda size: film(size, moving(sky="#f0c4a4")),
    "masked": lambda size: film(size, moving(blank="white")),
    "patched": lambda size: film(size, moving(blank=NEW)),
    "starring": lambda size: film(size, moving(subject=0.5)),
    "between": lambda size: film(size, [scene, lambda s: scene(s, 0.5, "#d6ced0"), SIGNS["last"]]),
    "long": lambda size: film(size, [lambda s, x=x: scene(s, x) for x in (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)]),
}


def sheet(title: str, family: str, colour: str, badge: str = "") -> tuple[Image.Image, Draw]:
    image = Image.new("RGB", (WIDTH, HEIGHT), GROUND)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, HEIGHT - BAND, WIDTH, HEIGHT), fill=colour)
    draw.text((18, HEIGHT - BAND + 6), family, "#10151c", ImageFont.load_default(17))
    draw.text((18, HEIGHT - BAND + 26), title, "white", ImageFont.load_default(26))
    if badge:
        font = ImageFont.load_default(22)
        wide = draw.textlength(badge, font)
        draw.rounded_rectangle((WIDTH - wide - 38, 14, WIDTH - 14, 48), 17, fill=STEPS)
        draw.text((WIDTH - wide - 26, 18), badge, "#20262f", font)
    return image, draw


def in_signs(takes: tuple[str, ...], makes: str, title: str, family: str, badge: str) -> Image.Image:
    image, draw = sheet(title, family, WAN if family.startswith("Wan") else QWEN, badge)
    room, high = HEIGHT - BAND, TILE[1] if len(takes) < 3 else 62
    gap = (room - len(takes) * high) // (len(takes) + 1)
    for i, sign in enumerate(takes):
        wide = TILE[0] if sign != "masked" and sign != "video" else 168
        image.paste(SIGNS[sign]((wide, high)), (20, gap + i * (high + gap)))
    draw.line((202, room // 2, 232, room // 2), fill=PAPER, width=6)
    draw.polygon([(230, room // 2 - 12), (230, room // 2 + 12), (248, room // 2)], fill=PAPER)
    is_film = makes in ("video", "changed", "patched", "starring", "between", "long")
    size = (240, 110) if is_film else (190, 130)
    image.paste(SIGNS[makes](size), (262, (room - size[1]) // 2 + (12 if badge else 0)))
    return image


def of_a_miniature(file: Path, title: str) -> Image.Image:
    image, _ = sheet(f"{title}, in seconds", "Miniature, nothing to download", "#4c8a63")
    frames, room = read_frames(file), HEIGHT - BAND
    count = min(SHOWN, len(frames))
    shown = [frames[round(i * (len(frames) - 1) / max(count - 1, 1))] for i in range(count)]
    side = min(room - 40, (WIDTH - 20 - 10 * count) // count)
    left = (WIDTH - count * (side + 10) + 10) // 2
    for i, frame in enumerate(shown):
        image.paste(frame.resize((side, side), Image.NEAREST), (left + i * (side + 10), (room - side) // 2))
    return image


def read_frames(file: Path) -> list[Image.Image]:
    if file.suffix == ".png":
        return [Image.open(file).convert("RGB")]
    import av

    with av.open(str(file)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def main() -> None:
    for name, (takes, makes, title) in TASKS.items():
        family = "Wan 2.1" if name.startswith("wan21") else "Qwen-Image"
        for ending, badge in (("", ""), ("_4_steps", "4 steps")):
            in_signs(takes, makes, title, family, badge).save(HERE / f"{name}{ending}.jpg", quality=88)
    for name, (pattern, title) in DEMOS.items() if len(sys.argv) > 1 else ():
        of_a_miniature(max(Path(sys.argv[1]).glob(pattern)), title).save(HERE / f"{name}.jpg", quality=90)


if __name__ == "__main__":
    main()
