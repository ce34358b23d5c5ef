"""Answers before, while and after training: where they go, and that training never notices."""

import csv
import json

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.lr_scheduler import ConstantLR

from lit_adapters import (
    AdapterFineTuneModule,
    InstructionDataModule,
    LoRA,
    SampleGenerations,
)
from lit_adapters.generation import generate
from lit_adapters.metrics import ROUGE, SlotF1
from tests.data.word_tokenizer import word_tokenizer
from tests.models import llama

TOKENIZER = word_tokenizer()
LETTERS = "abcdefghijklmnopqrst"
RECORDS = [
    {"prompt": f"{a} | b", "completion": f"{a} {a}", "task": ("one", "two")[i % 2]}
    for i, a in enumerate(LETTERS)
]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Experiment logs directory"),
]


def fit(folder, callback, loggers=(), epochs=3, files=1, streaming=False, **settings):
    paths = [folder / f"pairs{number or ''}.jsonl" for number in range(files)]
    for number, path in enumerate(paths):
        path.write_text("\n".join(map(json.dumps, RECORDS[number::files])))
    data = InstructionDataModule(
        list(map(str, paths)), batch_size=4, val_size=6, streaming=streaming, max_length=64
    )
    torch.manual_seed(0)
    module = AdapterFineTuneModule(
        llama(vocab_size=len(TOKENIZER)),
        LoRA(rank=4, dropout=0.3),
        tokenizer=TOKENIZER,
        **({"lr_scheduler": lambda o: ConstantLR(o, 1.0)} if streaming else {}),
    )
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[callback] if callback else [],
        logger=list(loggers) or False,
        max_epochs=epochs,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **settings,
    )
    trainer.fit(module, data)
    return trainer, module, data


def rows_of(file):
    with file.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def samples(**settings):
    return SampleGenerations(**{"max_new_tokens": 3, "show": 2, **settings})


def test_the_same_prompts_are_answered_before_at_every_validation_and_after(tmp_path, capsys):
    _, module, _ = fit(tmp_path, samples())
    rows = rows_of(tmp_path / "samples.csv")
    assert [row["step"] for row in rows] == ["0", "0", "4", "4", "8", "8", "12", "12"]
    prompts = [row["prompt"] for row in rows]
    assert prompts == prompts[:2] * 4
    assert len(set(prompts)) == 2
    assert rows[0]["task"] != rows[1]["task"]
    last = rows[-2:]
    expected = generate(module.model, TOKENIZER, [row["prompt"] for row in last], 3)
    assert [row["answer"] for row in last] == expected
    assert {row["match"] for row in rows} <= {"True", "False"}
    assert capsys.readouterr().out.count("Answers after") == 2  # the third is "before and after"


def test_validations_without_answers(tmp_path, capsys):
    fit(tmp_path, samples(at_validation=False))
    assert [row["step"] for row in rows_of(tmp_path / "samples.csv")] == ["0", "0", "12", "12"]
    assert "Answers after" not in capsys.readouterr().out


def test_nothing_shown_is_nothing_answered_at_validations(tmp_path, capsys):
    fit(tmp_path, samples(show=0))
    assert not (tmp_path / "samples.csv").exists()
    assert "Answers after" not in capsys.readouterr().out


def test_a_stream_of_unknown_length_is_answered_at_validations(tmp_path):
    fit(tmp_path, samples(show=1), epochs=2, streaming=True)
    assert [row["step"] for row in rows_of(tmp_path / "samples.csv")] == ["0", "4", "8", "8"]


def test_training_does_not_notice(tmp_path):
    weights = []
    for callback in (None, samples(), samples(at_validation=False)):
        _, module, _ = fit(tmp_path, callback, val_check_interval=2)
        weights.append([p.detach().clone() for p in module.parameters() if p.requires_grad])
        assert module.model.training
    assert any(w.abs().max() > 0 for w in weights[0])
    for other in weights[1:]:
        assert all(map(torch.equal, weights[0], other))


def test_the_sanity_check_before_training_answers_nothing(tmp_path):
    fit(tmp_path, samples(show=1), epochs=2, num_sanity_val_steps=1)
    assert [row["step"] for row in rows_of(tmp_path / "samples.csv")] == ["0", "4", "8"]


def test_answers_are_texts_in_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="board", version="")
    fit(tmp_path, samples(), [logger], epochs=2)
    events = EventAccumulator(str(tmp_path / "board"), size_guidance={"tensors": 0})
    events.Reload()
    found = events.Tensors("samples/text_summary")
    assert [event.step for event in found] == [0, 4, 8]
    text = found[0].tensor_proto.string_val[0].decode()
    header, rule, *rows = text.splitlines()
    assert (header, rule) == ("| prompt | expected | answer |", "| --- | --- | --- |")
    assert len(rows) == 2
    assert all(row.count("|") == 4 for row in rows)  # the prompts' own bars are written otherwise
    assert (tmp_path / "board" / "samples.csv").exists()


def test_further_scores_are_printed_and_logged_beside_exact_match(tmp_path, capsys):
    logger = CSVLogger(tmp_path, name="log", version="")
    fit(tmp_path, samples(metrics=[ROUGE(), SlotF1()]), [logger], epochs=1)
    names = rows_of(tmp_path / "log" / "metrics.csv")[0].keys()
    for when in ("before", "after"):
        for name in ("exact_match", "rouge1", "rouge2", "rougeL"):
            assert {f"{name}/one/{when}", f"{name}/two/{when}"} <= names
    assert not any(name.startswith("slot_f1") for name in names)  # no reference is a call
    shown = capsys.readouterr().out
    assert "Exact match" in shown
    assert "rougeL" in shown


def test_without_further_scores_the_tables_are_those_of_exact_match(tmp_path, capsys):
    logger = CSVLogger(tmp_path, name="log", version="")
    fit(tmp_path, samples(), [logger], epochs=1)
    names = rows_of(tmp_path / "log" / "metrics.csv")[0].keys()
    assert {name for name in names if name.endswith(("/before", "/after"))} == {
        f"exact_match/{task}/{when}" for task in ("one", "two") for when in ("before", "after")
    }
    assert "Scores on held-out" not in capsys.readouterr().out


def test_answers_of_several_sources_are_scored_by_source_too(tmp_path, capsys):
    logger = CSVLogger(tmp_path, name="log", version="")
    trainer, module, data = fit(tmp_path, samples(), [logger], epochs=1, files=2)
    names = rows_of(tmp_path / "log" / "metrics.csv")[0].keys()
    assert {f"exact_match/source/pairs{n}/after" for n in ("", "1")} <= names
    assert "source/pairs1" in capsys.readouterr().out
    trainer.test(module, data, verbose=False)
    answers = json.loads((tmp_path / "log" / "test_scores.json").read_text())["answers"]
    counts = {name: values["exact_match"]["answers"] for name, values in answers.items()}
    assert counts["source/pairs"] == counts["source/pairs1"] == 3


@pytest.mark.parametrize("named", [True, False])
def test_test_writes_all_scores_for_scripts(tmp_path, named):
    trainer, module, data = fit(tmp_path, None, epochs=1)
    own = {"scores_file": str(tmp_path / "some" / "scores.json")} if named else {}
    trainer.callbacks = [samples(metrics=[ROUGE()], **own)]
    (measured,) = trainer.test(module, data, verbose=False)
    file = tmp_path / "some" / "scores.json" if named else tmp_path / "test_scores.json"
    found = json.loads(file.read_text())
    answers = found.pop("answers")
    assert found == pytest.approx(measured)
    assert found.keys() == {"test/loss", "test/perplexity", "test/token_accuracy"}
    assert answers.keys() == {"one", "two"}
    assert sum(values["exact_match"]["answers"] for values in answers.values()) == 6
    assert answers["one"].keys() == {"exact_match", "rouge1", "rouge2", "rougeL"}
