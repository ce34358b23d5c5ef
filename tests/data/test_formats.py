import pytest

from lit_adapters.data import Example, Records, alpaca_prompt, to_examples

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3", "task": "sum"}


def test_alpaca_prompts_are_the_standard_ones():
    assert alpaca_prompt("Add.", "1 2") == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert alpaca_prompt("Add {1}.") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd {1}.\n\n### Response:\n"
    )


def test_alpaca_records():
    assert to_examples([ALPACA]) == [Example(alpaca_prompt("Add.", "1 2"), "3", "sum")]
    for empty in ({}, {"input": ""}, {"input": None}, {"input": " \n"}):
        record = {"instruction": "Hi.", "output": "Ho.", **empty}
        assert to_examples([record], "alpaca") == [Example(alpaca_prompt("Hi."), "Ho.")]


def test_other_pairs_are_told_by_their_fields():
    assert to_examples([{"question": "1+1?", "answer": "#### 2"}]) == [
        Example(alpaca_prompt("1+1?"), "#### 2")
    ]
    assert to_examples([{"prompt": "Once", "completion": " more"}]) == [Example("Once", " more")]


def test_nothing_to_format():
    assert to_examples([]) == []


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"instruction": "a"}, "record 2: field 'output' is missing; found 'instruction'"),
        ({"instruction": "a", "output": 3}, "record 2: field 'output' is int, expected text"),
        ({"instruction": "a", "output": None}, "record 2: field 'output' is NoneType"),
        ({"instruction": "a", "output": "b", "input": ["c"]}, "record 2: field 'input' is list"),
        ({"instruction": "\ud83d", "output": "b"}, "record 2: .* surrogate pair at character 0"),
        ({}, "found no fields"),
    ],
)
def test_a_bad_record_is_named(record, message):
    with pytest.raises(ValueError, match=f"pets.json.*{message}"):
        to_examples(Records([ALPACA, record], "pets.json"))


def test_unknown_fields_and_formats_are_errors_that_list_the_known():
    with pytest.raises(ValueError, match=r"record 1: .*\('txt'\).*alpaca: instruction \+ output"):
        to_examples([{"txt": "a"}])
    with pytest.raises(ValueError, match="'share' is unknown; use one of: auto, alpaca"):
        to_examples([ALPACA], "share")
