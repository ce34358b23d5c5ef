"""Prefix tuning: one softmax over prefix and tokens, under every mask, cache and file."""

import copy
import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lit_adapters import (
    PrefixTuning,
    attach,
    detach,
    load_adapter,
    merge,
    save_adapter,
    start_from_text,
)
from lit_adapters.adapters import PEFTPrefixTuning
from lit_adapters.adapters.prefix_layer import widened_mask
from lit_adapters.attachment import adapted_layers, bypassed, check_adapters_fire
from tests.models import (
    SIZES,
    VOCAB,
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


def qwen3(seed=0, **changes):
    config = Qwen3Config(**{**SIZES, "head_dim": 16, "tie_word_embeddings": False, **changes})
    return _build(Qwen3ForCausalLM, config, seed)


def gemma2(seed=0, **changes):
    """Windowed and full layers in turn, capped scores."""
    settings = {"head_dim": 16, "sliding_window": 5, "attn_implementation": "eager"}
    return _build(Gemma2ForCausalLM, Gemma2Config(**{**SIZES, **settings, **changes}), seed)


def open_mistral(seed=0, **changes):
    return mistral(seed, sliding_window=None, **changes)


OPEN = {  # without a window
    "llama": llama,
    "mistral": open_mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
}
FAMILIES = {**OPEN, "mistral-window": mistral, "gemma2": gemma2}
LENGTH = 4

every_family = pytest.mark.parametrize("family", FAMILIES)
every_open_family = pytest.mark.parametrize("family", OPEN)


def adapted(family="llama", shaken=True, implementation=None, **changes):
    model = FAMILIES[family](**changes)
    if implementation is not None:
        model.set_attn_implementation(implementation)
    names = attach(model, PrefixTuning(length=LENGTH), seed=0)
    assert names == [f"model.layers.{n}.self_attn" for n in range(2)]
    return shake(model, std=1.0) if shaken else model


def adapters(model):
    return [adapter for *_, adapter in adapted_layers(model)]


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- the equation


def half_turned(x, cos, sin):
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    cos, sin = cos[..., :half], sin[..., :half]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def paper(attention, hidden, cos, sin, keys, values):
    """The whole attention module with a prefix, head by head; causal, no padding, no window."""
    head_dim = attention.head_dim
    heads = attention.q_proj.weight.shape[0] // head_dim
    q, k, v = (getattr(attention, name)(hidden) for name in ("q_proj", "k_proj", "v_proj"))
    unseen = torch.full((len(hidden), len(hidden)), -math.inf).triu(1)
    mixed = []
    for h in range(heads):
        group = h // (heads // len(keys))
        q_h = q[:, h * head_dim : (h + 1) * head_dim]
        k_h = k[:, group * head_dim : (group + 1) * head_dim]
        v_h = v[:, group * head_dim : (group + 1) * head_dim]
        if hasattr(attention, "q_norm"):
            q_h, k_h = attention.q_norm(q_h), attention.k_norm(k_h)
        q_h, k_h = half_turned(q_h, cos, sin), half_turned(k_h, cos, sin)
        scores = torch.cat([q_h @ keys[group].T, q_h @ k_h.T + unseen], 1) / math.sqrt(head_dim)
        mixed.append(scores.softmax(-1) @ torch.cat([values[group], v_h]))
    return attention.o_proj(torch.cat(mixed, -1))


@every_open_family
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_the_output_is_the_papers_equation(family, masked):
    model = adapted(family)
    attention, adapter = model.model.layers[1].self_attn, adapters(model)[1]
    assert adapter.keys.shape == adapter.values.shape == (2, LENGTH, attention.head_dim)
    hidden = torch.randn(1, 5, 32)
    cos, sin = model.model.rotary_emb(hidden, torch.arange(5)[None])
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None] if masked else None
    actual, _ = attention(hidden_states=hidden, position_embeddings=(cos, sin), attention_mask=mask)
    expected = paper(attention, hidden[0], cos[0], sin[0], adapter.keys, adapter.values)
    close(actual[0], expected)
    positional, _ = attention(hidden, (cos, sin), mask)
    assert torch.equal(positional, actual)
    nothing = adapter.keys[:, :0]
    bare = paper(attention, hidden[0], cos[0], sin[0], nothing, nothing)
    assert (bare - expected).abs().max() > 0.01


def behind_a_cache(model, ids, positions, mask):
    """The stock model behind a cache that holds the prefix, every score's fate spelt out."""
    layers = list(adapted_layers(model))
    cache = DynamicCache()
    for number, (_, _, adapter) in enumerate(layers):
        shape = (len(ids), -1, -1, -1)
        cache.update(adapter.keys.expand(*shape), adapter.values.expand(*shape), number)
    rows = torch.arange(ids.shape[1])
    distance = rows[:, None] - rows
    window = model.config.sliding_window if "mistral" in model.config.model_type else None
    seen = (distance >= 0) & (distance < (window or math.inf))
    seen = seen & mask[:, None].bool()
    seen = torch.cat([torch.ones(len(ids), len(rows), LENGTH, dtype=torch.bool), seen], -1)[:, None]
    if model.config._attn_implementation == "eager":
        seen = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with bypassed(model):
        return model(
            input_ids=ids, position_ids=positions, attention_mask=seen, past_key_values=cache
        ).logits


@pytest.mark.parametrize("family", [*OPEN, "mistral-window"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["none", "left", "right", "unsaid"])
@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_logits_are_those_behind_a_cache_that_holds_the_prefix(
    family, implementation, padding, use_cache
):
    model = adapted(family, implementation=implementation)
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padding in ("left", "right"):
        mask[0, slice(0, 3) if padding == "left" else slice(6, 9)] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    told = {} if padding == "unsaid" else {"attention_mask": mask, "position_ids": positions}
    found = model(input_ids=ids, use_cache=use_cache, **told).logits
    expected = behind_a_cache(model, ids, positions, mask)
    close(found[mask.bool()], expected[mask.bool()])
    with bypassed(model):
        bare = model(input_ids=ids, use_cache=use_cache, **told).logits
    assert (bare - found)[mask.bool()].abs().amax(-1).min() > 0.01  # every token sees the prefix


@every_family
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_a_prompt_read_in_pieces_gives_the_same_logits_and_the_cache_holds_no_prefix(
    family, masked
):
    model = adapted(family)
    ids = torch.randint(3, VOCAB, (2, 9))
    whole = model(input_ids=ids, use_cache=False).logits
    cache, pieces = DynamicCache(config=model.config), []
    for start, end in ((0, 3), (3, 7), (7, 8), (8, 9)):
        told = {"attention_mask": torch.ones(2, end, dtype=torch.long)} if masked else {}
        output = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True, **told)
        assert output.past_key_values is cache
        assert cache.get_seq_length() == end
        pieces.append(output.logits)
    close(torch.cat(pieces, 1), whole)
    assert cache.layers[0].keys.shape[-2] <= 9
    with bypassed(model):
        stock = model(input_ids=ids[:, :3], use_cache=True).past_key_values
    fresh = model(input_ids=ids[:, :3], use_cache=True).past_key_values
    assert torch.equal(fresh.layers[0].keys, stock.layers[0].keys)


@every_family
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [0, 2])
def test_cached_greedy_generation_equals_uncached(family, kind, padding):
    model = adapted(family)
    prompt = torch.randint(3, VOCAB, (2, 6))
    prompt[0, :padding] = 0
    settings = {
        "attention_mask": (prompt != 0).long(),
        "max_new_tokens": 8,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    uncached = model.generate(prompt, use_cache=False, **settings)
    cached = model.generate(
        prompt, use_cache=True, cache_implementation=kind, disable_compile=True, **settings
    )
    assert cached.sequences.shape == (2, 14)
    assert torch.equal(cached.sequences, uncached.sequences)
    close(torch.stack(cached.logits), torch.stack(uncached.logits))
    with bypassed(model):
        bare = model.generate(prompt, use_cache=False, **settings)
    assert (bare.logits[0] - uncached.logits[0]).abs().amax(-1).min() > 0.01


def test_beams_are_those_without_a_cache():
    model = adapted()
    prompt = torch.randint(3, VOCAB, (2, 6))
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    settings["attention_mask"] = torch.ones_like(prompt)
    found = model.generate(prompt, use_cache=True, **settings)
    assert torch.equal(found, model.generate(prompt, use_cache=False, **settings))


@torch.no_grad()
def test_texts_packed_into_a_row_each_see_the_prefix_and_only_their_own_text():
    model = adapted()
    ids = torch.randint(3, VOCAB, (1, 9))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    apart = [model(input_ids=part, use_cache=False).logits for part in (ids[:, :4], ids[:, 4:])]
    close(packed, torch.cat(apart, 1))


# ---------------------------------------------------------------- training


def gradients(model, **settings):
    model.zero_grad()
    model(**batch(), **settings).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_checkpointing_and_use_cache_give_the_same_gradients(family, reentrant):
    model = adapted(family).train()
    expected = gradients(model, use_cache=False)
    assert len(expected) == 4
    assert all(gradient.abs().amax((0, 2)).min() > 0 for gradient in expected.values())
    for name, gradient in gradients(model, use_cache=True).items():
        close(gradient, expected[name], 1e-6)
    if reentrant:
        model.enable_input_require_grads()
    settings = {"use_reentrant": reentrant}
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    for name, gradient in gradients(model, use_cache=False).items():
        close(gradient, expected[name], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_lower_the_loss_and_leave_the_base(dtype):
    model = llama().to(dtype)
    attach(model, PrefixTuning(length=LENGTH), seed=0)
    before, start = base_bytes(model), trainable(model.train())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    assert base_bytes(model) == before
    for name, parameter in trainable(model).items():
        assert parameter.dtype == torch.float32
        assert not torch.equal(parameter, start[name])


def test_bf16_autocast_trains_fp32_masters():
    model = adapted().train()
    exact = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch())
    assert (output.logits.float() - exact).abs().max() < 0.1
    output.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_the_start_is_small_and_drawn_by_name_and_seed():
    drawn = []
    for seed in (0, 0, 1):
        model = llama()
        attach(model, PrefixTuning(length=100), seed=seed)
        drawn.append(list(trainable(model).values()))
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(drawn[0], drawn[2], strict=True))
    assert len({tensor.sum().item() for tensor in drawn[0]}) == 4
    for tensor in drawn[0]:
        assert tensor.shape == (2, 100, 8)
        assert abs(tensor.std() / 0.02 - 1) < 0.1
        assert abs(tensor.mean()) < 0.002


# ---------------------------------------------------------------- a start from text


@every_open_family
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_behind_a_text_a_prompt_computes_what_it_does_behind_its_prefix(family, training):
    model = OPEN[family]()
    ids = torch.randint(3, VOCAB, (1, 12))
    expected = model(input_ids=ids, use_cache=False).logits[:, LENGTH:]
    attach(model, PrefixTuning(length=LENGTH), seed=0)
    model.train(training)
    model.activation_checkpointing_enable()
    start_from_text(model, ids)
    assert all(module.training == training for module in model.modules())
    found = model.eval()(input_ids=ids[:, LENGTH:], use_cache=False).logits
    close(found, expected, 1e-4)


@torch.no_grad()
def test_a_window_does_not_shorten_the_start():
    windowed, whole = mistral(sliding_window=3), mistral(sliding_window=3)
    attach(windowed, PrefixTuning(length=8), seed=0)
    ids = torch.randint(3, VOCAB, (1, 8))
    start_from_text(windowed, ids)
    cache = DynamicCache()
    whole(input_ids=ids, past_key_values=cache)
    for adapter, layer in zip(adapters(windowed), cache.layers, strict=True):
        close(adapter.values, layer.values[0])  # values know no positions


def test_attach_starts_from_the_text_of_the_settings():
    asked = []

    def tokenizer(text, return_tensors):
        asked.append((text, return_tensors))
        return {"input_ids": torch.arange(3, 3 + len(text))[None]}

    model, other = llama(), llama()
    spec = PrefixTuning(length=LENGTH, text="six!!!")
    attach(model, spec, seed=0, tokenizer=tokenizer)
    assert asked == [("six!!!", "pt")]
    attach(other, PrefixTuning(length=LENGTH), seed=0)
    start_from_text(other, torch.tensor([[3, 4, 5, 6]]))
    assert torch.equal(logits(model), logits(other))
    before = trainable(model)
    PrefixTuning(length=LENGTH).prepare(model, tokenizer)
    assert len(asked) == 1  # no text, nothing to read
    assert all(torch.equal(p, before[name]) for name, p in trainable(model).items())


@pytest.mark.parametrize("shape", [(1, LENGTH - 1), (2, 9), (9,)])
def test_a_text_that_is_too_short_or_not_one_is_refused(shape):
    model = adapted()
    before = snapshot(model)
    with pytest.raises(ValueError, match="length 4 starts from one text of at least as many"):
        start_from_text(model, torch.full(shape, 5))
    assert snapshot(model) == before


def test_a_start_without_a_prefix_is_refused():
    with pytest.raises(ValueError, match="holds no prefix; attach PrefixTuning first"):
        start_from_text(llama(), torch.full((1, 9), 5))


def test_keys_and_values_of_another_shape_are_refused():
    adapter = adapters(adapted())[0]
    with pytest.raises(ValueError, match=r"values have shape \(2, 3, 8\), but .* \(2, 4, 8\)"):
        adapter.set_keys_values(adapter.keys.detach(), adapter.values.detach()[:, :3])


# ---------------------------------------------------------------- attach and detach


def test_detach_gives_back_the_stock_model():
    stock = llama()
    model = detach(adapted())
    assert shape_of(model) == shape_of(stock)
    assert base_bytes(model) == base_bytes(stock)
    assert torch.equal(logits(model), logits(stock))


def test_merge_is_refused_and_changes_nothing():
    model = adapted()
    before = snapshot(model)
    with pytest.raises(ValueError, match="PrefixTuning cannot be merged: no weight of the base"):
        merge(model)
    assert snapshot(model) == before


def test_compiled_without_graph_breaks():
    model = adapted()
    inputs = {key: batch()[key] for key in ("input_ids", "attention_mask")}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(**inputs, use_cache=False).logits, logits(model))


def test_every_adapter_fires_and_the_count_is_the_closed_form():
    model = adapted("gemma")
    check_adapters_fire(model, batch())
    trained = sum(parameter.numel() for parameter in trainable(model).values())
    assert trained == LENGTH * 2 * 2 * (2 * 16)  # two layers, keys and values, kv_heads * head_dim


@pytest.mark.parametrize(
    ("build", "targets", "kind"),
    [
        (gpt2, ["attn"], "GPT2Attention"),
        (llama, ["mlp"], "LlamaMLP"),
        (llama, ["k_proj"], "Linear"),
    ],
)
def test_what_takes_no_prefix_is_refused_by_name(build, targets, kind):
    with pytest.raises(ValueError, match=f"a {kind}, which cannot hold a PrefixTuning"):
        attach(build(), PrefixTuning(targets=targets))


@pytest.mark.parametrize("length", [0, -1, 1.5, True])
def test_a_wrong_length_is_named(length):
    with pytest.raises(ValueError, match=f"length must be a positive integer, got {length}"):
        PrefixTuning(length=length)


# ---------------------------------------------------------------- other kinds of attention


def called_directly(model, mask, **more):
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(1, 3, 32)
    return attention(hidden, model.model.rotary_emb(hidden, torch.arange(3)[None]), mask, **more)


def test_flex_attention_is_refused():
    model = adapted()
    model.set_attn_implementation("flex_attention")
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 3, 3, device="cpu")
    with pytest.raises(ValueError, match="BlockMask .*'flex_attention'.*'sdpa' or 'eager'"):
        called_directly(model, mask)


def test_paged_attention_is_refused():
    with pytest.raises(ValueError, match="called with a SimpleNamespace"):
        called_directly(adapted(), None, cache=SimpleNamespace())


def flash(**config):
    settings = {"_attn_implementation": "flash_attention_2", "sliding_window": None, **config}
    return SimpleNamespace(config=SimpleNamespace(**settings), layer_idx=0)


def test_flash_attention_gets_ones_on_the_left_and_keeps_no_mask():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    called = {"hidden_states": torch.zeros(2, 3, 8), "position_ids": torch.arange(3)[None]}
    widened = widened_mask(flash(), {**called, "attention_mask": mask}, 2)
    assert widened.tolist() == [[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]]
    assert widened_mask(flash(), {**called, "attention_mask": None}, 2) is None


@pytest.mark.parametrize(
    ("config", "called", "reason"),
    [
        ({"sliding_window": 5}, {}, "has a sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, {}, "has a sliding window"),
        ({}, {"position_ids": torch.tensor([[0, 1, 0, 1]])}, "packs several texts into a row"),
        ({}, {"cu_seq_lens_q": torch.tensor([0, 2])}, "packs several texts into a row"),
    ],
)
def test_flash_attention_that_would_hide_the_prefix_is_refused(config, called, reason):
    with pytest.raises(ValueError, match=reason):
        widened_mask(flash(**config), {"attention_mask": None, **called}, 2)


# ---------------------------------------------------------------- files

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


def peft_type(folder):
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"]


@pytest.mark.parametrize(
    ("family", "changes", "kind"),
    [
        *((family, {}, "PREFIX_TUNING") for family in OPEN),
        ("llama", {"rope_parameters": YARN}, "PREFIX_TUNING"),
        ("llama", {"rope_parameters": LLAMA3}, "PREFIX_TUNING"),
        ("llama", {"rope_parameters": DYNAMIC}, "LIT_PREFIX"),
        ("mistral-window", {}, "LIT_PREFIX"),
        ("gemma2", {}, "LIT_PREFIX"),
    ],
)
def test_a_folder_gives_the_same_logits_on_a_fresh_base(family, changes, kind, tmp_path):
    model = adapted(family, **changes)
    save_adapter(model, tmp_path / "one")
    assert peft_type(tmp_path / "one") == kind
    fresh = FAMILIES[family](**changes)
    assert load_adapter(fresh, tmp_path / "one") == [name for name, *_ in adapted_layers(model)]
    close(logits(fresh), logits(model))
    for name, parameter in trainable(fresh).items():  # to the bit where nothing is rotated
        tolerance = 0 if kind == "LIT_PREFIX" or name.endswith("values") else 1e-6
        close(parameter, trainable(model)[name], tolerance)
    save_adapter(fresh, tmp_path / "two")
    assert peft_type(tmp_path / "two") == kind
    held = adapted(family, shaken=False, **changes)
    load_adapter(held, tmp_path / "two")  # onto prefixes that are there
    close(logits(held), logits(model))


@pytest.mark.parametrize(
    "narrowed",
    [
        {"layers": [0]},
        {"exclude": ["1.self_attn"]},
        {"targets": r".*\.0\.self_attn"},
        {"targets": ["0.self_attn"]},
    ],
)
def test_a_prefix_on_some_layers_is_not_called_pefts(narrowed, tmp_path):
    model = llama()
    attach(model, PrefixTuning(length=LENGTH, **narrowed), seed=0)
    save_adapter(shake(model, std=1.0), tmp_path)
    assert peft_type(tmp_path) == "LIT_PREFIX"
    fresh = llama()
    assert load_adapter(fresh, tmp_path) == ["model.layers.0.self_attn"]
    assert torch.equal(logits(fresh), logits(model))


def test_all_attention_modules_are_pefts_choice_too(tmp_path):
    model = llama()
    attach(model, PrefixTuning(length=LENGTH, targets="all"), seed=0)
    save_adapter(model, tmp_path)
    assert peft_type(tmp_path) == "PREFIX_TUNING"


def test_pefts_layout_needs_every_layer_and_one_rotary_module():
    spec = PEFTPrefixTuning(LENGTH, "all")
    model = adapted()
    held = list(adapted_layers(model))
    with pytest.raises(ValueError, match=r"one on each of the model's 2 layers, .* layers \[1\]"):
        spec.pack(model, held[1:])
    model.model.second = copy.deepcopy(model.model.rotary_emb)
    with pytest.raises(ValueError, match="one rotary module, found 2"):
        spec.pack(model, held)


def test_a_folder_of_another_length_is_refused(tmp_path):
    save_adapter(adapted(), tmp_path)
    model = llama()
    attach(model, PrefixTuning(length=LENGTH + 1))
    with pytest.raises(ValueError, match="its adapters are not those on the model"):
        load_adapter(model, tmp_path)


# ---------------------------------------------------------------- PEFT


@pytest.fixture
def peft():
    module = pytest.importorskip("peft")
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5 by a name that is going
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        yield module


PEERS = [
    ("llama", {}),
    ("llama", {"rope_parameters": YARN}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("gemma", {}),
]


@pytest.mark.parametrize(("family", "changes"), PEERS)
def test_peft_loads_a_prefix_to_the_same_logits(family, changes, tmp_path, peft):
    model = adapted(family, **changes)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(FAMILIES[family](**changes), str(tmp_path)).eval()
    assert (logits(model) - logits(FAMILIES[family](**changes))).abs().max() > 0.1
    close(logits(theirs), logits(model))
    ids = batch(rows=1, length=6)["input_ids"][:, :3]
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    found = theirs.generate(input_ids=ids, **settings)
    assert torch.equal(found, model.generate(ids, **settings))


@pytest.mark.parametrize(("family", "changes"), PEERS)
def test_a_folder_of_peft_gives_the_same_logits_here(family, changes, tmp_path, peft):
    config = peft.PrefixTuningConfig(num_virtual_tokens=LENGTH, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(FAMILIES[family](**changes), config).eval()
    theirs.save_pretrained(str(tmp_path))
    model = FAMILIES[family](**changes)
    load_adapter(model, tmp_path)
    assert (logits(model) - logits(FAMILIES[family](**changes))).abs().max() > 0.1
    close(logits(model), logits(theirs))
    save_adapter(model, tmp_path / "again")
    ours, original = (
        load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
        for folder in (tmp_path / "again", tmp_path)
    )
    close(ours, original, 1e-6)


def test_peft_lets_the_prefix_slide_out_of_a_window_so_its_folder_is_refused(tmp_path, peft):
    config = peft.PrefixTuningConfig(num_virtual_tokens=LENGTH, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(mistral(), config).eval()
    theirs.save_pretrained(str(tmp_path))
    differing = (logits(theirs) - logits(mistral())).abs().amax(-1)
    assert differing[0, 0] > 0.01  # within the window of five
    model = mistral()
    with pytest.raises(ValueError, match="slide out of this model's attention window; use it with"):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(mistral()))


def test_peft_refuses_our_own_layout(tmp_path, peft):
    save_adapter(adapted("mistral-window"), tmp_path)
    with pytest.raises(KeyError, match="LIT_PREFIX"):
        peft.PeftModel.from_pretrained(mistral(), str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "prefix_projection",
            True,
            "prefix_projection=true: this prefix was computed by a network",
        ),
        ("num_transformer_submodules", 2, "only decoders can be adapted here"),
        ("num_virtual_tokens", None, "the field 'num_virtual_tokens' is missing"),
        ("modules_to_save", ["lm_head"], "modules_to_save=.* is not supported here"),
    ],
)
def test_what_a_config_may_not_ask_for(field, value, message, tmp_path):
    save_adapter(adapted(), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert snapshot(model) == before


def test_the_result_of_pefts_projection_is_what_its_file_holds(tmp_path, peft):
    """Which is why changing that one field is enough to load it."""
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=LENGTH, task_type="CAUSAL_LM", prefix_projection=True
    )
    theirs = peft.get_peft_model(llama(), config).eval()
    nn.init.normal_(theirs.prompt_encoder["default"].transform[-1].weight)
    theirs.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prefix_projection": False}))
    model = llama()
    load_adapter(model, tmp_path)
    close(logits(model), logits(theirs))
