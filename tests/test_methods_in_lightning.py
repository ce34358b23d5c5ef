"""Every method through the same fit, checkpoint, resume, validation, folder and command line."""

import csv
import json
import string
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from transformers import AutoModelForCausalLM

from lit_adapters import (
    AdapterCheckpoint,
    AdapterFineTuneModule,
    DoRA,
    FullFineTuning,
    InitAdapters,
    InstructionDataModule,
    LLaMAAdapter,
    LoRA,
    LoRAGA,
    PiSSA,
    PrefixTuning,
    load_adapter,
)
from lit_adapters.__main__ import console, main
from lit_adapters.base_model import load_base
from tests.data.word_tokenizer import word_tokenizer
from tests.models import llama, llama_tied, logits
from tests.test_checkpoint import Batches, make_trainer, read

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Experiment logs directory"),
    pytest.mark.filterwarnings("ignore:.*Be aware that when using `ckpt_path`"),
]

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Method:
    """A method as a fit uses it; ``leaves`` are the last parts of what a checkpoint holds."""

    spec: object
    leaves: set = field(default_factory=set)
    start: object = None
    build: object = llama
    lr: float = 1e-2
    tolerance: float = 0.0

    def fit(self, folder, data, steps, *, resume=None, precision="32-true"):
        """A new module, trained to ``steps`` optimizer steps, of five batches in an epoch."""
        seed_everything(0, verbose=False)
        module = self.module()
        callbacks = [AdapterCheckpoint(folder)]
        if self.start is not None:
            callbacks.append(InitAdapters(self.start, batches=2))
        settings = {"max_steps": steps, "max_epochs": 9, "limit_val_batches": 0}
        trainer = make_trainer(folder, *callbacks, precision=precision, **settings)
        trainer.fit(module, data(), ckpt_path=resume)
        assert trainer.global_step == steps
        assert trainer.num_training_batches == 5
        return module

    def module(self):
        return AdapterFineTuneModule(
            self.build(),
            self.spec,
            optimizer=lambda groups: torch.optim.AdamW(groups, lr=self.lr, weight_decay=0.1),
            lr_scheduler="constant",
            warmup=0.0,
        )


FACTORS = {"lora_A", "lora_B"}
ORIGIN = {"lora_A0", "lora_B0"}
METHODS = {
    "lora": Method(LoRA(rank=4, dropout=0.1), FACTORS),
    "dora": Method(DoRA(rank=4, dropout=0.1), FACTORS | {"magnitude"}),
    "pissa": Method(LoRA(rank=4, dropout=0.1), FACTORS | ORIGIN, PiSSA(niter=2)),
    "lora-ga": Method(LoRA(rank=4, dropout=0.1), FACTORS | ORIGIN, LoRAGA()),
    "llama-adapter": Method(LLaMAAdapter(prompt_length=3, top_layers=2), {"prompts", "gate"}),
    "prefix": Method(PrefixTuning(length=3), {"keys", "values"}, tolerance=1e-6),
    "full": Method(FullFineTuning(), lr=1e-3),
    "full-tied": Method(FullFineTuning(), lr=1e-3, build=llama_tied),
}


@pytest.fixture(scope="module", params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Builds the data module of a new process."""
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    letters = string.ascii_lowercase
    rows = [{"prompt": letters[i], "completion": " ".join(letters[: 2 + i % 7])} for i in range(24)]
    file.write_text("\n".join(map(json.dumps, rows)))
    settings = {"tokenizer": word_tokenizer(), "batch_size": 4, "val_size": 4}
    return lambda: InstructionDataModule(str(file), **settings)


@pytest.fixture(scope="module")
def fitted(method, data, tmp_path_factory):
    """A module after four steps, and the folder of its checkpoint."""
    folder = tmp_path_factory.mktemp("fit")
    return method.fit(folder, data, 4), folder


def same_state(found, expected):
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def moved(module, method):
    """Training changed the output: what is compared below is not the bare base."""
    return (logits(module.model.eval()) - logits(method.build())).abs().max() > 1e-3


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(method, fitted):
    module, folder = fitted
    assert moved(module, method)
    state = read(folder / "last.ckpt")["state_dict"]  # weights_only=True
    stock = {f"model.{name}" for name in method.build().state_dict()}
    if not method.leaves:
        assert state.keys() == stock
    else:
        assert {key.rpartition(".")[2] for key in state} == method.leaves
        assert all(".adapter." in key for key in state)
        assert not stock & state.keys()
    for key, value in state.items():
        assert torch.equal(module.state_dict()[key], value), key


def test_a_checkpoint_of_everything_holds_a_tied_weight_once(data, tmp_path):
    module = METHODS["full-tied"].fit(tmp_path, data, 1)
    weight = module.model.lm_head.weight.detach()
    assert module.model.model.embed_tokens.weight is module.model.lm_head.weight
    content = (tmp_path / "last.ckpt").read_bytes()
    assert content.count(weight.numpy().tobytes()) == 1
    folder = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert folder.count(weight.numpy().tobytes()) == 1


def test_a_resumed_run_ends_to_the_bit_where_an_unbroken_one_does(method, data, fitted, tmp_path):
    module, folder = fitted
    whole = method.fit(tmp_path / "whole", data, 8)
    second = method.fit(tmp_path / "second", data, 8, resume=folder / "last.ckpt")
    same_state(second, whole)
    assert not torch.equal(logits(whole.model.eval()), logits(module.model.eval()))
    assert torch.equal(logits(second.model.eval()), logits(whole.model.eval()))


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ["pissa", "full-tied"])
@pytest.mark.filterwarnings("ignore:.*bf16")  # full fine-tuning in bf16 says what is lost
def test_a_resumed_run_in_bf16_too(name, precision, data, tmp_path):
    method = METHODS[name]
    first = method.fit(tmp_path / "first", data, 4, precision=precision)
    whole = method.fit(tmp_path / "whole", data, 8, precision=precision)
    resume = tmp_path / "first" / "last.ckpt"
    second = method.fit(tmp_path / "second", data, 8, resume=resume, precision=precision)
    trained = {p.dtype for p in second.parameters() if p.requires_grad}
    rounded = name == "full-tied" and precision == "bf16-true"
    assert trained == {torch.bfloat16 if rounded else torch.float32}
    same_state(second, whole)
    assert any(
        not torch.equal(value, first.state_dict()[key]) for key, value in whole.state_dict().items()
    )


class Noting(Batches):
    """Keeps the batches that it handed out."""

    def __init__(self, count):
        super().__init__(count)
        self.handed = []

    def __iter__(self):
        for batch in super().__iter__():
            self.handed.append(batch["input_ids"].tolist())
            yield batch


def test_a_loader_that_keeps_its_position_goes_on_there(tmp_path):
    """Lightning gives it its state back; nothing of ours may come in between."""
    whole, first, second = (Noting(5) for _ in range(3))
    for batches, steps, resume in (
        (whole, 8, None),
        (first, 4, None),
        (second, 8, tmp_path / "4" / "last.ckpt"),
    ):
        callback = AdapterCheckpoint(tmp_path / str(steps))
        trainer = make_trainer(tmp_path, callback, max_steps=steps, max_epochs=9)
        trainer.fit(METHODS["lora"].module(), batches, ckpt_path=resume)
    assert len(first.handed) == 4
    assert first.handed + second.handed == whole.handed


def test_a_checkpoint_is_validated_on_a_fresh_module_without_its_start(method, fitted, tmp_path):
    module, folder = fitted

    def loss(module, ckpt_path=None):
        trainer = make_trainer(tmp_path)
        (found,) = trainer.validate(module, Batches(2), ckpt_path=ckpt_path, verbose=False)
        return found["val/loss"]

    expected = loss(module)
    assert loss(method.module(), folder / "last.ckpt") == expected
    assert loss(method.module()) != expected


def test_the_adapter_folder_computes_the_same_on_a_fresh_base(method, fitted):
    module, folder = fitted
    fresh = method.build()
    load_adapter(fresh, folder / "adapter")
    difference = (logits(fresh.eval()) - logits(module.model.eval())).abs().max()
    assert difference <= method.tolerance


# --- the command line ----------------------------------------------------------------------------

# By config: whether PEFT has a word for the method, and whether it can be folded into the base.
CHAINS = {
    "pissa": (True, True),
    "dora": (True, True),
    "prefix": (True, False),
    "llama_adapter": (False, False),
    "full": (False, True),
}


def run(*words, by=main):
    """The command line in this process, as if called with these words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lit_adapters", *map(str, words)])
        by()


def refused(*words):
    """What a person is told, which is one line and a hint."""
    with pytest.raises(SystemExit) as caught:
        run(*words, by=console)
    line, hint = str(caught.value).split("\n")
    assert line.startswith("error: ")
    assert hint.startswith("(LIT_ADAPTERS_TRACEBACK=1")
    return line


def last_values(root, column):
    """The last value that the newest run logged."""
    file = sorted(root.glob("lightning_logs/version_*/metrics.csv"))[-1]
    with file.open() as lines:
        return [float(row[column]) for row in csv.DictReader(lines) if row.get(column)][-1]


@torch.no_grad()
def scores(model):
    return model.eval()(torch.arange(5, 45).view(2, 20)).logits.float()


@pytest.mark.parametrize("name", CHAINS)
def test_a_method_goes_through_every_command(name, tmp_path, capsys):
    exports, merges = CHAINS[name]
    root = tmp_path / "runs"
    common = [
        *("--config", ROOT / "configs" / f"alpaca_{name}.yaml"),
        f"--trainer.default_root_dir={root}",
        *("--samples.limit=0", "--trainer.limit_val_batches=1", "--trainer.log_every_n_steps=1"),
    ]
    run("fit", *common, "--trainer.max_steps=3", "--data.train_limit=40")
    first = root / "lightning_logs" / "version_0" / "checkpoints"
    assert read(first / "last.ckpt")["global_step"] == 3

    resume = f"--ckpt_path={first / 'last.ckpt'}"
    run("fit", *common, "--trainer.max_steps=5", "--data.train_limit=40", resume)
    second = root / "lightning_logs" / "version_1" / "checkpoints"
    last = read(second / "last.ckpt")
    assert last["global_step"] == 5
    assert last["state_dict"].keys() == read(first / "last.ckpt")["state_dict"].keys()

    best = read(first / "best.ckpt")
    (score,) = [
        state["best_model_score"].item()
        for state in best["callbacks"].values()
        if "best_model_score" in state
    ]
    run("validate", *common, f"--ckpt_path={first / 'best.ckpt'}")
    assert last_values(root, "val/loss") == pytest.approx(score, rel=1e-6)

    folder = first / "adapter"
    capsys.readouterr()
    run(
        *("generate", "--adapter", folder, "--prompt", "hi", "--max_new_tokens", "3"),
        "--json=true",
    )
    row = json.loads(capsys.readouterr().out)
    assert row.keys() == {"instruction", "input", "answer"}
    assert row["instruction"] == "hi"

    adapted = load_base("tiny")
    load_adapter(adapted, folder)
    expected = scores(adapted)
    assert (expected - scores(load_base("tiny"))).abs().max() > 1e-3

    exported, merged = tmp_path / "peft", tmp_path / "merged"
    if exports:
        peft = pytest.importorskip("peft")
        run("export", "--adapter", folder, "--output", exported)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.PeftModel.from_pretrained(load_base("tiny"), exported)
            assert (scores(theirs) - expected).abs().max() <= 1e-4
    else:
        assert "PEFT" in refused("export", "--adapter", folder, "--output", exported)
        assert not exported.exists()
    if merges:
        run("merge", "--adapter", folder, "--output", merged)
        model = AutoModelForCausalLM.from_pretrained(merged)
        assert (scores(model) - expected).abs().max() <= 1e-4
    else:
        assert "cannot be merged" in refused("merge", "--adapter", folder, "--output", merged)
        assert not merged.exists()
