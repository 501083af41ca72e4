from pathlib import Path

import pytest
import torch
from torch import nn
from wanqwen.core.memory.resident import placed, resident

from .toy import from_file


def test_weights_go_to_the_device_and_are_the_same_tensors_after() -> None:
    module = nn.Linear(3, 2).requires_grad_(False)
    module.register_buffer("scale", torch.ones(2))
    before = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    with pytest.raises(KeyError), torch.inference_mode(), resident(module, torch.device("meta")) as there:
        assert {tensor.device.type for tensor in there.state_dict().values()} == {"meta"}
        raise KeyError
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == before


def test_nothing_moves_that_is_there_already() -> None:
    module = nn.Linear(3, 2)
    pointer = module.weight.data_ptr()
    with resident(module, torch.device("cpu")):
        assert module.weight.data_ptr() == pointer


def test_weights_that_came_to_be_where_they_compute_are_not_made_again(path: Path) -> None:
    loaded = from_file(path)
    for _ in range(2):
        with placed(loaded, torch.device("cpu"), lambda: 1 / 0):
            pass
        assert not any(tensor.is_meta for tensor in loaded.module.parameters())
