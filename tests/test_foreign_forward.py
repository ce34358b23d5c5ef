"""Layers whose class computes something of its own from the weight: refused, known or declared."""

import logging

import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from lit_adapters import LoRA, attach, detach, merge, weights
from tests.models import shake


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Causal(nn.Conv1d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (2, 0)))


class Renamed(nn.Linear):
    """Computes what its parent does, without saying so."""


class Shifting:
    """A forward that comes from beside the layer."""

    def forward(self, x):
        return super().forward(x) + 1


class Shifted(Shifting, nn.Linear):
    pass


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (Scaled(4, 4), "Scaled"),
        (type("Inherited", (Scaled,), {})(4, 4), "Inherited"),
        (Causal(4, 4, 3), "Causal"),
        (Shifted(4, 4), "Shifted"),
        (OPTLearnedPositionalEmbedding(9, 4), "OPTLearnedPositionalEmbedding"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_forward_of_its_own_is_refused_with_a_way_out(layer, kind):
    model = nn.Sequential(layer, nn.Linear(4, 4))
    with pytest.raises(ValueError, match=rf"'0', a {kind}, .*cannot hold.*forward of its own") as e:
        attach(model, LoRA(rank=1, targets=["0", "1"]))
    assert f"matrix_shape.register({kind}, " in str(e.value)
    assert attach(model, LoRA(rank=1, targets=["1"])) == ["1"]


def test_all_linear_leaves_it_out_and_says_so(caplog):
    model = nn.Sequential(Scaled(4, 4), nn.Linear(4, 4), Scaled(4, 4))
    with caplog.at_level(logging.WARNING):
        assert attach(model, LoRA(rank=1)) == ["1"]
    (said,) = [record.getMessage() for record in caplog.records]
    assert "leaves out 2 layers, such as '0', a Scaled" in said


def test_nothing_is_said_about_stock_layers(caplog):
    with caplog.at_level(logging.WARNING):
        attach(nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2)), LoRA(rank=1))
    assert not caplog.records


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(4, 4),
        Renamed(4, 4),
        FalconLinear(4, 4),
        Gemma3TextScaledWordEmbedding(9, 4, 0, embed_scale=3.0),
        nn.Conv2d(2, 2, 1),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_the_same_forward_under_another_name_is_adapted(layer):
    assert attach(nn.Sequential(layer), LoRA(rank=1, targets=["0"])) == ["0"]


def test_the_equations_of_those_taken_for_the_same():
    torch.manual_seed(0)
    x, linear = torch.randn(3, 4), FalconLinear(4, 4)
    torch.testing.assert_close(linear(x), x @ linear.weight.T + linear.bias)
    table = Gemma3TextScaledWordEmbedding(9, 4, 0, embed_scale=3.0)
    torch.testing.assert_close(table(torch.tensor([5])), 3 * table.weight[5][None])


def test_a_class_that_is_registered_is_adapted_and_merged():
    class Declared(Renamed):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    model = nn.Sequential(Declared(4, 4))
    with pytest.raises(ValueError, match="forward of its own"):
        attach(model, LoRA(rank=1, targets=["0"]))
    weights.matrix_shape.register(Declared, weights.matrix_shape.dispatch(Renamed))
    attach(model, LoRA(rank=1, targets=["0"]))
    x = torch.randn(3, 4)
    with torch.no_grad():
        expected = shake(model)(x)
        assert not torch.allclose(expected, detach_copy(model)(x))
        torch.testing.assert_close(merge(model)(x), expected)


def detach_copy(model):
    bare = nn.Sequential(nn.Linear(4, 4))
    bare[0].weight, bare[0].bias = model[0].weight, model[0].bias
    return detach(bare)


def test_routers_of_a_mixture_return_a_pair_and_are_left_out():
    class Config:
        hidden_size, num_local_experts, num_experts_per_tok = 4, 4, 1

    model = nn.Sequential(Llama4Router(Config()), nn.Linear(4, 4))
    assert attach(model, LoRA(rank=1)) == ["1"]


def test_layers_that_were_refused_for_other_reasons_still_are():
    odd = NonDynamicallyQuantizableLinear(4, 4)
    computed = parametrizations.weight_norm(nn.Linear(4, 4))
    for layer in (odd, computed):
        with pytest.raises(ValueError, match="cannot hold"):
            attach(nn.Sequential(layer), LoRA(rank=1, targets=["0"]))


def test_quantised_layers_are_known_and_their_subclasses_judged_alike():
    bnb = pytest.importorskip("bitsandbytes")

    class Louder(bnb.nn.Linear4bit):
        def forward(self, x):
            return 2 * super().forward(x)

    assert weights.is_adaptable(bnb.nn.Linear4bit(64, 64))
    assert weights.is_adaptable(bnb.nn.LinearNF4(64, 64))
    assert weights.is_adaptable(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False))
    assert not weights.is_adaptable(Louder(64, 64))
