"""Tokens kept on disk: found again only for the very same data, tokenizer and options."""

from dataclasses import dataclass

import pytest
from transformers import PreTrainedTokenizer

from lit_adapters.data import Example, cache, tokenise
from lit_adapters.data.cache import once
from tests.data.word_tokenizer import word_tokenizer

EXAMPLES = [Example(f"a b {c}", "c d") for c in "efgh"]
OPTIONS = {"max_length": 9, "overlong": "truncate"}


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(cache, "WORTH_IT", 0)


class Counting:
    """`tokenise`, and how often it ran; what was said."""

    def __init__(self):
        self.calls = 0
        self.said = []

    def __call__(self, *args, **options):
        self.calls += 1
        return tokenise(*args, **options)

    def run(self, folder, examples=None, tokenizer=None, **options):
        return once(
            self,
            EXAMPLES if examples is None else examples,
            tokenizer or word_tokenizer(),
            folder,
            self.said.append,
            **{**OPTIONS, **options},
        )


def test_the_second_run_reads_what_the_first_has_written(tmp_path):
    count = Counting()
    first, second = count.run(tmp_path), count.run(tmp_path)
    assert count.calls == 1
    assert first == second == tokenise(EXAMPLES, word_tokenizer(), **OPTIONS)
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]
    assert count.said == [f"Tokens are those of an earlier run, from {next(tmp_path.iterdir())}"]


def test_what_is_read_again_knows_its_sources(tmp_path):
    count = Counting()
    examples = [Example("a", "b", source=source) for source in ("one", "", "two", "one")]
    first, second = count.run(tmp_path, examples), count.run(tmp_path, examples)
    assert count.calls == 1
    assert first == second
    assert [tokens.get("source") for tokens in second[0]] == ["one", None, "two", "one"]


@dataclass(frozen=True)
class Longer(Example):
    more: str = ""


@pytest.mark.parametrize(
    "change",
    [
        {"examples": EXAMPLES[:3]},
        {"examples": EXAMPLES[::-1]},
        {"examples": [Longer(e.prompt, e.response, more="x") for e in EXAMPLES]},
        {"tokenizer": word_tokenizer(bos=False)},
        {"tokenizer": word_tokenizer(suffix=True)},
        {"max_length": 8},
        {"overlong": "drop"},
    ],
    ids=str,
)
def test_anything_else_is_another_file(tmp_path, change):
    count = Counting()
    count.run(tmp_path)
    assert count.run(tmp_path, **change)[0]
    assert count.calls == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_added_tokens_and_a_template_are_part_of_the_key(tmp_path):
    count = Counting()
    taught, templated = word_tokenizer(), word_tokenizer()
    taught.add_tokens(["<new>"])
    templated.chat_template = "{{ messages }}"
    for tokenizer in (word_tokenizer(), taught, templated):
        count.run(tmp_path, tokenizer=tokenizer)
    assert count.calls == 3


@pytest.mark.parametrize("library", ["tokenizers", "transformers"])
def test_the_tokens_of_another_version_of_a_library_are_made_again(tmp_path, monkeypatch, library):
    count = Counting()
    count.run(tmp_path)
    known = cache.version
    monkeypatch.setattr(cache, "version", lambda name: known(name) + ".1" * (name == library))
    count.run(tmp_path)
    assert count.calls == 2


@pytest.mark.parametrize("fault", ["cut", "flipped", "empty", "other"])
def test_a_damaged_file_is_made_again(tmp_path, fault):
    count = Counting()
    whole = count.run(tmp_path)
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    faults = {
        "cut": data[:-3],
        "flipped": data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
        "empty": b"",
        "other": b"not tokens at all",
    }
    file.write_bytes(faults[fault])
    assert count.run(tmp_path) == whole
    assert "is damaged" in count.said[-1]
    assert count.run(tmp_path) == whole
    assert count.calls == 2


def test_nothing_is_kept_where_it_is_not_wanted_or_not_worth_it(tmp_path, monkeypatch):
    count = Counting()
    count.run(None)
    monkeypatch.setattr(cache, "WORTH_IT", 10**6)
    count.run(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_in_python_is_not_cached(tmp_path):
    """What it does is in its code, which no key covers."""

    class Letters(PreTrainedTokenizer):
        vocab_size = 300

        def get_vocab(self):
            return {chr(i): i for i in range(300)}

        def _tokenize(self, text, **_):
            return list(text)

        def _convert_token_to_id(self, token):
            return ord(token)

        def _convert_id_to_token(self, index):
            return chr(index)

    Counting().run(tmp_path, tokenizer=Letters(eos_token="~"))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_costs_only_the_time(tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("a file")
    count = Counting()
    assert count.run(taken)[0]
    assert "cannot be written" in count.said[-1]
