"""Which tokens end an answer, after templates of five families."""

import pytest

from lit_adapters.data import Example, Prompting, stop_ids, to_examples
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
