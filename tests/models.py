"""Tiny, random, seeded Hugging Face models, and the few questions every test asks of a model."""

import hashlib

import torch
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lit_adapters.adapters import Adapter
from lit_adapters.adapters.new_tokens import NewRows

VOCAB = 72
PAD = 0
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,  # logits that depend on every layer
}


def _build(model_class: type[PreTrainedModel], config, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero by default: a lost bias would go unseen
                nn.init.normal_(parameter, std=0.1)
    model.loss_type = "ForCausalLM"  # unknown for GPT2LMHeadModel: a log line stops torch.compile
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None  # generation always runs to its length
    return model.eval()


def llama(seed: int = 0, **changes) -> PreTrainedModel:
    """Grouped-query attention, no biases, an output head of its own."""
    config = LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **changes})
    return _build(LlamaForCausalLM, config, seed)


def llama_tied(seed: int = 0, **changes) -> PreTrainedModel:
    """The output head and the embedding are one parameter."""
    return llama(seed, tie_word_embeddings=True, **changes)


def qwen2(seed: int = 0, **changes) -> PreTrainedModel:
    """Biases on q, k and v only."""
    config = Qwen2Config(**{**SIZES, "tie_word_embeddings": False, **changes})
    return _build(Qwen2ForCausalLM, config, seed)


def mistral(seed: int = 0, **changes) -> PreTrainedModel:
    """Sliding-window attention, shorter than the test batches."""
    config = MistralConfig(
        **{**SIZES, "sliding_window": 5, "tie_word_embeddings": False, **changes}
    )
    return _build(MistralForCausalLM, config, seed)


def gemma(seed: int = 0, **changes) -> PreTrainedModel:
    """Scaled embeddings, tied head, head_dim 16 where hidden / heads is 8."""
    config = GemmaConfig(**{**SIZES, "head_dim": 16, **changes})
    return _build(GemmaForCausalLM, config, seed)


def gpt2(seed: int = 0, **changes) -> PreTrainedModel:
    """HF ``Conv1D`` (weight stored (in, out)) with biases, tied head, absolute positions."""
    config = GPT2Config(
        **{
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": 48,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.1,
            **changes,
        }
    )
    return _build(GPT2LMHeadModel, config, seed)


BUILDERS = {
    "llama": llama,
    "llama-tied": llama_tied,
    "qwen2": qwen2,
    "gpt2": gpt2,
    "mistral": mistral,
    "gemma": gemma,
}


def batch(rows: int = 2, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Token ids (rows, length) and labels, the last row padded at its end."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    input_ids[-1, -3:] = PAD
    mask = (input_ids != PAD).long()
    labels = input_ids.masked_fill(mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def logits(model: nn.Module, seed: int = 0) -> Tensor:
    """Logits (rows, length, vocab) of ``batch(seed=seed)``."""
    inputs = batch(seed=seed)
    return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


def assert_base_again(found: Tensor, expected: Tensor, model: nn.Module) -> None:
    """What a freshly adapted ``model`` gives is the base's ``expected``, to the bit.

    But for logits of new tokens, which are a product of their own: processors differ in how they
    sum one of few rows.
    """
    ids = [m.spec.ids for m in model.modules() if isinstance(m, NewRows)]
    new = sorted({number for some in ids for number in some})
    old = [number for number in range(expected.shape[-1]) if number not in new]
    assert found.dtype == expected.dtype
    assert torch.equal(found[..., old], expected[..., old])
    torch.testing.assert_close(found[..., new], expected[..., new])


@torch.no_grad()
def shake(model: nn.Module, seed: int = 1, std: float = 0.2) -> nn.Module:
    """Add noise to every trainable parameter, each by its own name: a stand-in for training."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "big")
            generator = torch.Generator().manual_seed(key)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((std * noise).to(parameter.dtype))
    return model


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trainable parameters by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def fingerprint(tensor: Tensor) -> str:
    """Hash of dtype, shape and bytes."""
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype} {tuple(data.shape)}".encode())
    digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def base_bytes(model: nn.Module) -> dict[str, str]:
    """Hash of every state-dict entry that is not an adapter's."""
    own = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, Adapter))
    return {
        name: fingerprint(tensor)
        for name, tensor in model.state_dict().items()
        if not name.startswith(own)
    }


def snapshot(model: nn.Module) -> dict[str, object]:
    """All of a model that an operation which failed must have left alone."""
    return {
        "state": {name: fingerprint(tensor) for name, tensor in model.state_dict().items()},
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "modules": {name: (type(m), m.training) for name, m in model.named_modules()},
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
        "hooks": {
            name: [
                len(hooks)
                for hooks in (
                    m._forward_hooks,
                    m._forward_pre_hooks,
                    m._backward_hooks,
                    m._state_dict_hooks,
                )
            ]
            for name, m in model.named_modules()
        },
    }


def shape_of(model: nn.Module) -> dict[str, object]:
    """What makes a model stock: keys, module types, attributes and hooks, values aside."""
    whole = snapshot(model)
    return {
        "keys": list(whole["state"]),
        "modules": {name: kind for name, (kind, _) in whole["modules"].items()},
        "attributes": whole["attributes"],
        "hooks": whole["hooks"],
    }
