"""Data that cannot be used: the error names file, place and remedy, and nothing is trained on it.

What `tests/data` has tried on its readers already is not tried again; here is the rest, and what a
user of the data module sees.
"""

import json
import sys

import pytest
from datasets import Dataset

from lit_adapters import AdapterFineTuneModule, LoRA
from lit_adapters.data import Example, Records, hold_out, read_splits, tokenise
from lit_adapters.data.batches import EvalOrder
from lit_adapters.datamodule import InstructionDataModule
from tests.data.word_tokenizer import BOS, EOS, A, word_tokenizer
from tests.models import gpt2, llama, snapshot
from tests.test_datamodule import Recorder, make_trainer

pytestmark = [pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")]

RECORDS = [{"prompt": "a b", "completion": "c"} for _ in range(20)]
LINES = "\n".join(map(json.dumps, RECORDS))


def data(file, **settings):
    settings = {"tokenizer": word_tokenizer(), "val_size": 2, "batch_size": 4, **settings}
    return InstructionDataModule(str(file), **settings)


def refused(file, *words, kind=ValueError, **settings):
    """Setting up fails in these words, each time, and leaves nothing that looks like data."""
    module = data(file, **settings)
    for _ in range(2):
        with pytest.raises(kind) as caught:
            module.setup("fit")
        message = str(caught.value)
        for word in (file, *words):
            assert str(word) in message, f"{word!r} is not in: {message[:500]}"
        assert len(message) < 1000, message[:1000]
        assert "\n" not in message
    assert module.reports.get("train") is None
    return message


# ---------------------------------------------------------------- ten files, each broken in its way

SAID = {"role": "assistant", "content": "b"}
TALKS = "\n".join([json.dumps({"messages": [{"role": "user", "content": "a"}, SAID]})] * 20)


def parquet(tmp_path):
    Dataset.from_list(RECORDS).to_parquet(tmp_path / "whole")
    return (tmp_path / "whole").read_bytes()[:-20]


BROKEN = {
    "a list that was cut off": ("a.json", "[\n{},\n", ["line 3", "malformed JSON", "correct"]),
    "a line that was cut off": ("a.jsonl", LINES[:-5], ["line 20", "malformed JSON"]),
    "latin-1": ("a.jsonl", (LINES + "é").encode("latin-1"), ["byte", "line 20", "iconv"]),
    "a comma without quotes": ("a.csv", "prompt,completion\na,b\na,b,c\n", ["line 3", "quote"]),
    "half a parquet": ("a.parquet", parquet, ["cannot be read as parquet", "is it whole"]),
    "a field is missing": ("a.jsonl", LINES + '\n\n{"prompt": ""}', ["line 22", "'completion'"]),
    "a number for a text": (
        "a.json",
        '[{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 3}]',
        ["record 2", "'completion' is int", "as a string"],
    ),
    "two formats in one file": (
        "a.jsonl",
        LINES + '\n{"instruction": "a", "output": "b"}',
        ["line 21", "'prompt' is missing", "format prompt_completion"],
    ),
    "a role that nobody has": (
        "a.jsonl",
        TALKS + '\n{"messages": [{"role": "narrator", "content": "a"}]}',
        ["line 21", "turn 1", "unknown role 'narrator'", "assistant"],
    ),
    "a question without an answer": (
        "a.jsonl",
        TALKS + '\n{"messages": [{"role": "user", "content": "a"}]}',
        ["line 21", "no turn of the assistant", "add the answer"],
    ),
    "a format of its own": ("a.jsonl", '{"q": "a", "a": "b"}', ["line 1", "'q', 'a'", "rename"]),
    "no answer within max_length": (
        "a.jsonl",
        json.dumps({"prompt": "a " * 600, "completion": "b"}),
        ["none of 1 examples has a trained token within max_length 512", "raise max_length"],
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_gives_one_clear_error(tmp_path, kind):
    name, content, words = BROKEN[kind]
    file = tmp_path / name
    content = content(tmp_path) if callable(content) else content
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(file, *words, val_size=0)


# ---------------------------------------------------------------- bytes and encodings

TEXT = '[{"prompt": "é", "completion": "b"}]'
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (TEXT.encode("utf-16"), ["UTF-16", "iconv -f utf-16 "]),
        (b"\xfe\xff" + TEXT.encode("utf-16-be"), ["UTF-16", "iconv -f utf-16 "]),
        (TEXT.encode("utf-16-le"), ["UTF-16", "iconv -f utf-16le"]),
        (TEXT.encode("utf-16-be"), ["UTF-16", "iconv -f utf-16be"]),
        (('[{"prompt": "a", "completion": "b"}]' * 200).encode("utf-16-le"), ["utf-16le"]),
        (b"\n\n" + TEXT.encode("latin-1"), ["byte 15", "iconv -f latin1", "line 3"]),
        (PICTURE, ["byte 0", "a binary file", ".jsonl"]),
        (b"\x1f\x8b\x08\x00" + bytes(range(200)), ["a binary file"]),
        (bytes(5000), ["byte 0", "a binary file"]),
        (b'[{"prompt": "a\x00", "completion": "b"}]', ["byte 14", "a binary file"]),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_bytes_that_are_no_utf8_are_named_for_what_they_look_like(tmp_path, content, words, suffix):
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(content)
    refused(file, "not UTF-8", *words)


def test_utf8_with_a_byte_order_mark_is_read(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(LINES.replace("a b", "é b"), encoding="utf-8-sig")
    assert data(file).examples("train")[0] == Example("é b", "c")


@pytest.mark.parametrize("content", ["", " ", "\n\n\t\r\n", "\ufeff", "\ufeff\n"])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_file_of_nothing_is_empty(tmp_path, content, suffix):
    file = tmp_path / f"a.{suffix}"
    file.write_text(content, encoding="utf-8")
    refused(file, "is empty; expected at least one record")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", LINES + "\n" + "[" * 100_000, ["line 21", "nested too deeply"]),
        ("a.json", "[" * 100_000, ["nested too deeply"]),
        ("a.jsonl", '\n{"prompt": ' + "9" * 5000 + "}", ["line 2", "5000 digits"]),
        ("a.jsonl", LINES + '\n{"prompt": "a", "comp', ["line 21", "malformed JSON", "correct"]),
        ("a.jsonl", "x" * 3_000_000, ["line 1", "malformed JSON"]),
        ("a.jsonl", '"' + "x" * 3_000_000 + '"', ["line 1", "found str, expected an object"]),
        ("a.jsonl", '{"prompt": "a", "completion": NaN}', ["line 1", "float", "string"]),
        ("a.jsonl", '{"prompt": "a", "completion": ["b"]}', ["'completion' is list"]),
        ("a.jsonl", '{"prompt": "a", "completion": null}', ["'completion' is NoneType"]),
        ("a.jsonl", LINES + '\n{"prompt": "a"}', ["line 21", "'completion' is missing", "add"]),
        (
            "a.jsonl",
            json.dumps({f"field {n}" + "x" * 100: n for n in range(10_000)}),
            ["no known format", "9990 more", "rename"],
        ),
    ],
    ids=lambda value: str(value)[:25],
)
def test_a_bad_record_is_named_in_few_words(tmp_path, name, content, words):
    file = tmp_path / name
    file.write_text(content)
    refused(file, *words, val_size=0)


def test_a_folder_in_a_files_place_says_what_it_needs(tmp_path):
    folder = tmp_path / "train.jsonl"
    folder.mkdir()
    refused(folder, "has no train.jsonl or train.json", "nothing", kind=FileNotFoundError)
    refused(tmp_path, "found: train.jsonl", "path of the file", kind=FileNotFoundError)


def test_a_missing_file_names_a_near_one(tmp_path):
    (tmp_path / "alpaca.jsonl").write_text(LINES)
    refused(tmp_path / "alpacca.jsonl", "did you mean alpaca.jsonl?", kind=FileNotFoundError)


def test_without_the_package_for_the_hub_a_mistyped_name_is_still_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alpaca.json").write_text("[]")
    with pytest.raises(ValueError, match=r"did you mean alpaca.json\?.*pip install datasets"):
        read_splits("alpaca")


@pytest.mark.parametrize("val_size", [float("nan"), float("inf"), -float("inf")])
def test_a_share_that_is_no_number_is_refused(val_size):
    with pytest.raises(ValueError, match=f"val_size {val_size} is neither a share"):
        hold_out(Records(RECORDS), val_size, seed=0)


@pytest.mark.parametrize("size", [0, -3])
def test_a_batch_size_below_one_is_refused_for_evaluation_too(size):
    with pytest.raises(ValueError, match=f"batch_size {size} is below 1; give at least 1"):
        EvalOrder([3] * 5, size)


# ---------------------------------------------------------------- lengths

# BOS + prompt + response + EOS: 4, 8 and 10 tokens; the prompt with BOS is 2, 6 and 2.
MIXED = [Example("a", "b"), Example("b c d e f", "g"), Example("a", "b c d e f g h")]


@pytest.mark.parametrize("max_length", [1, 0, -5])
def test_a_length_that_leaves_nothing_to_predict_is_refused(max_length):
    with pytest.raises(ValueError, match=f"max_length {max_length} leaves no token.*at least 2"):
        tokenise(MIXED, word_tokenizer(), max_length)


def ids(text):
    return [A + ord(letter) - ord("a") for letter in text]


@pytest.mark.parametrize(
    ("overlong", "kept", "counts"),
    [
        ("drop", [[BOS, *ids("ab"), EOS]], (1, 0, 2)),
        ("truncate", [[BOS, *ids("ab"), EOS], [BOS, *ids("abcde")]], (2, 1, 1)),
        (
            "truncate-prompt",
            [[BOS, *ids("ab"), EOS], [BOS, *ids("defg"), EOS], [BOS, *ids("bcdef")]],
            (3, 2, 0),
        ),
    ],
)
def test_prompts_that_fill_the_length_are_counted_and_dropped_or_cut(overlong, kept, counts):
    found, report = tokenise(MIXED, word_tokenizer(), 6, overlong)
    assert [tokens["input_ids"] for tokens in found] == kept
    assert (report.kept, report.truncated, report.dropped) == counts
    assert report.long_prompts == 1
    assert "prompt alone fills max_length in 1 of all" in str(report)
    for tokens in found:
        assert len(tokens["labels"]) == len(tokens["input_ids"]) <= 6
        trained = [label for label in tokens["labels"] if label != -100]
        assert trained == tokens["input_ids"][-len(trained) :]
    if overlong == "truncate-prompt":
        assert found[1]["labels"] == [-100, -100, -100, -100, A + 6, EOS]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("max_length", range(2, 13))
def test_a_cut_prompt_keeps_as_much_as_fits_whatever_the_length(bos, max_length):
    whole, _ = tokenise(MIXED, word_tokenizer(bos=bos), 100)
    found, report = tokenise(MIXED, word_tokenizer(bos=bos), max_length, "truncate-prompt")
    assert report.kept == len(MIXED)
    for before, after in zip(whole, found, strict=True):
        assert len(after["input_ids"]) == min(max_length, len(before["input_ids"]))
        assert after["input_ids"][0] == BOS or not bos
        response = [label for label in before["labels"] if label != -100]
        room = max_length - bos
        assert [label for label in after["labels"] if label != -100] == response[:room]


def test_without_long_prompts_the_report_does_not_speak_of_them():
    assert "prompt" not in str(tokenise(MIXED, word_tokenizer(), 100)[1])


def test_long_prompts_are_reported_before_the_first_step(tmp_path, caplog):
    records = [*RECORDS, {"prompt": "a " * 50, "completion": "b"}]
    (tmp_path / "train.json").write_text(json.dumps(records))
    (tmp_path / "validation.json").write_text(json.dumps(RECORDS))
    told = []

    class Watching(Recorder):
        def on_train_batch_start(self, *_):
            told.append("fills max_length in 1 of all" in caplog.text)

    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        make_trainer(tmp_path, max_steps=1).fit(Watching(), data(tmp_path, max_length=10))
    assert told == [True]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_of_which_nothing_is_left_is_named_with_file_and_remedy(tmp_path, split):
    for name in ("train", "validation"):
        length = 50 if name == split else 1
        records = [{"prompt": "a " * length, "completion": "b"}] * 5
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    module = data(tmp_path, max_length=20)
    for _ in range(2):  # the second time is no different
        with pytest.raises(ValueError, match=rf"\({split}\): none of 5 .*longest 53.*max_length$"):
            module.setup("fit")
    assert split not in module.reports


def test_a_line_of_megabytes_is_an_example_like_any_other(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(LINES + "\n" + json.dumps({"prompt": "a", "completion": "b " * 10**6}))
    module = data(file, max_length=16, val_size=0)
    module.setup("fit")
    assert (module.reports["train"].truncated, module.reports["train"].longest) == (1, 10**6 + 3)


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_examples_beyond_the_context_of_the_model_are_refused_before_step_one(
    tmp_path, build, stage
):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"prompt": "a", "completion": "b " * 40}] * 8))
    model = build(max_position_embeddings=32) if build is llama else build(n_positions=32)
    module = AdapterFineTuneModule(model, LoRA(rank=2), tokenizer=word_tokenizer())
    before = snapshot(model)["state"]
    with pytest.raises(ValueError, match=r"43 tokens \(max_length is 512\).* 32 at most; set max"):
        getattr(make_trainer(tmp_path), stage)(module, data(file))
    after = snapshot(model)["state"]
    assert {name: after[name] for name in before} == before
    assert module.trainer.global_step == 0
    make_trainer(tmp_path, max_steps=1).fit(module, data(file, max_length=32))


def test_a_model_without_a_known_context_takes_any_length(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"prompt": "a", "completion": "b " * 900}] * 8))
    recorder = Recorder()
    make_trainer(tmp_path, max_steps=1).fit(recorder, data(file, max_length=1000))
    assert recorder.seen
