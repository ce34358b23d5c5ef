import importlib.util
import itertools
import json
import re
import sqlite3
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lit_adapters

ASSETS = Path(lit_adapters.__file__).parent / "assets"
EXAMPLES = Path(__file__).parent.parent / "examples"
SPLITS = ("train", "validation", "test")
TASKS = ("representation", "sql", "arithmetic")
FRAME = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location(
        "make_tiny_tasks", EXAMPLES / "make_tiny_tasks.py"
    )
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name while they are being defined.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def committed():
    return {
        split: [
            json.loads(line)
            for line in (ASSETS / "tasks" / f"{split}.jsonl").read_text("utf-8").splitlines()
        ]
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def generated(maker):
    return maker.generate()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "tiny")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(ASSETS / "tiny", dtype=torch.float32).eval()


def pair(combination):
    return combination.left, combination.right


def of_task(records, task):
    return [record for record in records if record["task"] == task]


class TestTasks:
    def test_regenerating_gives_the_committed_bytes(self, maker, tmp_path):
        maker.main(["--out", str(tmp_path)])
        for split in SPLITS:
            name = f"{split}.jsonl"
            assert (tmp_path / name).read_bytes() == (ASSETS / "tasks" / name).read_bytes()

    def test_another_seed_gives_other_records(self, maker, generated):
        other = maker.generate(seed=1)
        assert other["test"] != generated["test"]

    @pytest.mark.parametrize(
        ("split", "size"), [("train", 2000), ("validation", 200), ("test", 200)]
    )
    def test_sizes_and_shares(self, committed, split, size):
        counts = [len(of_task(committed[split], task)) for task in TASKS]
        assert counts == [0.4 * size, 0.4 * size, 0.2 * size]

    def test_records_have_the_alpaca_fields(self, committed):
        for record in itertools.chain.from_iterable(committed.values()):
            assert list(record) == ["instruction", "input", "output", "task"]
            assert all(isinstance(text, str) and text.strip() == text for text in record.values())
            assert all(record.values())

    def test_no_input_occurs_twice(self, committed):
        inputs = [r["input"] for r in itertools.chain.from_iterable(committed.values())]
        assert len(inputs) == len(set(inputs))

    @pytest.mark.parametrize("split", ["validation", "test"])
    def test_every_held_out_record_has_a_combination_that_training_lacks(self, generated, split):
        trained = {pair(c) for record in generated["train"] for c in record.combinations}
        assert all(set(map(pair, record.combinations)) - trained for record in generated[split])

    @pytest.mark.parametrize("split", ["validation", "test"])
    def test_held_out_combinations_stay_in_their_split(self, generated, split):
        for other in set(SPLITS) - {split}:
            met = [c.split for record in generated[other] for c in record.combinations]
            assert split not in met

    def test_parts_of_held_out_combinations_are_trained_on(self, generated):
        combinations = [c for record in generated["train"] for c in record.combinations]
        parts = {c.left for c in combinations} | {c.right for c in combinations}
        for record in generated["test"]:
            assert {part for c in record.combinations for part in pair(c)} <= parts

    def test_held_out_names_and_values_read_from_the_answers_never_met_in_training(self, committed):
        def pairs(record):
            name = re.search(r"name\[(.*?)\]", record["output"]).group(1)
            said = re.findall(r"(\w+)\[(.*?)\]|, (\w+)\)", record["output"])
            return {(name, *item) for item in said if item[0] not in ("name", "people")}

        trained = set().union(*map(pairs, of_task(committed["train"], "representation")))
        for split in ("validation", "test"):
            for record in of_task(committed[split], "representation"):
                assert pairs(record) - trained

    def test_every_word_of_an_answer_was_seen_in_training(self, committed):
        # Only combinations are held out: a word that never was an answer would be unfair.
        seen = set()
        for record in committed["train"]:
            seen.update(re.findall(r"[A-Za-z]+", record["output"]))
        for record in of_task(committed["test"], "representation"):
            assert set(re.findall(r"[A-Za-z]+", record["output"])) <= seen

    def test_sql_runs_on_the_given_schema(self, committed):
        for record in itertools.chain.from_iterable(committed.values()):
            if record["task"] != "sql":
                continue
            schema = re.match(r"Table: (.*)\n", record["input"]).group(1)
            with sqlite3.connect(":memory:") as connection:
                connection.execute(f"CREATE TABLE {schema}")
                connection.execute(record["output"])
            connection.close()

    def test_sums_are_right_and_end_in_the_answer(self, committed):
        for record in itertools.chain.from_iterable(committed.values()):
            if record["task"] != "arithmetic":
                continue
            *steps, last = record["output"].split("\n")
            for step in steps:
                left, operator, right, result = re.fullmatch(
                    r"(\d+) ([+*-]) (\d+) = (\d+)", step
                ).groups()
                expected = {
                    "+": int(left) + int(right),
                    "-": int(left) - int(right),
                    "*": int(left) * int(right),
                }[operator]
                assert int(result) == expected
            assert last == f"#### {result}"


class TestUnlabelledText:
    def test_is_reproducible(self, maker):
        first = list(itertools.islice(maker.unlabelled_text(7), 200))
        assert first == list(itertools.islice(maker.unlabelled_text(7), 200))
        assert first != list(itertools.islice(maker.unlabelled_text(8), 200))

    def test_never_shows_an_input_next_to_its_answer(self, maker, committed):
        text = list(itertools.islice(maker.unlabelled_text(), 20_000))
        mixed = [
            document
            for document in text
            if re.search(r"\w+\(name\[|SELECT |####", document)
            and re.search(r"[a-z] [a-z]+ [a-z]+.*[.?]", document)
        ]
        assert mixed == []

    def test_never_shows_a_held_out_answer(self, maker, committed):
        text = "\n".join(itertools.islice(maker.unlabelled_text(), 20_000)) + "\n"
        for record in committed["validation"] + committed["test"]:
            if record["task"] != "arithmetic":
                assert record["output"] + "\n" not in text
            assert record["input"] not in text


class TestTokenizer:
    @pytest.mark.parametrize(
        "text",
        [
            "",
            " ",
            "  two spaces first",
            "trailing newline\n",
            "\n\n\tTabs and\r\n lines  \n",
            "def f(x):\n    return x ** 2  # ok",
            "naïve café, Straße, 東京, Ελλάδα, مرحبا, 👩‍👩‍👧 🎉",
            "a\u00a0b\u200bc\x00d",
            "3.14159 and 1,000,000",
            " ,.!? n't 'll",
        ],
    )
    def test_any_text_survives(self, tokenizer, text):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text

    def test_special_tokens_are_distinct_and_known_to_the_model(self, tokenizer, model):
        ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert len(set(ids)) == 3
        for config in (model.config, model.generation_config):
            assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == ids

    def test_adds_bos_but_not_eos(self, tokenizer):
        ids = tokenizer("Hello there").input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id not in ids
        assert ids.count(tokenizer.bos_token_id) == 1

    def test_chat_template(self, tokenizer):
        turns = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
        ]
        bos, eos = tokenizer.bos_token, tokenizer.eos_token
        asked = tokenizer.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
        assert asked == f"{bos}Be brief.\n\n### Instruction:\nHi\n\n### Response:\n"
        answered = tokenizer.apply_chat_template(turns, tokenize=False)
        assert answered == f"{asked}Hello{eos}\n\n"

    def test_chat_template_marks_what_the_assistant_says(self, tokenizer):
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        encoded = tokenizer.apply_chat_template(
            turns, return_dict=True, return_assistant_tokens_mask=True
        )
        said = itertools.compress(encoded["input_ids"], encoded["assistant_masks"])
        assert tokenizer.decode(list(said)) == f"Hello{tokenizer.eos_token}"

    def test_records_are_short(self, tokenizer, committed):
        for record in itertools.chain.from_iterable(committed.values()):
            text = FRAME.format_map(record) + record["output"] + tokenizer.eos_token
            assert len(tokenizer(text).input_ids) <= 160


class TestModel:
    def test_is_small(self, model):
        files = list((ASSETS / "tiny").iterdir())
        assert sum(file.stat().st_size for file in files) <= 8_000_000
        assert 1_000_000 <= model.num_parameters() <= 3_500_000
        assert model.config.max_position_embeddings >= 512
        assert model.config.tie_word_embeddings

    def test_is_stored_in_bfloat16(self):
        stored = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny")
        assert stored.dtype == torch.bfloat16

    def test_tokenizer_fits(self, model, tokenizer):
        assert model.config.vocab_size == len(tokenizer)

    @torch.no_grad()
    def test_predicts_english(self, model, tokenizer):
        text = "If the value is not given, the default is used and the function returns None."
        ids = tokenizer(text, return_tensors="pt").input_ids
        # Guessing evenly among the pieces costs more than seven nats.
        assert model(input_ids=ids, labels=ids).loss.item() < 4.0

    @torch.no_grad()
    def test_copies_from_its_context(self, model, tokenizer):
        text = "Vorbi Kestal, Druna, Plimsa Gorn, Tealix"
        once = tokenizer(text).input_ids
        ids = torch.tensor([once + tokenizer(f"\n{text}", add_special_tokens=False).input_ids])
        logits = model(input_ids=ids).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        first, second = losses[: len(once) - 1], losses[len(once) + 1 :]
        assert second.mean() < 0.4 * first.mean()

    @torch.no_grad()
    def test_cannot_do_the_tasks_yet(self, model, tokenizer, committed):
        records = [record for task in TASKS for record in of_task(committed["test"], task)[:8]]
        prompts = [FRAME.format_map(record) for record in records]
        tokenizer.padding_side = "left"
        batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        output = model.generate(**batch, max_new_tokens=48, do_sample=False)
        answers = tokenizer.batch_decode(
            output[:, batch.input_ids.shape[1] :], skip_special_tokens=True
        )
        right = [a.strip() == r["output"] for a, r in zip(answers, records, strict=True)]
        assert sum(right) <= 1
