"""The data module's options for sources, formats and prompts, and what it makes of real files."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from lit_adapters import AdapterFineTuneModule, LoRA
from lit_adapters.data import ChatTemplate
from lit_adapters.datamodule import InstructionDataModule
from tests.data.chat_templates import QWEN, chat_tokenizer
from tests.data.word_tokenizer import word_tokenizer
from tests.models import llama
from tests.test_datamodule import Recorder, every_step, make_trainer

# The runs that resume here write no checkpoints of their own.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")

SHARED = Path(__file__).resolve().parents[2] / "shared"
REAL = SHARED / "data"
STORIES = SHARED / "models" / "stories260k"
TURNS = [("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
CHAT = {"messages": [{"role": role, "content": content} for role, content in TURNS]}


@pytest.fixture
def two(tmp_path):
    """Two sources of different formats: 20 pairs in JSON lines, 5 instructions in CSV."""
    pairs, tasks = tmp_path / "pairs.jsonl", tmp_path / "tasks.csv"
    pairs.write_text("\n".join(json.dumps({"prompt": "a", "completion": "b"}) for _ in range(20)))
    tasks.write_text("instruction,output\n" + "c,d\n" * 5)
    return str(pairs), str(tasks)


def test_a_list_of_sources_is_read_after_each_other_and_each_by_its_format(two, caplog):
    data = InstructionDataModule(list(two), tokenizer=word_tokenizer(), val_size=5)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        data.setup()
    told = [r.getMessage() for r in caplog.records if "format" in r.getMessage()]
    assert told == [
        f"{two[0]}: format prompt_completion (the first record has 'prompt' and 'completion')",
        f"{two[1]}: format alpaca (the first record has 'instruction' and 'output')",
    ]
    assert data.corpus.sources == {"pairs": two[0], "tasks": two[1]}
    for split, counts in (("train", (16, 4)), ("validation", (4, 1)), ("test", (4, 1))):
        examples, tokens = data.examples(split), data.tokens(split)
        expected = ["pairs"] * counts[0] + ["tasks"] * counts[1]
        assert [example.source for example in examples] == expected
        assert [one["source"] for one in tokens] == expected


def test_weights_are_of_the_training_records_alone(two, caplog):
    weights = dict(zip(two, (1, 1), strict=True))
    data = InstructionDataModule(weights, tokenizer=word_tokenizer(), val_size=5)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        data.setup("fit")
    sources = [example.source for example in data.examples("train")]
    assert [sources.count(source) for source in data.corpus.sources] == [16, 16]
    assert len(data.examples("validation")) == 5
    assert "tasks: each of 4 training records comes 4.00 times" in caplog.text
    assert data.hparams["path"] == weights
    assert (
        "source" not in InstructionDataModule(two[0], tokenizer=word_tokenizer()).tokens("train")[0]
    )


def test_a_count_is_held_out_of_all_sources_together(two, tmp_path):
    held = {
        (False, 0.2): (4, 1),
        (False, 10): (8, 2),
        (False, 3): (2, 1),  # 2.4 and 0.6
        (False, 1): (1, 0),
        (True, 5): (3, 2),
    }
    for (streaming, val_size), expected in held.items():
        data = InstructionDataModule(
            list(two), val_size=val_size, streaming=streaming, tokenizer=word_tokenizer()
        )
        sources = [example.source for example in data.examples("validation")]
        assert (sources.count("pairs"), sources.count("tasks")) == expected, (streaming, val_size)
    (tmp_path / "own").mkdir()
    for split, count in (("train", 20), ("validation", 3)):  # gives nothing of its train
        rows = "\n".join(json.dumps({"prompt": "a", "completion": "b"}) for _ in range(count))
        (tmp_path / "own" / f"{split}.jsonl").write_text(rows)
    for streaming in (False, True):
        data = InstructionDataModule(
            [str(tmp_path / "own"), two[1]],
            val_size=2,
            streaming=streaming,
            tokenizer=word_tokenizer(),
        )
        sources = [example.source for example in data.examples("validation")]
        assert (sources.count("own"), sources.count("tasks")) == (3, 2)
        assert len(data.examples("train")) == 20 + 3
    with pytest.raises(ValueError, match="val_size 25 holds out 25 of 25 records of 2 sources"):
        InstructionDataModule(list(two), val_size=25).examples("train")


def test_templates_render_evaluation_once(tmp_path, monkeypatch):
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps(CHAT) for _ in range(6)))
    data = InstructionDataModule(str(file), val_size=2, tokenizer=chat_tokenizer("qwen"))
    first = data.examples("validation")
    calls = []
    render = ChatTemplate.render
    monkeypatch.setattr(
        ChatTemplate, "render", lambda *args, **more: calls.append(1) or render(*args, **more)
    )
    assert data.examples("validation") == data.examples("test") == first
    assert not calls
    first.clear()  # the caller's own
    assert len(data.examples("validation")) == 2
    data.tokenizer = chat_tokenizer("phi")
    assert data.examples("validation") != first
    assert calls


def test_a_bad_record_of_one_source_names_its_file(two):
    with Path(two[1]).open("a") as file:
        file.write("e\n")
    data = InstructionDataModule(list(two), tokenizer=word_tokenizer())
    with pytest.raises(ValueError, match="tasks.csv, line 7: 1 fields") as raised:
        data.setup()
    assert "pairs" not in str(raised.value)


def test_a_trainer_trains_on_a_mixture(two, tmp_path):
    module = Recorder()
    weights = dict(zip(two, (1, 1), strict=True))
    data = InstructionDataModule(weights, val_size=5, batch_size=4)
    make_trainer(tmp_path, max_epochs=1).fit(module, data)
    assert sum(len(rows) for _, _, rows in module.seen) == 32


def test_length_statistics_are_logged_before_the_first_step(two, tmp_path):
    class Loud(CSVLogger):
        def log_metrics(self, metrics, step=None):
            logged.append((dict(metrics), step))

    logged = []
    trainer = make_trainer(tmp_path, max_epochs=1, log_every_n_steps=1)
    trainer.loggers = [Loud(tmp_path)]
    trainer.fit(Recorder(), InstructionDataModule(two[0], val_size=2))
    (train, step), (validation, _) = logged[:2]
    assert (train["data/train/examples"], train["data/train/p50"], step) == (18, 4, 0)
    assert validation["data/validation/kept"] == 2


def test_conversations_take_the_tokenizer_that_is_known(tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join([json.dumps(CHAT)] * 3))
    alone = InstructionDataModule(str(file), val_size=1)
    with pytest.raises(
        ValueError, match=r"chat.jsonl \(train\): a chat template needs a tokenizer"
    ):
        alone.examples("train")
    data = InstructionDataModule(str(file), tokenizer=chat_tokenizer(), val_size=1)
    (example,) = data.examples("validation")
    assert example.prompt.endswith("Two?<|im_end|>\n<|im_start|>assistant\n")
    assert (example.response, example.end, len(example.trained)) == ("2", "<|im_end|>", 1)
    last = InstructionDataModule(
        str(file), tokenizer=chat_tokenizer(), val_size=1, train_on="last", task_prompt="Count."
    )
    (example,) = last.examples("validation")
    assert example.trained == ()
    assert example.prompt.startswith("<|im_start|>system\nCount.<|im_end|>")


def test_a_template_file_is_an_option(tmp_path):
    file, template = tmp_path / "a.json", tmp_path / "mine.jinja"
    file.write_text(json.dumps([{"question": "One?", "answer": "1"}] * 2))
    template.write_text(QWEN.template.replace("Be of use.", "Count."))
    data = InstructionDataModule(str(file), tokenizer=chat_tokenizer(), template=str(template))
    (example,) = data.examples("train")
    assert example.prompt.startswith("<|im_start|>system\nCount.<|im_end|>")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "vicuna"}, "template 'vicuna' is unknown"),
        ({"train_on": "first"}, "train_on 'first' is unknown"),
        ({"path": []}, "names no source"),
        ({"path": {"a.json": 0.0}}, "no positive number"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(settings, message):
    with pytest.raises(ValueError, match=message):
        InstructionDataModule(**settings)


# ---------------------------------------------------------------- streams


@pytest.fixture
def long(tmp_path):
    file = tmp_path / "long.jsonl"
    records = [{"prompt": "ab"[i % 2], "completion": "c " * (1 + i % 5)} for i in range(46)]
    file.write_text("\n".join(map(json.dumps, records)))
    return str(file)


def stream(path, **settings):
    return InstructionDataModule(
        path, streaming=True, batch_size=4, val_size=4, shuffle_buffer=16, **settings
    )


def test_a_stream_resumes_with_the_very_next_batch(long, tmp_path):
    whole, folder = Recorder(), tmp_path / "checkpoints"
    make_trainer(tmp_path, [every_step(folder)], max_epochs=2).fit(whole, stream(long))
    assert len(whole.seen) == 2 * 11
    for file in sorted(folder.glob("*.ckpt"))[::2]:
        done = torch.load(file, weights_only=True)["trained_batches"]
        rest = Recorder()
        make_trainer(tmp_path, max_epochs=2).fit(rest, stream(long), ckpt_path=file)
        # Where the first epoch was over, Lightning goes on counting its batches in the second.
        assert [(epoch, rows) for epoch, _, rows in rest.seen] == [
            (epoch, rows) for epoch, _, rows in whole.seen[done:]
        ], file.name


class Watching(Callback):
    """Keeps the batches that are trained on."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(batch["input_ids"].tolist())


def test_our_own_module_resumes_a_stream_though_it_asks_for_the_data_early(long, tmp_path):
    """It asks for the number of steps, for which Lightning begins to read before it resumes."""

    folder = tmp_path / "checkpoints"

    def fit(callbacks=(), **resume):
        torch.manual_seed(0)
        watching = Watching()
        module = AdapterFineTuneModule(llama(), LoRA(rank=2), tokenizer=word_tokenizer())
        trainer = make_trainer(tmp_path, [watching, *callbacks], max_steps=14)
        trainer.fit(module, stream(long, max_length=64), **resume)
        return watching.seen

    whole = fit([every_step(folder)])
    assert len(whole) == 14
    for step in (1, 5, 11, 12):  # the eleventh ends the first epoch
        assert fit(ckpt_path=folder / f"step={step}.ckpt") == whole[step:], step


def test_the_first_records_of_a_stream_are_for_validation(long, tmp_path):
    data = stream(long, tokenizer=word_tokenizer())
    data.setup()
    lines = [json.loads(line) for line in Path(long).read_text().splitlines()]
    assert [e.response for e in data.examples("validation")] == [
        line["completion"] for line in lines[:4]
    ]
    assert len(data.examples("train")) == 42
    rows = sum(batch["input_ids"].shape[0] for batch in data.train_dataloader())
    assert rows == 42
    limited = stream(long, tokenizer=word_tokenizer(), train_limit=9)
    assert sum(batch["input_ids"].shape[0] for batch in limited.train_dataloader()) == 9


def test_streams_are_mixed_by_weight_and_the_same_every_time(long, two, tmp_path):
    weights = {long: 1, two[0]: 1}
    runs = []
    for _ in range(2):
        data = stream(weights, tokenizer=word_tokenizer())
        runs.append([batch["input_ids"].tolist() for batch in data.train_dataloader()])
    assert runs[0] == runs[1]
    assert sum(map(len, runs[0])) >= 2 * 42 - 20
    assert set(data.corpus.sources) == {"long", "pairs"}


def test_streams_are_packed_where_the_model_keeps_sequences_apart(long, tmp_path):
    class Kinds(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert batch["input_ids"].shape[0] == 1
            assert batch["input_ids"].shape[1] <= 32
            seen.append((batch["position_ids"] == 0).sum().item())

    seen, tokenizer = [], word_tokenizer()
    module = AdapterFineTuneModule(llama(vocab_size=32), LoRA(rank=2), tokenizer=tokenizer)
    make_trainer(tmp_path, [Kinds()], max_epochs=1).fit(
        module, stream(long, max_length=32, batch_tokens=32)
    )
    assert sum(seen) == 42  # every sequence once
    assert max(seen) > 4  # by tokens, not by their number


def test_a_stream_says_at_the_start_that_its_longest_example_may_not_fit(long):
    data = stream(long, tokenizer=word_tokenizer(), max_length=64, batch_tokens=32)
    with pytest.raises(ValueError, match="batch_tokens 32 is below max_length 64, and a stream"):
        data.train_dataloader()


def test_a_share_of_a_stream_cannot_be_held_out(long):
    data = InstructionDataModule(long, streaming=True, tokenizer=word_tokenizer())
    with pytest.raises(ValueError, match=r"val_size 0.05 is no count of records, and nobody knows"):
        data.setup("fit")


# ---------------------------------------------------------------- real files

real = pytest.mark.skipif(not SHARED.exists(), reason="real files are not here")
FILES = {
    "alpaca_en_demo.json": ("alpaca", 999),
    "gsm8k_test.jsonl": ("question_answer", 1319),
    "self_instruct_seed_tasks.jsonl": ("self_instruct", 175),
}


@real
@pytest.mark.parametrize("tokenizer", ["tiny", str(STORIES)], ids=["tiny", "stories260k"])
@pytest.mark.parametrize("name", FILES)
def test_real_files_train_the_answers_and_nothing_else(name, tokenizer, caplog):
    format, count = FILES[name]
    data = InstructionDataModule(
        str(REAL / name), tokenizer=tokenizer, val_size=0, max_length=100_000
    )
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        examples = data.examples("train")
    assert f"{name}: format {format} (" in caplog.text
    assert len(examples) == len(data.tokens("train")) == count
    words = data.tokenizer
    for example, tokens in zip(examples[::20], data.tokens("train")[::20], strict=True):
        trained = [label for label in tokens["labels"] if label != -100]
        assert trained[-1] == words.eos_token_id
        alone = words(example.response, add_special_tokens=False)["input_ids"]
        assert trained[:-1] == alone
        assert tokens["input_ids"].count(words.bos_token_id) == 1


@real
@pytest.mark.parametrize("tokenizer", ["tiny", str(STORIES)], ids=["tiny", "stories260k"])
def test_real_records_in_a_chat_template_of_ones_own(tokenizer, tmp_path):
    """A tokenizer that puts a space before every text puts none in the middle of this one."""
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    data = InstructionDataModule(
        str(REAL / "gsm8k_test.jsonl"),
        tokenizer=tokenizer,
        template=str(template),
        max_length=100_000,
        train_limit=60,
    )
    words, examples, tokens = data._load_tokenizer(), data.examples("train"), data.tokens("train")
    for example, one in zip(examples, tokens, strict=True):
        whole = f"{example.prompt}{example.response}{example.end}"
        assert one["input_ids"] == words(whole, add_special_tokens=False)["input_ids"]
        trained = words.decode([label for label in one["labels"] if label != -100])
        assert trained.strip() == f"{example.response}{words.eos_token}".strip()


def test_several_sources_are_evaluated_each_and_together(two, tmp_path):
    data = InstructionDataModule(list(two), val_size=5, batch_size=4)
    module = AdapterFineTuneModule("tiny")
    trainer = make_trainer(tmp_path)
    trainer.validate(module, data, verbose=False)
    logged = {key: value.item() for key, value in trainer.callback_metrics.items()}
    names = list(data.corpus.sources)
    assert len(names) == 2
    loaders = data.val_dataloader()
    assert list(loaders) == names
    sums = [[module.nll(batch) for batch in loader] for loader in loaders.values()]
    nll = [sum(n.item() for n, _ in each) for each in sums]
    tokens = [sum(t.item() for _, t in each) for each in sums]
    for name, n, t in zip(names, nll, tokens, strict=True):
        assert logged[f"val/loss/{name}"] == pytest.approx(n / t, rel=1e-5)
    assert logged["val/loss"] == pytest.approx(sum(nll) / sum(tokens), rel=1e-5)
    assert set(data.reports) == {f"validation/{name}" for name in names}
