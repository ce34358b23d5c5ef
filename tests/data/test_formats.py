import pytest

from lit_adapters.data import (
    FORMATS,
    Example,
    Prompting,
    Records,
    alpaca_prompt,
    choose_format,
    hold_out,
    read_splits,
    to_examples,
    why,
)
from tests.data.chat_templates import chat_tokenizer
from tests.data.word_tokenizer import word_tokenizer

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


# ---------------------------------------------------------------- every format

TALK = [
    {"role": "system", "content": "Count."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
]
FROM = [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "1"}]
SIMPLE = Example(alpaca_prompt("One?"), "1")


@pytest.mark.parametrize(
    ("name", "record", "expected"),
    [
        ("alpaca", {"instruction": "One?", "output": "1"}, SIMPLE),
        ("dolly", {"instruction": "One?", "response": "1", "category": "x"}, SIMPLE),
        (
            "dolly",
            {"instruction": "One?", "context": "un", "response": "1"},
            Example(alpaca_prompt("One?", "un"), "1"),
        ),
        (
            "self_instruct",
            {"instruction": "One?", "instances": [{"input": "un", "output": "1"}]},
            Example(alpaca_prompt("One?", "un"), "1"),
        ),
        ("question_answer", {"question": "One?", "answer": "1"}, SIMPLE),
        ("prompt_completion", {"prompt": "One", "completion": " 1"}, Example("One", " 1")),
        ("text", {"text": "One is 1.", "task": "t"}, Example("", "One is 1.", "t")),
        ("messages", {"messages": TALK[1:]}, SIMPLE),
        ("messages", {"messages": FROM}, SIMPLE),
        ("sharegpt", {"conversations": FROM, "id": 3}, SIMPLE),
        ("sharegpt", {"conversations": TALK[1:]}, SIMPLE),
        ("messages", {"messages": TALK}, Example("Count.\n\n" + SIMPLE.prompt, "1")),
        (
            "sharegpt",
            {"system": "Count.", "conversations": FROM},
            Example("Count.\n\n" + SIMPLE.prompt, "1"),
        ),
    ],
)
def test_every_format_is_known_by_its_fields_and_read(name, record, expected):
    assert choose_format([record]) == name
    words = word_tokenizer()  # has no chat template: then conversations are Alpaca's too
    assert to_examples([record], tokenizer=words) == [expected]
    assert to_examples([record], name, tokenizer=words) == [expected]
    assert all(f"'{field}'" in why(name) for field in FORMATS[name].fields)


def test_one_instruction_of_several_instances_makes_several_examples():
    instances = [{"input": str(n), "output": str(n + 1)} for n in range(3)]
    found = to_examples([{"instruction": "Add one.", "instances": instances}])
    assert [example.response for example in found] == ["1", "2", "3"]
    for instances in ([], "text", [3]):
        with pytest.raises(ValueError, match="record 1: .*expected (a list of objects|an object)"):
            to_examples([{"instruction": "Add one.", "instances": instances}])


def test_a_conversation_in_alpacas_template_trains_every_answer_and_its_end():
    record = {
        "instruction": "Two?",
        "output": "2",
        "system": "Count.",
        "history": [["One?", "1"]],
    }
    tokenizer = word_tokenizer()
    (example,) = to_examples([record], tokenizer=tokenizer)
    first = "Count.\n\n" + alpaca_prompt("One?")
    assert example.prompt == f"{first}1</s>\n\n### Instruction:\nTwo?\n\n### Response:\n"
    assert list(example.segments()) == [
        (first, False),
        ("1</s>", True),
        ("\n\n### Instruction:\nTwo?\n\n### Response:\n", False),
        ("2", True),
    ]
    (last,) = to_examples([record], prompting=Prompting(train_on="last"), tokenizer=tokenizer)
    assert last == Example(example.prompt, "2")
    (whole,) = to_examples(
        [record], prompting=Prompting(train_on="everything"), tokenizer=tokenizer
    )
    assert [trained for _, trained in whole.segments()] == [True, True]
    with pytest.raises(ValueError, match="record 1: .*needs the tokenizer's EOS between them"):
        to_examples([record])


def test_a_task_description_and_no_template():
    record = {"instruction": "One?", "input": "un", "output": "1"}
    (example,) = to_examples([record], prompting=Prompting("none", "Count."))
    assert example == Example("Count.\n\nOne?\nun", "1")
    (example,) = to_examples([record], prompting=Prompting(task_prompt="Count."))
    assert example == Example("Count.\n\n" + alpaca_prompt("One?", "un"), "1")
    (example,) = to_examples([{"text": "One."}], prompting=Prompting(task_prompt="Count."))
    assert example == Example("Count.\n\n", "One.")
    (example,) = to_examples([{"prompt": "One?", "completion": "1"}], prompting=Prompting("alpaca"))
    assert example == SIMPLE


# ---------------------------------------------------------------- what is decided about odd records


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": []}, "field 'messages' is empty, expected a list of turns"),
        ({"messages": "[]"}, "field 'messages' is str, expected a list"),
        ({"messages": [TALK[1], "hi"]}, "turn 2 is str, expected an object"),
        ({"messages": [{"text": "hi"}]}, r"turn 1 has neither 'role' nor 'from' \(found 'text'\)"),
        ({"messages": [{"role": "narrator", "content": ""}]}, "unknown role 'narrator'; use one"),
        ({"messages": [{"role": 3, "content": ""}]}, "unknown role 3"),
        ({"messages": [{"role": "user", "content": 3}]}, r"turn 1 \(user\): 'content' is int"),
        ({"messages": [{"role": "user"}]}, "'content' is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "'content' is missing"),
        ({"messages": [{"from": "gpt", "value": {"a": 1}}]}, "'value' is dict"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "parts that are no text",
        ),
        ({"messages": TALK[:2]}, r"no turn of the assistant.*roles: system, user\); add"),
        ({"messages": [{"role": "assistant", "content": "\ud83d"}]}, "half a surrogate"),
        ({"messages": [{**TALK[2], "weight": 0.5}]}, "weight 0.5; use 0"),
        ({"messages": [TALK[1], {**TALK[2], "weight": 0}]}, "no turn of the assistant to train on"),
        ({"messages": TALK, "tools": "{"}, "'tools' is no JSON list"),
        ({"messages": TALK, "tools": [3]}, "'tools' is no list of objects"),
        ({"messages": [*TALK, TALK[0], *TALK[1:]]}, "turn 4 is the system, for which this templ"),
        ({"messages": [TALK[1], {"role": "tool", "content": "x"}, TALK[2]]}, "turn 2 is the tool"),
        ({"messages": [*TALK, TALK[2]]}, "turn 4 of the assistant answers nothing"),
        (
            {"messages": [TALK[1], {**TALK[2], "tool_calls": [1]}, *TALK[1:]]},
            "turn 2 is a call of tools",
        ),
        ({"instruction": "a", "output": "b", "history": ["a"]}, "no list of .question, answer."),
        ({"instruction": "a", "output": "b", "history": "a"}, "no list of .question, answer."),
        ({"text": None}, "field 'text' is NoneType"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(record, message):
    with pytest.raises(ValueError, match=f"record 1: .*{message}"):
        to_examples([record], tokenizer=word_tokenizer())


def test_what_odd_records_mean():
    def meaning(*turns, **more):
        return to_examples([{"messages": list(turns), **more}], tokenizer=word_tokenizer())[0]

    asked, said = TALK[1:]
    assert meaning(asked, said, asked) == SIMPLE  # nothing follows a last question
    assert meaning(asked, {**said, "content": ""}) == Example(SIMPLE.prompt, "")  # learns to stop
    assert meaning({**asked, "content": "One"}, {**asked, "content": "?"}, said).prompt == (
        alpaca_prompt("One\n\n?")
    )
    parts = [{"type": "text", "text": "On"}, {"type": "text", "text": "e?"}]
    assert meaning({**asked, "content": parts}, said) == SIMPLE
    assert meaning({**asked, "role": "Human"}, {**said, "role": "MODEL"}) == SIMPLE
    assert meaning(asked, said, task="t").task == "t"
    unread = {**said, "content": "0", "weight": 0}
    assert meaning(asked, unread, asked, said).trained == ()
    assert "0</s>" in meaning(asked, unread, asked, said).prompt


def test_none_joins_one_question_to_one_answer():
    with pytest.raises(ValueError, match="2 answers, and template 'none' joins one"):
        to_examples([{"messages": TALK[1:] * 2}], prompting=Prompting("none"))
    with pytest.raises(ValueError, match="running text is no chat"):
        to_examples([{"text": "a"}], prompting=Prompting("chat"), tokenizer=chat_tokenizer())


def test_the_line_of_a_record_survives_holding_out(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = ['{"instruction": "a", "output": "b"}'] * 30 + ["", '{"instruction": "a"}']
    file.write_text("\n".join(lines))
    parts = hold_out(read_splits(str(file))["train"], 0.2, seed=1)
    (bad,) = [part for part in parts if any("output" not in record for record in part)]
    with pytest.raises(ValueError, match="a.jsonl, line 32: field 'output' is missing"):
        to_examples(bad, "alpaca")
