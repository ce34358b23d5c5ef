"""`InitAdapters`: another start than the default, before the optimizer exists; not on a resume."""

import json
import random
import string
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import SumMetric

from lit_adapters import (
    AdapterCheckpoint,
    AdapterFineTuneModule,
    DoRA,
    FullFineTuning,
    Gaussian,
    InitAdapters,
    InstructionDataModule,
    Kaiming,
    LoRA,
    LoRAGA,
    PiSSA,
    attach,
    detach,
    initialise,
)
from lit_adapters.adapters import LoRAAdapter
from lit_adapters.attachment import adapted_layers
from lit_adapters.callbacks import init
from lit_adapters.data import collate
from lit_adapters.gradients import mean_loss
from lit_adapters.packed_rows import keep_rows_apart
from tests.data.word_tokenizer import word_tokenizer
from tests.models import gpt2, llama
from tests.test_module import Memory

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]

SPEC = LoRA(rank=3, targets=["c_attn", "c_fc"])
RECORDS = [
    {"prompt": string.ascii_lowercase[i % 26], "completion": " ".join("abcdefg"[: 1 + i % 7])}
    for i in range(30)
]


class Foreign(LightningModule):
    """A module that is not ours and builds its model in ``__init__``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 8))
        attach(self.net, LoRA(rank=4, targets=["0", "3"]), seed=1)
        self.metric = SumMetric()
        self.seen = []

    def configure_optimizers(self):
        self.seen = [adapter.lora_A.clone() for *_, adapter in adapted_layers(self)]
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)

    def training_step(self, batch):
        loss = self.net(batch).square().mean()
        self.log("loss", loss)
        self.log_dict({"twice": 2 * loss})
        self.metric.update(1.0)
        return loss

    def train_dataloader(self):
        return DataLoader(torch.arange(16.0).view(2, 8))


def make_trainer(folder, callbacks, **options):
    return Trainer(
        default_root_dir=folder,
        callbacks=[c for c in callbacks if c is not None],
        accelerator="cpu",
        enable_model_summary=False,
        **{
            "max_epochs": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_checkpointing": any(isinstance(c, AdapterCheckpoint) for c in callbacks),
            **options,
        },
    )


def fit(module, callback, folder, *data, **options):
    make_trainer(folder, [callback], **options).fit(module, *data)


def values(module):
    """Every adapter tensor, origins included."""
    return {
        f"{name}.{key}": tensor.clone()
        for name, _, adapter in adapted_layers(module)
        for key, tensor in adapter.state_dict().items()
    }


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# --- when it acts ------------------------------------------------------------------------------


def test_a_foreign_module_is_initialised_before_its_optimizer_exists(tmp_path):
    module = Foreign()
    callback = InitAdapters(Gaussian())
    fit(module, callback, tmp_path)
    expected = Foreign()
    initialise(expected.net, Gaussian())  # names as `attach` saw them
    for found, (*_, adapter) in zip(module.seen, adapted_layers(expected), strict=True):
        assert torch.equal(found, adapter.lora_A)
    assert callback.initialised == ["0", "3"]


class Late(Foreign):
    """Attaches in `configure_model`, as modules do whose model is sharded."""

    def __init__(self, callback=None):
        super().__init__()
        detach(self.net)
        self.callback = callback

    def configure_model(self):
        if not any(adapted_layers(self)):
            attach(self.net, LoRA(rank=4, targets=["0", "3"]), seed=1)
            if self.callback is not None:
                self.callback.initialise(self, self.net)


def test_adapters_that_come_after_setup_are_started_by_hand_or_said(tmp_path):
    with pytest.raises(ValueError, match=r"\(PiSSA\) starts.*Late has none until later"):
        fit(Late(), InitAdapters(PiSSA()), tmp_path)
    fit(Late(), InitAdapters(), tmp_path)
    callback = InitAdapters(PiSSA())
    module = Late(callback)
    fit(module, callback, tmp_path)
    assert all(adapter.pinned for *_, adapter in adapted_layers(module))
    fit(module, callback, tmp_path)


def test_a_second_fit_keeps_what_was_trained(tmp_path):
    module, callback = Foreign(), InitAdapters(Gaussian())
    fit(module, callback, tmp_path)
    with torch.no_grad():
        module.net[0].adapter.lora_A.fill_(7.0)
    fit(module, callback, tmp_path)
    assert module.net[0].adapter.lora_A.eq(7.0).all()


@pytest.mark.parametrize("first", [None, PiSSA()], ids=["default", "pinned"])
def test_another_callback_does_not_throw_away_what_was_trained(tmp_path, first):
    """One is made for each trainer, as by a function that builds both."""
    module = Foreign()
    fit(module, InitAdapters(first), tmp_path)
    fit(module, InitAdapters(PiSSA()), tmp_path)  # the rate is 0: nothing was trained
    with torch.no_grad():
        module.net[3].adapter.lora_B.add_(0.5)
    trained = values(module)
    with pytest.raises(ValueError, match=r"'3' holds what was trained.*InitAdapters\(PiSSA\)"):
        fit(module, InitAdapters(PiSSA()), tmp_path)
    assert_equal(values(module), trained)
    fit(module, InitAdapters(), tmp_path)


def test_no_initialiser_is_the_default_start(tmp_path):
    module, trained = Foreign(), Foreign()
    fit(module, InitAdapters(), tmp_path)
    assert_equal(values(module), values(trained))


def test_evaluation_initialises_nothing_and_a_later_fit_does(tmp_path, material):
    base, data = material
    module, callback = ours(base, optimizer=still), InitAdapters(PiSSA())
    make_trainer(tmp_path, [callback]).validate(module, data(), verbose=False)
    assert not callback.initialised
    assert not any(adapter.pinned for *_, adapter in adapted_layers(module))
    fit(module, callback, tmp_path, data(), max_steps=1)
    direct, again = ours(base, optimizer=still), InitAdapters(PiSSA())
    fit(direct, again, tmp_path, data(), max_steps=1)
    assert callback.initialised == again.initialised != []
    assert_equal(values(module), values(direct))


# --- with gradients, through our module --------------------------------------------------------


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A base with dropout and a function that returns fresh data for it."""
    folder = tmp_path_factory.mktemp("material")
    tokenizer = word_tokenizer()
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))

    def base():
        return gpt2(vocab_size=len(tokenizer), resid_pdrop=0.2, embd_pdrop=0.2)

    def data():
        return InstructionDataModule(
            str(folder / "pairs.jsonl"), tokenizer=tokenizer, batch_size=4, val_size=4
        )

    return base, data


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1)


def ours(base, **settings):
    base = base if isinstance(base, nn.Module) else base()
    settings = {"lr_scheduler": "constant", "warmup": 0.0, "optimizer": sgd, **settings}
    return AdapterFineTuneModule(base, adapter=SPEC, **settings)


class Seen(Callback):
    """Keeps the batches of a run, and a random number of each step."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, module, batch, index):
        self.batches.append((batch["input_ids"].tolist(), torch.get_rng_state().sum().item()))


class Shuffled:
    """A batch sampler with a generator of its own, of some library."""

    def __init__(self, count, library):
        self.count = count
        self.generator = {
            "torch": lambda: torch.Generator().manual_seed(3),
            "numpy": lambda: np.random.default_rng(3),
            "legacy": lambda: np.random.RandomState(3),
            "python": lambda: random.Random(3),
        }[library]()

    def __iter__(self):
        if isinstance(self.generator, torch.Generator):
            order = torch.randperm(self.count, generator=self.generator).tolist()
        elif isinstance(self.generator, random.Random):
            order = self.generator.sample(range(self.count), self.count)
        else:
            order = self.generator.permutation(self.count).tolist()
        return iter([order[i : i + 4] for i in range(0, self.count, 4)])

    def __len__(self):
        return self.count // 4


def loader(data, **options):
    data.setup("fit")
    rows = data.train_dataloader().examples
    return DataLoader(rows, collate_fn=lambda part: collate(part, 0), **options)


SOURCES = {
    "data module": lambda data: data,
    "our loader": lambda data: (data.setup("fit"), data.train_dataloader())[1],
    "global generator": lambda data: loader(data, batch_size=4, shuffle=True),
    "own generator": lambda data: loader(
        data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
    **{
        library: lambda data, library=library: loader(data, batch_sampler=Shuffled(24, library))
        for library in ("torch", "numpy", "legacy", "python")
    },
}


def spy(monkeypatch):
    """The batches that the callback takes."""
    taken = []

    def first_batches(*arguments):
        taken.extend(real(*arguments))
        return taken

    real = init.first_batches
    monkeypatch.setattr(init, "first_batches", first_batches)
    return taken


@pytest.mark.parametrize("source", SOURCES)
def test_training_is_that_of_a_run_started_by_hand(source, material, tmp_path, monkeypatch):
    """The start, the order of batches, dropout and all that is trained, to the bit."""
    base, data = material
    taken = spy(monkeypatch)
    seed_everything(7, verbose=False)
    module, seen = ours(base, loss="full"), Seen()
    callback = InitAdapters(LoRAGA(), batches=3)
    # An epoch and some: the order of the second depends on what the first left behind.
    trainer = make_trainer(tmp_path, [callback, seen], max_steps=9, max_epochs=-1)
    trainer.fit(module, SOURCES[source](data()))
    assert len(taken) == 3

    seed_everything(7, verbose=False)
    model, again = base(), Seen()
    attach(model, SPEC)
    keep_rows_apart(model)  # the batches of the data module are packed
    initialise(model, LoRAGA(), taken)
    by_hand = ours(model, loss="full")
    trainer = make_trainer(tmp_path, [again], max_steps=9, max_epochs=-1)
    trainer.fit(by_hand, SOURCES[source](data()))
    assert len(seen.batches) == 9
    assert seen.batches == again.batches
    assert_equal(values(module), values(by_hand))


def test_the_batches_are_the_first_of_training(material, tmp_path, monkeypatch):
    base, data = material
    taken, seen = spy(monkeypatch), Seen()
    trainer = make_trainer(tmp_path, [InitAdapters(LoRAGA(), batches=3), seen], max_steps=3)
    trainer.fit(ours(base), data())
    assert [batch["input_ids"].tolist() for batch in taken] == [ids for ids, _ in seen.batches]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("checkpointing", ["none", "full", 2])
def test_it_works_under_any_precision_and_with_checkpointing(
    precision, checkpointing, material, tmp_path
):
    base, data = material
    module = ours(base, gradient_checkpointing=checkpointing, optimizer=still)
    fit(module, InitAdapters(LoRAGA()), tmp_path, data(), precision=precision, max_steps=1)
    exact = ours(base, optimizer=still)
    fit(exact, InitAdapters(LoRAGA()), tmp_path, data(), max_steps=1)
    for (*_, found), (*_, expected) in zip(
        adapted_layers(module), adapted_layers(exact), strict=True
    ):
        assert found.lora_A.dtype == torch.float32
        overlap = found.lora_A @ expected.lora_A.T  # of the spaces: singular vectors may turn
        assert overlap.norm() > 0.9 * expected.lora_A.norm() ** 2 / 3**0.5


def still(groups):
    return torch.optim.SGD(groups, lr=0.0)


# Fp32 sums take 12,288 bytes for c_attn (32 x 96) and 6,144 for c_fc (32 x 48), in two layers.
@pytest.mark.parametrize(("budget", "groups"), [(1, 4), (12_288, 4), (18_432, 2), (36_864, 1)])
def test_a_byte_budget_starts_at_the_same_place_in_more_passes(budget, groups, material, tmp_path):
    base, data = material
    found, passes = [], []
    for limit in (None, budget):
        module = ours(base, optimizer=still)
        callback = InitAdapters(LoRAGA(), batches=3, gradient_bytes=limit)
        begun = count_losses(module, callback)
        fit(module, callback, tmp_path, data(), max_steps=1)
        found.append(values(module))
        passes.append(len(begun))
    assert passes == [3, 3 * groups]
    for name, tensor in found[0].items():
        assert (found[1][name] - tensor).abs().max() < 1e-4, name


def count_losses(module, callback):
    """A list that grows with every loss that is computed for the start."""
    losses, nll = [], module.nll

    def counted(batch):
        if not callback.initialised:
            losses.append(batch)
        return nll(batch)

    module.nll = counted
    return losses


def test_a_default_device_or_dtype_of_the_trainer_does_not_matter(material, tmp_path):
    """Lightning builds models with the device (and half precision) as the default of tensors."""
    base, data = material
    found = []
    for device, dtype in (("cpu", torch.float32), ("meta", torch.float16)):
        module = ours(base, optimizer=still)
        model = module.model
        attach(model, SPEC)
        trainer = make_trainer(tmp_path, [])
        trainer.state.fn = "fit"
        trainer.strategy.connect(module)
        module.trainer = trainer
        trainer._data_connector.attach_data(module, datamodule=data())
        trainer.datamodule.setup("fit")
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                InitAdapters(LoRAGA(direction="random"), batches=2).initialise(module, model)
            assert torch.get_default_dtype() == dtype
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(values(module))
    assert_equal(*found)


# --- with gradients, through other modules -----------------------------------------------------


def by_hand(batches, loss=None):
    expected = Foreign()
    loss = loss or (lambda model, x: (model(x).square().mean(), torch.tensor(1)))
    initialise(expected.net, LoRAGA(), batches, loss=loss)
    return values(expected)


def test_a_training_step_is_a_loss(tmp_path):
    """Without dropout, with logging muted and metrics untouched."""
    module = Foreign()
    sums = []
    module.metric.reset()
    callback = InitAdapters(LoRAGA(), batches=5)
    trainer = make_trainer(tmp_path, [callback], max_steps=1)
    module.on_train_start = lambda: sums.append(module.metric.sum_value.item())
    trainer.fit(module)
    batches = list(module.train_dataloader())
    assert_equal(values(module), by_hand(batches))
    assert sums == [0.0]
    assert "log" not in vars(module)
    assert trainer.callback_metrics["loss"] > 0


class Around(Foreign):
    """Dropout and a trained layer outside of what is adapted."""

    def __init__(self):
        super().__init__()
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 8)
        nn.init.eye_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def training_step(self, batch):
        return self.drop(self.head(self.net(batch))).square().mean()

    def setup(self, stage):  # after the callback's
        assert self.drop.training
        assert self.head.weight.requires_grad
        assert self.head.weight.grad is None


def test_the_rest_of_the_module_is_at_rest_too(tmp_path):
    module = Around()
    fit(module, InitAdapters(LoRAGA()), tmp_path)
    for name, tensor in by_hand(list(module.train_dataloader())).items():
        assert (values(module)[name] - tensor).abs().max() < 1e-5, name


class Mapped(Foreign):
    """Batches are mappings with labels; a step returns one."""

    def training_step(self, batch, batch_idx):
        if batch["x"].sum() < 0:
            return None
        return {"loss": self.net(batch["x"]).square().mean()}

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3, 2, 8, generator=generator).abs()
        x[2] = -1.0  # a batch that is skipped
        labels = [torch.tensor([[1, 2, 3], [1, 2, -100]]), torch.tensor([[1, -100, 2]] * 2)]
        rows = [{"x": x[0], "labels": labels[0]}, {"x": x[1], "labels": labels[1]}]
        return DataLoader([*rows, {"x": x[2], "labels": labels[1]}], batch_size=None)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_labels_weigh_a_training_step(tmp_path):
    module = Mapped()
    fit(module, InitAdapters(LoRAGA()), tmp_path)
    weights = iter([torch.tensor(3), torch.tensor(2)])
    batches = [batch["x"] for batch in module.train_dataloader()][:2]

    def loss(model, x):
        return model(x).square().mean(), next(weights)

    assert_equal(values(module), by_hand(batches, loss))


class Text(LightningModule):
    """A plain causal language model with dropout, as one would write it."""

    def __init__(self, model):
        super().__init__()
        self.model = model.train()
        attach(model, SPEC)

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return sgd([p for p in self.parameters() if p.requires_grad])


def test_a_plain_language_model_weighs_tokens(material, tmp_path, monkeypatch):
    base, data = material
    taken = spy(monkeypatch)
    seed_everything(3, verbose=False)
    module = Text(base())
    data = loader(data(), batch_size=4, shuffle=True)
    fit(module, InitAdapters(LoRAGA(), batches=3), tmp_path, data, max_steps=1)
    seed_everything(3, verbose=False)
    expected = Text(base())
    initialise(expected.model, LoRAGA(), taken, loss=mean_loss)
    for (*_, found), (*_, wanted) in zip(
        adapted_layers(module), adapted_layers(expected), strict=True
    ):
        assert (found.lora_A0 - wanted.lora_A).abs().max() < 1e-5
        assert found.lora_A.ne(found.lora_A0).any()  # and trained


class Summed(Foreign):
    """A module that says itself what its loss is."""

    automatic_optimization = False

    def nll(self, batch):
        return self.net(batch).square().sum(), 8

    def training_step(self, batch):
        self.optimizers().step()


def test_a_method_nll_comes_first(tmp_path):
    module = Summed()
    module.automatic_optimization = False
    fit(module, InitAdapters(LoRAGA()), tmp_path)
    for name, tensor in by_hand(list(module.train_dataloader())).items():
        assert (values(module)[name] - tensor).abs().max() < 1e-5, name


class ByHand(Foreign):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


def test_what_gives_no_gradients_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ByHand optimises by hand.*nll"):
        fit(ByHand(), InitAdapters(LoRAGA()), tmp_path)
    module, only_once = Foreign(), iter([torch.ones(1, 8)])
    with pytest.raises(ValueError, match="list_iterator, which can only be read once"):
        fit(module, InitAdapters(LoRAGA()), tmp_path, only_once)
    assert len(list(only_once)) == 1
    with pytest.raises(ValueError, match="no batches"):
        fit(Foreign(), InitAdapters(LoRAGA()), tmp_path, DataLoader([]))


def test_adapters_without_factors_are_refused(tmp_path):
    for start in (PiSSA(), LoRAGA()):
        module = Foreign()
        module.net = nn.Sequential(nn.Linear(8, 8))
        attach(module.net, FullFineTuning(targets=["0"]))
        with pytest.raises(TypeError, match=f"{type(start).__name__} does not fit FullFineTuning"):
            fit(module, InitAdapters(start), tmp_path)


def test_dora_is_started_too(tmp_path):
    module = Foreign()
    module.net = nn.Sequential(nn.Linear(8, 8))
    attach(module.net, DoRA(rank=2, targets=["0"]))
    x = torch.randn(3, 8)
    before = module.net(x)
    fit(module, InitAdapters(LoRAGA()), tmp_path)
    assert module.net[0].adapter.pinned
    assert torch.equal(module.net(x), before)


# --- resuming ----------------------------------------------------------------------------------


def text_run(folder, base, data, steps, callback, path=None, visible=False):
    """Train our module to ``steps``, from ``path`` if given; return module and trainer."""
    seed_everything(11, verbose=False)
    module = ours(base)
    keeper = AdapterCheckpoint(folder, monitor=None, every_n_train_steps=2)
    trainer = make_trainer(folder, [callback, keeper], max_steps=steps, max_epochs=-1)
    if visible:
        trainer.ckpt_path, path = path, None
    trainer.fit(module, data(), ckpt_path=path)
    return module, trainer


@pytest.mark.parametrize("visible", [True, False])
@pytest.mark.parametrize("start", [PiSSA(), LoRAGA()])
def test_a_resumed_run_goes_on_from_its_origins(start, visible, material, tmp_path, monkeypatch):
    base, data = material
    whole, _ = text_run(tmp_path / "whole", base, data, 8, InitAdapters(start))
    text_run(tmp_path / "part", base, data, 4, InitAdapters(start))
    calls = []
    monkeypatch.setattr(init, "initialise", lambda *a, **k: calls.append(a) or initialise(*a, **k))
    last = tmp_path / "part" / "last.ckpt"
    callback = InitAdapters(start)
    resumed, trainer = text_run(tmp_path / "rest", base, data, 8, callback, last, visible)
    assert trainer.global_step == 8
    assert len(calls) == (0 if visible else 1)
    assert_equal(values(resumed), values(whole))
    adapter = next(adapted_layers(resumed)).adapter
    assert adapter.pinned
    assert adapter.lora_A.ne(adapter.lora_A0).any()
    assert adapter.start_name == repr(start)  # what a folder will say
    assert callback.initialised

    (expected,) = trainer.validate(resumed, data(), verbose=False)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    bare = make_trainer(tmp_path, [])
    (found,) = bare.validate(ours(base), data(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert found == expected


def known_resume(model, callback):
    """Call it as a run does that resumes from a file it knows."""
    trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"), ckpt_path="last.ckpt")
    callback.initialise(SimpleNamespace(trainer=trainer), model)


def test_a_resume_makes_room_for_origins_before_anything_is_loaded():
    model = llama()
    attach(model, LoRA(rank=2))
    before = {n: p.clone() for n, p in model.named_parameters()}
    callback = InitAdapters(PiSSA())
    known_resume(model, callback)
    for *_, adapter in adapted_layers(model):
        assert isinstance(adapter, LoRAAdapter)
        assert adapter.pinned
        assert not adapter.lora_A0.requires_grad
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    adapter.lora_A.data.add_(1.0)
    known_resume(model, InitAdapters(PiSSA()))
    assert adapter.lora_A0.ne(adapter.lora_A).all()  # an origin that is there stays


def test_a_resume_with_a_start_at_zero_pins_nothing():
    model = llama()
    attach(model, LoRA(rank=2))
    known_resume(model, InitAdapters(Kaiming()))
    assert not any(adapter.pinned for *_, adapter in adapted_layers(model))


# --- several devices ---------------------------------------------------------------------------


def test_all_devices_start_where_the_first_one_does():
    """This device drew something else; what the first one sends arrives, origins included."""
    model, first = llama(), llama()
    for one, seed in ((model, 1), (first, 2)):
        attach(one, LoRA(rank=2), seed=seed)
    initialise(first, PiSSA(), seed=2)
    sent = iter([adapter.state_dict() for *_, adapter in adapted_layers(first)])
    asked = []

    def broadcast(state):
        asked.append(state)
        return next(sent)

    trainer = SimpleNamespace(
        state=SimpleNamespace(fn="fit"),
        ckpt_path=None,
        world_size=2,
        is_global_zero=False,
        progress_bar_callback=None,
        strategy=SimpleNamespace(broadcast=broadcast),
        loggers=[],
    )
    InitAdapters(Gaussian()).initialise(SimpleNamespace(trainer=trainer), model)
    assert len(asked) == 14
    assert_equal(values(model), values(first))


# --- what it tells -----------------------------------------------------------------------------


def test_it_logs_what_it_did(tmp_path, caplog):
    loggers = [Memory(), Memory()]
    module = Foreign()
    with caplog.at_level("INFO"):
        fit(module, InitAdapters(PiSSA()), tmp_path, logger=loggers, log_every_n_steps=1)
    for logger in loggers:
        assert logger["init/layers"] == [2]
        assert logger["init/bytes"] == [2 * 2 * 4 * 8 * 4]  # two layers, A0 and B0, fp32
        assert 0 < logger["init/seconds"][0] < 60
    (line,) = [r.getMessage() for r in caplog.records if "layers started" in r.getMessage()]
    assert line.startswith("PiSSA: 2 layers started in ")
    assert line.endswith(" s, origins 0.0 MB")


class Slow(Gaussian):
    """Takes its time."""

    seconds = 0.0

    def __call__(self, *args, **kwargs):
        time.sleep(self.seconds)
        return super().__call__(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:.*progress bar")
@pytest.mark.parametrize(
    ("seconds", "bar", "shown"), [(0.6, True, True), (0.0, True, False), (0.6, False, False)]
)
def test_a_bar_shows_when_it_takes_more_than_a_second(tmp_path, capfd, seconds, bar, shown):
    start = Slow()
    type(start).seconds = seconds
    fit(Foreign(), InitAdapters(start), tmp_path, enable_progress_bar=bar, limit_train_batches=0)
    assert ("Slow:" in capfd.readouterr().err) == shown


# --- settings ----------------------------------------------------------------------------------


def test_senseless_settings_are_refused():
    with pytest.raises(ValueError, match="batches must be at least 1, got 0"):
        InitAdapters(LoRAGA(), batches=0)
    with pytest.raises(ValueError, match="gradient_bytes must be at least 1.*got 0"):
        InitAdapters(LoRAGA(), gradient_bytes=0)


@pytest.fixture
def parser(monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(InitAdapters, "init")
    return parser


def test_the_command_line_takes_initialisers_by_name(parser):
    text = (
        "init: {initialiser: {class_path: lit_adapters.PiSSA, init_args: {niter: 7}}, batches: 3}"
    )
    settings = parser.parse_string(text)
    callback = parser.instantiate_classes(settings).init
    assert (callback.initialiser, callback.batches) == (PiSSA(niter=7), 3)
    flags = ["--init.initialiser=lit_adapters.LoRAGA", "--init.initialiser.gamma=9"]
    callback = parser.instantiate_classes(parser.parse_args(flags)).init
    assert callback.initialiser == LoRAGA(gamma=9)
    assert parser.instantiate_classes(parser.parse_args([])).init.initialiser is None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("lit_adapters.LoRA", "does not implement protocol Initialiser"),
        ("torch.nn.Linear", "does not implement protocol Initialiser"),
        ("builtins.print", "not implement protocol Initialiser|not accessible"),
        ("magic", "Expected a dot import path"),
    ],
)
def test_the_command_line_refuses_what_is_no_initialiser(parser, path, message):
    with pytest.raises(Exception, match=message):
        parser.parse_args([f"--init.initialiser={path}"])
    with pytest.raises(Exception, match="'size' is not accepted"):
        parser.parse_args(["--init.initialiser=lit_adapters.PiSSA", "--init.initialiser.size=3"])


# --- the starts themselves ---------------------------------------------------------------------


@pytest.mark.parametrize("start", [Kaiming(), Gaussian()])
def test_a_start_is_a_no_op_and_has_the_stated_spread(start):
    wide = nn.Sequential(nn.Linear(400, 64), nn.Embedding(300, 64))
    attach(wide, LoRA(rank=16, targets=["0", "1"]))
    initialise(wide, start, seed=5)
    dense, table = wide[0].adapter, wide[1].adapter
    assert not dense.lora_B.any()
    assert not table.lora_A.any()
    expected = {Kaiming: (1 / (3 * 400)) ** 0.5, Gaussian: 1 / 16}[type(start)]
    assert dense.lora_A.std().item() == pytest.approx(expected, rel=0.05)
    assert table.lora_B.std().item() == pytest.approx(1.0, rel=0.1)


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="no adapters.*attach"):
        initialise(nn.Linear(4, 4), Gaussian())
