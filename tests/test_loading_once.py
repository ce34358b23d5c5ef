"""Reading once, as far as one process can tell: who builds, what is told, what is refused."""

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn

from lit_adapters import LoRA, attach
from lit_adapters.loading_once import (
    Held,
    Machine,
    _empty,
    _structure_of,
    build_once,
    held_by,
    machine_of,
    obstacle_of,
    outside,
)
from lit_adapters.packed_rows import keep_rows_apart
from tests.models import BUILDERS, llama, llama_tied, logits


@dataclass(frozen=True)
class Alone(Machine):
    """Hears from a reader that is elsewhere."""

    heard: object = None
    said: tuple = ()

    @property
    def reads(self):
        return self.heard is None

    def tell(self, thing):
        return self.heard or thing

    def explain(self, obstacle):
        self.said.append(obstacle)


def told(made):
    """What the other ranks make of what a reader has built."""
    machine = Alone(reader=1, size=2, heard=_structure_of(made), said=[])
    return build_once(machine, lambda: made, lambda: None), machine.said


@pytest.mark.parametrize("name", BUILDERS)
def test_others_get_the_same_model_without_parameters(name):
    model = BUILDERS[name]()
    attach(model, LoRA(rank=2, modules_to_save=["lm_head"] if name == "llama" else None))
    keep_rows_apart(model)
    expected = logits(model)
    found, said = told({"model": model, "sizes": 3})
    other = found["model"]
    assert said == []
    assert found["sizes"] == 3
    assert other is not model
    assert all(p.is_meta for p in other.parameters())
    assert all(torch.equal(a, b) for a, b in zip(other.buffers(), model.buffers(), strict=True))
    held, given = held_by(model), held_by(other)
    assert [h.is_adapter for h in held] == [h.is_adapter for h in given]
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in other.named_parameters()]
    for one, another in zip(held, given, strict=True):
        if another.tensor.is_meta:
            torch.utils.swap_tensors(another.tensor, _empty(another.tensor, "cpu"))
            another.tensor.data.copy_(one.tensor.data)
        assert one.tensor.requires_grad == another.tensor.requires_grad
    assert torch.equal(logits(other), expected)
    assert other.config._attn_implementation == model.config._attn_implementation


def test_tied_weights_stay_tied():
    found, _ = told({"model": llama_tied()})
    other = found["model"]
    assert other.lm_head.weight is other.model.embed_tokens.weight
    (held, *_) = [h for h in held_by(other) if h.tensor is other.lm_head.weight]
    torch.utils.swap_tensors(held.tensor, _empty(held.tensor, "cpu"))
    assert not other.lm_head.weight.is_meta
    assert other.lm_head.weight is other.model.embed_tokens.weight


def test_what_cannot_be_told_is_built_by_every_rank():
    model = llama()
    model.register_forward_hook(lambda *_: None)  # has no name by which it could be told
    found, said = told({"model": model})
    assert found["model"] is model
    (reason,) = said
    assert reason.startswith("its structure cannot be told: ")


def test_the_error_of_the_reader_is_its_own():
    def fails():
        raise OSError("no space")

    machine = Alone(reader=0, size=2)
    with pytest.raises(OSError, match="no space"):
        build_once(machine, fails, lambda: None)


def test_every_tensor_is_held_once_and_belongs_to_a_layer_or_the_rest():
    model = llama()
    attach(model, LoRA(rank=2))
    layers = list(model.model.layers)
    ids = [id(held.tensor) for held in held_by(model)]
    assert len(ids) == len(set(ids)) == len([*model.parameters(), *model.buffers()])
    parts = [id(h.tensor) for layer in layers for h in held_by(layer)]
    rest = [id(h.tensor) for h in outside(model, layers)]
    assert sorted(parts + rest) == sorted(ids)
    assert not set(parts) & set(rest)
    assert id(model.model.rotary_emb.inv_freq) in rest


def test_a_base_without_values_is_refused(monkeypatch):
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    meta = nn.Parameter(torch.empty(2, device="meta"))
    with pytest.raises(ValueError, match="on the meta device, without values.*pass a folder"):
        Machine(reader=0, size=2).fill([Held(meta, False)], torch.device("cpu"))


def test_a_rank_that_is_alone_has_no_machine():
    assert machine_of(None) is None
    assert machine_of(FSDPStrategy()) is None  # there is no process group


def module(**changes):
    trainer = SimpleNamespace(strategy=ModelParallelStrategy(), callbacks=[])
    return SimpleNamespace(**{"base": "tiny", "quantization": None, "trainer": trainer, **changes})


def test_only_what_every_rank_needs_whole_is_read_by_all():
    assert obstacle_of(module()) is None
    assert "passed in" in obstacle_of(module(base=None))
    assert "quantised" in obstacle_of(module(quantization="nf4"))
    wraps = module()
    wraps.trainer.strategy = FSDPStrategy(auto_wrap_policy={nn.Linear})
    assert "auto_wrap_policy" in obstacle_of(wraps)
    copied = copy.copy(wraps.trainer)
    copied.strategy = FSDPStrategy()
    assert obstacle_of(module(trainer=copied)) is None
