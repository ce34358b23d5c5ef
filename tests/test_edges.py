"""Where several things meet: sets and attach, ties that are no head, threads, several models."""

import json
import shutil
import threading

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lit_adapters import (
    AdapterSet,
    LoRA,
    attach,
    detach,
    export_merged,
    load_adapter,
    save_adapter,
)
from lit_adapters.base_model import load_base, load_tokenizer
from tests.models import batch, llama, llama_tied, logits, shake, snapshot


def test_unmerging_leaves_adapters_that_were_attached_meanwhile():
    model = llama()
    adapters = AdapterSet(model)
    adapters.add("a", LoRA(rank=2))
    adapters.merge()
    attach(model, LoRA(rank=4))
    before = snapshot(model)
    with pytest.raises(ValueError, match="attached or taken off without this set"):
        adapters.unmerge()
    assert snapshot(model) == before
    detach(model)
    adapters.unmerge()
    assert model.model.layers[0].self_attn.q_proj.adapter.rank == 2


def test_a_waiting_adapter_is_not_put_on_modules_that_were_replaced():
    model = llama()
    adapters = AdapterSet(model)
    adapters.add("a", LoRA(rank=2, targets=["lm_head"]))
    adapters.activate(None)
    model.lm_head = nn.Linear(32, 72, bias=False)
    with pytest.raises(ValueError, match="'lm_head' is not the module any more"):
        adapters.activate("a")
    adapters.delete("a")
    assert adapters.names == []


def test_untying_two_inner_layers_leaves_the_head_tied(tmp_path):
    model = llama_tied()
    layers = model.model.layers
    layers[1].mlp.gate_proj.weight = layers[0].mlp.gate_proj.weight
    attach(model, LoRA(rank=2, targets=["layers.0.mlp.gate_proj"]))
    expected = logits(shake(model))
    export_merged(model, tmp_path, untie=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert merged.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


class Waiting(nn.Linear):
    """Its calls overlap if they can."""

    def forward(self, x):
        threading.Event().wait(0.02)
        return super().forward(x)


def test_threads_that_call_a_copied_layer_leave_the_base_in_its_place():
    model = nn.Sequential(Waiting(4, 4), nn.Linear(4, 4))
    frozen = model[0].weight
    attach(model, LoRA(rank=1, targets=["1"], modules_to_save=["0"]))
    with torch.no_grad():
        shake(model)
        expected = model(torch.ones(2, 4))
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(model(torch.ones(2, 4)))) for _ in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(output, expected) for output in found)
    detach(model)
    assert model[0].weight is frozen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An adapter with one new token."""
    model = load_base("tiny")
    attach(model, LoRA(rank=2, new_tokens=["<a>"]), tokenizer=load_tokenizer("tiny"))
    return save_adapter(model, tmp_path_factory.mktemp("saved") / "adapter")


def test_rows_of_one_token_are_not_loaded_as_those_of_another(folder):
    model = load_base("tiny")
    attach(model, LoRA(rank=2, new_tokens=["<b>"]), tokenizer=load_tokenizer("tiny"))
    before = snapshot(model)
    with pytest.raises(ValueError, match="its adapters are not those on the model"):
        load_adapter(model, folder)
    assert snapshot(model) == before


@pytest.mark.parametrize("text", ["", "\ud800", "x" * 2000, None])
def test_a_text_that_is_no_token_is_refused(folder, text, tmp_path):
    spoilt = shutil.copytree(folder, tmp_path / "adapter")
    notes = json.loads((spoilt / "lit_adapters.json").read_text())
    (spoilt / "lit_adapters.json").write_text(json.dumps({**notes, "new_tokens": [text]}))
    model, tokenizer = load_base("tiny"), load_tokenizer("tiny")
    before, size = snapshot(model), len(tokenizer)
    with pytest.raises(ValueError, match="new_tokens"):
        load_adapter(model, spoilt, tokenizer=tokenizer)
    assert (snapshot(model), len(tokenizer)) == (before, size)


@pytest.mark.parametrize("row", [2_000_000, 10**30, -1, True, 1e30])
def test_an_id_far_beyond_the_table_is_refused(folder, row, tmp_path):
    spoilt = shutil.copytree(folder, tmp_path / "adapter")
    config = json.loads((spoilt / "adapter_config.json").read_text())
    config["trainable_token_indices"] = {"model.embed_tokens": [row]}
    (spoilt / "adapter_config.json").write_text(json.dumps(config))
    model = load_base("tiny")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"new_tokens|trainable_token_indices"):
        load_adapter(model, spoilt)
    assert snapshot(model) == before


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.teacher, self.student = llama(0), llama(1)


def test_new_tokens_go_to_the_language_model_that_is_adapted():
    model = Two()
    attach(model, LoRA(rank=2, targets=r"student\..*q_proj", new_tokens=[5]))
    found = [name for name, _ in model.named_modules() if name.endswith("new_rows")]
    assert found == ["student.model.embed_tokens.new_rows", "student.lm_head.new_rows"]
    with pytest.raises(ValueError, match="several language models"):
        attach(Two(), LoRA(rank=2, targets=["q_proj"], new_tokens=[5]))


def weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(nn.Linear(4, 4))


@pytest.mark.parametrize(
    "settings", [{"targets": ["0"]}, {"targets": ["1"], "modules_to_save": ["0"]}]
)
def test_weights_that_are_computed_at_each_call_are_refused(settings):
    model = nn.Sequential(weight_norm(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="'0', a Linear, which cannot hold"):
        attach(model, LoRA(rank=1, **settings))


def test_a_table_that_calls_write_to_is_refused():
    with pytest.raises(ValueError, match="cannot hold"):
        attach(nn.Sequential(nn.Embedding(9, 4, max_norm=1.0)), LoRA(rank=1, targets=["0"]))


def test_a_forward_that_somebody_wrapped_later_is_not_thrown_away():
    model = llama()
    attach(model, LoRA(rank=2, targets=["q_proj"], modules_to_save=["lm_head"]))
    model.lm_head.forward = lambda x: x
    with pytest.raises(ValueError, match="wrapped the forward of 'lm_head'"):
        detach(model)
    assert model.model.layers[0].self_attn.q_proj.adapter.rank == 2


def test_what_is_attached_in_inference_mode_can_be_trained():
    model = llama()
    adapters = AdapterSet(model)
    with torch.inference_mode():
        adapters.add("a", LoRA(rank=2, new_tokens=[5]))
        adapters.activate(None)
        adapters.activate("a")
    model.train()(**batch()).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.adapter.lora_B.grad is not None
