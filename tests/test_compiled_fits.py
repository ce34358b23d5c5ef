"""Compiled layers within whole fits: every method and setting trains as it does uncompiled."""

import json
import logging

import pytest
import torch
from lightning.pytorch import Callback

import lit_adapters.compilation
from lit_adapters import (
    AdapterCheckpoint,
    DoRA,
    FullFineTuning,
    GaLore,
    InitAdapters,
    InstructionDataModule,
    LLaMAAdapter,
    LoRA,
    PiSSA,
    PrefixTuning,
)
from lit_adapters.adapters import shared_input
from lit_adapters.blocks import gated_mlp, rms_norm
from lit_adapters.callbacks import SampleGenerations
from lit_adapters.data import collate
from lit_adapters.weights import branch
from tests.data.word_tokenizer import word_tokenizer
from tests.models import PAD, llama, qwen2, trainable
from tests.test_compilation import _nothing_compiled as _nothing_compiled
from tests.test_compilation import graphs, of_lengths
from tests.test_compilation import pytestmark as pytestmark
from tests.test_module import Batches, adamw, examples, fit, make, make_trainer


class Steps(Callback):
    """The loss of each step, and how many graphs there are after each batch."""

    def __init__(self):
        self.loss, self.graphs = [], []

    def on_train_batch_end(self, trainer, *_):
        if len(self.loss) < trainer.global_step:
            self.loss.append(trainer.callback_metrics["train/loss"].item())
        self.graphs.append(graphs())


def packed(count, seed=0):
    """Packed rows, all of other lengths."""
    rows = examples(4 * count, seed)
    return Batches(collate(rows[i : i + 4], PAD, packed=True) for i in range(0, 4 * count, 4))


def galore():
    return GaLore(rank=4, update_gap=2, scale=1.0)


FULL = {"adapter": FullFineTuning()}
TWO = {"trainer": {"accumulate_grad_batches": 2}}
FITS = {  # what is not said is LoRA on one batch of six equal ones
    "lora": {},
    "dora": {"adapter": DoRA(rank=4)},
    "dropout": {"adapter": LoRA(rank=4, dropout=0.3)},
    "pissa": {"callbacks": lambda: [InitAdapters(PiSSA())]},
    "prefix": {"adapter": PrefixTuning(length=3)},
    "llama-adapter": {"adapter": LLaMAAdapter(prompt_length=3, top_layers=1)},
    "full": FULL,
    "galore": {**FULL, "callbacks": lambda: [galore()]},
    "galore, two batches a step": {**FULL, **TWO, "callbacks": lambda: [galore()]},
    "two batches a step": TWO,
    "recomputed": {"settings": {"gradient_checkpointing": "full"}},
    "every second layer recomputed": {"settings": {"gradient_checkpointing": 2}},
    "full, recomputed": {**FULL, "settings": {"gradient_checkpointing": "full"}},
    # Not those of keys: no loss depends on them, so that Adam would follow what is rounded.
    "biases": {
        "adapter": LoRA(rank=4, bias="adapter", targets=["q_proj", "v_proj"]),
        "base": qwen2,
    },
    "embeddings": {"adapter": LoRA(rank=4, targets=["embed_tokens", "q_proj", "lm_head"])},
    "trained copies": {"adapter": LoRA(rank=4, modules_to_save=["layers.0.mlp.up_proj"])},
    "bf16-mixed": {"trainer": {"precision": "bf16-mixed"}},
    "bf16-mixed, dora": {"adapter": DoRA(rank=4), "trainer": {"precision": "bf16-mixed"}},
    "bf16-true": {"trainer": {"precision": "bf16-true"}},
}


def run(folder, backend, case, train, validation=None, **options):
    """Return losses and graphs by step, and what was trained."""
    torch.compiler.reset()
    torch.manual_seed(0)
    settings = {"optimizer": adamw, **case.get("settings", {})}
    if "adapter" in case:
        settings["adapter"] = case["adapter"]
    module = make(case.get("base", llama)(), compile=backend, **settings)
    steps = Steps()
    callbacks = [steps, *case.get("callbacks", list)()]
    told = {"max_epochs": -1, "max_steps": 6, **case.get("trainer", {}), **options}
    before = graphs()
    fit(folder, module, train, validation, callbacks=callbacks, **told)
    steps.graphs = [count - before for count in steps.graphs]
    assert len(steps.loss) == told["max_steps"]
    return steps, trainable(module.model)


def assert_equal_runs(found, expected, rtol=1e-4, atol=1e-4):
    """To a hundredth of a step of Adam, which enlarges what both round in an order of their own."""
    (steps, trained), (other, wanted) = found, expected
    assert steps.loss == pytest.approx(other.loss, rel=rtol)
    assert trained.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(trained[name], tensor, rtol=rtol, atol=atol, msg=name)


@pytest.fixture
def stepwise(monkeypatch):
    """Plain layers compute one operation after the other, as compiled ones do: Adam shows it."""
    for place in (branch, gated_mlp, rms_norm, shared_input):
        monkeypatch.setattr(place, "is_transformed", lambda: True)


@pytest.mark.parametrize("name", FITS)
def test_a_fit_is_that_of_the_plain_model_and_compiles_in_its_first_step_alone(
    tmp_path, name, stepwise
):
    plain, compiled = (
        run(tmp_path, backend, FITS[name], of_lengths([12] * 6)) for backend in (False, "eager")
    )
    assert_equal_runs(compiled, plain, atol=1e-5)
    counts = compiled[0].graphs
    assert 1 <= counts[0] == counts[-1] <= 2
    assert plain[0].graphs[-1] == 0


CHANGING = {
    "padded": ({}, lambda: of_lengths(range(5, 35), padded=True), 4),
    "unpadded": ({}, lambda: of_lengths(range(5, 35)), 4),
    "packed": ({}, lambda: packed(30), 14),
    "packed, full": (FULL, lambda: packed(30), 8),
}


@pytest.mark.parametrize("kind", CHANGING)
def test_thirty_lengths_are_compiled_in_the_first_two_steps(tmp_path, kind):
    """Once for one length and once for all; packed rows in parts around their attention."""
    case, batches, most = CHANGING[kind]
    plain, compiled = (
        run(tmp_path, backend, case, batches(), max_steps=30) for backend in (False, "eager")
    )
    assert_equal_runs(compiled, plain, rtol=1e-3)
    counts = compiled[0].graphs
    assert counts[1] == counts[-1] <= most


def test_validation_is_compiled_beside_training(tmp_path):
    plain, compiled = (
        run(
            *(tmp_path, backend, {}, of_lengths([12] * 6), of_lengths([9, 9])),
            val_check_interval=2,
            max_steps=12,
        )
        for backend in (False, "eager")
    )
    assert_equal_runs(compiled, plain)
    counts = compiled[0].graphs
    assert counts[2] == counts[-1] <= 6


def test_answers_within_a_fit_compile_nothing(tmp_path):
    """And are those of the plain model: before, at validations and after."""
    file = tmp_path / "records.json"
    file.write_text(json.dumps([{"prompt": f"a {w}", "completion": "b c d"} for w in "abcdefghij"]))
    found, answers, made = [], [], []
    for backend, limit in ((False, 2), ("eager", 2), ("eager", 0)):
        torch.compiler.reset()
        torch.manual_seed(0)
        folder = tmp_path / f"{backend}-{limit}"
        words = word_tokenizer()
        settings = {"batching": "padded", "cache_dir": None, "template": "none"}
        data = InstructionDataModule(str(file), tokenizer=words, val_size=2, **settings)
        module = make(compile=backend, optimizer=adamw, tokenizer=words)
        steps, before = Steps(), graphs()
        sampled = SampleGenerations(limit=limit, max_new_tokens=4)
        trainer = make_trainer(folder, callbacks=[steps, sampled], max_epochs=3)
        trainer.fit(module, datamodule=data)
        found.append((steps, trainable(module.model)))
        answers.append([file.read_text() for file in folder.rglob("samples.jsonl")])
        made.append(graphs() - before)
    assert_equal_runs(found[1], found[0])
    assert answers[0] == answers[1] != []
    assert made[0] == 0 < made[1] == made[2]


@pytest.mark.parametrize("adapter", [LoRA(rank=4), DoRA(rank=4)], ids=["lora", "dora"])
def test_a_resumed_fit_goes_on_as_the_plain_one(tmp_path, adapter):
    found = []
    for backend in (False, "eager"):
        folder = tmp_path / str(backend)
        case = {
            "adapter": adapter,
            "callbacks": lambda folder=folder: [AdapterCheckpoint(folder, monitor=None)],
        }
        batches = of_lengths([12] * 3)
        run(folder, backend, case, batches, max_steps=3, enable_checkpointing=True)
        torch.compiler.reset()
        module = make(compile=backend, optimizer=adamw, adapter=adapter)
        steps, before = Steps(), graphs()
        keep = AdapterCheckpoint(folder / "resumed", monitor=None)
        trainer = make_trainer(
            folder, callbacks=[steps, keep], max_epochs=-1, max_steps=6, enable_checkpointing=True
        )
        trainer.fit(module, batches, of_lengths([9, 9]), ckpt_path=folder / "last.ckpt")
        found.append((steps, trainable(module.model)))
    assert len(steps.loss) == 3
    assert_equal_runs(*reversed(found))
    assert steps.graphs[0] - before == steps.graphs[-1] - before <= 4


@pytest.mark.parametrize("adapter", [LoRA(rank=4), DoRA(rank=4)], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base(tmp_path, kind, adapter):
    pytest.importorskip("bitsandbytes")
    llama(intermediate_size=64).save_pretrained(tmp_path / "base")
    case = {
        "adapter": adapter,
        "base": lambda: str(tmp_path / "base"),
        "settings": {"quantization": kind, "tokenizer": word_tokenizer()},
    }
    plain, compiled = (
        run(tmp_path, backend, case, of_lengths([12] * 6)) for backend in (False, "eager")
    )
    assert_equal_runs(compiled, plain)
    assert compiled[0].graphs == [2] * 6


def test_beyond_the_most_versions_torch_says_that_it_no_longer_compiles(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(lit_adapters.compilation, "MOST_VERSIONS", 2)
    with caplog.at_level(logging.WARNING):
        plain, compiled = (
            run(tmp_path, backend, {}, of_lengths([12, 9, 13] * 2)) for backend in (False, "eager")
        )
    assert_equal_runs(compiled, plain)
    assert compiled[0].graphs[-1] == 2
    assert "recompile_limit" in caplog.text
