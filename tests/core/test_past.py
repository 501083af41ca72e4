"""What layers remember comes back as it was, wherever it waited."""

import pytest
import torch
from torch import nn
from wanqwen.core.memory.trace import peak_bytes
from wanqwen.core.past import MODES, OFFLOADED, WHOLE, Past, VAEMode

each_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)


@each_mode
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frames_come_back_behind_zeros_once(mode: VAEMode, layout: torch.memory_format, dtype: torch.dtype) -> None:
    layer, past = nn.Identity(), Past(mode=mode)
    frames = torch.randn(1, 3, 5, 4, 6).to(dtype, memory_format=layout)
    expected = frames[:, :, -2:].clone()
    past.keep(layer, frames[:, :, -2:])
    assert layer in past and nn.Identity() not in past
    frames.zero_()
    into = torch.full((1, 3, 3, 4, 6), torch.nan, dtype=dtype)
    assert past.recall(layer, into) is into
    assert torch.equal(into[:, :, 1:], expected) and not into[:, :, 0].any()
    assert layer not in past
    assert not past.recall(layer, into).any(), "what was moved is gone"


def test_offloaded_frames_wait_in_the_same_room_again() -> None:
    layer, past, rooms = nn.Identity(), Past(mode=OFFLOADED), set()
    for frames in torch.randn(4, 1, 3, 2, 4, 6):
        past.keep(layer, frames)
        rooms.add(past._kept[layer]._room.data_ptr())
        assert torch.equal(past.recall(layer, torch.empty_like(frames)), frames)
    assert len(rooms) == 1


@each_mode
def test_a_mark_of_no_frames_is_kept(mode: VAEMode) -> None:
    layer, past = nn.Identity(), Past(mode=mode)
    past.keep(layer, torch.ones(1, 3, 0, 4, 6))
    assert layer in past
    assert not past.recall(layer, torch.ones(1, 3, 2, 4, 6)).any()


@each_mode
def test_of_a_single_chunk_nothing_is_kept(mode: VAEMode) -> None:
    layer, past = nn.Identity(), Past(single=True, mode=mode)
    past.keep(layer, torch.ones(1, 3, 2, 4, 6))
    assert layer not in past


def test_only_offloaded_frames_take_nothing_on_the_device() -> None:
    frames = torch.empty(1, 3, 5, 4, 6, device="meta")

    def kept(mode: VAEMode) -> int:
        past = Past(mode=mode)
        return peak_bytes(lambda: past.keep(nn.Identity(), frames[:, :, -2:]))

    assert kept(WHOLE) == 3 * 2 * 4 * 6 * 4
    assert kept(OFFLOADED) == 0
