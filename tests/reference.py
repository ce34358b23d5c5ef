"""The papers' equations on dense matrices, in plain tensors: nothing here comes from the library.

A layer's weight is seen as one matrix W (out, in): a convolution's kernel is flattened behind its
output channels, an embedding and a Hugging Face ``Conv1D`` are transposed. Torch's own layer, run
with another matrix in place of its weight, is the oracle for what an adapted layer must give.
"""

import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

VOCAB = 40


class OneLayer(nn.Module):
    """The smallest model with a layer to adapt."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def _conv1d(out, inputs):
    layer = Conv1D(out, inputs)
    nn.init.normal_(layer.bias)  # zero by default: a scaled bias would go unseen
    return layer


LAYERS = {
    "linear": partial(nn.Linear, 14, 12),
    "linear-no-bias": partial(nn.Linear, 14, 12, bias=False),
    "wide-linear": partial(nn.Linear, 9, 20),
    "conv1d-hf": partial(_conv1d, 12, 14),
    "embedding": partial(nn.Embedding, VOCAB, 12),
    "conv2d": partial(nn.Conv2d, 4, 12, 3),
    "conv2d-strided": partial(nn.Conv2d, 4, 12, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2)),
    "conv2d-groups": partial(nn.Conv2d, 8, 12, 3, groups=2, padding=1),
}


def one_layer(kind: str, seed: int = 0) -> OneLayer:
    torch.manual_seed(seed)
    return OneLayer(LAYERS[kind]()).eval()


def inputs(layer: nn.Module, seed: int = 0) -> Tensor:
    """Random inputs of a layer, of the layer's dtype."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(layer, nn.Embedding):
        return torch.randint(0, layer.num_embeddings, (3, 7), generator=generator)
    if isinstance(layer, nn.Conv1d):
        shape = (3, layer.in_channels, 11)
    elif isinstance(layer, nn.Conv2d):
        shape = (3, layer.in_channels, 9, 8)
    else:
        shape = (3, 7, layer.weight.shape[0 if isinstance(layer, Conv1D) else 1])
    return torch.randn(shape, generator=generator).to(layer.weight.dtype)


def stored_transposed(layer: nn.Module) -> bool:
    return isinstance(layer, (Conv1D, nn.Embedding))


def matrix(layer: nn.Module) -> Tensor:
    """A layer's weight as W (out, in), fp32, detached."""
    weight = layer.weight.detach().float()
    return weight.T.clone() if stored_transposed(layer) else weight.flatten(1).clone()


def run(layer: nn.Module, W: Tensor, x: Tensor) -> Tensor:
    """What torch's layer computes with W (out, in) in place of its weight; bias as it is."""
    bare = copy.deepcopy(layer)
    if hasattr(bare, "adapter"):
        raise ValueError("the reference needs a layer without an adapter")
    weight = W.T if stored_transposed(layer) else W.reshape(layer.weight.shape)
    return functional_call(bare, {"weight": weight}, (x,))


def product(A: Tensor, B: Tensor, groups: int = 1) -> Tensor:
    """B A (out, in); with groups, block g of B's rows times block g of A's rows."""
    return torch.cat([b @ a for a, b in zip(A.chunk(groups), B.chunk(groups), strict=True)])


def moved(W: Tensor, scale: float, now: Tensor, start: Tensor | None) -> Tensor:
    """V = W + s (B A - B0 A0)."""
    return W + scale * (now if start is None else now - start)


def dora(V: Tensor, m: Tensor, detached: bool = True) -> Tensor:
    """W' = m V / ||V||, one norm per output row, constant in the gradient (2402.09353, 4.3)."""
    norm = V.norm(dim=1, keepdim=True)
    return m[:, None] * V / (norm.detach() if detached else norm)


def effective(layer: nn.Module, adapter: nn.Module, **leaves: Tensor) -> Tensor:
    """W' (out, in) of a layer under an adapter's parameters, ``leaves`` in place of some."""
    groups = getattr(layer, "groups", 1)
    parts = {**dict(adapter.named_parameters()), **leaves}
    start = None
    if "lora_A0" in parts:
        start = product(parts["lora_A0"], parts["lora_B0"], groups)
    now = product(parts["lora_A"], parts["lora_B"], groups)
    V = moved(matrix(layer), adapter.scale, now, start)
    return dora(V, parts["magnitude"]) if "magnitude" in parts else V


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
