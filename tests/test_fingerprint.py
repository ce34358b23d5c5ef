"""A base is recognised in any precision, and its sample never leaves the tensor."""

import pytest
import torch
from torch import nn

from lit_adapters import LoRA, attach
from lit_adapters.fingerprint import base_name, fingerprint, same_base, spaced
from tests.models import llama

RECORDED = "20bff9935b2e74b8-9af8474363199066-f6ab6a8a2c7b7dbd-f9c948dc95e6d4a4"


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 2**24 + 4, 525_336_576, 3 * 2**31 + 1])
def test_sampled_indices_span_the_tensor_and_stay_inside(length):
    indices = spaced(length, 16).tolist()
    assert indices[0] == 0
    assert indices[-1] == length - 1
    assert len(set(indices)) == min(16, length)


def test_sampled_indices_are_on_the_cpu_wherever_they_are_first_asked_for():
    with torch.device("meta"):
        assert spaced(1234, 7).device.type == "cpu"


def test_adapters_and_precision_do_not_change_a_fingerprint():
    model = llama()
    bare = fingerprint(model)
    attach(model, LoRA(rank=2))
    assert fingerprint(model) == bare
    for dtype in (torch.bfloat16, torch.float16):
        assert same_base(fingerprint(llama().to(dtype)), bare)


def test_another_weight_or_shape_is_another_base():
    bare = fingerprint(llama())
    assert not same_base(fingerprint(llama(seed=1)), bare)
    assert not same_base(fingerprint(llama(vocab_size=80)), bare)


def test_folders_of_earlier_versions_are_recognised():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 5))
    for number, parameter in enumerate(model.parameters()):
        values = torch.arange(parameter.numel()).view(parameter.shape) / 7 + number
        parameter.data = values
    for layer, dtype in zip(model, (None, torch.bfloat16, torch.half, torch.double), strict=True):
        layer.to(dtype)
    model.register_parameter("count", nn.Parameter(torch.arange(3), requires_grad=False))
    assert fingerprint(model) == RECORDED


def test_a_parameter_of_no_dimension_is_covered():
    model = llama()
    model.scale = nn.Parameter(torch.tensor(2.0))
    before = fingerprint(model)
    model.scale.data += 1
    assert not same_base(fingerprint(model), before)


def test_a_name_never_tells_a_local_path(tmp_path):
    model = llama()
    model.config._name_or_path = str(tmp_path / "secret" / "my-model")
    assert base_name(model) == (None, "my-model")
    model.config._name_or_path = "owner/model"
    assert base_name(model) == ("owner/model", "owner/model")
