import pytest
import torch
from torch import nn
from wanqwen.core.memory.resident import resident


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
