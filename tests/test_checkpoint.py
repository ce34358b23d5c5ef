"""Checkpoints hold the adapter and not the base, come when they are due and never half written."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F

from lit_adapters import (
    AdapterCheckpoint,
    AdapterFineTuneModule,
    DoRA,
    LoRA,
    attach,
    detach,
    load_adapter,
)
from lit_adapters.data import collate
from tests.models import PAD, VOCAB, llama, logits, shake, trainable

pytestmark = [
    # Lightning 2.6 on torch 2.13: any trainer with any data raises this.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    # Most fits here need no validation.
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    # A resumed run writes beside the files of the first one on purpose.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

SPEC = LoRA(rank=4)


class Batches:
    """The same batches in every epoch; goes on where a checkpoint left off."""

    def __init__(self, count, seed=0):
        self.done = 0
        generator = torch.Generator().manual_seed(seed)
        self.batches = []
        for number in range(count):
            ids = torch.randint(3, VOCAB, (4 + number % 3,), generator=generator).tolist()
            self.batches.append(collate([{"input_ids": ids, "labels": ids}], PAD))

    def __iter__(self):
        start = self.done % len(self)
        for self.done, batch in enumerate(self.batches[start:], start + 1):  # noqa: B020
            yield batch

    def __len__(self):
        return len(self.batches)

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


class Foreign(LightningModule):
    """Somebody's own module: no hook of ours, adapters attached in ``__init__``."""

    def __init__(self, spec=SPEC):
        super().__init__()
        self.net = llama().train()
        attach(self.net, spec)

    def forward(self, batch):
        return self.net(batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def loss(self, batch):
        return F.cross_entropy(self(batch)[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch), batch_size=1)

    def configure_optimizers(self):
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class ForeignWithHead(Foreign):
    """Trains a head of its own beside the adapters."""

    def __init__(self, spec=SPEC):
        super().__init__(spec)
        self.head = nn.Linear(VOCAB, VOCAB)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch):
        return self.head(super().forward(batch))

    def training_step(self, batch, batch_idx):
        self.seen += 1
        return super().training_step(batch, batch_idx)


def ours(spec=SPEC):
    return AdapterFineTuneModule(llama(), spec, optimizer=lambda g: torch.optim.AdamW(g, lr=1e-2))


MODULES = {"ours": ours, "foreign": Foreign, "foreign-with-head": ForeignWithHead}
each_module = pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)


def make_trainer(folder, *callbacks, **settings):
    return Trainer(
        **{
            "default_root_dir": folder,
            "accelerator": "cpu",
            "logger": False,
            "max_epochs": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": list(callbacks),
            **settings,
        }
    )


def read(file):
    return torch.load(file, weights_only=True)


def step_in(file):
    return read(file)["global_step"] if Path(file).exists() else None


def root_of(module):
    return module.model if isinstance(module, AdapterFineTuneModule) else module.net


class EachStep(Callback):
    """Calls back at the end of every batch; listed first, it sees what the batch before left."""

    def __init__(self, look):
        self.look = look
        self.seen = []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append(self.look(trainer))


# --- what is in it -------------------------------------------------------------------------------


@each_module
def test_no_base_weight_is_in_the_file(tmp_path, build):
    module = build()
    trainer = make_trainer(tmp_path, AdapterCheckpoint(tmp_path / "out"))
    trainer.fit(module, Batches(3), Batches(1))
    for name in ("last.ckpt", "best.ckpt"):
        file = tmp_path / "out" / name
        keys = set(read(file)["state_dict"])
        expected = {n for n, p in module.named_parameters() if p.requires_grad}
        if build is ForeignWithHead:
            expected.add("seen")
        assert keys == expected
        content = file.read_bytes()
        for key, value in llama().state_dict().items():
            assert value.numpy().tobytes()[:256] not in content, key
        trained = next(p for p in module.parameters() if p.requires_grad)
        if name == "last.ckpt":  # the search does find what is there
            assert trained.detach().numpy().tobytes()[:256] in content


@each_module
def test_all_that_a_resume_needs_is_in_the_file(tmp_path, build):
    module = build()
    trainer = make_trainer(tmp_path, AdapterCheckpoint(tmp_path / "out"))
    trainer.fit(module, Batches(3))
    checkpoint = read(tmp_path / "out" / "last.ckpt")
    (optimizer,), (schedule,) = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
    trained = [p for p in module.parameters() if p.requires_grad]
    assert len(optimizer["state"]) == len(trained)
    assert {"step", "exp_avg", "exp_avg_sq"} <= set(next(iter(optimizer["state"].values())))
    assert schedule["last_epoch"] == 3
    assert checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == 3
    assert set(checkpoint["random_state"]) == {"torch", "cuda", "numpy", "python"}
    assert torch.equal(checkpoint["random_state"]["torch"], torch.get_rng_state())
    assert checkpoint["global_step"] == 3


@each_module
def test_a_resumed_run_ends_like_one_that_was_never_stopped(tmp_path, build):
    whole, first, second = (seeded(build) for _ in range(3))
    make_trainer(tmp_path, AdapterCheckpoint(tmp_path / "whole"), max_epochs=3).fit(
        whole, Batches(4), Batches(2)
    )
    make_trainer(tmp_path, AdapterCheckpoint(tmp_path / "out"), max_epochs=2).fit(
        first, Batches(4), Batches(2)
    )
    trainer = make_trainer(tmp_path, AdapterCheckpoint(tmp_path / "out"), max_epochs=3)
    trainer.fit(second, Batches(4), Batches(2), ckpt_path=tmp_path / "out" / "last.ckpt")
    assert trainer.global_step == 12
    if isinstance(whole, Foreign):  # no total that depends on max_epochs enters the schedule
        expected, found = trainable(whole), trainable(second)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    if build is ForeignWithHead:
        assert whole.seen == second.seen == 12


def seeded(build, seed=0):
    torch.manual_seed(seed)
    return build()


# --- when it is written --------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_last_is_written_every_n_steps_and_at_the_end(tmp_path, accumulate):
    file = tmp_path / "out" / "last.ckpt"
    look = EachStep(lambda trainer: (trainer.global_step, step_in(file)))
    trainer = make_trainer(
        tmp_path,
        AdapterCheckpoint(tmp_path / "out", every_n_train_steps=3),
        look,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(Foreign(), Batches(8 * accumulate))
    # Lightning runs checkpoint callbacks after the others: what a batch wrote, the next one sees
    for step, written in look.seen:
        assert written in (None, 3, 6)
        if step in (4, 5, 7, 8):
            assert written == 3 * (step // 3)
    assert step_in(file) == trainer.global_step == 8


@pytest.mark.parametrize("resumed", [False, True])
def test_last_is_never_taken_inside_an_accumulation_window(tmp_path, resumed):
    """Gradients of a begun window are in no checkpoint: a resume would lose them."""

    class InWindow(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
            saved.append((checkpoint["global_step"], progress["ready"]))

    saved, settings = [], {"accumulate_grad_batches": 3}
    path = None
    if resumed:
        callback = AdapterCheckpoint(tmp_path / "out", every_n_train_steps=2)
        make_trainer(tmp_path, callback, max_steps=2, **settings).fit(Foreign(), Batches(12))
        path = tmp_path / "out" / "last.ckpt"
    callback = AdapterCheckpoint(tmp_path / "out", every_n_train_steps=2)
    trainer = make_trainer(tmp_path, callback, InWindow(), **settings)
    trainer.fit(Foreign(), Batches(12), ckpt_path=path)
    assert saved == ([(4, 12)] if resumed else [(2, 6), (4, 12)])


def test_last_can_be_switched_off(tmp_path):
    callback = AdapterCheckpoint(tmp_path / "out", every_n_train_steps=1, save_last=False)
    make_trainer(tmp_path, callback).fit(Foreign(), Batches(3))
    assert not list((tmp_path / "out").glob("*.ckpt"))
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


def test_an_interval_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        AdapterCheckpoint(tmp_path, every_n_train_steps=0)


def test_the_lowest_accuracy_is_not_taken_for_the_best(tmp_path):
    with pytest.raises(ValueError, match="lowest accuracy for the best; pass mode='max'"):
        AdapterCheckpoint(tmp_path, monitor="val/token_accuracy")
    assert AdapterCheckpoint(tmp_path, monitor="val/token_accuracy", mode="max").mode == "max"


def test_one_callback_serves_two_fits(tmp_path):
    callback = AdapterCheckpoint(tmp_path / "out")
    module = Foreign()
    make_trainer(tmp_path, callback).fit(module, Batches(4))
    os.remove(tmp_path / "out" / "last.ckpt")
    make_trainer(tmp_path, callback).fit(module, Batches(4))
    assert step_in(tmp_path / "out" / "last.ckpt") == 4


class ByHand(Foreign):
    """Two optimizers, which step one behind the other in each batch but the first ``alone``."""

    def __init__(self, alone):
        super().__init__()
        self.alone = alone
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers[: 1 if batch_idx < self.alone else 2]:
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self):
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [torch.optim.SGD(some, lr=0.1) for some in (parameters[::2], parameters[1::2])]


@pytest.mark.parametrize("alone", [0, 1])
def test_last_is_written_though_batches_step_past_the_interval(tmp_path, alone):
    file = tmp_path / "out" / "last.ckpt"
    look = EachStep(lambda trainer: (trainer.global_step, step_in(file)))
    callback = AdapterCheckpoint(tmp_path / "out", every_n_train_steps=4)
    make_trainer(tmp_path, callback, look).fit(ByHand(alone), Batches(8))
    # As above, the batch after sees it; one is of two steps.
    assert all(step < 7 or (written or 0) > step - 4 - 2 for step, written in look.seen)


@pytest.mark.parametrize("steps", [4, 5])
def test_the_last_state_is_validated_though_a_batch_steps_past_the_end(tmp_path, steps):
    callback = AdapterCheckpoint(tmp_path / "out")
    trainer = make_trainer(tmp_path, callback, max_epochs=-1, max_steps=steps)
    trainer.fit(ByHand(alone=0), Batches(8), Batches(1))
    assert step_in(tmp_path / "out" / "best.ckpt") == trainer.global_step == 2 * -(-steps // 2)


def test_the_best_of_another_module_is_not_compared(tmp_path):
    """One callback serves a search: the folder beside it is of the module that was fitted last."""
    callback = AdapterCheckpoint(tmp_path / "out")
    for value in (1.0, 2.0):
        module = Scripted([value])
        make_trainer(tmp_path, callback).fit(module, Batches(2), Batches(1))
        assert callback.best_model_score == value
        fresh = llama()
        load_adapter(fresh, callback.adapter_path)
        expected = trainable(module.net)
        assert all(torch.equal(expected[n], v) for n, v in trainable(fresh).items())
    make_trainer(tmp_path, callback).fit(module, Batches(2))  # the same one, and no validation
    assert callback.best_model_score == 2.0
    pickle.loads(pickle.dumps(callback))


def test_two_callbacks_do_not_write_over_each_other(tmp_path):
    both = [AdapterCheckpoint(), AdapterCheckpoint(monitor="train/loss")]
    with pytest.raises(ValueError, match="each over the other's; give one of them another dirpath"):
        make_trainer(tmp_path, *both).fit(Foreign(), Batches(2), Batches(1))
    both = [AdapterCheckpoint(tmp_path / "one"), AdapterCheckpoint(tmp_path / "two", monitor=None)]
    make_trainer(tmp_path, *both).fit(Foreign(), Batches(2), Batches(1))
    for one in both:
        load_adapter(llama(), one.adapter_path)
    assert both[0].adapter_path != both[1].adapter_path


def test_a_better_state_at_the_step_where_an_earlier_fit_ended_is_kept(tmp_path):
    callback, module = AdapterCheckpoint(tmp_path / "out"), Scripted([2.0, 1.0])
    for value in (2.0, 1.0):
        make_trainer(tmp_path, callback).fit(module, Batches(2), Batches(1))
        assert callback.best_model_score == value


class Scripted(Foreign):
    """Logs the validation losses it is told to."""

    def __init__(self, values):
        super().__init__()
        self.values = list(values)
        self.states = []

    def validation_step(self, batch, batch_idx):
        self.states.append(trainable(self))
        self.log("val/loss", self.values[len(self.states) - 1], batch_size=1)


@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 1)])
@pytest.mark.parametrize("often", [False, True])
def test_best_and_the_folder_beside_it_follow_the_monitored_value(tmp_path, mode, best, often):
    module = Scripted([2.0, 3.0, 1.0, 2.5])
    callback = AdapterCheckpoint(tmp_path / "out", mode=mode)
    settings = {"val_check_interval": 2} if often else {"max_epochs": 4}
    make_trainer(tmp_path, callback, **settings).fit(module, Batches(8 if often else 2), Batches(1))
    expected = module.states[best]
    assert callback.best_model_path == str(tmp_path / "out" / "best.ckpt")
    assert callback.best_model_score == module.values[best]
    assert callback.adapter_path == tmp_path / "out" / "adapter"
    checkpoint = read(tmp_path / "out" / "best.ckpt")
    assert checkpoint["global_step"] == 2 * (best + 1)
    assert all(torch.equal(checkpoint["state_dict"][n], value) for n, value in expected.items())
    model = llama()
    load_adapter(model, tmp_path / "out" / "adapter")
    found = {f"net.{name}": p for name, p in model.named_parameters() if ".lora_" in name}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert step_in(tmp_path / "out" / "last.ckpt") == 8
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "last.ckpt",
        "best.ckpt",
        "adapter",
    }


@each_module
def test_without_validation_the_folder_is_the_final_state(tmp_path, build):
    module = build()
    make_trainer(tmp_path, AdapterCheckpoint(tmp_path / "out")).fit(module, Batches(3))
    assert not (tmp_path / "out" / "best.ckpt").exists()
    model = llama()
    load_adapter(model, tmp_path / "out" / "adapter")
    assert torch.equal(logits(model), logits(root_of(module).eval()))
    assert not torch.equal(logits(model), logits(llama()))


@pytest.mark.parametrize("same_folder", [True, False])
def test_a_resumed_run_does_not_take_a_worse_state_for_the_best(tmp_path, same_folder):
    first = Scripted([2.0, 1.0])
    make_trainer(tmp_path, AdapterCheckpoint(tmp_path / "out"), max_epochs=2).fit(
        first, Batches(2), Batches(1)
    )
    folder = tmp_path / ("out" if same_folder else "other")
    second = Scripted([3.0, 1.5])
    callback = AdapterCheckpoint(folder)
    make_trainer(tmp_path, callback, max_epochs=4).fit(
        second, Batches(2), Batches(1), ckpt_path=tmp_path / "out" / "last.ckpt"
    )
    assert callback.best_model_score == 1.0
    assert callback.best_model_path == str(tmp_path / "out" / "best.ckpt")
    assert step_in(tmp_path / "out" / "best.ckpt") == 4
    assert not (tmp_path / "other" / "best.ckpt").exists()
    assert callback.adapter_path == tmp_path / "out" / "adapter"


def test_a_resumed_run_replaces_the_best_by_a_better_state(tmp_path):
    make_trainer(tmp_path, AdapterCheckpoint(tmp_path / "out"), max_epochs=2).fit(
        Scripted([2.0, 1.0]), Batches(2), Batches(1)
    )
    callback = AdapterCheckpoint(tmp_path / "other")
    make_trainer(tmp_path, callback, max_epochs=4).fit(
        Scripted([3.0, 0.5]), Batches(2), Batches(1), ckpt_path=tmp_path / "out" / "last.ckpt"
    )
    assert callback.best_model_path == str(tmp_path / "other" / "best.ckpt")
    assert step_in(callback.best_model_path) == 8
    assert step_in(tmp_path / "out" / "best.ckpt") == 4  # the first run's is its own
    assert (tmp_path / "other" / "adapter" / "adapter_model.safetensors").exists()


@each_module
def test_the_trainer_evaluates_the_best_and_the_last(tmp_path, build):
    module = build()
    trainer = make_trainer(tmp_path, AdapterCheckpoint(tmp_path / "out"), max_epochs=2)
    trainer.fit(module, Batches(3), Batches(2))
    final = logits(root_of(module).eval())
    shake(module)
    trainer.validate(module, Batches(2), ckpt_path="last", verbose=False)
    assert torch.equal(logits(root_of(module).eval()), final)
    best = read(tmp_path / "out" / "best.ckpt")
    found = trainer.validate(module, Batches(2), ckpt_path="best", verbose=False)[0]["val/loss"]
    score = best["callbacks"][trainer.checkpoint_callback.state_key]["best_model_score"]
    assert found == pytest.approx(score.item(), rel=1e-6)


# --- a checkpoint of something else --------------------------------------------------------------

RESHAPED = LoRA(rank=3)
FEWER = LoRA(rank=4, targets=["q_proj", "v_proj"])


@each_module
@pytest.mark.parametrize(
    ("saved", "here", "message"),
    [
        (FEWER, SPEC, r"lacks '[\w.]+\.k_proj\.adapter\.lora_A'"),
        (SPEC, FEWER, r"holds '[\w.]+\.adapter\.lora_A'.* not trained here"),
        (
            SPEC,
            RESHAPED,
            # torch refuses it in a foreign module, before a callback is asked
            r"lora_A' has shape \(4, 32\) in the checkpoint and \(3, 32\) here"
            r"|size mismatch for net\.[\w.]+\.adapter\.lora_A: .*\[4, 32\].*\[3, 32\]",
        ),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_a_checkpoint_of_another_adapter_is_refused_by_key(tmp_path, build, saved, here, message):
    make_trainer(tmp_path, AdapterCheckpoint(tmp_path / "out")).fit(build(saved), Batches(2))
    module = build(here)
    trainer = make_trainer(tmp_path, AdapterCheckpoint(tmp_path / "other"), max_epochs=2)
    with pytest.raises((ValueError, RuntimeError), match=message):
        trainer.fit(module, Batches(2), ckpt_path=tmp_path / "out" / "last.ckpt")
    assert trainer.global_step == 0


@each_module
def test_a_checkpoint_without_one_tensor_is_refused_by_key(tmp_path, build):
    make_trainer(tmp_path, AdapterCheckpoint(tmp_path / "out")).fit(build(), Batches(2))
    checkpoint = read(tmp_path / "out" / "last.ckpt")
    key = sorted(checkpoint["state_dict"])[0]
    del checkpoint["state_dict"][key]
    torch.save(checkpoint, tmp_path / "less.ckpt")
    trainer = make_trainer(tmp_path, AdapterCheckpoint(tmp_path / "other"), max_epochs=2)
    with pytest.raises(ValueError, match=f"the checkpoint lacks '{key}'"):
        trainer.fit(build(), Batches(2), ckpt_path=tmp_path / "less.ckpt")


@each_module
def test_an_adapter_of_a_longer_list_of_tensors_is_refused_by_key(tmp_path, build):
    make_trainer(tmp_path, AdapterCheckpoint(tmp_path / "out")).fit(build(), Batches(2))
    checkpoint = read(tmp_path / "out" / "last.ckpt")
    checkpoint["state_dict"]["net.lm_head.adapter.lora_A"] = torch.zeros(4, 32)
    torch.save(checkpoint, tmp_path / "more.ckpt")
    trainer = make_trainer(tmp_path, AdapterCheckpoint(tmp_path / "other"), max_epochs=2)
    with pytest.raises(ValueError, match=r"holds 'net\.lm_head\.adapter\.lora_A'"):
        trainer.fit(build(), Batches(2), ckpt_path=tmp_path / "more.ckpt")


def test_a_full_checkpoint_of_the_same_module_can_be_resumed(tmp_path):
    """Written before our callback was in use, base included."""
    first = seeded(Foreign)
    callback = ModelCheckpoint(tmp_path / "full", save_last=True)
    make_trainer(tmp_path, callback).fit(first, Batches(2))
    assert "net.lm_head.weight" in read(tmp_path / "full" / "last.ckpt")["state_dict"]
    second = seeded(Foreign, 1)
    trainer = make_trainer(tmp_path, AdapterCheckpoint(tmp_path / "out"), max_epochs=1)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        trainer.fit(second, Batches(2), ckpt_path=tmp_path / "full" / "last.ckpt")
    expected = trainable(first)
    assert all(torch.equal(expected[name], value) for name, value in trainable(second).items())


# --- a save that fails ---------------------------------------------------------------------------


class Fails(Callback):
    """From a step on, one function that writing needs raises as on a full disk."""

    def __init__(self, monkeypatch, owner, name, step):
        self.arguments = monkeypatch, owner, name
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            monkeypatch, owner, name = self.arguments
            monkeypatch.setattr(owner, name, self._fail)

    @staticmethod
    def _fail(first, second=None, *_, **__):
        if hasattr(second, "write"):
            second.write(b"half a file")
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("owner", "name"), [(torch, "save"), (os, "fsync"), (os, "replace")])
@each_module
def test_a_save_that_fails_leaves_the_previous_one(tmp_path, monkeypatch, build, owner, name):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        trainer = make_trainer(
            tmp_path,
            Fails(patch, owner, name, step=3),
            AdapterCheckpoint(out, every_n_train_steps=2),
        )
        with pytest.raises(OSError, match="No space left"):
            trainer.fit(seeded(build), Batches(6))
    assert step_in(out / "last.ckpt") == 2
    assert [path.name for path in out.glob("*.ckpt")] == ["last.ckpt"]
    trainer = make_trainer(tmp_path, AdapterCheckpoint(out))
    trainer.fit(build(), Batches(6), ckpt_path=out / "last.ckpt")
    assert trainer.global_step == step_in(out / "last.ckpt") == 6
    assert {path.name for path in out.iterdir()} == {"last.ckpt", "adapter"}


def test_no_file_under_construction_is_called_a_checkpoint(tmp_path, monkeypatch):
    """Whatever looks for *.ckpt while a save is under way must find complete files only."""
    real, names = Trainer.save_checkpoint, []

    def save(self, filepath, *args, **options):
        names.append(Path(filepath).name)
        return real(self, filepath, *args, **options)

    monkeypatch.setattr(Trainer, "save_checkpoint", save)
    callback = AdapterCheckpoint(tmp_path / "out", every_n_train_steps=1)
    make_trainer(tmp_path, callback).fit(Foreign(), Batches(2), Batches(1))
    assert len(names) == 3
    assert not any(name.endswith(".ckpt") for name in names)


# --- where it is written -------------------------------------------------------------------------


def written_below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("logger", [True, False])
def test_nothing_is_written_outside_the_root_folder(tmp_path, monkeypatch, logger):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    loggers = CSVLogger(root) if logger else False
    trainer = make_trainer(root, AdapterCheckpoint(), logger=loggers, log_every_n_steps=1)
    trainer.fit(ours(), Batches(2), Batches(1))
    assert not written_below(elsewhere)
    found = {Path(name).name for name in written_below(root)}
    assert {"last.ckpt", "best.ckpt", "adapter_config.json", "adapter_model.safetensors"} <= found
    assert Path(trainer.checkpoint_callback.best_model_path).is_relative_to(root)
    assert Path(trainer.checkpoint_callback.last_model_path).is_relative_to(root)
    assert trainer.checkpoint_callback.adapter_path.is_relative_to(root)


def test_fast_dev_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(tmp_path, AdapterCheckpoint(every_n_train_steps=1), fast_dev_run=True)
    trainer.fit(ours(), Batches(2), Batches(1))
    assert not written_below(tmp_path)


def test_evaluation_alone_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_trainer(tmp_path, AdapterCheckpoint()).validate(ours(), Batches(2), verbose=False)
    assert not written_below(tmp_path)


def test_adapters_on_the_module_itself_are_saved_as_one_folder_that_loads(tmp_path):
    """Small networks keep their layers on the LightningModule, without a model in between."""

    class Direct(LightningModule):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 1)

        def training_step(self, batch, batch_idx):
            return self.second(self.first(batch).relu()).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    class Inputs:
        def __iter__(self):
            return iter(torch.ones(2, 3, 8))

        def __len__(self):
            return 2

    module, fresh = Direct(), Direct()
    attach(module, LoRA(rank=1, targets=["first", "second"]))
    make_trainer(tmp_path, AdapterCheckpoint(tmp_path / "out")).fit(module, Inputs())
    assert load_adapter(fresh, tmp_path / "out" / "adapter") == ["first", "second"]
    expected = trainable(module)
    assert all(torch.equal(expected[name], value) for name, value in trainable(fresh).items())


def test_what_is_trained_beside_the_adapters_is_said_not_to_be_in_the_folder(tmp_path):
    module = Foreign()
    module.net.lm_head.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"'lm_head.weight' and 0 more.*`modules_to_save`"):
        make_trainer(tmp_path, AdapterCheckpoint(tmp_path / "out")).fit(module, Batches(2))
    assert "net.lm_head.weight" in read(tmp_path / "out" / "last.ckpt")["state_dict"]
    module = Foreign(LoRA(rank=2, modules_to_save=["lm_head"]))
    make_trainer(tmp_path, AdapterCheckpoint(tmp_path / "out")).fit(module, Batches(2))


class Towers(Foreign):
    """Several models in a container, each adapted by settings of its own."""

    def __init__(self, *specs):
        super().__init__()
        detach(self.net)
        self.net = nn.ModuleList(llama(seed) for seed in range(len(specs)))
        for one, spec in zip(self.net, specs, strict=True):
            attach(one.train(), spec)

    def forward(self, batch):
        return sum(one(batch["input_ids"]).logits for one in self.net)


@pytest.mark.parametrize("specs", [(LoRA(rank=2, alpha=4), LoRA(rank=2, alpha=8)), (SPEC, DoRA())])
def test_models_in_a_container_have_a_folder_each_that_loads(tmp_path, specs):
    module = Towers(*specs)
    make_trainer(tmp_path, AdapterCheckpoint(tmp_path / "out")).fit(module, Batches(4), Batches(1))
    for seed, one in enumerate(module.net):
        fresh = llama(seed)
        load_adapter(fresh, tmp_path / "out" / "adapter" / f"net.{seed}")
        assert torch.equal(logits(fresh.eval()), logits(one.eval()))
    resumed, last = Towers(*specs), tmp_path / "out" / "last.ckpt"
    make_trainer(tmp_path, AdapterCheckpoint(tmp_path / "out"), max_epochs=2).fit(
        resumed, Batches(4), Batches(1), ckpt_path=last
    )


def test_a_monitor_that_is_never_logged_is_an_error_that_lists_what_is(tmp_path):
    from lightning.pytorch import LightningModule, Trainer
    from torch import nn
    from torch.utils.data import DataLoader

    from lit_adapters import AdapterCheckpoint, LoRA, attach

    class Foreign(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4))
            attach(self.net, LoRA(rank=2, targets=["0"]))

        def training_step(self, batch):
            return self.net(batch).sum()

        def validation_step(self, batch):
            self.log("val_loss", self.net(batch).sum())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = DataLoader(torch.ones(2, 4))
    options = {"max_epochs": 1, "logger": False, "enable_progress_bar": False}
    trainer = Trainer(
        default_root_dir=tmp_path, callbacks=[AdapterCheckpoint()], accelerator="cpu", **options
    )
    with pytest.raises(ValueError, match="monitor='val/loss'.*val_loss.*monitor=None"):
        trainer.fit(Foreign(), data, data)
