"""The estimate: counts against the tensors of a model that was trained, peaks against a profile."""

import gc
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import models
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from lit_adapters import (
    DoRA,
    FullFineTuning,
    GaLore,
    LoftQ,
    LoRA,
    PiSSA,
    QPiSSA,
    initialise,
)
from lit_adapters.__main__ import main
from lit_adapters.estimate import Rehearsal, Training, estimate, estimation, largest_batch
from lit_adapters.estimate.command import parse_size, sequences_of
from lit_adapters.estimate.estimation import peaks_of, summary
from lit_adapters.estimate.memory_trace import CATEGORIES, Peak
from lit_adapters.estimate.shapes import like
from lit_adapters.module import AdapterFineTuneModule
from lit_adapters.optim import GaLoreEngine, parameter_groups
from lit_adapters.targets import match_targets

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "alpaca_lora.yaml"
ROWS, LENGTH = 2, 12

pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a random Llama of six layers."""
    folder = tmp_path_factory.mktemp("base")
    # Rows of 64 and 96 elements: blocks of 64 and of 32 in 4 bits.
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6}
    models.llama(**sizes).save_pretrained(folder)
    return str(folder)


def training(base, precision="32-true", galore=None, initialiser=None, accumulate=1, **settings):
    module = AdapterFineTuneModule(base=base, **settings)
    return Training(
        module, ROWS, LENGTH, precision, accumulate, galore=galore, initialiser=initialiser
    )


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam_8bit(parameters):
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.optim.AdamW8bit(parameters, lr=1e-3, min_8bit_size=1024)


CASES = {
    "lora": {},
    "lora bf16": {"precision": "bf16-true"},
    "lora sgd": {"optimizer": sgd},
    "lora mixed": {"precision": "bf16-mixed"},
    "dora": {"adapter": DoRA(rank=4)},
    "pissa": {"adapter": LoRA(rank=4), "initialiser": PiSSA()},
    "full": {"adapter": FullFineTuning()},
    "full bf16": {"adapter": FullFineTuning(), "precision": "bf16-true"},
    "galore": {"adapter": FullFineTuning(), "galore": GaLore(rank=8)},
    "galore bf16": {
        "adapter": FullFineTuning(),
        "galore": GaLore(rank=8, side="full"),
        "precision": "bf16-true",
    },
    "galore 8 bit": {
        "adapter": FullFineTuning(),
        "galore": GaLore(rank=8),
        "optimizer": adam_8bit,
    },
    "nf4": {"quantization": "nf4"},
    "fp4 bf16": {"quantization": "fp4", "precision": "bf16-true"},
    "int8": {"quantization": "int8"},
    "nf4 dora": {"quantization": "nf4", "adapter": DoRA(rank=4)},
    "nf4 qpissa": {"quantization": "nf4", "initialiser": QPiSSA(iterations=1)},
    "nf4 loftq": {"quantization": "nf4", "initialiser": LoftQ(iterations=2)},
    "int8 qpissa": {"quantization": "int8", "initialiser": QPiSSA(iterations=1)},
}


def build(one: Training):
    """The same for real: module, optimizer and engine."""
    module = like(one.module)
    place = SimpleNamespace(root_device=torch.device("cpu"))
    module._trainer = SimpleNamespace(
        precision=one.precision, callbacks=[], strategy=place, lr_scheduler_configs=[]
    )
    module.configure_model()
    if one.initialiser is not None:
        initialise(module.model, one.initialiser)
    optimizer = module.optimizer_factory(parameter_groups(module.model))
    engine = None
    if one.galore is not None:
        names = match_targets(module.model, one.galore.selection)
        layers = {name: module.model.get_submodule(name) for name in names}
        engine = GaLoreEngine(layers, optimizer, one.galore.settings)
    return module, optimizer, engine


def step(module, optimizer, precision="32-true"):
    """What the trainer does with our module: no gradients of the last step in the forward."""
    optimizer.zero_grad()
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        loss = module.training_step(batch, 0)
    loss.backward()
    optimizer.step()


def tensors_of(module, optimizer, engine):
    """Bytes by kind, from the tensors that are there."""
    model = module.model
    named = [(n, p) for n, p in model.named_parameters() if not n.endswith(".galore")]
    ours = {n for n, p in named if p.requires_grad or ".adapter." in n}
    states = [
        getattr(m.weight, "quant_state", None) for m in model.modules() if hasattr(m, "weight")
    ]
    scales = [t for s in states if s for t in (s.absmax, s.state2.absmax, s.offset)]
    rows = [m.state.SCB for m in model.modules() if type(m).__name__ == "Linear8bitLt"]
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    for one in engine.projected.values() if engine else ():
        state += [one.shadow, *(basis for basis in one.projector or () if basis is not None)]
    return {
        "base": sum(p.nbytes for n, p in named if n not in ours)
        + sum(t.untyped_storage().nbytes() for t in scales + rows),
        "adapter": sum(p.nbytes for n, p in named if n in ours),
        "gradients": sum(p.grad.nbytes for p in stepped if p.grad is not None),
        # Once each: 8-bit states share their code tables.
        "optimizer": sum({id(t): t.nbytes for t in state}.values()),
    }


@pytest.mark.parametrize("name", CASES)
def test_what_can_be_counted_is_exact_to_the_byte(base, name):
    if "quantization" in CASES[name]:
        pytest.importorskip("bitsandbytes")
    one = training(base, **CASES[name])
    real = build(one)
    step(real[0], real[1], one.precision)
    expected = tensors_of(*real)
    found = estimate(Rehearsal(one)).largest
    assert {key: found[key] for key in expected} == expected


def test_the_embedded_base_is_counted_too():
    one = training("tiny")
    real = build(one)
    step(real[0], real[1])
    expected = tensors_of(*real)
    found = estimate(Rehearsal(one)).largest
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("name", ["lora", "dora", "full", "galore", "nf4", "lora mixed"])
def test_the_peak_is_that_of_the_allocator(base, name):
    one = training(base, **CASES[name])
    module, optimizer, engine = build(one)
    run = partial(step, module, optimizer, one.precision)
    before = tensors_of(module, optimizer, engine)  # no gradients, no state
    gc.collect()  # what others left would be freed while it is counted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
        for weight in engine.projected.values() if engine else ():
            weight.age = engine.settings.update_gap
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    measured = most + sum(before.values())
    assert estimate(Rehearsal(one)).peak == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"adapter": FullFineTuning(), "gradient_checkpointing": True},
        {"adapter": FullFineTuning(), "galore": GaLore(rank=8), "accumulate": 2},
    ],
    ids=["lora", "full, checkpointing", "galore, accumulating"],
)
def test_few_layers_tell_of_all(base, settings, monkeypatch):
    rehearsal = Rehearsal(training(base, **settings))
    few = peaks_of(rehearsal, ROWS)
    monkeypatch.setattr(estimation, "MORE", 6)
    every = peaks_of(rehearsal, ROWS)
    assert summary(few) == summary(every)
    assert few["step", ""].total == every["step", ""].total


def test_layers_that_differ_are_all_run(base):
    rehearsal = Rehearsal(training(base, adapter=LoRA(rank=4, layers=[0, 5])))
    assert estimation.repeated_layers(rehearsal.model)[1] == 6
    stack = rehearsal.model.model.layers
    estimate(rehearsal)
    assert len(stack) == 6


def test_checkpointing_and_half_a_batch_save_activations(base):
    plain, recomputed = (
        estimate(Rehearsal(training(base, gradient_checkpointing=on))) for on in (False, True)
    )
    half = estimate(Rehearsal(training(base)), 1)
    assert recomputed.largest["activations"] < 0.5 * plain.largest["activations"]
    assert half.largest["activations"] == pytest.approx(plain.largest["activations"] / 2, rel=0.01)
    for other in (recomputed, half):
        assert other.largest["optimizer"] == plain.largest["optimizer"]


@pytest.mark.parametrize("start", [1, 8, 50, 1000])
@pytest.mark.parametrize("memory", [80, 99, 100, 110, 199, 471, 10**4])
@pytest.mark.parametrize(
    ("farthest", "sizes"),
    [
        (100, lambda n: {"forward": 90 + 10 * n, "backward": 12 * n}),  # another part takes over
        (1, lambda n: {"forward": 5 * n, "step": 300}),
        (500, lambda n: {"forward": 70 + n * n}),  # far from a line
        (30, lambda n: {"loss": 60 + 50 * min(n, 7) + n}),  # until there is a chunk
    ],
)
def test_the_largest_batch_fits_and_the_next_does_not(farthest, sizes, memory, start):

    def peaks(n):
        parts = [dict.fromkeys(CATEGORIES, 0)] * 2
        return {part: Peak(total, *parts) for part, total in sizes(n).items()}

    found = largest_batch(peaks, memory, start, farthest)
    fitting = (n for n in range(10**4) if n and max(sizes(n).values()) <= memory)
    assert found == max(fitting, default=0)


@pytest.mark.parametrize("name", ["lora", "full", "galore", "nf4"])
def test_the_search_is_short_and_true_of_a_model(base, name):
    rehearsal = Rehearsal(training(base, **CASES[name]))
    asked = []

    def peaks(n):
        asked.append(n)
        return peaks_of(rehearsal, n)

    memory = estimate(rehearsal, 37).peak
    assert largest_batch(peaks, memory, ROWS, 100) == 37
    assert len(asked) <= 4
    rehearsal.module.model_loss.chunk = 32  # tokens: many chunks, as there are in large batches
    beyond = estimate(rehearsal, 370).peak
    asked.clear()
    assert largest_batch(peaks, beyond, ROWS, 80) == pytest.approx(370, rel=0.01)
    assert max(asked) == 80


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("24 gb", 24 * 10**9),
        ("16GiB", 16 * 2**30),
        ("1.5Ti", 3 * 2**39),
        ("80e9", 80 * 10**9),
        ("512M", 512 * 10**6),
        ("1000", 1000),
    ],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["lots", "", "GB", "24 apples", "-3GB", "0", "1.2.3GB"])
def test_what_is_no_size_is_named_with_an_example(text):
    with pytest.raises(ValueError, match="is no size; expected.*24GB"):
        parse_size(text)


def arguments(base, *more):
    small = ["--data.batch_size=2", "--data.max_length=12", "--model.adapter.rank=4"]
    return ["estimate", "--config", str(CONFIG), f"--model.base={base}", *small, *more]


@pytest.fixture
def config_only(tmp_path):
    """A base that is nothing but its config: no weights, no tokenizer."""
    models.llama(intermediate_size=64).config.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    return tmp_path


def test_the_config_alone_gives_the_method_and_its_alternatives(config_only, capsys, monkeypatch):
    monkeypatch.delattr(AutoModelForCausalLM, "from_pretrained")
    main(arguments(config_only, "--memory=1MB", "--json"))
    found = json.loads(capsys.readouterr().out)
    names = [column["name"] for column in found["alternatives"]]
    assert found["configured"]["name"] == "LoRA"
    assert names == ["half the batch", "full", "LoRA, nf4", "GaLore, rank 4", "checkpointing on"]
    assert found["fits"] is (found["configured"]["estimate"]["peak"] <= 10**6)
    for column in [found["configured"], *found["alternatives"]]:
        if column["problem"] is None:  # bitsandbytes may be absent
            assert sum(column["estimate"]["parts"].values()) == column["estimate"]["peak"]
            assert column["largest_batch"] >= 1
    assert {c["name"] for c in found["alternatives"] if c["problem"]} <= {"LoRA, nf4"}


def test_the_table_is_printed_from_outside(config_only):
    command = [sys.executable, "-m", "lit_adapters", *arguments(config_only, "--memory=10kB")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    for row in ("base", "gradients", "optimizer", "activations", "logits", "workspace", "peak"):
        assert row in done.stdout
    assert "does not fit: LoRA takes" in done.stdout
    assert "nothing here fits" in done.stdout.replace("\n", " ")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["estimate"], "nothing says which model is meant.*--config"),
        (["estimate", "--model.base=./nowhere"], "'./nowhere' is not a folder"),
        (["estimate", "--model.base=tiny", "--data.max_length=0"], "max_length 0 is below 1"),
        (["estimate", "--model.base=tiny", "--data.batch_size=0"], "batch_size 0 is below 1"),
        (["estimate", "--model.base=nobody/nothing"], "'nobody/nothing' could not be loaded"),
        (["estimate", "--model.base=tiny", "--memory=lots"], "memory 'lots' is no size"),
    ],
)
def test_wrong_input_is_told_in_a_line(given, message):
    with pytest.raises((ValueError, OSError), match=message):
        main(given)


def test_a_batch_that_is_filled_by_tokens_counts_as_its_sequences():
    data = SimpleNamespace(batch_size=8, batch_tokens=None, max_length=256)
    assert sequences_of(data) == 8
    data.batch_tokens = 4097
    assert sequences_of(data) == 17


def test_a_quantised_estimate_leaves_nothing_without_values_behind():
    functional = pytest.importorskip("bitsandbytes").functional
    kept = functional.name2qmap.pop("dynamic", None)
    try:
        estimate(Rehearsal(Training(AdapterFineTuneModule("tiny", quantization="nf4"), 1, 16)))
        assert not any(table.is_meta for table in functional.name2qmap.values())
    finally:
        functional.name2qmap.pop("dynamic", None)
        if kept is not None:
            functional.name2qmap["dynamic"] = kept
