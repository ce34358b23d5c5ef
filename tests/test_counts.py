"""How much is trained, on the real shapes of Llama-2-7B, without a byte of its weights."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lit_adapters import DoRA, FullFineTuning, LoRA, attach

ATTENTION = ["q_proj", "v_proj"]
HIDDEN, INNER, LAYERS, VOCAB = 4096, 11008, 32, 32000


@pytest.fixture
def llama_7b():
    """Transformers' default Llama is Llama-2-7B."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    return model


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (LoRA(rank=8, targets=ATTENTION), 4_194_304),
        (LoRA(rank=8), 19_988_480),
        (LoRA(rank=16, targets=ATTENTION), 2 * 4_194_304),
        (DoRA(rank=8, targets=ATTENTION), 4_194_304 + LAYERS * 2 * HIDDEN),
        (DoRA(rank=8), 19_988_480 + LAYERS * (5 * HIDDEN + 2 * INNER)),
        (FullFineTuning(), 6_738_415_616),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else str(value),
)
def test_a_spec_trains_as_many_parameters_as_the_closed_form_says(llama_7b, spec, expected):
    attach(llama_7b, spec)
    assert trained(llama_7b) == expected
    assert {p.device.type for p in llama_7b.parameters()} == {"meta"}


def test_embedding_and_head_of_a_grown_vocabulary_are_adapted_too():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32004))
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    attach(model, LoRA(rank=8, targets=[*linears, "embed_tokens", "lm_head"]))
    assert trained(model) == 20_566_080
