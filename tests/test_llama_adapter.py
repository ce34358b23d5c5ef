"""LLaMA-Adapter: the paper's equation, its start, and what PEFT makes of the files."""

import json
import math
import warnings
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lit_adapters import LLaMAAdapter, attach, detach, load_adapter, merge, save_adapter
from lit_adapters.adapters.attention import queries
from lit_adapters.attachment import adapted_layers, check_adapters_fire
from tests.models import (
    SIZES,
    _build,
    base_bytes,
    batch,
    gemma,
    gpt2,
    llama,
    logits,
    mistral,
    qwen2,
    shake,
    shape_of,
    snapshot,
    trainable,
)


def llama_with_biases(seed=0, **changes):
    return llama(seed, attention_bias=True, **changes)


def qwen3(seed=0, **changes):
    config = Qwen3Config(**{**SIZES, "head_dim": 16, "tie_word_embeddings": False, **changes})
    model = _build(Qwen3ForCausalLM, config, seed)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):  # one by default: a lost norm weight
            nn.init.uniform_(parameter, 0.5, 1.5, generator=torch.Generator().manual_seed(7))
    return model


def moe(model_class, config_class):
    config = config_class(
        **SIZES, num_experts=2, num_local_experts=2, num_experts_per_tok=1, moe_intermediate_size=16
    )
    return _build(model_class, config, 0)


FAMILIES = {
    "llama": llama,
    "llama-biases": llama_with_biases,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
}
COUSINS = {
    "mixtral": lambda: moe(MixtralForCausalLM, MixtralConfig),
    "qwen2-moe": lambda: moe(Qwen2MoeForCausalLM, Qwen2MoeConfig),
    "qwen3-moe": lambda: moe(Qwen3MoeForCausalLM, Qwen3MoeConfig),
}
GATES = ["per-head", "scalar"]
K = 3

every_family = pytest.mark.parametrize("family", FAMILIES)
every_gate = pytest.mark.parametrize("gate", GATES)


def adapted(family="llama", gate="per-head", shaken=True, top_layers=2, dtype=torch.float32):
    model = FAMILIES[family]().to(dtype)
    spec = LLaMAAdapter(prompt_length=K, top_layers=top_layers, gate=gate)
    names = attach(model, spec, seed=0)
    assert names == [f"model.layers.{n}.self_attn" for n in range(2 - top_layers, 2)]
    return shake(model, std=0.5) if shaken else model


def adapters(model):
    return [adapter for *_, adapter in adapted_layers(model)]


@contextmanager
def recorded_queries(model, record):
    """Let the model attend through a function that keeps the queries it is given."""

    def attend(module, query, *args, **kwargs):
        record.append((module, query.detach()))
        return sdpa_attention_forward(module, query, *args, **kwargs)

    before = model.config._attn_implementation
    AttentionInterface.register("recording", attend)
    model.config._attn_implementation = "recording"
    yield
    model.config._attn_implementation = before


# ---------------------------------------------------------------- the equation


def half_turned(x, cos, sin):
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    cos, sin = cos[..., :half], sin[..., :half]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def paper(attention, hidden, cos, sin, prompts, factor):
    """The whole attention module with prompts, head by head; causal, no padding, no window."""
    head_dim = attention.head_dim
    heads = attention.q_proj.weight.shape[0] // head_dim
    kv_heads = attention.k_proj.weight.shape[0] // head_dim

    def project(name, x):
        layer = getattr(attention, name)
        return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)

    q, k, v = (project(name, hidden) for name in ("q_proj", "k_proj", "v_proj"))
    k_p, v_p = project("k_proj", prompts), project("v_proj", prompts)
    length = hidden.shape[0]
    hidden_from = torch.full((length, length), -math.inf).triu(1)
    mixed = []
    for h in range(heads):
        mine = slice(h * head_dim, (h + 1) * head_dim)
        group = h // (heads // kv_heads)
        shared = slice(group * head_dim, (group + 1) * head_dim)
        q_h, k_h = q[:, mine], k[:, shared]
        if hasattr(attention, "q_norm"):
            q_h, k_h = attention.q_norm(q_h), attention.k_norm(k_h)
        q_h, k_h = half_turned(q_h, cos, sin), half_turned(k_h, cos, sin)
        tokens = (q_h @ k_h.T / math.sqrt(head_dim) + hidden_from).softmax(-1) @ v[:, shared]
        prompted = (q_h @ k_p[:, shared].T / math.sqrt(head_dim)).softmax(-1) @ v_p[:, shared]
        mixed.append(tokens + factor[h] * prompted)
    return project("o_proj", torch.cat(mixed, -1))


@every_family
@every_gate
@torch.no_grad()
def test_the_output_is_the_papers_equation(family, gate):
    model = adapted(family, gate)
    attention, adapter = model.model.layers[1].self_attn, adapters(model)[1]
    hidden = torch.randn(1, 5, 32)
    cos, sin = model.model.rotary_emb(hidden, torch.arange(2, 7)[None])
    actual, _ = attention(
        hidden_states=hidden, position_embeddings=(cos, sin), attention_mask=_causal(5)
    )
    gates = adapter.gate.tanh() if gate == "per-head" else adapter.gate.expand(4)
    assert adapter.gate.shape == ((4,) if gate == "per-head" else (1,))
    assert gates.abs().min() > 0.01
    expected = paper(attention, hidden[0], cos[0], sin[0], adapter.prompts, gates)
    torch.testing.assert_close(actual[0], expected, rtol=1e-5, atol=1e-5)
    bare = paper(attention, hidden[0], cos[0], sin[0], adapter.prompts, torch.zeros(4))
    assert (expected - bare).abs().max() > 0.01


def _causal(length):
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


@torch.no_grad()
def test_positional_arguments_are_understood():
    model = adapted()
    attention = model.model.layers[1].self_attn
    hidden = torch.randn(1, 5, 32)
    embeddings = model.model.rotary_emb(hidden, torch.arange(5)[None])
    named, _ = attention(
        hidden_states=hidden, position_embeddings=embeddings, attention_mask=_causal(5)
    )
    assert torch.equal(attention(hidden, embeddings, _causal(5))[0], named)


@pytest.mark.parametrize("family", [*FAMILIES, *COUSINS])
@torch.no_grad()
def test_queries_are_those_the_module_attends_with(family):
    model = {**FAMILIES, **COUSINS}[family]()
    calls, record = {}, []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, output: calls.update({module: kwargs}), with_kwargs=True
        )
    with recorded_queries(model, record):
        model(**batch())
    assert len(record) == 2
    for module, expected in record:
        hidden, (cos, sin) = calls[module]["hidden_states"], calls[module]["position_embeddings"]
        assert torch.equal(queries(module, hidden, cos, sin), expected)


@every_family
@torch.no_grad()
def test_prompt_keys_are_the_raw_projection_without_rotation(family):
    model = adapted(family)
    attention, adapter = model.model.layers[0].self_attn, adapters(model)[0]
    keys, values = adapter.prompt_keys_values(attention, torch.float32)
    assert keys.shape == values.shape == (2, K, attention.head_dim)
    for found, layer in ((keys, attention.k_proj), (values, attention.v_proj)):
        expected = nn.functional.linear(adapter.prompts, layer.weight, layer.bias)
        assert torch.equal(found.transpose(0, 1).flatten(1), expected)


# ---------------------------------------------------------------- the start


@every_family
@every_gate
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_starts_at_the_base_to_the_bit(family, gate, dtype):
    before = logits(FAMILIES[family]().to(dtype))
    model = adapted(family, gate, shaken=False, dtype=dtype)
    assert all(p.dtype == torch.float32 for p in trainable(model).values())
    assert torch.equal(logits(model), before)


def test_it_starts_at_the_base_under_autocast():
    model = llama_with_biases()
    with torch.autocast("cpu", torch.bfloat16):
        before = logits(model)
        attach(model, LLaMAAdapter(top_layers=2), seed=0)
        assert torch.equal(logits(model), before)


def test_prompts_are_standard_normal_and_drawn_by_name_and_seed():
    drawn = []
    for seed in (0, 0, 1):
        model = llama()
        attach(model, LLaMAAdapter(prompt_length=100, top_layers=2), seed=seed)
        drawn.append([adapter.prompts.detach() for adapter in adapters(model)])
        assert all(adapter.gate.abs().max() == 0 for adapter in adapters(model))
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not torch.equal(drawn[0][0], drawn[2][0])
    assert not torch.equal(drawn[0][0], drawn[0][1])
    for prompts in drawn[0]:
        assert prompts.shape == (100, 32)
        assert abs(prompts.mean()) < 0.08
        assert abs(prompts.std() - 1) < 0.08


@every_gate
def test_gates_move_first_and_then_prompts(gate):
    model = adapted(gate=gate, shaken=False).train()
    before = base_bytes(model)
    start = trainable(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(4):  # each a graph of its own: nothing of the last one is used again
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        losses.append(loss.item())
        for adapter in adapters(model):
            assert adapter.gate.grad.abs().min() > 0
            if step == 0:
                assert adapter.prompts.grad.abs().max() == 0
            if step > 0:
                assert (adapter.prompts.grad.abs().sum(1) > 0).all()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, start[name]) for name, p in trainable(model).items())
    assert base_bytes(model) == before


def test_a_bf16_base_trains_fp32_masters():
    model = adapted(dtype=torch.bfloat16).train()
    model(**batch()).loss.backward()
    for adapter in adapters(model):
        for parameter in (adapter.prompts, adapter.gate):
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            assert parameter.grad.abs().max() > 0


# ---------------------------------------------------------------- inside a model


@every_family
def test_cached_greedy_generation_equals_uncached(family):
    model = adapted(family)
    prompt = batch(rows=2, length=6, seed=4)["input_ids"]
    prompt[0, :2] = 0  # padded on the left
    prompt[1] = prompt[1].flip(0)
    mask = (prompt != 0).long()
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    cached = model.generate(prompt, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **settings))
    assert cached.shape == (2, 14)


@torch.no_grad()
def test_attention_implementations_agree():
    one, other = adapted(), adapted()
    other.set_attn_implementation("eager")
    torch.testing.assert_close(logits(one), logits(other), rtol=1e-5, atol=1e-5)


@every_gate
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(gate, reentrant):
    model = adapted(gate=gate).train()
    if reentrant:
        model.enable_input_require_grads()

    def gradients():
        model.zero_grad()
        model(**batch(), use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    expected = gradients()
    settings = {"use_reentrant": reentrant}
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    found = gradients()
    assert len(found) == 4
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-7)


def test_compiled_without_graph_breaks():
    model = adapted()
    inputs = {key: batch()[key] for key in ("input_ids", "attention_mask")}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(**inputs, use_cache=False).logits
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-5)


def test_every_adapter_fires_and_only_the_top_layers_have_one():
    model = adapted(top_layers=1)
    check_adapters_fire(model, batch())
    assert [name for name, *_ in adapted_layers(model)] == ["model.layers.1.self_attn"]


def test_detach_gives_back_the_stock_model():
    stock = llama()
    model = detach(adapted())
    assert shape_of(model) == shape_of(stock)
    assert base_bytes(model) == base_bytes(stock)
    assert torch.equal(logits(model), logits(stock))


def test_merge_is_refused_and_changes_nothing():
    model = adapted()
    before = snapshot(model)
    with pytest.raises(ValueError, match="LLaMAAdapter cannot be merged: no weight of the base"):
        merge(model)
    assert snapshot(model) == before


# ---------------------------------------------------------------- sizes and refusals


@pytest.mark.parametrize(("gate", "count"), [("per-head", 1_229_760), ("scalar", 1_228_830)])
def test_parameters_on_the_shape_of_llama_2_7b(gate, count):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # its defaults are this shape
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    attach(model, LLaMAAdapter(gate=gate), seed=0)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def phi3():
    return _build(Phi3ForCausalLM, Phi3Config(**SIZES), 0)


def stablelm():
    return _build(StableLmForCausalLM, StableLmConfig(**SIZES), 0)


@pytest.mark.parametrize(
    ("build", "targets", "kind"),
    [
        (gpt2, ["attn"], "GPT2Attention"),  # fused, absolute positions
        (phi3, ["self_attn"], "Phi3Attention"),  # fused
        (stablelm, ["self_attn"], "StableLmAttention"),  # part of a head rotated
        (llama, ["q_proj"], "Linear"),
        (llama, ["mlp"], "LlamaMLP"),
    ],
)
def test_what_is_not_such_an_attention_module_is_refused_by_name(build, targets, kind):
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"a {kind}, which cannot hold a LLaMAAdapter"):
        attach(model, LLaMAAdapter(top_layers=1, targets=targets))
    assert snapshot(model) == before


def test_more_layers_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="top_layers=30, but the targets match only 2 attention"):
        attach(llama(), LLaMAAdapter())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_length": 0}, "prompt_length must be a positive integer, got 0"),
        ({"top_layers": True}, "top_layers must be a positive integer, got True"),
        ({"gate": "tanh"}, "gate must be 'per-head' or 'scalar', got 'tanh'"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        LLaMAAdapter(**settings)


# ---------------------------------------------------------------- files


@every_family
@every_gate
@pytest.mark.parametrize("top_layers", [1, 2])
def test_a_folder_gives_the_same_logits_on_a_fresh_base(family, gate, top_layers, tmp_path):
    model = adapted(family, gate, top_layers=top_layers)
    save_adapter(model, tmp_path)
    fresh = FAMILIES[family]()
    names = load_adapter(fresh, tmp_path)
    assert names == [name for name, *_ in adapted_layers(model)]
    assert torch.equal(logits(fresh), logits(model))
    held = adapted(family, gate, shaken=False, top_layers=top_layers)
    load_adapter(held, tmp_path)  # onto adapters that are there
    assert torch.equal(logits(held), logits(model))


def test_a_folder_with_the_other_gate_is_refused(tmp_path):
    save_adapter(adapted(gate="scalar"), tmp_path)
    with pytest.raises(ValueError, match="its adapters are not those on the model"):
        load_adapter(adapted(gate="per-head"), tmp_path)


@pytest.mark.parametrize(
    "narrowed",
    [
        {"layers": [0]},
        {"exclude": ["1.self_attn"]},
        {"targets": r".*\.0\.self_attn"},
        {"targets": ["0.self_attn"]},
    ],
)
def test_a_choice_of_layers_that_peft_cannot_make_is_not_called_pefts(narrowed, tmp_path):
    model = llama()
    attach(model, LLaMAAdapter(top_layers=1, gate="scalar", **narrowed), seed=0)
    save_adapter(shake(model, std=0.5), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LIT_LLAMA_ADAPTER"
    assert config["target_modules"] == ["model.layers.0.self_attn"]
    fresh = llama()
    assert load_adapter(fresh, tmp_path) == ["model.layers.0.self_attn"]
    assert torch.equal(logits(fresh), logits(model))


# ---------------------------------------------------------------- PEFT


@pytest.fixture
def peft():
    module = pytest.importorskip("peft")
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5 by a name that is going
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        yield module


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("top_layers", [1, 2])
def test_peft_loads_a_scalar_gate_to_the_same_logits(family, top_layers, tmp_path, peft):
    model = adapted(family, "scalar", top_layers=top_layers)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "ADAPTION_PROMPT"
    assert config["target_modules"] == "self_attn"
    theirs = peft.PeftModel.from_pretrained(FAMILIES[family](), str(tmp_path)).eval()
    bare = logits(FAMILIES[family]())
    assert (logits(model) - bare).abs().max() > 0.02
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("top_layers", [1, 2])
def test_a_folder_of_peft_gives_the_same_logits_here(family, top_layers, tmp_path, peft):
    config = peft.AdaptionPromptConfig(
        adapter_len=K, adapter_layers=top_layers, task_type="CAUSAL_LM"
    )
    theirs = shake(peft.get_peft_model(FAMILIES[family](), config).eval(), std=0.5)
    theirs.save_pretrained(str(tmp_path))
    model = FAMILIES[family]()
    load_adapter(model, tmp_path)
    assert (logits(model) - logits(FAMILIES[family]())).abs().max() > 0.02
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    save_adapter(model, tmp_path / "again")
    ours, original = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "again", tmp_path)
    )
    assert ours.keys() == original.keys()
    assert all(torch.equal(ours[key], original[key]) for key in ours)


def test_peft_refuses_the_papers_gate(tmp_path, peft):
    save_adapter(adapted(gate="per-head"), tmp_path)
    with pytest.raises(KeyError, match="LIT_LLAMA_ADAPTER"):
        peft.PeftModel.from_pretrained(llama(), str(tmp_path))


@pytest.mark.parametrize(
    ("family", "changes"),
    [("qwen2", {}), ("gemma", {}), ("llama", {"head_dim": 16})],
)
def test_models_that_peft_cannot_run_fail_there_and_work_here(family, changes, tmp_path, peft):
    model = FAMILIES[family](**changes)
    attach(model, LLaMAAdapter(prompt_length=K, top_layers=2, gate="scalar"), seed=0)
    save_adapter(shake(model, std=0.5), tmp_path)
    fresh = FAMILIES[family](**changes)
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    reason = "Unsupported model type" if not changes else "is invalid for input of size"
    with pytest.raises((ValueError, RuntimeError), match=reason):
        logits(peft.PeftModel.from_pretrained(FAMILIES[family](**changes), str(tmp_path)))


def test_peft_adds_an_output_bias_twice_so_such_a_folder_is_not_called_pefts(tmp_path, peft):
    bare = logits(llama_with_biases())
    config = peft.AdaptionPromptConfig(adapter_len=K, adapter_layers=2, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(llama_with_biases(), config).eval()
    assert (logits(theirs) - bare).abs().max() > 0.02
    assert torch.equal(logits(adapted("llama-biases", "scalar", shaken=False)), bare)
    save_adapter(adapted("llama-biases", "scalar"), tmp_path)
    with pytest.raises(KeyError, match="LIT_LLAMA_ADAPTER"):
        peft.PeftModel.from_pretrained(llama_with_biases(), str(tmp_path))
