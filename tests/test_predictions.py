"""`predict` answers whole prompts, each once, in order, however often it is broken off."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lit_adapters import AdapterFineTuneModule, InstructionDataModule, LoRA
from lit_adapters.callbacks import PredictionWriter
from lit_adapters.callbacks.prediction_parts import PredictionParts
from lit_adapters.generation import generate
from lit_adapters.metrics import BLEU, ROUGE, SlotF1
from tests.data.word_tokenizer import word_tokenizer
from tests.metrics.test_base import some_answers
from tests.models import gpt2, llama, shake

ROOT = Path(__file__).resolve().parents[1]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
RECORDS = [
    {"prompt": " ".join(LETTERS[i : i + 2 + i % 4]), "completion": LETTERS[i], "task": "xy"[i % 2]}
    for i in range(10)
]
TOKENIZER = word_tokenizer()
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Failing(AdapterFineTuneModule):
    """Fails at its n-th batch; counts prompts."""

    fails_at = math.inf

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.answered = []

    def predict_step(self, batch, batch_idx):
        if batch_idx >= self.fails_at:
            raise KeyError("the power is gone")
        self.answered += [row["index"] for row in batch]
        return super().predict_step(batch, batch_idx)


def make(seed=1, **settings):
    settings = {"max_new_tokens": 5, **settings}
    base = llama(vocab_size=len(TOKENIZER))
    torch.manual_seed(seed)
    module = Failing(base, LoRA(rank=4), tokenizer=TOKENIZER, **settings)
    module.configure_model()
    shake(module.model, seed=seed)
    return module


def make_data(folder, records=RECORDS, **settings):
    for split in ("train", "test"):
        lines = "\n".join(map(json.dumps, records))
        (folder / f"{split}.jsonl").write_text(lines)
    return InstructionDataModule(str(folder), val_size=2, **{"batch_size": 2, **settings})


def predict(folder, module, data=None, metrics=None, **settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    callback = PredictionWriter(str(folder / "out.jsonl"), metrics)
    trainer = Trainer(
        accelerator="cpu", default_root_dir=folder, callbacks=[callback], **quiet, **settings
    )
    trainer.predict(module, data or make_data(folder), return_predictions=False)
    return read(folder)


def read(folder):
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def break_off(folder, module, at):
    module.fails_at = at
    with pytest.raises(KeyError, match="power"):
        predict(folder, module)
    module.fails_at = math.inf
    module.answered.clear()


def names(folder):
    return {path.name for path in folder.iterdir() if path.name.startswith("out")}


def test_every_record_is_answered_in_order_and_scored(tmp_path, capsys):
    module = make()
    rows = predict(tmp_path, module, metrics=[ROUGE()])
    expected = generate(module.model, TOKENIZER, [r["prompt"] for r in RECORDS], 5)
    for index, (row, record, answer) in enumerate(zip(rows, RECORDS, expected, strict=True)):
        scores = row.pop("metrics")
        assert row == {
            "index": index,
            "task": record["task"],
            "prompt": record["prompt"],
            "prediction": answer,
            "reference": record["completion"],
        }
        assert scores.keys() == {"exact_match", "rouge1", "rouge2", "rougeL"}
        assert scores["exact_match"] == (answer.split() == record["completion"].split())
    found = json.loads((tmp_path / "out.scores.json").read_text())["answers"]
    assert {task: values["rouge1"]["answers"] for task, values in found.items()} == {"x": 5, "y": 5}
    shown = capsys.readouterr().out
    assert "10 predictions written to" in shown
    assert "rouge1" in shown
    assert names(tmp_path) == {"out.jsonl", "out.scores.json"}


def test_predictions_of_several_sources_say_their_source_and_are_scored_by_it(tmp_path, capsys):
    for name, records in (("one", RECORDS[:4]), ("two", RECORDS[4:])):
        (tmp_path / name).mkdir()
        make_data(tmp_path / name, records)
    data = InstructionDataModule([str(tmp_path / "one"), str(tmp_path / "two")], val_size=2)
    rows = predict(tmp_path, make(), data)
    assert [row["source"] for row in rows] == ["one"] * 4 + ["two"] * 6
    found = json.loads((tmp_path / "out.scores.json").read_text())["answers"]
    counts = {name: values["exact_match"]["answers"] for name, values in found.items()}
    assert counts == {"x": 5, "y": 5, "source/one": 4, "source/two": 6}
    assert "source/two" in capsys.readouterr().out


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_broken_run_goes_on_where_it_was(tmp_path, capsys, at):
    module = make()
    whole = predict(tmp_path, module)
    (tmp_path / "out.jsonl").write_text("of an earlier run\n")
    break_off(tmp_path, module, at)
    assert (tmp_path / "out.jsonl").read_text() == "of an earlier run\n"
    assert "the same command goes on" in capsys.readouterr().out
    assert predict(tmp_path, module, make_data(tmp_path, batch_size=3)) == whole
    assert module.answered == list(range(2 * at, 10))
    assert names(tmp_path) == {"out.jsonl", "out.scores.json"}


def test_a_row_that_was_cut_off_is_answered_again(tmp_path):
    module = make()
    whole = predict(tmp_path, module)
    break_off(tmp_path, module, 3)
    part = tmp_path / "out.jsonl.part0"
    part.write_text(part.read_text()[:-9])
    assert predict(tmp_path, module) == whole
    assert module.answered == [5, 6, 7, 8, 9]


def test_rows_of_another_number_of_ranks_are_taken_over(tmp_path):
    module = make()
    whole = predict(tmp_path, module)
    break_off(tmp_path, module, 4)
    header, *rows = (tmp_path / "out.jsonl.part0").read_text().splitlines()
    (tmp_path / "out.jsonl.part0").write_text("\n".join([header, *rows[::2], ""]))
    (tmp_path / "out.jsonl.part1").write_text("\n".join([header, *rows[1::2], ""]))
    assert predict(tmp_path, module) == whole
    assert module.answered == [8, 9]


@pytest.mark.parametrize("change", ["weights", "length", "data", "limit", "tokens", "damage"])
def test_what_was_begun_otherwise_is_begun_again(tmp_path, capsys, change):
    module = make()
    break_off(tmp_path, module, 2)
    data, settings = None, {}
    if change == "weights":
        with torch.no_grad():
            next(p for p in module.model.parameters() if p.requires_grad)[-1, -1] += 0.1
    elif change == "length":
        module.max_new_tokens = 4
    elif change == "data":
        data = make_data(tmp_path, [*RECORDS[:9], {**RECORDS[9], "completion": "z"}])
    elif change == "tokens":  # the same text to another tokenizer
        data = make_data(tmp_path, tokenizer=word_tokenizer(bos=False))
    elif change == "limit":
        settings = {"limit_predict_batches": 4}
    else:
        (tmp_path / "out.jsonl.part0").write_bytes(b"\xff\xfe not ours\n{}\n")
    rows = predict(tmp_path, module, data, **settings)
    assert (
        module.answered == list(range(8 if change == "limit" else 10)) == [r["index"] for r in rows]
    )
    assert "is left out" in capsys.readouterr().out
    assert names(tmp_path) == {"out.jsonl", "out.scores.json"}


def test_rows_missing_from_a_folder_that_machines_do_not_share_are_an_error(tmp_path):
    callback = PredictionWriter(str(tmp_path / "out.jsonl"))
    parts = PredictionParts(tmp_path / "out.jsonl", "key")
    row = {"index": 0, "task": "", "prompt": "a", "prediction": "b", "reference": "c"}
    parts.start_over([row])
    with pytest.raises(RuntimeError, match="1 of 2 predictions.*other machines.*share"):
        callback._finish(parts, 2)
    assert parts.read() == {0: row}
    assert not (tmp_path / "out.jsonl").exists()


def test_prompts_are_whole_whatever_the_longest_sequence_of_training(tmp_path):
    rows = predict(tmp_path, make(), make_data(tmp_path, max_length=2))
    assert [row["prompt"] for row in rows] == [record["prompt"] for record in RECORDS]
    assert [row["reference"] for row in rows] == [record["completion"] for record in RECORDS]


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_prompt_beyond_the_positions_of_the_model_loses_its_beginning(build):
    model = build(vocab_size=len(TOKENIZER))
    long = " ".join(LETTERS[i % 26] for i in range(80))
    kept = " ".join(long.split()[-(64 - 4 - 1) :])  # beside the answer and BOS
    with pytest.warns(UserWarning, match="more than 60 tokens lose their beginning.*64 positions"):
        found = generate(model, TOKENIZER, [long, "a b"], 4)
    assert found == generate(model, TOKENIZER, [kept, "a b"], 4)


def test_a_source_without_test_records_cannot_be_predicted(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    data = InstructionDataModule(str(tmp_path), val_size=0)
    with pytest.raises(ValueError, match="neither a test nor a validation split"):
        predict(tmp_path, make(), data)


def test_other_loaders_are_refused_by_name(tmp_path):
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[PredictionWriter()],
        **{"enable_progress_bar": False, "enable_model_summary": False, "logger": False},
    )
    with pytest.raises(TypeError, match="prompts of an InstructionDataModule.*on a FitLoader"):
        trainer.predict(make(), make_data(tmp_path, tokenizer=TOKENIZER).train_dataloader())


def test_a_module_that_cannot_be_recognised_again_is_refused_by_name(tmp_path):
    class Foreign(LightningModule):
        def predict_step(self, batch, batch_idx):
            return [{**row, "prediction": ""} for row in batch]

    with pytest.raises(TypeError, match="`max_new_tokens`.*Foreign lacks them"):
        predict(tmp_path, Foreign(), make_data(tmp_path, tokenizer=TOKENIZER))


RANK = """
import json, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
from lightning.pytorch import Trainer
from lit_adapters.callbacks import PredictionWriter
from lit_adapters.metrics import BLEU, ROUGE, SlotF1
from tests.metrics.test_base import some_answers
from tests.test_predictions import make, make_data
folder = Path(sys.argv[1])
callback = PredictionWriter(str(folder / "out.jsonl"))
trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", callbacks=[callback], logger=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
)
module, data = make(), make_data(folder)
trainer.predict(module, data, return_predictions=False)
validation = trainer.validate(module, data, verbose=False)[0]
rank = trainer.global_rank
scores = {}
for metric in (ROUGE(), BLEU(), SlotF1()):
    metric.update(some_answers()[:7] if rank else some_answers()[7:])
    scores.update(metric.compute())
report = {"answered": module.answered, "validation": validation, "scores": scores}
Path(folder, f"rank{rank}.json").write_text(json.dumps(report))
"""


def two_ranks(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder)],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **shared, "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in ranks]
    return [process.returncode for process in ranks], outputs


def test_two_ranks_answer_evaluate_and_score_what_one_does(tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    alone.mkdir()
    shared.mkdir()
    whole = predict(alone, make())
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(accelerator="cpu", default_root_dir=alone, **quiet)
    validation = trainer.validate(make(), make_data(alone), verbose=False)[0]

    break_off(shared, make(), 2)
    codes, outputs = two_ranks(shared)
    assert codes == [0, 0], outputs
    assert read(shared) == whole
    reports = [json.loads((shared / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert sorted(reports[0]["answered"] + reports[1]["answered"]) == [4, 5, 6, 7, 8, 9]
    scores = {}
    for metric in (ROUGE(), BLEU(), SlotF1()):
        metric.update(some_answers())
        scores.update(metric.compute())
    for report in reports:
        assert report["validation"] == pytest.approx(validation, rel=1e-6)
        assert report["scores"] == pytest.approx(scores, rel=1e-6)
