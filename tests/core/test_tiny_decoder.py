"""The tiny decoder of previews, against its layers written out one by one."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from wanqwen.core.tiny_decoder import of_state, open_tiny_decoder

WIDTHS, CHANNELS = (12, 8, 6, 6), 4
GROWS = (1, 2, 2)  # in time, after each stage


def tiny_state() -> dict[str, Tensor]:
    """The tensors of a file, with part of an encoder."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * (0.5 / shape[1] ** 0.5 if len(shape) == 4 else 0.1)

    state, layer = {"encoder.0.weight": random(3, 3, 3, 3)}, 3
    state |= {"decoder.1.weight": random(WIDTHS[0], CHANNELS, 3, 3), "decoder.1.bias": random(WIDTHS[0])}
    for wide, narrow, grows in zip(WIDTHS, WIDTHS[1:], GROWS, strict=False):
        for block in range(3):
            for conv, width in ((0, 2 * wide), (2, wide), (4, wide)):
                name = f"decoder.{layer + block}.conv.{conv}"
                state |= {f"{name}.weight": random(wide, width, 3, 3), f"{name}.bias": random(wide)}
        state[f"decoder.{layer + 4}.conv.weight"] = random(wide * grows, wide, 1, 1)
        state[f"decoder.{layer + 5}.weight"] = random(narrow, wide, 3, 3)
        layer += 6
    return state | {f"decoder.{layer + 1}.weight": random(3, WIDTHS[-1], 3, 3), f"decoder.{layer + 1}.bias": random(3)}


def written_out(state: dict[str, Tensor], clip: Tensor) -> Tensor:
    """Decode frame by frame, keeping what each block saw of the frame before."""
    past: dict[str, Tensor] = {}

    def conv(x: Tensor, name: str, padding: int = 1) -> Tensor:
        return F.conv2d(x, state[f"decoder.{name}.weight"], state.get(f"decoder.{name}.bias"), padding=padding)

    frames = []
    for frame in clip:
        x, layer = conv((frame / 3).tanh()[None] * 3, "1").relu(), 3
        for wide in WIDTHS[:3]:
            for block in range(layer, layer + 3):
                before, past[block] = past.get(block, torch.zeros_like(x)), x
                inner = conv(torch.cat((x, before), dim=1), f"{block}.conv.0").relu()
                x = (conv(conv(inner, f"{block}.conv.2").relu(), f"{block}.conv.4") + x).relu()
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = conv(F.conv2d(x, state[f"decoder.{layer + 4}.conv.weight"][-wide:]), str(layer + 5))
            layer += 6
        frames.append(conv(x.relu(), str(layer + 1)).clamp(0, 1)[0])
    return torch.stack(frames)


def test_it_is_its_layers_one_after_the_other():
    state, clip = tiny_state(), torch.randn(4, CHANNELS, 3, 5, generator=torch.Generator().manual_seed(1)) * 2
    made, wanted = of_state(state, CHANNELS, "a file")(clip), written_out(state, clip)
    assert made.shape == (4, 3, 24, 40) and made.std() > 0.05
    assert (made - wanted).abs().max() < 1e-5
    assert (made[1:] - written_out(state, clip[1:])).abs().max() > 1e-3, "frames before count"


def test_a_file_shows_the_last_frame_of_the_first_clip(tmp_path):
    save_file(tiny_state(), tmp_path / "tiny.safetensors")
    decoder = open_tiny_decoder(tmp_path / "tiny.safetensors", torch.device("cpu"), CHANNELS)
    x0 = torch.randn(2, CHANNELS, 5, 3, 5)
    image = decoder.show(x0)
    assert image.shape == (24, 40, 3)
    assert torch.allclose(image, written_out(tiny_state(), x0[0].movedim(1, 0)[-2:])[-1].movedim(0, -1), atol=1e-5)


@pytest.mark.parametrize("change", ["names", "channels", "depth"])
def test_another_file_is_named(change):
    state, channels = tiny_state(), CHANNELS
    if change == "names":
        state = {name.replace("decoder", "taesd"): tensor for name, tensor in state.items()}
    elif change == "channels":
        channels = 16
    else:
        state["decoder.30.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"some_file.*tiny decoder"):
        of_state(state, channels, "some_file")
