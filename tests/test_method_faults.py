"""Faults that methods once had: each of these went through in silence, or left half of its work."""

import copy
import json
import resource
import time

import pytest
import torch
from torch import nn

from lit_adapters import (
    AdapterCheckpoint,
    AdapterFineTuneModule,
    DoRA,
    FullFineTuning,
    Gaussian,
    InitAdapters,
    LLaMAAdapter,
    LoRA,
    LoRAGA,
    MiLoRA,
    OLoRA,
    PiSSA,
    PrefixTuning,
    attach,
    check_adapters_fire,
    export_peft,
    initialise,
    load_adapter,
    merge,
    save_adapter,
    start_from_text,
)
from lit_adapters.attachment import adapted_layers
from lit_adapters.optim import hold_ratios, parameter_groups
from lit_adapters.saved_settings import spec_from_plain, spec_to_plain
from tests.data.word_tokenizer import word_tokenizer
from tests.models import batch, llama, llama_tied, logits, mistral, shake, snapshot
from tests.test_checkpoint import Batches, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:.*Be aware that when using `ckpt_path`"),
]


def kind(thing):
    """What a case is called."""
    return type(thing).__name__


CONFIG, EXTRA = "adapter_config.json", "lit_adapters.json"


def read_json(file):
    return json.loads(file.read_text())


def edit(file, **fields):
    """Change fields of a JSON file; None removes one."""
    content = {**read_json(file), **fields}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def refused(act, model, match):
    """``act`` raises ValueError in these words and leaves ``model`` as it was."""
    before = snapshot(model)
    with pytest.raises(ValueError, match=match) as caught:
        act()
    assert snapshot(model) == before
    return str(caught.value)


# --- weights that come after the adapter ---------------------------------------------------------

STARTS = {"kaiming": None, "pissa": PiSSA()}
each_start = pytest.mark.parametrize("start", STARTS)


@each_start
@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_a_model_adapted_on_the_meta_device_takes_the_weights_of_its_twin(method, start):
    twin = llama()
    attach(twin, method(rank=4), seed=0)
    if STARTS[start] is not None:
        initialise(twin, STARTS[start], seed=0)
    shake(twin, std=0.05)
    with torch.device("meta"):
        model = llama()
    attach(model, method(rank=4), seed=0)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)  # what the memory held before
    for name, buffer in twin.named_buffers():  # a rotary's: in no state_dict
        if "rotary" in name:
            model.get_buffer(name).copy_(buffer)
    model.load_state_dict(twin.state_dict())
    assert torch.equal(logits(model), logits(twin))
    assert not torch.equal(logits(model), logits(llama()))
    merged = merge(copy.deepcopy(model))
    assert (logits(merged) - logits(model)).abs().max() < 1e-4


@each_start
@pytest.mark.parametrize("whole", [True, False])
def test_dora_notices_base_weights_that_are_loaded_later(start, whole):
    model, other = llama(), llama(seed=5)
    attach(model, DoRA(rank=4), seed=0)
    if STARTS[start] is not None:
        initialise(model, STARTS[start], seed=0)
    shake(model, std=0.05)
    before = logits(model)  # the old lengths of rows were in use
    if whole:
        model.load_state_dict(other.state_dict(), strict=False)
    else:
        layer = model.model.layers[0].mlp.down_proj
        layer.load_state_dict(other.model.layers[0].mlp.down_proj.state_dict(), strict=False)
    found = logits(model)
    assert (found - before).abs().max() > 0.1
    assert (logits(merge(copy.deepcopy(model))) - found).abs().max() < 1e-4


# --- folders of the base's own weights -----------------------------------------------------------


def full_folder(folder, build=llama, **settings):
    model = build()
    attach(model, FullFineTuning(**settings))
    save_adapter(shake(model, std=0.05), folder)
    return model


def test_one_end_of_a_tied_pair_is_not_loaded(tmp_path):
    full_folder(tmp_path, targets=["lm_head"])
    model = llama_tied()
    act = lambda: load_adapter(model, tmp_path, check_base=False)  # noqa: E731
    refused(act, model, "'lm_head'.*tied")


@pytest.mark.parametrize("lost", ["file", "fingerprint"])
def test_weights_of_an_unknown_base_are_not_written_into_this_one(lost, tmp_path):
    trained = full_folder(tmp_path)
    if lost == "file":
        (tmp_path / EXTRA).unlink()
    else:
        edit(tmp_path / EXTRA, base_fingerprint=None)
    model = llama()
    said = refused(lambda: load_adapter(model, tmp_path), model, "check_base=False")
    assert str(tmp_path) in said
    load_adapter(model, tmp_path, check_base=False)
    assert torch.equal(logits(model), logits(trained))
    assert not torch.equal(logits(model), logits(llama()))


# --- sizes that no file holds --------------------------------------------------------------------

SIZED = {
    "PREFIX_TUNING": (PrefixTuning(length=3), "num_virtual_tokens"),
    "LIT_PREFIX": (PrefixTuning(length=3, layers=[0]), "num_virtual_tokens"),
    "ADAPTION_PROMPT": (LLaMAAdapter(3, 2, gate="scalar"), "adapter_len"),
    "LIT_LLAMA_ADAPTER": (LLaMAAdapter(3, 2), "adapter_len"),
}


@pytest.mark.parametrize("size", [10**6, 10**9, 10**13, 10**30])
@pytest.mark.parametrize("layout", SIZED)
def test_an_absurd_size_is_refused_before_memory_is_taken(layout, size, tmp_path):
    spec, field = SIZED[layout]
    model = llama()
    attach(model, spec, seed=0)
    save_adapter(model, tmp_path)
    assert read_json(tmp_path / CONFIG)["peft_type"] == layout
    edit(tmp_path / CONFIG, **{field: size})
    bare = llama()
    whole = snapshot(bare)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(ValueError, match=str(tmp_path)) as caught:
        load_adapter(bare, tmp_path)
    assert time.perf_counter() - begun < 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB on Linux
    assert grown < 100_000
    assert "\n" not in str(caught.value)
    assert snapshot(bare) == whole


@pytest.mark.parametrize("layout", SIZED)
def test_the_size_of_the_file_is_accepted(layout, tmp_path):
    spec, _ = SIZED[layout]
    model = llama()
    attach(model, spec, seed=0)
    save_adapter(shake(model), tmp_path)
    fresh = llama()
    load_adapter(fresh, tmp_path)
    assert (logits(fresh) - logits(model)).abs().max() <= 1e-6


# --- a start from text ---------------------------------------------------------------------------

TEXT = "a b c d e f"


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_text_without_a_tokenizer_is_refused(mode):
    model = getattr(llama(), mode)()
    spec = PrefixTuning(length=4, text=TEXT)
    refused(lambda: attach(model, spec), model, "start_from_text|tokenizer=")


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_text_that_is_too_short_leaves_the_model_bare(mode):
    model = getattr(llama(), mode)()
    spec = PrefixTuning(length=9, text="a b")
    act = lambda: attach(model, spec, tokenizer=word_tokenizer())  # noqa: E731
    refused(act, model, "longer text or a smaller length")


def test_a_text_with_a_tokenizer_is_start_from_text():
    tokenizer, model, other = word_tokenizer(), llama(), llama()
    attach(model, PrefixTuning(length=4, text=TEXT), seed=0, tokenizer=tokenizer)
    attach(other, PrefixTuning(length=4), seed=0)
    random = logits(other)
    start_from_text(other, tokenizer(TEXT, return_tensors="pt")["input_ids"])
    assert torch.equal(logits(model), logits(other))
    assert not torch.equal(logits(model), random)


# --- a start that fails midway -------------------------------------------------------------------


@pytest.mark.parametrize("earlier", [None, OLoRA(), Gaussian()], ids=["fresh", "pinned", "plain"])
@pytest.mark.parametrize("start", [PiSSA(), MiLoRA()], ids=["pissa", "milora"])
@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_a_start_that_fails_midway_changes_no_adapter(method, start, earlier, tmp_path):
    model = llama()
    attach(model, method(rank=4, alpha_pattern={"1.mlp.gate_proj": 0}), seed=0)
    if earlier is not None:
        initialise(model, earlier, seed=1)
    before, started = snapshot(model), []
    save_adapter(model, tmp_path / "before")
    with pytest.raises(ValueError, match=r"1\.mlp\.gate_proj"):
        initialise(model, start, seed=0, progress=started.append)
    assert len(started) > 1  # some had their new start
    assert snapshot(model)["state"] == before["state"]
    pinned = {adapter.pinned for *_, adapter in adapted_layers(model)}
    assert pinned == {isinstance(earlier, OLoRA)}
    save_adapter(model, tmp_path / "after")
    for name in (CONFIG, EXTRA):
        assert read_json(tmp_path / "after" / name) == read_json(tmp_path / "before" / name)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("pinned", [False, True])
def test_a_start_that_is_interrupted_changes_no_adapter(count, pinned):
    """By Ctrl-C, in the backward pass (one batch), after it (two) or without one."""
    model = llama()
    attach(model, LoRA(rank=4), seed=0)
    if pinned:
        initialise(model, OLoRA())
    started, before = [], snapshot(model)

    def interrupt(name):
        started.append(name)
        if len(started) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        initialise(
            model,
            LoRAGA() if count else PiSSA(),
            batches=[batch(seed=number) for number in range(count)],
            progress=interrupt,
        )
    after = snapshot(model)
    assert after["state"] == before["state"]
    assert after["requires_grad"] == before["requires_grad"]
    names = {adapter.start_name for *_, adapter in adapted_layers(model)}
    assert names == {repr(OLoRA()) if pinned else None}
    assert torch.isfinite(model.train()(**batch()).loss)


# --- what PEFT cannot say ------------------------------------------------------------------------


def circular():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(6, 8, 3, padding=1, padding_mode="circular"))


OWN = {
    "LIT_FULL": (llama, FullFineTuning()),
    "LIT_LLAMA_ADAPTER": (llama, LLaMAAdapter(3, 2)),
    "LIT_PREFIX": (mistral, PrefixTuning(length=3)),
    "LIT_LORA": (circular, LoRA(rank=2, targets=["0"])),
}


@torch.no_grad()
def output(model):
    if isinstance(model, nn.Sequential):
        return model(torch.arange(60.0).view(1, 6, 10).sin())
    return logits(model)


@pytest.mark.parametrize("layout", OWN)
def test_what_peft_cannot_say_is_not_exported_to_it(layout, tmp_path):
    build, spec = OWN[layout]
    model = build()
    attach(model, spec, seed=0)
    shake(model)
    exported = tmp_path / "peft"
    refused(lambda: export_peft(model, exported), model, "PEFT")
    assert not exported.exists()
    save_adapter(model, tmp_path / "ours")
    assert read_json(tmp_path / "ours" / CONFIG)["peft_type"] == layout
    fresh = build()
    load_adapter(fresh, tmp_path / "ours")
    assert torch.equal(output(fresh), output(model))
    assert not torch.equal(output(fresh), output(build()))


# --- the record of the start ---------------------------------------------------------------------


def recorded(folder):
    return read_json(folder / EXTRA)["initialiser"]


@pytest.mark.parametrize("start", [PiSSA(niter=2), OLoRA(), Gaussian()], ids=kind)
@pytest.mark.parametrize("held", [False, True], ids=["bare", "adapted"])
def test_the_name_of_the_start_survives_loading(start, held, tmp_path):
    model = llama()
    attach(model, LoRA(rank=4), seed=0)
    initialise(model, start, seed=0)
    save_adapter(model, tmp_path / "one")
    assert recorded(tmp_path / "one") == repr(start)
    fresh = llama()
    if held:  # by adapters of the same layout and another start, whose values are replaced
        attach(fresh, LoRA(rank=4), seed=0)
        if start.pins_origin:
            initialise(fresh, MiLoRA(), seed=0)
    load_adapter(fresh, tmp_path / "one")
    save_adapter(fresh, tmp_path / "two")
    assert recorded(tmp_path / "two") == repr(start)


def test_the_name_of_the_start_survives_a_resume(tmp_path):
    def fit(steps, resume=None):
        module = AdapterFineTuneModule(llama(), LoRA(rank=4))
        callbacks = [AdapterCheckpoint(tmp_path / str(steps)), InitAdapters(PiSSA(niter=2))]
        trainer = make_trainer(tmp_path, *callbacks, max_steps=steps, max_epochs=9)
        trainer.fit(module, Batches(2), ckpt_path=resume)

    fit(2)
    fit(4, resume=tmp_path / "2" / "last.ckpt")
    for steps in (2, 4):
        assert recorded(tmp_path / str(steps) / "adapter") == repr(PiSSA(niter=2))


def test_an_origin_of_an_unknown_kind_is_refused(tmp_path):
    model = llama()
    attach(model, LoRA(rank=4), seed=0)
    initialise(model, PiSSA(), seed=0)
    save_adapter(model, tmp_path)
    edit(tmp_path / EXTRA, origin="first half of the rank")
    bare = llama()
    refused(lambda: load_adapter(bare, tmp_path), bare, "first half of the rank")


# --- learning rates that mean nothing ------------------------------------------------------------

LORA = LoRA(rank=4)
EMBEDDING = LoRA(rank=4, targets=["embed_tokens", "q_proj"])
MEANINGLESS = {
    "ratio-full": (FullFineTuning(), {"lora_plus_ratio": 16.0}, 1e-3, "lora_B"),
    "ratio-prompts": (LLaMAAdapter(3, 2), {"lora_plus_ratio": 0.5}, 1e-3, "lora_B"),
    "ratio-prefix": (PrefixTuning(length=3), {"lora_plus_ratio": 16.0}, 1e-3, "lora_B"),
    "no-embedding": (LORA, {"embedding_lr": 1e-4}, 1e-3, "embedding"),
    "base-rate-0": (EMBEDDING, {"embedding_lr": 1e-4}, 0.0, "embedding_lr.*0"),
}


def rated(spec, settings, lr):
    model = llama()
    attach(model, spec, seed=0)
    ratio, embedding = settings.get("lora_plus_ratio", 1.0), settings.get("embedding_lr")
    optimizer = torch.optim.SGD(parameter_groups(model, ratio, embedding), lr=lr)
    hold_ratios(optimizer)
    return optimizer


@pytest.mark.parametrize("case", MEANINGLESS)
def test_rates_that_mean_nothing_are_refused(case, tmp_path):
    spec, settings, lr, match = MEANINGLESS[case]
    with pytest.raises(ValueError, match=match):
        rated(spec, settings, lr)
    optimizer = lambda groups: torch.optim.SGD(groups, lr=lr)  # noqa: E731
    module = AdapterFineTuneModule(llama(), spec, optimizer=optimizer, **settings)
    trainer = make_trainer(tmp_path, enable_checkpointing=False)
    with pytest.raises(ValueError, match=match):
        trainer.fit(module, Batches(1))


def test_the_same_rates_where_they_mean_something_are_accepted():
    found = rated(EMBEDDING, {"lora_plus_ratio": 16.0, "embedding_lr": 1e-4}, 1e-3).param_groups
    assert sorted(group["lr"] for group in found) == pytest.approx([1e-4, 1e-3, 16e-3])
    assert {group["lr"] for group in rated(FullFineTuning(), {}, 0.0).param_groups} == {0.0}


# --- layers that are not ordinary ----------------------------------------------------------------


class Attending(nn.Module):
    """Torch's attention reads ``out_proj.weight`` and never calls ``out_proj``."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0])


def test_weights_that_are_trained_themselves_need_no_call():
    model, x = Attending(), torch.randn(2, 4, 8)
    attach(model, FullFineTuning())
    check_adapters_fire(model, {"x": x})
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def with_a_child():
    model = llama()
    model.model.layers[1].mlp.down_proj.add_module("adapter", nn.Linear(4, 4))
    return model


@pytest.mark.parametrize("spec", [LoRA(rank=4), DoRA(rank=4), FullFineTuning()], ids=kind)
def test_a_layer_with_an_adapter_of_its_own_is_refused_by_name(spec, tmp_path):
    model = with_a_child()
    name = r"model\.layers\.1\.mlp\.down_proj"
    refused(lambda: attach(model, spec), model, name)
    donor = llama()
    attach(donor, spec, seed=0)
    save_adapter(donor, tmp_path)
    refused(lambda: load_adapter(model, tmp_path, check_base=False), model, name)
    beside = LoRA(rank=4, exclude=["1.mlp.down_proj"])
    assert "model.layers.1.mlp.down_proj" not in attach(model, beside)


@pytest.mark.parametrize("method", [LoRA, DoRA])
@pytest.mark.parametrize("start", [PiSSA(), OLoRA(), MiLoRA()], ids=kind)
def test_a_start_that_reads_weights_is_refused_where_there_are_none(method, start):
    with torch.device("meta"):
        model = llama()
    attach(model, method(rank=4))
    with pytest.raises(ValueError, match="q_proj.*meta device"):
        initialise(model, start)
    assert not any(adapter.pinned for *_, adapter in adapted_layers(model))


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", [LoRA(), DoRA(), FullFineTuning(), LLaMAAdapter(), PrefixTuning()], ids=kind
)
def test_an_unknown_field_of_saved_settings_is_named(spec):
    plain = spec_to_plain(spec)
    assert spec_from_plain(plain) == spec
    plain["init_args"]["colour"] = 3
    with pytest.raises(ValueError, match="colour"):
        spec_from_plain(plain)


@pytest.mark.parametrize("text", [5, ["a"], b"a", True])
def test_a_text_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="text must be"):
        PrefixTuning(text=text)


@pytest.mark.parametrize(("precision", "warns"), [("bf16-true", True), ("bf16-mixed", False)])
def test_full_fine_tuning_in_bf16_says_that_small_steps_are_lost(precision, warns, tmp_path):
    module = AdapterFineTuneModule(llama(), FullFineTuning())
    trainer = make_trainer(tmp_path, enable_checkpointing=False, precision=precision)
    if not warns:
        trainer.fit(module, Batches(1))  # a warning would be an error
        return
    with pytest.warns(UserWarning, match="bf16|bfloat16") as caught:
        trainer.fit(module, Batches(1))
    assert any("lost" in str(warning.message) for warning in caught)


def test_adapters_in_bf16_precision_are_fp32_and_warn_of_nothing(tmp_path):
    module = AdapterFineTuneModule(llama(), LoRA(rank=4))
    trainer = make_trainer(tmp_path, enable_checkpointing=False, precision="bf16-true")
    trainer.fit(module, Batches(1))
