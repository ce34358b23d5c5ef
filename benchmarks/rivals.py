"""The models of the benchmarks: random Llamas, adapted by us and by PEFT, made to hold the same."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

Loss = Callable[[nn.Module, Tensor], Tensor]  # of a model on token ids
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(hidden: int, layers: int, vocabulary: int, **more: Any) -> LlamaForCausalLM:
    """A random Llama in training mode; its values depend on its sizes alone."""
    config = LlamaConfig(
        **{
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": hidden * 11 // 4,
            "num_hidden_layers": layers,
            "num_attention_heads": max(1, hidden // 64),
            "num_key_value_heads": max(1, hidden // 64),
            "tie_word_embeddings": False,
            **more,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).train()


def token_ids(vocabulary: int, rows: int, length: int) -> Tensor:
    """Random ids (rows, length)."""
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def sharing(model: nn.Module) -> nn.Module:
    """A copy that holds the very parameters of ``model``: for sides that leave them alone."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def with_peft(model: nn.Module, config: Any) -> nn.Module:
    import peft  # not there on every machine that has a GPU

    return peft.get_peft_model(model, config)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def plain_name(name: str) -> str:
    """What a trained tensor is called by us, whoever's it is."""
    name = re.sub(r"^base_model\.(model\.)?", "", name)
    name = re.sub(r"(\.default(\.weight)?|\.weight)$", "", name)
    name = name.replace("lora_magnitude_vector", "magnitude")
    return (
        name.replace("adapter.", "")
        .replace("adaption_prompt", "prompts")
        .replace("adaption_gate", "gate")
    )


def pairs(ours: nn.Module, theirs: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The trained parameters of two sides, each with its counterpart.

    Raises:
        ValueError: if one side trains what the other does not.
    """
    mine, other = (
        {plain_name(n): p for n, p in model.named_parameters() if p.requires_grad}
        for model in (ours, theirs)
    )
    if mine.keys() != other.keys():
        raise ValueError(f"trained by one side only: {sorted(mine.keys() ^ other.keys())[:4]}")
    return [(parameter, other[name]) for name, parameter in mine.items()]


@torch.no_grad()
def shake(model: nn.Module) -> nn.Module:
    """Move what training starts from zero away from it, so that everything has a gradient."""
    generator = torch.Generator().manual_seed(2)
    for parameter in trained(model):
        if not parameter.any():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.02 * noise)
    return model


@torch.no_grad()
def equalise(ours: nn.Module, theirs: nn.Module) -> None:
    """Give their side the values of ours."""
    for mine, other in pairs(ours, theirs):
        other.copy_(mine.view_as(other))


@contextmanager
def no_gradients_left(*models: nn.Module) -> Iterator[None]:
    try:
        yield
    finally:
        for model in models:
            model.zero_grad()


def gradients_off(
    ours: nn.Module, theirs: nn.Module, loss: Loss, their_loss: Loss, ids: Tensor
) -> tuple[float, float]:
    """Relative deviation of the loss, and the largest of a gradient (norm of the difference)."""
    with no_gradients_left(ours, theirs):
        values = [loss(ours, ids), their_loss(theirs, ids)]
        for value in values:
            value.backward()
        off = 0.0
        for mine, other in pairs(ours, theirs):
            if mine.grad is None or other.grad is None:
                raise ValueError("a trained parameter has no gradient")
            expected = other.grad.float().flatten()
            difference = (mine.grad.float().flatten() - expected).norm()
            off = max(off, float(difference / expected.norm().clamp(min=1e-30)))
        mine_value, other_value = (value.item() for value in values)
        return abs(mine_value - other_value) / abs(other_value), off
