from itertools import pairwise

import pytest
import torch
from wanqwen.core.tiles import TileSize, cut


@pytest.mark.parametrize(("height", "width"), [(5, 7), (32, 32), (33, 90), (90, 160)])
@pytest.mark.parametrize("size", [TileSize(32, 32, 8), TileSize(8, 24, 7), TileSize(3, 2, 0), TileSize(16, 16, 8)])
@pytest.mark.parametrize("factor", [1, 8])
def test_weights_add_up_to_one_everywhere(height: int, width: int, size: TileSize, factor: int) -> None:
    total = torch.zeros(height * factor, width * factor)
    for tile in cut(height, width, size, factor):
        rows, columns = (slice(s.start * factor, s.stop * factor) for s in (tile.rows, tile.columns))
        weight = tile.weight_y[:, None] * tile.weight_x
        assert weight.min() >= 0
        total[rows, columns] += weight
    assert (total - 1).abs().max() < 1e-5


def test_neighbours_share_at_least_the_overlap() -> None:
    columns = sorted({(t.columns.start, t.columns.stop) for t in cut(16, 100, TileSize(16, 32, 8), 8)})
    assert len(columns) > 2
    assert all(left[1] - right[0] >= 8 for left, right in pairwise(columns))


def test_a_tile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 x 2"):
        TileSize(1, 8, 0)


def test_too_much_overlap_does_not_explode() -> None:
    assert len(list(cut(60, 104, TileSize(8, 8, 8), 8))) < 500
