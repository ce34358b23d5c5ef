"""A merge that is stopped midway: the model computes what it did, and nothing is merged twice."""

import pytest
import torch
from torch import nn

from lit_adapters import (
    AdapterSet,
    DoRA,
    LLaMAAdapter,
    LoRA,
    attach,
    merge,
)
from lit_adapters.adapters import LoRAAdapter, TrainedCopy
from lit_adapters.attachment import adapted_layers
from tests.data.word_tokenizer import word_tokenizer
from tests.models import base_bytes, llama, logits, shake

SPECS = {
    "lora": LoRA(rank=2),
    "dora": DoRA(rank=2, bias="all"),
    "company": LoRA(
        rank=2, targets=["q_proj", "lm_head"], modules_to_save=["norm"], new_tokens=["<a>"]
    ),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))


def adapted(spec):
    model = llama(attention_bias=True)
    attach(model, spec, tokenizer=word_tokenizer())
    return shake(model).eval()


def fail_at(monkeypatch, number, after):
    """The ``number``-th call of any `merge_into` fails, before or after it has written."""
    calls = []
    for kind in (LoRAAdapter, TrainedCopy):
        real = kind.merge_into

        def failing(self, layer, real=real):
            calls.append(layer)
            if len(calls) != number:
                return real(self, layer)
            if after:
                real(self, layer)
            raise KeyboardInterrupt

        monkeypatch.setattr(kind, "merge_into", failing)


@every_spec
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_the_model_computes_the_same_and_merging_goes_on(monkeypatch, spec, number, after):
    model, whole = adapted(spec), merge(adapted(spec))
    expected = logits(model)
    with monkeypatch.context() as patch:
        fail_at(patch, number, after)
        with pytest.raises(KeyboardInterrupt):
            merge(model)
    assert any(adapted_layers(model))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert base_bytes(merge(model)) == base_bytes(whole)


@every_spec
@pytest.mark.parametrize("number", [1, 3])
def test_a_set_has_its_base_and_its_adapter_back(monkeypatch, spec, number):
    adapters = AdapterSet(adapted(spec))
    expected, before = logits(adapters.model), base_bytes(adapters.model)
    with monkeypatch.context() as patch:
        fail_at(patch, number, after=True)
        with pytest.raises(KeyboardInterrupt):
            adapters.merge()
    assert base_bytes(adapters.model) == before
    assert torch.equal(logits(adapters.model), expected)
    adapters.merge()
    torch.testing.assert_close(logits(adapters.model), expected, rtol=1e-4, atol=1e-4)
    adapters.unmerge()
    assert torch.equal(logits(adapters.model), expected)


def test_a_method_that_no_weight_can_express_is_refused_before_anything_is_written():
    model = adapted(LoRA(rank=2, targets=["q_proj"]))
    second = llama(attention_bias=True)
    attach(second, LLaMAAdapter(prompt_length=2, top_layers=1))
    both = nn.ModuleList([model, second])
    before = base_bytes(both)
    with pytest.raises(ValueError, match="LLaMAAdapter cannot be merged"):
        merge(both)
    assert base_bytes(both) == before
    assert any(adapted_layers(model))
