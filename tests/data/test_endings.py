"""Which tokens end an answer, after templates of five families."""

import pytest

from lit_adapters.data import (
    Example,
    Prompting,
    stop_ids,
    stop_ids_of_tokens,
    to_examples,
    tokenise,
)
from tests.data.chat_templates import chat_tokenizer
from tests.data.word_tokenizer import word_tokenizer

ASKED = {"instruction": "Count.", "input": "", "output": "1"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama3", []),  # its end of turn is EOS
        ("qwen", []),
        ("mistral", []),
        ("gemma", ["<end_of_turn>"]),
        ("phi", ["<|end|>"]),
    ],
)
def test_the_end_of_a_turn_is_that_of_the_template(name, expected):
    tokenizer = chat_tokenizer(name)
    examples = to_examples([ASKED], "alpaca", prompting=Prompting("chat"), tokenizer=tokenizer)
    assert tokenizer.convert_ids_to_tokens(stop_ids(examples, tokenizer)) == expected


def test_what_an_answer_may_end_with_does_not_end_it():
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["</call>"])
    tokenizer.add_tokens(["<end>"], special_tokens=True)
    ends = ["</call><end>", "<end>\n", "</s>", None]
    examples = [Example("a", "b", end=end) for end in ends]
    assert tokenizer.convert_ids_to_tokens(stop_ids(examples, tokenizer)) == ["<end>"]


def test_a_token_that_was_taught_ends_an_answer_where_no_special_one_does():
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<stop>"])
    examples = [Example("a", "b", end=" <stop>\n")]
    assert tokenizer.convert_ids_to_tokens(stop_ids(examples, tokenizer)) == ["<stop>"]


@pytest.mark.parametrize("name", ["llama3", "qwen", "mistral", "gemma", "phi"])
def test_the_tokens_of_answers_tell_the_same(name):
    tokenizer = chat_tokenizer(name)
    examples = to_examples([ASKED] * 2, "alpaca", prompting=Prompting("chat"), tokenizer=tokenizer)
    tokens, _ = tokenise(examples, tokenizer)
    answers = [[label for label in one["labels"] if label != -100] for one in tokens]
    answers[0] = answers[0][:1]  # cut
    assert stop_ids_of_tokens(answers, tokenizer) == stop_ids(examples, tokenizer)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["a <end> </s>", "b </call>"], ["<end>"]),
        (["a </call> <end>", "b"], ["<end>"]),
        (["a </call>", "b"], []),  # the first was cut
        (["a </call>", "b </call>"], ["</call>"]),  # as taught
        (["a <unk> </s>", "b </s>"], []),
        (["", "b </s>"], []),
        ([], []),
    ],
)
def test_tokens_that_close_answers(answers, expected):
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["</call>"])
    tokenizer.add_tokens(["<end>"], special_tokens=True)
    ids = [tokenizer.convert_tokens_to_ids(text.split()) for text in answers]
    found = stop_ids_of_tokens(ids, tokenizer)
    assert tokenizer.convert_ids_to_tokens(found) == expected
