"""Several adapters on one model: each computes what it would compute on a model of its own."""

import copy
import json
import math
import pickle
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lit_adapters import (
    AdapterFineTuneModule,
    AdapterSet,
    DoRA,
    FullFineTuning,
    LLaMAAdapter,
    LoRA,
    OLoRA,
    PiSSA,
    PrefixTuning,
    attach,
    detach,
    export_merged,
    initialise,
    load_adapter,
    merge,
    save_adapter,
)
from lit_adapters.adapters import LoRAAdapter
from lit_adapters.attachment import adapted_layers
from tests.data.word_tokenizer import word_tokenizer
from tests.models import (
    VOCAB,
    base_bytes,
    batch,
    fingerprint,
    gpt2,
    llama,
    llama_tied,
    logits,
    qwen2,
    shake,
    shape_of,
    snapshot,
    trainable,
)
from tests.reference import OneLayer, close, inputs, matrix, one_layer, product, run
from tests.test_module import adamw, examples, fit, in_batches

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]

QV = ["q_proj", "v_proj"]
SPECS = {
    "lora": LoRA(rank=2, dropout=0.3),
    "dora": DoRA(rank=3, targets=["q_proj", "down_proj"]),
    "prompts": LLaMAAdapter(prompt_length=3, top_layers=2),
    "prefix": PrefixTuning(length=3),
    "head": LoRA(rank=2, targets=QV, modules_to_save=["lm_head", "norm"]),
    "biases": DoRA(rank=2, targets=QV, bias="all"),
    "rows": LoRA(rank=2, targets=[*QV, "lm_head"], new_tokens=["<a>", "<b>"]),
    "other rows": LoRA(rank=2, targets=QV, bias="adapter", new_tokens=["<c>", 9]),
}
KINDS = list(SPECS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def pefts_advice(test):
    """PEFT warns of its own defaults, and reads a name that transformers deprecates."""
    for warning in ("ignore::UserWarning", "ignore:`is_gradient_checkpointing` is deprecated"):
        test = pytest.mark.filterwarnings(warning)(test)
    return test


MERGEABLE = [kind for kind in KINDS if kind not in ("prompts", "prefix")]


def words():
    """A tokenizer that knows as many tokens as the models, so that new ones add rows."""
    tokenizer = word_tokenizer()
    tokenizer.add_tokens([f"w{number}" for number in range(VOCAB - len(tokenizer))])
    return tokenizer


def alone(kind, build=qwen2):
    """A model of its own for one of the adapters, as if trained."""
    model = build()
    attach(model, SPECS[kind], seed=3, tokenizer=words())
    return shake(model)


def together(*kinds, build=qwen2):
    """One model and all of them (the last is active)."""
    adapters = AdapterSet(build())
    for kind in kinds or KINDS:
        adapters.add(kind, SPECS[kind], seed=3, tokenizer=words())
        shake(adapters.model)
    return adapters


@torch.no_grad()
def answers(model):
    """Logits of a batch in which the last row of the embedding is looked up too."""
    ids = batch()["input_ids"].clone()
    ids[0, 4] = model.get_input_embeddings().weight.shape[0] - 1
    return model(input_ids=ids, attention_mask=batch()["attention_mask"]).logits


def vocabulary(model):
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return (
        model.config.vocab_size,
        model.config.get_text_config().vocab_size,
        embedding.num_embeddings,
        len(embedding.weight),
        head.out_features,
        len(head.weight),
    )


def everything(adapters):
    """All that a failure must leave alone."""
    return {
        "names": adapters.names,
        "active": adapters.active,
        "model": snapshot(adapters.model),
        "config": getattr(adapters.model, "config", None) and adapters.model.config.to_dict(),
        "trained": {name: values(adapters, name) for name in adapters.names},
    }


def values(adapters, name):
    """Hashes of what an adapter holds, waiting or not, by looking and not touching."""
    return {
        f"{module}.{key}": fingerprint(tensor)
        for module, _, adapter in adapters._adapters[name]
        for key, tensor in adapter.state_dict().items()
    }


def train(model, optimizer, steps=2, seed=0):
    for step in range(steps):
        optimizer.zero_grad()
        model(**batch(seed=seed + step)).loss.backward()
        optimizer.step()


def optimizer_of(model):
    return adamw([p for p in model.parameters() if p.requires_grad])


# ---------------------------------------------------------------- one active, or none


@pytest.mark.parametrize("build", [qwen2, partial(qwen2, tie_word_embeddings=True)])
def test_each_computes_to_the_bit_what_it_computes_alone(build):
    adapters = together(build=build)
    model = adapters.model
    for kind in [*reversed(KINDS), *KINDS]:
        adapters.activate(kind)
        own = alone(kind, build)
        assert torch.equal(answers(model), answers(own)), kind
        assert shape_of(model) == shape_of(own)
        assert snapshot(model)["state"] == snapshot(own)["state"]
        assert snapshot(model)["requires_grad"] == snapshot(own)["requires_grad"]
        assert vocabulary(model) == vocabulary(own)
        assert model.config.to_dict() == own.config.to_dict()


def test_they_all_differ_so_that_mixing_them_up_would_be_seen():
    adapters = together()
    found = [logits(adapters.model)[..., :VOCAB]]
    for kind in [*KINDS[:-1], None]:
        adapters.activate(kind)
        found.append(logits(adapters.model)[..., :VOCAB])
    for number, one in enumerate(found):
        assert not any(torch.equal(one, other) for other in found[:number])


@every_kind
@pytest.mark.parametrize("build", [qwen2, partial(qwen2, tie_word_embeddings=True)])
def test_with_none_active_it_is_the_stock_model(kind, build):
    adapters, stock = together(kind, "rows" if kind != "rows" else "lora", build=build), build()
    adapters.activate(kind)
    adapters.activate(None)
    model = adapters.model
    assert adapters.active is None
    assert torch.equal(logits(model), logits(stock))
    assert shape_of(model) == shape_of(stock)
    assert snapshot(model)["state"] == snapshot(stock)["state"]
    assert model.config.to_dict() == stock.config.to_dict()
    assert not trainable(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (build is not qwen2)


def test_rows_come_and_go_with_the_sizes_of_the_vocabulary():
    adapters = together("lora", "rows", "other rows")
    expected = {"lora": 72, "rows": 74, "other rows": 73, None: 72}
    for name in ["rows", "other rows", None, "rows", "lora", "other rows"]:
        adapters.activate(name)
        assert set(vocabulary(adapters.model)) == {expected[name]}
        assert answers(adapters.model).shape[-1] == expected[name]


def test_names_and_which_is_active():
    adapters = AdapterSet(llama())
    assert (adapters.names, adapters.active) == ([], None)
    adapters.activate(None)
    adapters.add("b", LoRA(rank=2))
    adapters.add("a", DoRA(rank=2))
    assert (adapters.names, adapters.active) == (["b", "a"], "a")
    adapters.activate("b")
    adapters.activate("b")
    assert adapters.active == "b"
    adapters.delete("a")
    assert (adapters.names, adapters.active) == (["b"], "b")
    adapters.add("a", LoRA(rank=1))  # the name is free again
    assert (adapters.names, adapters.active) == (["b", "a"], "a")
    adapters.delete("a")
    assert (adapters.names, adapters.active) == (["b"], None)
    assert torch.equal(logits(adapters.model), logits(llama()))


@every_kind
def test_what_a_model_holds_already_is_taken_over(kind):
    model = alone(kind)
    before = snapshot(model)
    adapters = AdapterSet(model)
    assert (adapters.names, adapters.active) == (["default"], "default")
    assert snapshot(model) == before
    adapters.add("more", LoRA(rank=1), seed=0)
    shake(model)
    adapters.activate("default")
    assert torch.equal(answers(model), answers(alone(kind)))
    assert {**snapshot(model), "hooks": 0} == {**before, "hooks": 0}


def test_the_fresh_start_of_an_adapter_is_that_of_attach():
    adapters = together("dora", "rows")
    adapters.add("fresh", LoRA(rank=2), seed=5)
    model = qwen2()
    attach(model, LoRA(rank=2), seed=5)
    assert snapshot(adapters.model)["state"] == snapshot(model)["state"]


def test_deleting_one_leaves_the_others_to_the_bit():
    adapters = together()
    kept = {kind: values(adapters, kind) for kind in KINDS}
    for kind in ("lora", "other rows", "prefix"):
        adapters.delete(kind)
    assert adapters.active is None
    assert set(vocabulary(adapters.model)) == {72}
    for kind in adapters.names:
        adapters.activate(kind)
        assert values(adapters, kind) == kept[kind]
        assert torch.equal(answers(adapters.model), answers(alone(kind)))


def test_hooks_of_others_stay():
    model, seen = llama(), []
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    adapters = AdapterSet(model)
    for name in ("a", "b"):
        adapters.add(name, LoRA(rank=2, modules_to_save=["norm"]))
    for name in ("a", None, "b", None):
        adapters.activate(name)
        seen.clear()
        logits(model)
        assert seen == ["before", "after"]


# ---------------------------------------------------------------- training


@every_kind
def test_training_one_leaves_the_others_and_the_base_alone(kind):
    adapters = together()
    adapters.activate(kind)
    before, base = {name: values(adapters, name) for name in KINDS}, base_bytes(adapters.model)
    train(adapters.model, optimizer_of(adapters.model))
    assert values(adapters, kind) != before.pop(kind)
    assert {name: values(adapters, name) for name in before} == before
    assert base_bytes(adapters.model) == base
    for name in before:
        adapters.activate(name)
        assert torch.equal(answers(adapters.model), answers(alone(name)))


@every_kind
@pytest.mark.parametrize("other", ["rows", None])
def test_an_optimizer_goes_on_after_switching_away_and_back(kind, other):
    """To the bit as if the adapter had never been off the model."""
    if other == kind:
        other = "dora"
    adapters = together(kind, other) if other else together(kind)
    model, alone_model = adapters.model, alone(kind)
    adapters.activate(kind)
    ours, theirs = optimizer_of(model), optimizer_of(alone_model)
    train(model, ours)
    adapters.activate(other)
    if other:
        train(model, optimizer_of(model), seed=5)
    adapters.activate(kind)
    train(model, ours, seed=2)
    train(alone_model, theirs)
    train(alone_model, theirs, seed=2)
    assert trainable(model).keys() == trainable(alone_model).keys()
    for name, value in trainable(alone_model).items():
        assert torch.equal(model.get_parameter(name), value)
    assert torch.equal(answers(model), answers(alone_model))


def test_a_parameter_that_was_frozen_by_hand_stays_frozen():
    adapters = together("lora", "dora")
    adapters.activate("lora")
    for name, parameter in adapters.model.named_parameters():
        if name.endswith("lora_A"):
            parameter.requires_grad_(False)
    adapters.activate("dora")
    adapters.activate("lora")
    assert {name.rpartition(".")[2] for name in trainable(adapters.model)} == {"lora_B"}


@every_kind
def test_modes_are_those_of_the_model(kind):
    adapters = together(kind, "lora" if kind != "lora" else "dora")
    model = adapters.model.train()
    for mode in (True, False):
        adapters.activate(None)
        model.train(mode)
        adapters.activate(kind)
        assert {module.training for module in model.modules()} == {mode}


def test_dropout_follows_the_mode_of_the_model():
    adapters = together("lora", "dora")
    adapters.model.train()
    adapters.activate("lora")
    assert not torch.equal(logits(adapters.model), logits(adapters.model))
    adapters.activate(None)
    adapters.model.eval()
    adapters.activate("lora")
    assert torch.equal(logits(adapters.model), logits(alone("lora")))


def test_fit_one_switch_and_fit_another_under_a_trainer(tmp_path):
    def fitted(model, adapter=None):
        module = AdapterFineTuneModule(
            model, adapter, optimizer=adamw, lr_scheduler="constant", warmup=0.0
        )
        torch.manual_seed(1)
        fit(tmp_path, module, in_batches(examples(8), 2))
        return model.eval()

    adapters = AdapterSet(llama())
    adapters.add("a", LoRA(rank=2), seed=0)
    adapters.add("b", DoRA(rank=3), seed=0)
    adapters.activate("a")
    waiting = values(adapters, "b")
    fitted(adapters.model)
    assert values(adapters, "b") == waiting
    trained = values(adapters, "a")
    adapters.activate("b")
    fitted(adapters.model)
    assert values(adapters, "b") != waiting
    assert values(adapters, "a") == trained
    for name, spec in {"a": LoRA(rank=2), "b": DoRA(rank=3)}.items():
        own = llama()
        attach(own, spec, seed=0)
        adapters.activate(name)
        adapters.model.eval()
        assert torch.equal(logits(adapters.model), logits(fitted(own, spec)))
    adapters.activate(None)
    assert torch.equal(logits(adapters.model), logits(llama()))


def test_one_module_fits_what_is_active_when_it_is_called(tmp_path):
    adapters = AdapterSet(llama())
    adapters.add("a", LoRA(rank=2), seed=0)
    adapters.add("b", LoRA(rank=3), seed=0)
    module = AdapterFineTuneModule(
        adapters.model, optimizer=adamw, lr_scheduler="constant", warmup=0.0
    )
    for name, other in (("a", "b"), ("b", "a"), ("a", "b")):
        adapters.activate(name)
        before, still = values(adapters, name), values(adapters, other)
        fit(tmp_path, module, in_batches(examples(4), 2))
        assert values(adapters, name) != before
        assert values(adapters, other) == still


def test_batches_are_padded_where_the_next_adapter_needs_that(tmp_path):
    """A prefix is before the first sequence of a row alone, and the adapter before it was none."""
    adapters = AdapterSet(llama())
    adapters.add("prefix", PrefixTuning(length=2))
    adapters.add("lora", LoRA(rank=2))
    module = AdapterFineTuneModule(adapters.model, optimizer=adamw)
    fit(tmp_path, module, in_batches(examples(4), 2))
    assert module.packing_obstacle is None
    adapters.activate("prefix")
    fit(tmp_path, module, in_batches(examples(4), 2))
    assert module.packing_obstacle == "PrefixTuning puts something before the first sequence only"


# ---------------------------------------------------------------- moves and copies


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_the_base_changes_dtype_while_an_adapter_waits(kind, dtype):
    adapters, own = together(kind), alone(kind).to(dtype)
    masters = values(adapters, kind)
    adapters.activate(None)
    adapters.model.to(dtype)
    adapters.activate(kind)
    assert values(adapters, kind) == masters
    assert torch.equal(answers(adapters.model), answers(own))
    adapters.activate(None)
    assert torch.equal(logits(adapters.model), logits(qwen2().to(dtype)))


@every_kind
def test_an_adapter_follows_to_another_device_when_it_is_activated(kind, monkeypatch):
    # Every machine has that device, and else it is refused for want of values.
    monkeypatch.setattr(AdapterSet, "_check_kept", lambda self, name: None)
    adapters = together(kind, "lora" if kind != "lora" else "dora")
    waiting = values(adapters, kind)
    adapters.model.to("meta")
    assert values(adapters, kind) == waiting
    adapters.activate(kind)
    model = adapters.model
    found = {t.device.type for t in [*model.parameters(), *model.buffers()]}
    assert found == {"meta"}
    assert set(trainable(model)) == set(trainable(alone(kind)))


@every_kind
def test_copies_of_the_model_hold_the_active_adapter_alone(kind):
    adapters = together(kind, "lora" if kind != "lora" else "dora")
    adapters.activate(kind)
    copies = [copy.deepcopy(adapters.model), pickle.loads(pickle.dumps(adapters.model))]
    expected = answers(adapters.model)
    adapters.activate(None)
    for made in copies:
        assert torch.equal(answers(made), expected)
        taken = AdapterSet(made)
        assert taken.names == ["default"]
        taken.activate(None)
        assert torch.equal(logits(made), logits(qwen2()))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda whole: pickle.loads(pickle.dumps(whole))], ids=["copy", "file"]
)
def test_copies_of_a_set_are_whole_and_apart(copied):
    adapters = together()
    other = copied(adapters)
    assert (other.names, other.active) == (KINDS, KINDS[-1])
    for kind in KINDS:
        other.activate(kind)
        assert torch.equal(answers(other.model), answers(alone(kind)))
        shake(other.model, seed=8)
    assert adapters.active == KINDS[-1]
    for kind in KINDS:
        adapters.activate(kind)
        assert torch.equal(answers(adapters.model), answers(alone(kind)))


# ---------------------------------------------------------------- files


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@every_kind
@pytest.mark.parametrize("state", ["active", "waiting", "bare"])
def test_any_of_them_is_saved_as_if_it_were_alone(kind, state, tmp_path):
    other = "rows" if kind != "rows" else "lora"
    adapters = together(kind, other)
    adapters.activate({"active": kind, "waiting": other, "bare": None}[state])
    before = everything(adapters)
    folder = adapters.save(kind, tmp_path / "set")
    assert folder == tmp_path / "set"
    assert everything(adapters) == before
    assert files(folder) == files(save_adapter(alone(kind), tmp_path / "alone"))
    if state == "active":
        assert files(save_adapter(adapters.model, tmp_path / "model")) == files(folder)


@every_kind
def test_folders_are_loaded_beside_each_other(kind, tmp_path):
    folder, own = save_adapter(alone(kind), tmp_path), qwen2()
    load_adapter(own, folder)
    adapters = together("rows", "head")
    adapters.load("loaded", folder)
    assert (adapters.names, adapters.active) == (["rows", "head", "loaded"], "loaded")
    assert torch.equal(answers(adapters.model), answers(own))
    close(answers(own), answers(alone(kind)))
    for name in ("rows", "head"):
        adapters.activate(name)
        assert torch.equal(answers(adapters.model), answers(alone(name)))
    adapters.activate("loaded")
    assert torch.equal(answers(adapters.model), answers(own))


def test_a_tokenizer_decides_about_the_rows_of_a_folder(tmp_path):
    folder = save_adapter(alone("other rows"), tmp_path)
    tokenizer = words()
    tokenizer.add_tokens(["<before>"])
    adapters = together("other rows")
    adapters.load("loaded", folder, tokenizer=tokenizer)
    assert set(vocabulary(adapters.model)) == {74}
    moved = logits(adapters.model)
    adapters.activate("other rows")
    assert set(vocabulary(adapters.model)) == {73}
    close(logits(adapters.model)[..., 72], moved[..., 73])


def test_a_folder_of_another_base_is_loaded_only_if_asked(tmp_path):
    folder = save_adapter(alone("lora", partial(qwen2, seed=1)), tmp_path)
    adapters = together("dora")
    with pytest.raises(ValueError, match="trained on another base.*check_base=False"):
        adapters.load("loaded", folder)
    adapters.load("loaded", folder, check_base=False)
    assert adapters.active == "loaded"
    assert torch.equal(answers(adapters.model), answers(alone("lora")))


def test_a_save_that_fails_leaves_the_active_one_on(tmp_path):
    adapters = together("lora", "rows")
    (tmp_path / "file").write_text("in the way")
    before = everything(adapters)
    with pytest.raises(OSError, match="file"):
        adapters.save("lora", tmp_path / "file" / "folder")
    assert everything(adapters) == before


# ---------------------------------------------------------------- what fails changes nothing


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders that cannot be loaded here, by what is wrong."""
    root = tmp_path_factory.mktemp("folders")
    save_adapter(alone("lora", partial(qwen2, seed=1)), root / "other base")
    for name in ("short", "misnamed", "garbage"):
        save_adapter(alone("rows"), root / name)
    weights = (root / "short" / "adapter_model.safetensors").read_bytes()
    (root / "short" / "adapter_model.safetensors").write_bytes(weights[:-9])
    config = json.loads((root / "misnamed" / "adapter_config.json").read_text())
    config["target_modules"] = ["no_proj"]
    (root / "misnamed" / "adapter_config.json").write_text(json.dumps(config))
    (root / "garbage" / "adapter_config.json").write_text("{")
    full = qwen2()
    attach(full, FullFineTuning())
    save_adapter(shake(full), root / "full")
    return root


def adding(name, spec, **options):
    return lambda adapters, _: adapters.add(name, spec, **options)


def loading(name, folder):
    return lambda adapters, folders: adapters.load(name, folders / folder)


def calling(method, *arguments):
    return lambda adapters, _: getattr(adapters, method)(*arguments)


FAILURES = {
    "add-targets": (adding("new", LoRA(targets=["q_prj"])), ValueError, "q_prj.*q_proj"),
    "add-rank": (adding("new", LoRA(rank=33)), ValueError, "rank 33 exceeds"),
    "add-bias": (adding("new", LoRA(targets=["o_proj"], bias="adapter")), ValueError, "bias"),
    "add-rows": (adding("new", LoRA(new_tokens=["<d>"])), ValueError, "tokenizer"),
    "add-ids": (adding("new", LoRA(new_tokens=[900])), ValueError, "900.*72 rows"),
    "add-taken": (adding("lora", LoRA()), ValueError, r"'lora' is taken.*\['lora', 'dora'"),
    "add-empty": (adding("", LoRA()), ValueError, "'' is empty"),
    "add-full": (adding("new", FullFineTuning()), ValueError, "FullFineTuning.*modules_to_save"),
    "load-missing": (loading("new", "nowhere"), FileNotFoundError, "nowhere is not a folder"),
    "load-base": (loading("new", "other base"), ValueError, "another base"),
    "load-short": (loading("new", "short"), ValueError, "not a readable safetensors"),
    "load-targets": (loading("new", "misnamed"), ValueError, "no_proj"),
    "load-garbage": (loading("new", "garbage"), ValueError, "not valid JSON"),
    "load-full": (loading("new", "full"), ValueError, "FullFineTuning.*modules_to_save"),
    "load-taken": (loading("rows", "full"), ValueError, "'rows' is taken"),
    "load-empty": (loading("", "full"), ValueError, "empty"),
    "activate": (calling("activate", "lara"), ValueError, r"'lara'.*\['lora', 'dora'"),
    "delete": (calling("delete", "lara"), ValueError, r"'lara'.*\['lora', 'dora'"),
    "save": (calling("save", "lara", "folder"), ValueError, r"'lara'.*\['lora', 'dora'"),
    "unmerge": (calling("unmerge"), ValueError, "nothing is merged"),
    "combine-nothing": (calling("combine", "new", {}), ValueError, "at least one.*weight"),
    "combine-unknown": (calling("combine", "new", {"lora": 1, "lara": 1}), ValueError, "'lara'"),
    "combine-taken": (calling("combine", "lora", {"lora": 1}), ValueError, "'lora' is taken"),
    "combine-empty": (calling("combine", "", {"lora": 1}), ValueError, "empty"),
    **{
        f"combine-{kind}": (
            calling("combine", "new", {"lora": 0.5, kind: 0.5}),
            ValueError,
            f"{kind!r} holds a .*only sums of plain LoRA.*Merge",
        )
        for kind in KINDS
        if kind != "lora"
    },
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("active", ["rows", None])
def test_what_fails_leaves_set_and_model_as_they_were(failure, active, folders):
    call, kind, said = FAILURES[failure]
    adapters = together()
    adapters.activate(active)
    before, expected = everything(adapters), answers(adapters.model)
    with pytest.raises(kind, match=said):
        call(adapters, folders)
    assert everything(adapters) == before
    assert torch.equal(answers(adapters.model), expected)
    adapters.activate("prefix")  # and it still switches
    assert torch.equal(answers(adapters.model), answers(alone("prefix")))


@pytest.mark.parametrize("failure", [f for f in FAILURES if f.startswith(("add", "load"))])
def test_the_first_of_a_set_fails_and_the_model_is_untouched(failure, folders):
    call, kind, _ = FAILURES[failure]
    if "taken" in failure:
        return
    adapters = AdapterSet(qwen2())
    before = everything(adapters)
    assert all(before["model"]["requires_grad"].values())
    with pytest.raises(kind):
        call(adapters, folders)
    assert everything(adapters) == before


@pytest.mark.parametrize("change", [{"peft_type": "OFT"}, {"r": -3}, {"use_foo": True}])
def test_a_config_that_cannot_be_is_named(change, tmp_path):
    file = save_adapter(alone("lora"), tmp_path) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    adapters = together("dora")
    before = everything(adapters)
    with pytest.raises(ValueError, match="adapter_config.json"):
        adapters.load("new", tmp_path)
    assert everything(adapters) == before


@pytest.mark.parametrize("weight", [math.nan, math.inf, "much", True])
def test_weights_that_are_no_finite_numbers_are_refused(weight):
    adapters = together("dora", "lora")
    before = everything(adapters)
    with pytest.raises(ValueError, match="'lora'.*(nan|inf|much|True)"):
        adapters.combine("new", {"lora": weight})
    assert everything(adapters) == before


@pytest.mark.parametrize("waiting", ["lora", "head", "rows"])
@pytest.mark.parametrize("way", ["activate", "save", "combine"])
def test_what_waits_is_not_lost_to_a_model_without_values(waiting, way, tmp_path):
    adapters = together(waiting, "dora")
    values = [p for one in adapters._adapters[waiting] for p in one.adapter.parameters()]
    before = [value.clone() for value in values]
    adapters.model.to("meta")
    act = {
        "activate": lambda: adapters.activate(waiting),
        "save": lambda: adapters.save(waiting, tmp_path / "adapter"),
        "combine": lambda: adapters.combine("sum", {waiting: 1.0}),
    }[way]
    with pytest.raises(ValueError, match=f"meta device.*'{waiting}' would follow"):
        act()
    assert adapters.active == "dora"
    now = [p for one in adapters._adapters[waiting] for p in one.adapter.parameters()]
    assert len(now) == len(before) > 0
    assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))


BEHIND = {
    "attached": lambda model: attach(detach(model), LoRA(rank=3)),
    "detached": detach,
    "merged": merge,
}


@pytest.mark.parametrize("active", ["lora", None])
@pytest.mark.parametrize("change", BEHIND)
@pytest.mark.parametrize("call", ["activate", "add", "save", "combine", "merge"])
def test_what_was_done_to_the_model_without_the_set_is_not_lost_silently(call, change, active):
    if active is None and change != "attached":
        return
    adapters = together("dora", "lora")
    adapters.activate(active)
    BEHIND[change](adapters.model)
    before = everything(adapters)
    arguments = {
        "activate": ["dora"],
        "add": ["new", LoRA()],
        "save": ["dora", "nowhere"],
        "combine": ["new", {"lora": 1.0}],
        "merge": [],
    }[call]
    with pytest.raises(ValueError, match="not those of.*without this set.*new AdapterSet"):
        getattr(adapters, call)(*arguments)
    assert everything(adapters) == before


def test_an_interrupt_while_adding_leaves_the_active_one_on(monkeypatch):
    adapters = together("rows", "lora")
    adapters.activate("rows")
    before = everything(adapters)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(LoRAAdapter, "reset", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapters.add("new", LoRA(rank=2, new_tokens=["<d>"]), tokenizer=words())
    assert everything(adapters) == before


def test_a_model_whose_own_weights_are_trained_is_refused():
    model = qwen2()
    attach(model, FullFineTuning(targets=["mlp.up_proj"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match="FullFineTuning.*modules_to_save"):
        AdapterSet(model)
    assert snapshot(model) == before


# ---------------------------------------------------------------- sums


def delta(layer, adapter):
    """scale (B A - B0 A0) in float64 from the factors, (out, in)."""
    parts = {name: p.detach().double() for name, p in adapter.named_parameters()}
    groups = getattr(layer, "groups", 1)
    moved = product(parts["lora_A"], parts["lora_B"], groups)
    if "lora_A0" in parts:
        moved = moved - product(parts["lora_A0"], parts["lora_B0"], groups)
    return adapter.scale * moved


def summed(adapters, weights):
    """The sum of deltas by module, float64, from the adapters one by one."""
    total = {}
    for name, weight in weights.items():
        adapters.activate(name)
        for module, layer, adapter in adapted_layers(adapters.model):
            total[module] = total.get(module, 0) + weight * delta(layer, adapter)
    return total


def check_sum(adapters, name, total, tolerance=2e-6):
    """The adapter called ``name`` does on each module what ``total`` says, and no more."""
    adapters.activate(name)
    held = list(adapted_layers(adapters.model))
    assert [module for module, *_ in held] == [
        module for module, _ in adapters.model.named_modules() if module in total
    ]
    for module, layer, adapter in held:
        size = max(1.0, total[module].abs().max().item())
        close(delta(layer, adapter) / size, total[module] / size, tolerance)
        groups = getattr(layer, "groups", 1)
        assert adapter.rank <= min(len(total[module]) // groups, total[module].shape[1])
        assert not adapter.pinned
        assert adapter.dropout == 0
    return held


LAYERS = [
    "linear", "wide-linear", "conv1d-hf", "embedding", "conv2d", "conv2d-strided", "conv2d-groups",
]  # fmt: skip
WEIGHTS = {"a": 0.7, "b": -1.3, "c": 0.0, "d": 2.0}


def layered(model, ranks, **settings):
    adapters = AdapterSet(model)
    for name, rank in ranks.items():
        spec = LoRA(rank=rank, alpha=3 + rank, targets=["layer"], dropout=0.2, **settings)
        adapters.add(name, spec, seed=len(name))
        shake(model, seed=ord(name), std=0.5)
    return adapters


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "ranks",
    [dict(zip("abcd", (2, 1, 3, 1), strict=True)), dict.fromkeys("abcd", 5)],
    ids=["thin", "full"],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_sum_computes_the_sum_on_every_layer(kind, ranks, rslora):
    if kind == "conv2d-groups" and ranks["a"] == 2:
        ranks = {**ranks, "c": 1}  # 5 of 6
    adapters = layered(one_layer(kind), ranks, rslora=rslora)
    total = summed(adapters, WEIGHTS)
    adapters.combine("sum", WEIGHTS)
    assert adapters.active == "sum"
    [(_, layer, adapter)] = check_sum(adapters, "sum", total)
    stock = one_layer(kind).layer
    limit = min(len(matrix(stock)) // getattr(stock, "groups", 1), matrix(stock).shape[1])
    assert adapter.rank == min(sum(ranks.values()), limit)
    x = inputs(stock)
    wide = x.double() if x.is_floating_point() else x
    expected = run(stock.double(), matrix(one_layer(kind).layer).double() + total["layer"], wide)
    with torch.no_grad():
        found = adapters.model(x)
    size = expected.abs().max()
    close(found / size, (expected / size).float(), 1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Linear(4, 10),
        lambda: nn.Linear(10, 4),
        lambda: nn.Conv2d(4, 12, 1, groups=2),
        lambda: nn.Conv2d(12, 4, 3, groups=2),
        lambda: nn.Conv1d(6, 6, 1, groups=3),
        lambda: nn.Embedding(3, 8),
    ],
    ids=["tall", "wide", "tall-groups", "wide-groups", "square-groups", "embedding"],
)
@pytest.mark.parametrize("count", [2, 3, 9])
def test_more_rank_than_a_layer_has_becomes_full_rank(layer, count):
    torch.manual_seed(0)
    names = "abcdefghi"[:count]
    adapters = layered(OneLayer(layer()).eval(), dict.fromkeys(names, 2))
    weights = {name: 0.5 - number for number, name in enumerate(names)}
    total = summed(adapters, weights)
    adapters.combine("sum", weights)
    check_sum(adapters, "sum", total)
    weight = adapters.model.layer.weight
    [(_, _, adapter)] = adapted_layers(adapters.model)
    assert adapter.lora_A.shape[1] * adapter.lora_B.shape[0] == weight.numel()


TASKS = {
    "a": LoRA(rank=2, alpha=7),
    "b": LoRA(rank=4, targets=["q_proj", "mlp.up_proj"], rslora=True, dropout=0.5),
    "c": LoRA(
        rank=3,
        targets=["v_proj", "down_proj", "embed_tokens"],
        rank_pattern={"layers.1.self_attn.v_proj": 6, "embed_tokens": 1},
        alpha_pattern={"layers.0.*": 1},
    ),
    "d": LoRA(rank=2, targets=["lm_head", "v_proj"]),
}


def tasks(build=llama, start=None):
    adapters = AdapterSet(build())
    for name, spec in TASKS.items():
        adapters.add(name, spec, seed=ord(name))
        if start:
            initialise(adapters.model, start)
        shake(adapters.model, seed=ord(name), std=0.1)
    return adapters


def with_deltas(model, total):
    """A float64 model with these changes in its weights."""
    model = model.double()
    for module, change in total.items():
        layer = model.get_submodule(module)
        change = change.T if isinstance(layer, nn.Embedding) else change
        layer.weight = nn.Parameter(layer.weight.detach() + change)
    return model


@pytest.mark.parametrize("start", [None, PiSSA(), OLoRA()], ids=["plain", "pissa", "olora"])
@pytest.mark.parametrize("weights", [WEIGHTS, {"c": 1.0, "a": -0.5}, {"b": 1e-3}, {"d": 0.0}])
def test_a_sum_over_different_targets_ranks_and_scales(weights, start):
    adapters = tasks(start=start)
    total = summed(adapters, weights)
    before = {name: values(adapters, name) for name in TASKS}
    adapters.combine("sum", weights)
    assert (adapters.names, adapters.active) == ([*TASKS, "sum"], "sum")
    assert {name: values(adapters, name) for name in TASKS} == before
    check_sum(adapters, "sum", total)
    expected = logits(with_deltas(llama(), total))
    scale = expected.abs().max()
    close(logits(adapters.model) / scale, (expected / scale).float(), 1e-5)


def test_a_sum_of_many():
    adapters, names = AdapterSet(llama()), [f"n{number}" for number in range(40)]
    for number, name in enumerate(names):
        adapters.add(name, LoRA(rank=1 + number % 3, targets=QV), seed=number)
        shake(adapters.model, seed=number)
    weights = {name: math.sin(number) for number, name in enumerate(names)}
    total = summed(adapters, weights)
    adapters.combine("sum", weights)
    check_sum(adapters, "sum", total)
    assert {adapter.rank for *_, adapter in adapted_layers(adapters.model)} == {16, 32}


def test_a_sum_of_one_is_that_one_and_a_sum_of_nothing_the_base():
    adapters = tasks()
    adapters.activate("a")
    expected = logits(adapters.model)
    adapters.combine("same", {"a": 1.0})
    close(logits(adapters.model), expected, 1e-6)
    adapters.combine("nothing", {"a": 0.0, "b": 0.0})
    close(logits(adapters.model), logits(llama()), 1e-6)


def test_a_sum_is_summed_again_trained_and_deleted():
    adapters = tasks()
    total = summed(adapters, {"a": 0.25, "b": 0.5, "c": 2.0})
    adapters.combine("ab", {"a": 0.5, "b": 1.0})
    adapters.combine("abc", {"ab": 0.5, "c": 2.0})
    check_sum(adapters, "abc", total)
    assert {n.rpartition(".")[2] for n in trainable(adapters.model)} == {"lora_A", "lora_B"}
    before = {name: values(adapters, name) for name in adapters.names}
    train(adapters.model, optimizer_of(adapters.model))
    assert values(adapters, "abc") != before.pop("abc")
    adapters.delete("abc")
    assert {name: values(adapters, name) for name in adapters.names} == before
    assert torch.equal(logits(adapters.model), logits(llama()))


def test_a_sum_on_a_bf16_base_keeps_fp32_factors():
    adapters = tasks(lambda: llama().to(torch.bfloat16))
    total = summed(adapters, WEIGHTS)
    adapters.combine("sum", WEIGHTS)
    check_sum(adapters, "sum", total)
    assert {p.dtype for p in adapters.model.parameters() if p.requires_grad} == {torch.float32}


class Nested(nn.Module):
    """Modules whose names are endings of others'."""

    def __init__(self, depth=3):
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.inner = Nested(depth - 1) if depth else None
        self.last = nn.Linear(6, 6)

    def forward(self, x):
        x = torch.tanh(self.proj(x))
        return self.last(x if self.inner is None else self.inner(x))


def nested():
    torch.manual_seed(0)
    return Nested()


@torch.no_grad()
def nested_output(model):
    return model(torch.linspace(-1, 1, 18).view(3, 6))


@pytest.mark.parametrize("left_out", [[], ["inner.proj"]], ids=["all", "some"])
def test_names_that_are_endings_of_others_keep_their_ranks(left_out, tmp_path):
    adapters = AdapterSet(nested())
    for name, pattern in {
        "a": {"inner.inner.proj": 2, "inner.proj": 3},
        "b": {"inner.inner.inner.proj": 3, "last": 2},
    }.items():
        spec = LoRA(rank=1, targets="(inner.)*(proj|last)", exclude=left_out or None,
                    rank_pattern=pattern)  # fmt: skip
        adapters.add(name, spec, seed=1)
        shake(adapters.model, seed=ord(name))
    adapters.add("c", LoRA(rank=2, targets="proj|inner.last"), seed=1)
    shake(adapters.model)
    total = summed(adapters, {"a": 1, "b": -0.5, "c": 0.3})
    adapters.combine("sum", {"a": 1, "b": -0.5, "c": 0.3})
    held = check_sum(adapters, "sum", total)
    ranks = {name: adapter.rank for name, _, adapter in held}
    assert len(set(ranks.values())) >= 3
    folder = adapters.save("sum", tmp_path)
    model = nested()
    load_adapter(model, folder)
    assert {name: adapter.rank for name, _, adapter in adapted_layers(model)} == ranks
    assert torch.equal(nested_output(model), nested_output(adapters.model))


@pytest.mark.parametrize("start", [None, PiSSA()], ids=["plain", "pissa"])
@pytest.mark.parametrize("weights", [WEIGHTS, {"b": 0.3}], ids=["four", "one"])
def test_a_saved_sum_is_a_folder_like_any_other(weights, start, tmp_path):
    adapters = tasks(start=start)
    adapters.combine("sum", weights)
    expected = logits(adapters.model)
    folder = adapters.save("sum", tmp_path)
    model = llama()
    load_adapter(model, folder)
    assert torch.equal(logits(model), expected)
    adapters.load("again", folder)
    assert torch.equal(logits(adapters.model), expected)
    close(logits(merge(model)), expected, 1e-4)


@pefts_advice
@pytest.mark.parametrize("start", [None, PiSSA()], ids=["plain", "pissa"])
def test_peft_reads_a_saved_sum(start, tmp_path):
    peft = pytest.importorskip("peft")
    adapters = tasks(start=start)
    adapters.combine("sum", WEIGHTS)
    folder = adapters.save("sum", tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), folder).eval()
    close(logits(theirs), logits(adapters.model))
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pefts_advice
@pytest.mark.parametrize("kind", ["conv1d-hf", "embedding", "conv2d", "conv2d-groups", "linear"])
@pytest.mark.parametrize("rank", [2, 5])
def test_peft_reads_a_saved_sum_of_every_layer_it_computes_as_we_do(kind, rank, tmp_path):
    peft = pytest.importorskip("peft")
    adapters = layered(one_layer(kind), dict.fromkeys("abcd", rank))
    adapters.combine("sum", WEIGHTS)
    folder = adapters.save("sum", tmp_path)
    stock = one_layer(kind)
    x = inputs(stock.layer)
    said = json.loads((folder / "adapter_config.json").read_text())["peft_type"]
    assert said == ("LIT_LORA" if kind == "conv2d-groups" else "LORA")
    with torch.no_grad():
        expected = adapters.model(x)
        load_adapter(stock, folder)
        assert torch.equal(stock(x), expected)
        if said == "LORA":
            theirs = peft.PeftModel.from_pretrained(one_layer(kind), folder).eval()
            size = expected.abs().max()
            close(theirs(x) / size, expected / size)


@pefts_advice
@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.5, -0.5), (2.0, 0.0)])
def test_a_sum_of_pefts_folders_is_pefts_sum(build, weights, tmp_path):
    peft = pytest.importorskip("peft")
    targets = (QV, ["v_proj", "up_proj"]) if build is llama else (["c_attn"], ["c_attn", "c_fc"])
    configs = [
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets[0],
                        fan_in_fan_out=build is gpt2),
        peft.LoraConfig(r=4, lora_alpha=9, target_modules=targets[1], use_rslora=True,
                        fan_in_fan_out=build is gpt2),
    ]  # fmt: skip
    theirs = peft.get_peft_model(build(), configs[0], "a")
    theirs.add_adapter("b", configs[1])
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path)
    theirs.add_weighted_adapter(["a", "b"], list(weights), "sum", combination_type="cat")
    theirs.set_adapter("sum")
    theirs.eval()
    adapters = AdapterSet(build())
    for name in "ab":
        adapters.load(name, tmp_path / name)
        theirs.set_adapter(name)
        close(logits(adapters.model), logits(theirs))
    theirs.set_adapter("sum")
    adapters.combine("sum", dict(zip("ab", weights, strict=True)))
    close(logits(adapters.model), logits(theirs))


# ---------------------------------------------------------------- merging for a while


def bits(model):
    """Hashes and identities of every weight and buffer, those that no state dict holds too."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: (fingerprint(tensor), id(tensor)) for name, tensor in named}


@pytest.mark.parametrize("kind", MERGEABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_unmerging_restores_every_bit(kind, dtype):
    adapters = together(kind, "rows" if kind != "rows" else "lora", build=lambda: qwen2().to(dtype))
    adapters.activate(kind)
    model = adapters.model
    before, expected = everything(adapters), answers(model)
    all_bits = bits(model)
    for _ in range(5):
        adapters.merge()
        assert not list(adapted_layers(model))
        assert not trainable(model)
        assert shape_of(model) == shape_of(qwen2())
        assert set(vocabulary(model)) == {expected.shape[-1]}
        size = expected.float().abs().max()
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        close(answers(model).float() / size, expected.float() / size, tolerance)
        adapters.unmerge()
        assert bits(model) == all_bits
        assert torch.equal(answers(model), expected)
    assert everything(adapters) == before
    adapters.activate(None)
    assert torch.equal(logits(model), logits(qwen2().to(dtype)))
    assert base_bytes(model) == base_bytes(qwen2().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_subtracting_would_not_restore_them(dtype):
    """So the test above can fail."""
    adapters = together("lora", build=lambda: qwen2().to(dtype))
    model, lost = adapters.model, 0
    for _, layer, adapter in adapted_layers(model):
        change = delta(layer, adapter).float()
        weight = layer.weight.detach()
        merged = (weight.float() + change).to(dtype)
        lost += int(((merged.float() - change).to(dtype) != weight).sum())
    assert lost > 100


def test_buffers_of_whole_modules_come_back():
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

        def forward(self, x):
            return self.norm(self.conv(x))

    torch.manual_seed(0)
    model, x = Images(), torch.randn(4, 3, 7, 7)
    adapters = AdapterSet(model)
    adapters.add("whole", LoRA(rank=2, targets=["conv"], bias="all", modules_to_save=["norm"]))
    shake(model)
    model.train()
    for _ in range(3):
        model(x)
    model.eval()
    before, expected = bits(model), model(x)
    stored = {name: one for name, one in before.items() if "norm" in name}
    assert len(stored) == 10
    for _ in range(3):
        adapters.merge()
        assert model.norm.num_batches_tracked == 3
        close(model(x), expected, 1e-5)
        adapters.unmerge()
        assert bits(model) == before
        assert torch.equal(model(x), expected)
    adapters.activate(None)
    assert model.norm.num_batches_tracked == 0


def test_buffers_come_back_although_the_model_was_moved_meanwhile():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    stock = snapshot(model)["state"]
    adapters = AdapterSet(model)
    adapters.add("whole", LoRA(rank=2, targets=["0"], modules_to_save=["1"]))
    shake(model.train())(torch.ones(2, 3, 5, 5))
    model.eval()
    before = snapshot(model)["state"]
    adapters.merge()
    model.double()
    model.float()
    adapters.unmerge()
    assert snapshot(model)["state"] == before
    adapters.activate(None)
    assert snapshot(model)["state"] == stock


@pytest.mark.parametrize("start", [PiSSA(), OLoRA()], ids=["pissa", "olora"])
def test_pinned_starts_are_merged_and_unmerged(start):
    adapters = tasks(start=start)
    adapters.activate("a")
    before, expected = bits(adapters.model), logits(adapters.model)
    adapters.merge()
    close(logits(adapters.model), expected, 1e-4)
    adapters.unmerge()
    assert bits(adapters.model) == before
    assert torch.equal(logits(adapters.model), expected)


def test_a_sum_is_merged_and_leaves_no_hooks_meanwhile():
    adapters = tasks()
    adapters.combine("sum", WEIGHTS)
    expected, before = logits(adapters.model), bits(adapters.model)
    adapters.merge()
    assert shape_of(adapters.model) == shape_of(llama())
    close(logits(adapters.model), expected, 1e-4)
    adapters.unmerge()
    assert bits(adapters.model) == before


REFUSED_WHILE_MERGED = {
    "add": calling("add", "new", LoRA(rank=1)),
    "load": calling("load", "new", "nowhere"),
    "activate": calling("activate", "dora"),
    "activate-none": calling("activate", None),
    "activate-same": calling("activate", "lora"),
    "delete": calling("delete", "lora"),
    "save": calling("save", "lora", "nowhere"),
    "save-other": calling("save", "dora", "nowhere"),
    "combine": calling("combine", "new", {"lora": 1.0}),
    "merge": calling("merge"),
}


@pytest.mark.parametrize("call", REFUSED_WHILE_MERGED.values(), ids=REFUSED_WHILE_MERGED)
def test_while_merged_everything_else_is_refused(call):
    adapters = together("dora", "lora")
    bare = bits(adapters.model)
    adapters.merge()
    before = everything(adapters)
    with pytest.raises(ValueError, match=r"'lora' is merged into the base; call unmerge\(\)"):
        call(adapters, None)
    assert everything(adapters) == before
    adapters.unmerge()
    assert bits(adapters.model) == bare


def test_another_is_deleted_while_one_is_merged():
    adapters = together("dora", "lora")
    expected = answers(adapters.model)
    adapters.merge()
    adapters.delete("dora")
    adapters.unmerge()
    assert (adapters.names, adapters.active) == (["lora"], "lora")
    assert torch.equal(answers(adapters.model), expected)


@pytest.mark.parametrize("kinds", [(), ("lora",)])
def test_with_none_active_there_is_nothing_to_merge(kinds):
    adapters = together(*kinds) if kinds else AdapterSet(qwen2())
    adapters.activate(None)
    before = everything(adapters)
    with pytest.raises(ValueError, match="no adapter is active"):
        adapters.merge()
    assert everything(adapters) == before


@pytest.mark.parametrize("kind", ["prompts", "prefix"])
def test_prompts_are_not_merged_and_nothing_changes(kind):
    adapters = together("lora", kind)
    before = everything(adapters)
    with pytest.raises(ValueError, match="cannot be merged.*Keep the base"):
        adapters.merge()
    assert everything(adapters) == before
    adapters.activate("lora")  # it is not taken for merged
    adapters.merge()
    adapters.unmerge()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_one_end_of_tied_weights_is_not_merged_and_nothing_changes(target):
    adapters = AdapterSet(llama_tied())
    adapters.add("a", LoRA(rank=2, targets=["q_proj", target]), seed=0)
    shake(adapters.model)
    before, expected = everything(adapters), logits(adapters.model)
    with pytest.raises(ValueError, match="tied"):
        adapters.merge()
    assert everything(adapters) == before
    assert torch.equal(logits(adapters.model), expected)
    adapters.activate(None)
    assert torch.equal(logits(adapters.model), logits(llama_tied()))


def test_rows_at_both_ends_of_a_tie_are_merged_and_unmerged():
    adapters = AdapterSet(llama_tied())
    adapters.add("rows", LoRA(rank=2, new_tokens=["<a>", 9]), seed=0, tokenizer=words())
    model = shake(adapters.model)
    before, expected = bits(model), answers(model)
    for _ in range(3):
        adapters.merge()
        assert model.lm_head.weight is model.model.embed_tokens.weight
        close(answers(model), expected, 1e-4)
        adapters.unmerge()
        assert bits(model) == before
        assert torch.equal(answers(model), expected)
    adapters.activate(None)
    assert snapshot(model)["state"] == snapshot(llama_tied())["state"]


def test_the_mode_may_change_while_merged():
    adapters = together("lora")
    adapters.model.train()
    adapters.merge()
    adapters.model.eval()
    adapters.unmerge()
    assert torch.equal(answers(adapters.model), answers(alone("lora")))


def test_a_copy_of_a_merged_set_is_unmerged_by_itself():
    adapters = together("dora", "lora")
    adapters.merge()
    other = copy.deepcopy(adapters)
    merged = logits(adapters.model)
    other.unmerge()
    assert torch.equal(answers(other.model), answers(alone("lora")))
    assert torch.equal(logits(adapters.model), merged)
    adapters.unmerge()
    assert torch.equal(answers(adapters.model), answers(alone("lora")))


def test_training_goes_on_after_unmerging():
    adapters, own = together("dora", "lora"), alone("lora")
    model = adapters.model
    ours, theirs = optimizer_of(model), optimizer_of(own)
    train(model, ours)
    adapters.merge()
    logits(model)
    adapters.unmerge()
    train(model, ours, seed=2)
    train(own, theirs)
    train(own, theirs, seed=2)
    assert torch.equal(answers(model), answers(own))


def test_the_active_one_is_exported_and_the_set_goes_on(tmp_path):
    adapters = together("dora", "lora")
    adapters.activate("dora")
    before = everything(adapters)
    folder = export_merged(adapters.model, tmp_path)
    assert everything(adapters) == before
    stored = load_file(folder / "model.safetensors")
    merged = merge(alone("dora")).state_dict()
    assert stored.keys() == merged.keys()
    assert all(torch.equal(stored[name], value) for name, value in merged.items())
