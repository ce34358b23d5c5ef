"""Packed, padded, by number or by tokens: the same training and the same evaluation."""

import json
import string

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lit_adapters import AdapterFineTuneModule, InitAdapters, LoRA, LoRAGA, PrefixTuning
from lit_adapters.datamodule import InstructionDataModule
from tests.data.word_tokenizer import word_tokenizer
from tests.models import llama, mistral, trainable

pytestmark = [
    # Lightning 2.6 on torch 2.13: any trainer with any data raises this.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    # The runs that resume here write no checkpoints of their own.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]

LETTERS = string.ascii_lowercase
RECORDS = [
    {"prompt": " ".join(LETTERS[i % 20 : i % 20 + 3]), "completion": " ".join(LETTERS[: 1 + i % 7])}
    for i in range(26)
]


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, RECORDS)))
    return str(file)


def make_data(source, **settings):
    return InstructionDataModule(source, **{"batch_size": 4, "val_size": 6, **settings})


def make_module(build=llama, **settings):
    return AdapterFineTuneModule(
        build(),
        **{"adapter": LoRA(rank=4), "tokenizer": word_tokenizer(), "max_new_tokens": 4, **settings},
    )


def make_trainer(folder, callbacks=(), **settings):
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        callbacks=list(callbacks),
        **{"max_epochs": 2, **settings},
    )


class Kinds(Callback):
    """Notes whether batches are packed, and the loss of each step."""

    def __init__(self):
        self.packed, self.losses = set(), []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.packed.add("position_ids" in batch)
        self.losses.append(outputs["loss"].item())


def start(trainer, build=llama, **settings):
    """A module whose adapters are the same in every run."""
    torch.manual_seed(0)
    return make_module(build, **settings)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("build", [llama, mistral])
def test_packed_batches_train_as_padded_ones(source, tmp_path, build, accumulate):
    runs = []
    for batching in ("auto", "padded"):
        kinds = Kinds()
        trainer = make_trainer(tmp_path, [kinds], accumulate_grad_batches=accumulate)
        module = start(trainer, build)
        data = make_data(source, batching=batching, group_by_length=False)  # or they differ
        trainer.fit(module, data)
        assert kinds.packed == {batching == "auto"}
        runs.append((kinds.losses, trainable(module.model)))
    (losses, weights), (others, expected) = runs
    assert losses == pytest.approx(others, rel=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)


def test_evaluation_is_the_same_under_any_batching(source, tmp_path):
    module, found = make_module(mistral), []
    for settings in (
        {"batching": "padded"},
        {"batching": "padded", "batch_tokens": 30},
        {},
        {"batch_size": 1},
        {"batch_size": 6},
        {"batch_tokens": 20},
    ):
        trainer = make_trainer(tmp_path)
        (values,) = trainer.validate(module, make_data(source, **settings), verbose=False)
        found.append(values)
    assert found[0].keys() == {"val/loss", "val/perplexity", "val/token_accuracy"}
    for values in found[1:]:
        assert values == pytest.approx(found[0], rel=1e-5)


def test_answers_are_the_same_under_any_batching(source, tmp_path):
    module, found = make_module(), []
    for settings in ({"batching": "padded"}, {}, {"batch_tokens": 40}):
        batches = make_trainer(tmp_path).predict(module, make_data(source, **settings))
        found.append([row for batch in batches for row in batch])
    assert len(found[0]) == 6
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_the_number_of_steps_is_known_in_advance(source, tmp_path):
    for settings in ({"batch_tokens": 25}, {"batch_tokens": 25, "batching": "padded"}):
        planned = []

        class Plan(Callback):
            def on_train_start(self, trainer, pl_module, planned=planned):
                planned.append(trainer.estimated_stepping_batches)

        trainer = make_trainer(tmp_path, [Plan()], max_epochs=3, accumulate_grad_batches=2)
        trainer.fit(make_module(), make_data(source, **settings))
        assert planned == [trainer.global_step]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("settings", [{}, {"batch_tokens": 25}], ids=str)
def test_packed_runs_resume_with_the_very_next_batch(source, tmp_path, settings, num_workers):
    class Recording(Kinds):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self.losses[-1] = (self.losses[-1], batch["input_ids"].tolist())

    def run(callbacks, **more):
        recording = Recording()
        trainer = make_trainer(tmp_path, [recording, *callbacks])
        module = start(trainer)
        trainer.fit(module, make_data(source, num_workers=num_workers, **settings), **more)
        return recording, trainable(module.model)

    saving = ModelCheckpoint(tmp_path / "saved", "{step}", save_top_k=-1, every_n_train_steps=1)
    whole, weights = run([saving])
    assert whole.packed == {True}
    steps = len(whole.losses)
    for step in (2, steps // 2 + 1):
        rest, final = run([], ckpt_path=tmp_path / "saved" / f"step={step}.ckpt")
        assert rest.losses == whole.losses[step:]
        assert all(torch.equal(final[name], value) for name, value in weights.items())


def test_gradients_for_the_start_are_the_same(source, tmp_path):
    found = []
    for batching in ("auto", "padded"):
        callback = InitAdapters(LoRAGA(), batches=3)
        trainer = make_trainer(tmp_path, [callback], max_steps=1)
        module = start(trainer, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
        trainer.fit(module, make_data(source, batching=batching, group_by_length=False))
        found.append(trainable(module.model))
    for name, value in found[1].items():
        # signs of singular vectors are free
        torch.testing.assert_close(found[0][name].abs(), value.abs(), rtol=1e-3, atol=1e-4)


def lines(caplog):
    return [r.getMessage() for r in caplog.records if "Batches are padded" in r.getMessage()]


def test_a_model_that_cannot_be_packed_is_padded_and_says_why_once(source, tmp_path, caplog):
    kinds = Kinds()
    trainer = make_trainer(tmp_path, [kinds])
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer.fit(make_module(adapter=PrefixTuning(length=2)), make_data(source))
    assert kinds.packed == {False}
    (line,) = lines(caplog)
    assert line.endswith("PrefixTuning puts something before the first sequence only.")
    with pytest.raises(ValueError, match="batching='packed', but PrefixTuning puts something"):
        make_trainer(tmp_path).fit(
            make_module(adapter=PrefixTuning(length=2)), make_data(source, batching="packed")
        )


class Foreign(LightningModule):
    """Somebody's own module around a model of transformers."""

    def __init__(self):
        super().__init__()
        self.model = llama().train()
        self.tokenizer = word_tokenizer()
        self.keys, self.losses = set(), []

    def training_step(self, batch, batch_idx):
        self.keys |= set(batch)
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_foreign_module_gets_packed_batches_only_if_it_asks(source, tmp_path, caplog):
    runs = {}
    for batching in ("auto", "packed"):
        module = Foreign()
        with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
            data = make_data(source, batching=batching, group_by_length=False)
            make_trainer(tmp_path, max_steps=4).fit(module, data)
        runs[batching] = module
    assert "attention_mask" in runs["auto"].keys
    assert "position_ids" in runs["packed"].keys
    assert lines(caplog) == [
        "Batches are padded, not packed: Foreign does not say whether its model keeps sequences "
        "apart."
    ]
    assert runs["packed"].losses == pytest.approx(runs["auto"].losses, rel=1e-5)


def test_an_unknown_way_to_batch_is_an_error_with_the_remedy(source):
    with pytest.raises(ValueError, match="'packing' is unknown; use 'auto', 'packed' or 'padded'"):
        make_data(source, batching="packing")


def test_memory_is_pinned_only_for_an_accelerator(source, tmp_path):
    data = make_data(source, tokenizer=word_tokenizer())
    assert data.train_dataloader().pin_memory is False
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(make_module(), data)
    assert trainer.train_dataloader.pin_memory is False


def test_tokens_are_kept_where_the_module_is_told_to(source, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("lit_adapters.data.cache.WORTH_IT", 0)
    folder = tmp_path / "tokens"
    batches = []
    for _ in range(2):
        data = make_data(source, tokenizer=word_tokenizer(), cache_dir=str(folder))
        with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
            batches.append([b["input_ids"].tolist() for b in data.train_dataloader()])
    assert batches[0] == batches[1]
    assert sum("Tokens are those of an earlier run" in r.getMessage() for r in caplog.records) == 1
    make_data(source, tokenizer=word_tokenizer(), cache_dir=None).setup("fit")
    assert len(list(folder.iterdir())) == 1
