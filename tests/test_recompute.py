"""Gradient checkpointing by policy: the same numbers, less kept, and which layers run twice."""

import sys

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_layers import GradientCheckpointingLayer

from lit_adapters import (
    AdapterFineTuneModule,
    DoRA,
    FullFineTuning,
    GaLore,
    LLaMAAdapter,
    LoRA,
    PiSSA,
    PrefixTuning,
    attach,
    initialise,
)
from lit_adapters.cli import AdapterCLI
from lit_adapters.recompute import recompute_activations, recompute_every
from lit_adapters.saved_settings import trusted_settings
from tests.models import VOCAB, batch, gemma, gpt2, llama, shake, trainable
from tests.test_module import Batches, examples, in_batches, make, make_trainer, sgd

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]

LAYERS = 6
FAMILIES = {
    "llama": (llama, "model.layers", {"num_hidden_layers": LAYERS}),
    "gemma": (gemma, "model.layers", {"num_hidden_layers": LAYERS}),
    "gpt2": (gpt2, "transformer.h", {"n_layer": LAYERS}),
}
METHODS = {
    "lora-dropout": LoRA(rank=4, dropout=0.3),
    "dora": DoRA(rank=4, dropout=0.3),
    "pissa": LoRA(rank=4),
    "top-layers-alone": LoRA(rank=4, targets=r"model\.layers\.[45]\..*_proj"),
    "llama-adapter": LLaMAAdapter(prompt_length=3, top_layers=LAYERS),
    "prefix": PrefixTuning(length=3),
    "full": FullFineTuning(),
}


class Foreign(nn.Module):
    """Somebody's own module around layers that transformers knows how to recompute."""

    class Inner(GradientCheckpointingLayer):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x).tanh()

    class Outer(GradientCheckpointingLayer):
        def __init__(self):
            super().__init__()
            self.mlp = Foreign.Inner()

        def forward(self, x):
            return x + self.mlp(x)

    def __init__(self, layers=4):
        super().__init__()
        self.blocks = nn.ModuleList(Foreign.Outer() for _ in range(layers))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def times_run(blocks, step):
    """How often each block's MLP runs in ``step``."""
    counts = [0] * len(blocks)

    def count(index):
        def hook(*_):
            counts[index] += 1

        return hook

    hooks = [b.mlp.register_forward_pre_hook(count(i)) for i, b in enumerate(blocks)]
    step()
    for hook in hooks:
        hook.remove()
    return counts


def kept_bytes(model, loss):
    """Bytes of the distinct tensors that a backward pass would find, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = tensor  # alive, so that no address is used twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    total = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)
    value.backward()
    return total


# ---------------------------------------------------------------- which layers


@pytest.mark.parametrize(
    ("policy", "every"),
    [("none", 0), (False, 0), ("full", 1), (True, 1), (1, 1), (2, 2), (7, 7)],
)
def test_a_policy_is_a_distance_of_layers(policy, every):
    assert recompute_every(policy) == every
    assert type(recompute_every(policy)) is int


@pytest.mark.parametrize("policy", [0, -1, 1.5, "ful", "2", None, [2]])
def test_what_is_no_policy_is_refused_in_one_line(policy):
    with pytest.raises(ValueError, match="gradient_checkpointing=.*none, full, or") as caught:
        AdapterFineTuneModule("tiny", gradient_checkpointing=policy)
    assert repr(policy) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("every", "twice"), [(1, range(6)), (2, [0, 2, 4]), (4, [0, 4]), (6, [0])])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_of_every_n_layers_runs_twice(family, every, twice):
    build, path, sizes = FAMILIES[family]
    model = build(**sizes)
    attach(model, LoRA(rank=2), seed=0)
    recompute_activations(model.train(), every)
    counts = times_run(
        model.get_submodule(path), lambda: model(**batch(), use_cache=False).loss.backward()
    )
    assert counts == [2 if index in twice else 1 for index in range(LAYERS)]
    model.eval()
    counts = times_run(
        model.get_submodule(path), lambda: model(**batch(), use_cache=False).loss.backward()
    )
    assert counts == [1] * LAYERS


def test_layers_inside_layers_are_not_counted():
    model, x = Foreign(), torch.ones(2, 8)
    recompute_activations(model, 2)
    assert times_run(model.blocks, lambda: model(x).sum().backward()) == [2, 1, 2, 1]


@pytest.mark.parametrize("every", [1, 2])
def test_a_module_of_someone_else_s_has_the_same_gradients(every):
    torch.manual_seed(0)
    model, x = Foreign(), torch.ones(2, 8)
    found = []
    for policy in (0, every):
        if policy:
            recompute_activations(model, policy)
        model.zero_grad()
        model(x).sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_more_than_there_are_layers_is_said(tmp_path):
    with pytest.raises(
        ValueError, match="=7 is above the 6 layers of LlamaForCausalLM.*most 6, full"
    ):
        recompute_activations(llama(num_hidden_layers=6), 7)
    module = make(llama(), gradient_checkpointing=3)
    with pytest.raises(ValueError, match="=3 is above the 2 layers"):
        make_trainer(tmp_path).fit(module, in_batches(examples(2), 2))


def test_a_module_without_such_layers_is_told_what_to_do(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB))
    module = make(model, gradient_checkpointing="full")
    with pytest.raises(
        TypeError, match="Sequential has no layer.*GradientCheckpointingLayer.*none"
    ):
        module.configure_model()
    make(model, gradient_checkpointing="none").configure_model()


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_the_same_to_the_bit(method):
    found = []
    for every in (0, 1, 2):
        model = llama(num_hidden_layers=LAYERS)
        attach(model, METHODS[method], seed=0)
        if method == "pissa":
            initialise(model, PiSSA(niter=2), seed=0)
        shake(model).train()
        if every:
            recompute_activations(model, every)
        torch.manual_seed(3)  # the same dropout masks
        model(**batch(), use_cache=False).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, expected in found[0].items():
        assert expected is not None, name
        assert expected.abs().max() > 0, name
        for other in found[1:]:
            assert torch.equal(other[name], expected), name


def test_embeddings_below_frozen_layers_are_asked_for_no_gradient():
    model = llama()
    attach(model, LoRA(rank=2), seed=0)
    recompute_activations(model.train())
    outputs = []
    model.get_input_embeddings().register_forward_hook(lambda *a: outputs.append(a[2]))
    model(**batch(), use_cache=False).loss.backward()
    assert not outputs[0].requires_grad


@pytest.mark.parametrize("how", ["lora", "galore"])
def test_a_fit_is_the_same_to_the_bit(tmp_path, how):
    found = []
    for policy in ("none", "full", 2):
        galore = how == "galore"
        module = make(
            llama(num_hidden_layers=LAYERS),
            adapter=FullFineTuning() if galore else LoRA(rank=4, dropout=0.1),
            optimizer=sgd,
            gradient_checkpointing=policy,
        )
        callbacks = [GaLore(rank=4, update_gap=2)] if galore else []
        trainer = make_trainer(tmp_path, accumulate_grad_batches=2, callbacks=callbacks)
        torch.manual_seed(0)  # of the adapter's start
        module.configure_model()
        start = trainable(module.model)
        torch.manual_seed(3)
        trainer.fit(module, in_batches(examples(12), 2))
        found.append((trainer.logger["train/loss"], trainable(module.model)))
    (losses, weights), *others = found
    assert len(losses) == 3
    assert any(not torch.equal(weights[name], start[name]) for name in weights)
    for other in others:
        assert other[0] == losses
        assert all(torch.equal(other[1][name], value) for name, value in weights.items())


# ---------------------------------------------------------------- what is kept


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora-dropout", "full"])
def test_what_is_kept_falls_with_every_layer_that_is_recomputed(family, method):
    build, _, sizes = FAMILIES[family]
    kept = {}
    for every in (0, 1, 2, 3):
        model = build(**sizes)
        attach(model, METHODS[method], seed=0)
        if every:
            recompute_activations(model, every)
        model.train()
        inputs = batch(rows=4, length=48)
        kept[every] = kept_bytes(model, lambda m=model, i=inputs: m(**i, use_cache=False).loss)
    saved = {every: kept[0] - kept[every] for every in (1, 2, 3)}
    assert saved[1] > kept[0] / 2  # layers are most of what is kept
    # Three layers of six, two of six. The first, above frozen embeddings, keeps a little less.
    assert saved[2] == pytest.approx(saved[1] / 2, rel=0.06)
    assert saved[3] == pytest.approx(saved[1] / 3, rel=0.06)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("policy", ["none", "full", 2, True, False])
def test_a_policy_survives_a_checkpoint(tmp_path, policy):
    module = make(llama(), gradient_checkpointing=policy)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, Batches([batch()]))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    again = trusted_settings(saved)["gradient_checkpointing"]
    assert (again, type(again)) == (policy, type(policy))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("written", "every"),
    [("true", 1), ("false", 0), ("none", 0), ("full", 1), ("2", 2)],
)
@pytest.mark.parametrize("how", ["flag", "file"])
def test_the_command_line_and_files_take_every_policy(tmp_path, monkeypatch, how, written, every):
    (tmp_path / "a.yaml").write_text(f"model:\n  gradient_checkpointing: {written}\n")
    flag = f"--model.gradient_checkpointing={written}"
    arguments = [flag] if how == "flag" else ["--config", str(tmp_path / "a.yaml")]
    monkeypatch.setattr(sys, "argv", ["lit_adapters"])
    cli = AdapterCLI([*arguments, f"--trainer.default_root_dir={tmp_path}"], run=False)
    assert cli.model.recompute_every == every
