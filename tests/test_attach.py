"""Which layers are adapted, what is refused and how, and whether every adapter is heard."""

import re
import time
from dataclasses import FrozenInstanceError

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_adapters import LoRA, attach, check_adapters_fire, detach, initialise, merge
from lit_adapters.initialisers import Kaiming
from tests.models import BUILDERS, batch, gemma, gpt2, llama, llama_tied, logits, shake, snapshot

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(model, **settings):
    return set(attach(model, LoRA(**{"rank": 2, **settings})))


def refused(make, *words, kind=ValueError):
    """``make`` raises ``kind`` and its message holds every one of ``words``."""
    with pytest.raises(kind) as caught:
        make()
    message = str(caught.value)
    for word in words:
        assert str(word) in message, f"{word!r} is not in: {message}"
    return message


class Plain(nn.Module):
    """A model that is no Hugging Face model."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


# ---------------------------------------------------------------- what targets mean


@pytest.mark.parametrize("family", BUILDERS)
def test_all_linear_is_every_linear_but_the_output_head(family):
    model = BUILDERS[family]()
    names = adapted(model)
    assert len(names) == (2 * 4 if family == "gpt2" else 2 * len(LINEARS))
    assert not any("lm_head" in name or "embed" in name or "wte" in name for name in names)


def test_all_linear_on_a_plain_module_is_every_linear():
    assert adapted(Plain()) == {"body.0", "body.2", "head"}


def test_a_list_matches_name_endings_at_dots():
    assert adapted(llama(), targets=["q_proj"]) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    }
    assert adapted(llama(), targets=["0.self_attn.q_proj", "lm_head"]) == {
        "model.layers.0.self_attn.q_proj",
        "lm_head",
    }
    assert adapted(llama(), targets=["model.layers.1.mlp.up_proj"]) == {
        "model.layers.1.mlp.up_proj"
    }


def test_part_of_a_word_is_not_an_ending():
    refused(lambda: adapted(llama(), targets=["proj"]), "'proj'", "q_proj")


def test_a_string_is_a_regular_expression_for_the_whole_name():
    assert adapted(llama(), targets=r".*\.1\.self_attn\.[qv]_proj") == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    }
    refused(lambda: adapted(llama(), targets="q_proj"), "q_proj", "regular expression")


def test_a_name_matched_twice_is_adapted_once():
    model = llama()
    names = attach(model, LoRA(rank=2, targets=["q_proj", "self_attn.q_proj"]))
    assert len(names) == len(set(names)) == 2
    assert all(len(model.get_submodule(name)._forward_hooks) == 1 for name in names)


def test_the_list_of_names_is_in_model_order():
    model = llama()
    names = attach(model, LoRA(rank=2, targets=["v_proj", "embed_tokens", "q_proj"]))
    order = [name for name, _ in model.named_modules()]
    assert names == sorted(names, key=order.index)


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["o_proj", "mlp.up_proj"], {"q_proj", "k_proj", "v_proj", "gate_proj", "down_proj"}),
        (r".*\.mlp\..*", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_exclude_takes_a_list_of_endings_or_a_regular_expression(exclude, left):
    names = adapted(llama(), exclude=exclude)
    assert {name.rsplit(".", 1)[-1] for name in names} == left
    assert len(names) == 2 * len(left)


def test_layers_keeps_the_decoder_layers_of_these_numbers():
    names = adapted(llama(), layers=[1])
    assert len(names) == len(LINEARS)
    assert all(name.startswith("model.layers.1.") for name in names)
    assert all(".h.0." in name for name in adapted(gpt2(), layers=[0]))


def test_layers_and_exclude_narrow_together():
    assert adapted(llama(), layers=[0], exclude=r".*\.mlp\..*", targets=["q_proj", "up_proj"]) == {
        "model.layers.0.self_attn.q_proj"
    }


def test_patterns_give_single_modules_their_rank_and_alpha_and_the_first_hit_wins():
    model = llama()
    spec = LoRA(
        rank=4,
        alpha=8,
        rank_pattern={"q_proj": 2, r"0\.self_attn\..*": 3, "_proj": 99},
        alpha_pattern={r"model\.layers\.1\.mlp\.up_proj": 1},
    )
    attach(model, spec)
    found = {
        name: (adapter.lora_A.shape[0], adapter.scale)
        for name, adapter in model.named_modules()
        if name.endswith("adapter")
    }
    assert found["model.layers.0.self_attn.q_proj.adapter"] == (2, 4.0)
    assert found["model.layers.1.self_attn.q_proj.adapter"] == (2, 4.0)
    assert found["model.layers.0.self_attn.k_proj.adapter"] == (3, pytest.approx(8 / 3))
    assert found["model.layers.1.self_attn.k_proj.adapter"] == (4, 2.0)
    assert found["model.layers.1.mlp.up_proj.adapter"] == (4, 0.25)


def test_everything_else_is_frozen_even_what_was_trainable_before():
    model = llama()
    model.requires_grad_(True)
    names = adapted(model, targets=["q_proj"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.adapter.lora_{f}" for name in names for f in "AB"}


def test_the_defaults_are_the_documented_ones():
    spec = LoRA()
    assert (spec.rank, spec.alpha, spec.dropout, spec.targets) == (8, 16, 0.0, "all-linear")
    assert spec.rslora is False
    assert spec.exclude is None
    assert spec.layers is None
    assert spec.rank_pattern == {}
    assert spec.alpha_pattern == {}


def test_a_spec_is_a_frozen_value():
    spec = LoRA(rank=3)
    with pytest.raises(FrozenInstanceError):
        spec.rank = 4
    assert spec == LoRA(rank=3)


# ---------------------------------------------------------------- refusals, in words


@pytest.mark.parametrize("targets", [["q_prj"], ["q_proj", "v_prj"], "q_prj", r".*q_prj"])
def test_a_target_that_matches_nothing_is_refused_with_near_names(targets):
    missed = targets[-1] if isinstance(targets, list) else targets
    near = "v_proj" if "v_" in missed else "q_proj"
    message = refused(lambda: adapted(llama(), targets=targets), missed, near)
    assert "q_prj" in message or "v_prj" in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"targets": []}, ["targets"]),
        ({"layers": [7]}, ["layers", "7"]),
        ({"exclude": r".*"}, ["exclude"]),
        ({"targets": "model.layers.(0"}, ["model.layers.(0", "regular expression"]),
        ({"exclude": ["o_prooj"]}, ["o_prooj", "o_proj"]),
        ({"targets": ["input_layernorm"]}, ["input_layernorm", "LlamaRMSNorm"]),
        ({"targets": ["self_attn"]}, ["self_attn", "LlamaAttention"]),
        ({"rank": 33}, ["33", "32", "q_proj", "rank"]),
        ({"rank": 17, "targets": ["up_proj", "v_proj"]}, ["17", "16", "v_proj", "rank"]),
        ({"rank_pattern": {"1.mlp.up_proj": 40}}, ["40", "32", "layers.1.mlp.up_proj"]),
        ({"rank": 33, "targets": ["embed_tokens"]}, ["33", "32", "embed_tokens"]),
    ],
)
def test_a_spec_that_does_not_fit_is_refused_in_words_and_the_model_is_unchanged(settings, words):
    model = llama()
    model.model.norm.requires_grad_(False)
    model.model.layers[0].train()
    before, state = snapshot(model), torch.get_rng_state()
    refused(lambda: adapted(model, **settings), *words)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_the_largest_rank_that_fits_is_accepted():
    adapted(llama(), rank=16, targets=["k_proj"])


def test_attaching_twice_is_refused_with_the_remedy_and_changes_nothing():
    model = llama()
    adapted(model, targets=["q_proj"])
    shake(model)
    before = snapshot(model)
    for targets in (["q_proj"], ["v_proj"], "all-linear"):
        message = refused(lambda t=targets: adapted(model, targets=t), "already", "q_proj")
        assert "merge" in message or "detach" in message
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, ["rank", "0"]),
        ({"rank": -2}, ["rank", "-2"]),
        ({"rank": 1.5}, ["rank", "1.5"]),
        ({"rank": "8"}, ["rank", "'8'"]),
        ({"rank": True}, ["rank", "True"]),
        ({"alpha": float("nan")}, ["alpha", "nan"]),
        ({"alpha": float("inf")}, ["alpha", "inf"]),
        ({"alpha": "16"}, ["alpha", "'16'"]),
        ({"dropout": -0.1}, ["dropout", "-0.1"]),
        ({"dropout": 1.0}, ["dropout", "1.0"]),
        ({"dropout": "0.1"}, ["dropout", "'0.1'"]),
        ({"dropout": float("nan")}, ["dropout", "nan"]),
        ({"rank_pattern": {"q_proj": 0}}, ["q_proj", "0"]),
        ({"rank_pattern": {"q_proj": "2"}}, ["q_proj", "'2'"]),
        ({"alpha_pattern": {"q_proj": float("nan")}}, ["q_proj", "nan"]),
        ({"alpha_pattern": {"q_proj": "2"}}, ["q_proj", "'2'"]),
        ({"rank_pattern": {"(q_proj": 2}}, ["(q_proj"]),
        ({"alpha_pattern": {"(q_proj": 2}}, ["(q_proj"]),
        ({"targets": 5}, ["targets", "5"]),
        ({"targets": [5]}, ["targets", "5"]),
        ({"layers": ["1"]}, ["layers", "'1'"]),
    ],
)
def test_a_setting_that_means_nothing_is_refused_by_name(settings, words):
    refused(lambda: adapted(llama(), **settings), *words, kind=(ValueError, TypeError))


# ---------------------------------------------------------------- merge and detach


@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (llama_tied, ["embed_tokens"]),
        (llama_tied, ["lm_head", "q_proj"]),
        (gemma, ["embed_tokens", "v_proj"]),
        (gpt2, ["wte", "c_attn"]),
    ],
)
def test_merging_one_end_of_a_tied_pair_is_refused_and_changes_nothing(build, targets):
    model = build()
    adapted(model, targets=targets)
    shake(model)
    before, output = snapshot(model), logits(model)
    message = refused(lambda: merge(model), "tied", targets[0])
    assert "ntie" in message  # the remedy
    assert snapshot(model) == before
    assert torch.equal(logits(model), output)


def test_a_tied_model_merges_when_neither_end_is_adapted():
    model = llama_tied()
    adapted(model)
    before = logits(shake(model, std=0.1))
    merge(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_merging_or_initialising_a_bare_model_is_refused():
    refused(lambda: merge(llama()), "no adapter", kind=(ValueError, RuntimeError))
    refused(lambda: initialise(llama(), Kaiming()), "attach", kind=(ValueError, RuntimeError))


def test_detach_leaves_hooks_of_others_alone():
    model, calls = llama(), []
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda *_: calls.append("before"))
    adapted(model, targets=["q_proj"])
    layer.register_forward_hook(lambda *_: calls.append("after"))
    detach(model)
    logits(model)
    assert calls == ["before", "after"]


# ---------------------------------------------------------------- is every adapter heard?


class Bypass(nn.Module):
    """Uses ``fused``'s weight without calling it; everything else as it should be."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.called = nn.Linear(8, 8)
        self.fused = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        x = self.dropout(self.called(x))
        if self.way == "F.linear":
            return F.linear(x, self.fused.weight, self.fused.bias)
        if self.way == "forward":
            return self.fused.forward(x)
        if self.way == "never":
            return x
        return self.fused(x)


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("way", ["F.linear", "forward", "never"])
def test_a_bypassed_adapter_is_named(way):
    model = Bypass(way)
    attach(model, LoRA(rank=2))
    shake(model)
    message = refused(
        lambda: check_adapters_fire(model, {"x": torch.randn(2, 8)}), "fused", kind=RuntimeError
    )
    assert not re.search(r"\bcalled\b", message.split("without calling")[0])


@pytest.mark.parametrize(
    ("settings", "advice", "not_this"),
    [
        ({}, "`exclude`", "modules_to_save"),
        ({"targets": ["called"], "modules_to_save": ["fused"]}, "`modules_to_save`", "exclude"),
        ({"targets": ["called"], "bias": "all"}, "(`bias`)", "exclude"),
        ({"bias": "adapter"}, "`exclude` and train fewer biases", "modules_to_save"),
    ],
)
def test_the_advice_fits_what_was_bypassed(settings, advice, not_this):
    model = Bypass("never")
    attach(model, LoRA(rank=2, **settings))
    message = refused(
        lambda: check_adapters_fire(model, {"x": torch.randn(2, 8)}),
        ": fused. ",
        "experts of a mixture",
        advice,
        kind=RuntimeError,
    )
    assert not_this not in message


def test_adapters_that_all_fire_pass():
    model = Bypass("called")
    attach(model, LoRA(rank=2))
    assert check_adapters_fire(model, {"x": torch.randn(2, 8)}) is None


@pytest.mark.parametrize("family", BUILDERS)
def test_every_adapter_of_a_stock_model_fires(family):
    model = BUILDERS[family]()
    adapted(model)
    check_adapters_fire(model, batch())


@pytest.mark.parametrize("targets", ["all-linear", ["out_proj"]])
def test_the_output_projection_of_torch_attention_which_it_never_calls_is_refused(targets):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    refused(lambda: attach(Block(), LoRA(rank=2, targets=targets)), "")


@pytest.mark.parametrize("way", ["called", "F.linear"])
def test_the_check_leaves_random_state_modes_gradients_and_hooks(way):
    model = Bypass(way)
    attach(model, LoRA(rank=2, dropout=0.5))
    model.train()
    model.called.eval()  # a mixed mode is kept as it is
    before, state, mode = snapshot(model), torch.get_rng_state(), modes(model)
    data = {"x": torch.randn(2, 8, generator=torch.Generator().manual_seed(0))}
    try:
        check_adapters_fire(model, data)
    except RuntimeError:
        assert way == "F.linear"
    assert torch.equal(torch.get_rng_state(), state)
    assert modes(model) == mode
    assert snapshot(model) == before
    assert all(p.grad is None for p in model.parameters())


def test_a_batch_that_makes_the_model_fail_leaves_the_model_too():
    model = Bypass("called")
    attach(model, LoRA(rank=2, dropout=0.5))
    model.train()
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="shapes"):
        check_adapters_fire(model, {"x": torch.randn(2, 9, generator=torch.Generator())})
    assert torch.equal(torch.get_rng_state(), state)
    assert snapshot(model) == before
    attached_hooks = [len(m._forward_hooks) for m in model.modules()]
    assert sum(attached_hooks) == 2


# ---------------------------------------------------------------- wrapped models, odd inputs


def test_all_linear_leaves_the_head_of_a_wrapped_language_model_alone():
    wrapper = nn.Module()
    wrapper.model = llama()
    names = attach(wrapper, LoRA(rank=2))
    assert names
    assert not any("lm_head" in name for name in names)


def test_a_single_vector_is_a_valid_input():
    layer = nn.Sequential(nn.Linear(6, 5))
    attach(layer, LoRA(rank=2, targets=["0"]))
    nn.init.normal_(layer[0].adapter.lora_B)
    x = torch.randn(6)
    torch.testing.assert_close(layer(x), layer(x[None])[0])


FOREVER = "(.*?)" * 10 + "[x-z]"  # the tenth power of the length of the name


@pytest.mark.parametrize(
    "spec",
    [
        LoRA(rank=2, targets=FOREVER),
        LoRA(rank=2, exclude=FOREVER),
        LoRA(rank=2, rank_pattern={FOREVER: 1}),
        LoRA(rank=2, alpha_pattern={FOREVER: 1}),
    ],
    ids=["targets", "exclude", "rank_pattern", "alpha_pattern"],
)
def test_a_pattern_that_would_run_forever_is_an_error_within_seconds(spec):
    model = llama()
    before, start = snapshot(model), time.process_time()
    with pytest.raises(ValueError, match=r"takes longer than 1 s"):
        attach(model, spec)
    assert time.process_time() - start < 20
    assert snapshot(model) == before


def test_nested_repetitions_are_no_trouble():
    start = time.process_time()
    with pytest.raises(ValueError, match="matches no module"):
        attach(llama(), LoRA(rank=2, targets=r"(.+)+[x-z]"))  # exponential in Python's own `re`
    assert time.process_time() - start < 5
