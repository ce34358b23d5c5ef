"""The data module under a trainer; above all: what comes after a resume."""

import json
import string
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lit_adapters import AlpacaDataModule, InstructionDataModule
from lit_adapters.data import alpaca_prompt
from tests.data.word_tokenizer import EOS, word_tokenizer

pytestmark = [
    # Lightning 2.6 on torch 2.13: any trainer with any data raises this.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    # The runs that resume here write no checkpoints of their own.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]

SHARED = Path(__file__).resolve().parents[2] / "shared"
LETTERS = string.ascii_lowercase
RECORDS = [
    {"prompt": LETTERS[i % 26], "completion": " ".join(LETTERS[: 1 + (5 * i) % 7])}
    for i in range(26)
]


class Recorder(LightningModule):
    """Keeps the batches it trains on; its one weight makes it trainable."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []
        self.tokenizer = word_tokenizer()

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch["input_ids"].tolist()))
        return (self.weight * batch["labels"].float().mean()).sum()

    def validation_step(self, batch, batch_idx):
        pass

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["trained_batches"] = len(self.seen)


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, RECORDS)))
    return str(file)


def make_data(source, **settings):
    return InstructionDataModule(source, **{"batch_size": 4, "val_size": 2, **settings})


def make_trainer(folder, callbacks=(), **settings):
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        callbacks=list(callbacks),
        **{"max_epochs": 3, **settings},
    )


def every_step(folder, **settings):
    return ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1, **settings)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "limits",
    [{}, {"limit_train_batches": 5}, {"max_epochs": -1, "max_steps": 8}, {"val_check_interval": 3}],
    ids=str,
)
def test_resume_goes_on_with_the_very_next_batch(source, tmp_path, num_workers, accumulate, limits):
    settings = {"accumulate_grad_batches": accumulate, **limits}
    folder = tmp_path / "checkpoints"
    whole = Recorder()
    trainer = make_trainer(tmp_path, [every_step(folder)], **settings)
    trainer.fit(whole, make_data(source, num_workers=num_workers))

    files = sorted(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    epochs, continued = set(), 0
    for file in files[:: 3 if num_workers else 1]:
        checkpoint = torch.load(file, weights_only=True)
        rest = Recorder()
        trainer = make_trainer(tmp_path, **settings)
        trainer.fit(rest, make_data(source, num_workers=num_workers), ckpt_path=file)
        assert rest.seen == whole.seen[checkpoint["trained_batches"] :], file.name
        epochs.add(checkpoint["epoch"])
        continued += bool(rest.seen)
    assert {0, 1} <= epochs
    assert continued >= len(epochs)


@pytest.mark.parametrize(
    "settings",
    [
        {"every_n_epochs": 1, "save_on_train_epoch_end": True},
        {"every_n_epochs": 1, "save_on_train_epoch_end": False},  # after validation
    ],
    ids=str,
)
def test_resume_from_the_end_of_an_epoch_begins_the_next(source, tmp_path, settings):
    folder = tmp_path / "checkpoints"
    whole = Recorder()
    callback = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, **settings)
    make_trainer(tmp_path, [callback]).fit(whole, make_data(source))
    for epoch in (0, 1):
        rest = Recorder()
        file = folder / f"epoch={epoch}.ckpt"
        make_trainer(tmp_path).fit(rest, make_data(source), ckpt_path=file)
        assert rest.seen == whole.seen[6 * (epoch + 1) :]


def test_resume_after_a_failed_step_repeats_its_batch(source, tmp_path):
    """The failed batch was fetched but not trained: a loader's own count would skip it."""

    class Failing(Recorder):
        def training_step(self, batch, batch_idx):
            if len(self.seen) == 8:
                raise RuntimeError("out of memory")
            return super().training_step(batch, batch_idx)

    class Saving(Callback):
        def on_exception(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "failed.ckpt")

    whole, failing, rest = Recorder(), Failing(), Recorder()
    make_trainer(tmp_path).fit(whole, make_data(source))
    with pytest.raises(RuntimeError, match="out of memory"):
        make_trainer(tmp_path, [Saving()]).fit(failing, make_data(source))
    make_trainer(tmp_path).fit(rest, make_data(source), ckpt_path=tmp_path / "failed.ckpt")
    assert failing.seen + rest.seen == whole.seen


def test_resume_with_other_settings_is_warned_about(source, tmp_path):
    folder = tmp_path / "checkpoints"
    make_trainer(tmp_path, [every_step(folder)], max_steps=2).fit(Recorder(), make_data(source))
    with pytest.warns(UserWarning, match="epoch 0 is not the one of the checkpoint"):
        make_trainer(tmp_path, max_steps=3).fit(
            Recorder(), make_data(source, seed=1), ckpt_path=folder / "step=2.ckpt"
        )


def test_order_depends_on_neither_the_global_seed_nor_the_loader_settings(source, tmp_path):
    runs = []
    for seed, num_workers in ((1, 0), (2, 2)):
        seed_everything(seed, verbose=False)
        module = Recorder()
        before = torch.get_rng_state()
        make_trainer(tmp_path, max_epochs=2).fit(module, make_data(source, num_workers=num_workers))
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(module.seen)
    assert runs[0] == runs[1]
    assert [ids for epoch, _, ids in runs[0] if epoch] != [ids for e, _, ids in runs[0] if not e]


def test_iterating_by_hand_starts_at_the_beginning_and_leaves_the_fit_alone(source, tmp_path):
    class Peeking(Callback):
        def on_train_batch_end(self, trainer, *_):
            heads.append(next(iter(trainer.datamodule.train_dataloader()))["input_ids"].tolist())

    heads, peeked, plain = [], Recorder(), Recorder()
    data = make_data(source)
    make_trainer(tmp_path, [Peeking()]).fit(peeked, data)
    make_trainer(tmp_path).fit(plain, make_data(source))
    assert peeked.seen == plain.seen
    assert heads == [plain.seen[0][2]] * len(plain.seen)
    assert len(list(data.train_dataloader())) == 6


def test_reloading_every_epoch_changes_nothing(source, tmp_path):
    plain, reloading = Recorder(), Recorder()
    make_trainer(tmp_path).fit(plain, make_data(source))
    make_trainer(tmp_path, reload_dataloaders_every_n_epochs=1).fit(reloading, make_data(source))
    assert plain.seen == reloading.seen


def test_overfitting_repeats_the_same_batches(source, tmp_path):
    module = Recorder()
    make_trainer(tmp_path, overfit_batches=2).fit(module, make_data(source))
    first, second = ([ids for e, _, ids in module.seen if e == epoch] for epoch in (0, 1))
    assert len(first) == 2
    assert first == second


def test_devices_share_the_data(source):
    shares = []
    for rank in (0, 1):
        data = make_data(source, tokenizer=word_tokenizer(), batch_size=2)
        data.trainer = SimpleNamespace(
            distributed_sampler_kwargs={"rank": rank, "num_replicas": 2}, train_dataloader=None
        )
        rows = [data.sequences(batch) for batch in data.train_dataloader()]
        shares.append([[part["input_ids"].tolist() for part in row] for row in rows])
    alone = make_data(source, tokenizer=word_tokenizer()).train_dataloader()
    together = [sorted(a + b) for a, b in zip(*shares, strict=True)]
    assert together == [
        sorted(
            ids[mask.bool()].tolist()
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        )
        for batch in alone
    ]


def test_evaluation_and_prediction_keep_the_order_of_the_data(source, tmp_path):
    data, module = make_data(source, val_size=7), Recorder()
    trainer = make_trainer(tmp_path)
    trainer.validate(module, data, verbose=False)
    trainer.test(module, data, verbose=False)
    rows = [row for batch in trainer.predict(module, data) for row in batch]
    own = data.examples("test")
    assert [row["index"] for row in rows] == list(range(len(own)))
    assert [(row["prompt"], row["reference"]) for row in rows] == [
        (example.prompt, example.response) for example in own
    ]
    assert data.examples("test") == data.examples("validation")


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_settings_that_leave_no_evaluation(source, tmp_path):
    data = make_data(source, val_size=0, train_limit=5)
    make_trainer(tmp_path, max_epochs=1).fit(Recorder(), data)
    assert data.reports["train"].examples == 5
    with pytest.raises(ValueError, match="neither a test nor a validation split"):
        make_trainer(tmp_path).test(Recorder(), data)
    with pytest.raises(ValueError, match="train_limit 0 is below 1"):
        make_data(source, train_limit=0)


def test_setup_tokenises_once_per_tokenizer_and_reports(source, caplog):
    data = make_data(source, tokenizer=word_tokenizer(pad=False))
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        data.setup("fit")
        data.setup("fit")
    messages = [r.getMessage() for r in caplog.records if "examples kept" in r.getMessage()]
    assert [message.split("): ")[1][:8] for message in messages] == ["24 of 24", "2 of 2 e"]
    batch = next(iter(data.train_dataloader()))
    assert (batch["input_ids"][batch["attention_mask"] == 0] == EOS).all()
    data.tokenizer = word_tokenizer(bos=False)
    lengths = [
        part["input_ids"].shape[0] for b in data.val_dataloader() for part in data.sequences(b)
    ]
    assert max(lengths) == data.reports["validation"].longest
    assert set(data.reports) == {"validation"}


def test_tokens_are_made_again_when_the_tokenizer_has_learnt_some(source):
    """As from an adapter's `new_tokens`, after the data was looked at."""
    tokenizer = word_tokenizer()
    data = make_data(source, tokenizer=tokenizer)
    before = data.tokens("train")
    new = len(tokenizer)
    tokenizer.add_tokens(["a b"])
    assert not any(new in one["input_ids"] for one in before)
    assert any(new in one["input_ids"] for one in data.tokens("train"))


def test_a_missing_tokenizer_is_an_error_with_the_remedy(source, tmp_path):
    with pytest.raises(ValueError, match=r"there is no trainer; give InstructionDataModule\(token"):
        make_data(source).setup("fit")
    module = Recorder()
    module.tokenizer = None
    with pytest.raises(ValueError, match="Recorder has none"):
        make_trainer(tmp_path).fit(module, make_data(source))


def test_hyperparameters_are_plain_and_rebuild_the_module(source, tmp_path):
    assert "tokenizer" not in make_data(source, tokenizer=word_tokenizer()).hparams
    folder = str(tmp_path / "words")
    word_tokenizer().save_pretrained(folder)
    data = AlpacaDataModule(source, tokenizer=folder, max_length=9)
    assert all(isinstance(value, str | int | float | None) for value in data.hparams.values())
    copy = AlpacaDataModule(**data.hparams)
    assert (copy.format, copy.max_length) == ("alpaca", 9)
    plain = InstructionDataModule(source, tokenizer=folder, val_size=2)
    plain.setup()
    assert plain.reports["train"].examples == 24
    assert plain.hparams["tokenizer"] == folder


def test_the_embedded_data_needs_no_tokenizer_to_be_read():
    data = AlpacaDataModule(train_limit=3)
    examples = data.examples("train")
    assert len(examples) == 3
    assert examples[0].prompt.startswith(alpaca_prompt("x")[:40])
    assert all(example.response and example.task for example in data.examples("test"))


@pytest.mark.skipif(not SHARED.exists(), reason="real files are not here")
def test_real_files_make_batches(tmp_path):
    data = AlpacaDataModule(
        str(SHARED / "data" / "alpaca_en_demo.json"),
        tokenizer=str(SHARED / "models" / "stories260k"),
        batch_size=16,
        max_length=256,
    )
    data.setup("fit")
    report = data.reports["train"]
    assert report.examples == 949
    rows = tokens = width = 0
    for batch in data.train_dataloader():
        rows += batch["input_ids"].shape[0]
        width += batch["input_ids"].numel()
        tokens += int(batch["attention_mask"].sum())
        assert batch["input_ids"].shape[1] <= 256
    assert rows == report.kept
    assert tokens / width > 0.9
