"""Chat templates: what is trained on is what the model has to write, where it writes it."""

import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_adapters.data import (
    ChatTemplate,
    Conversation,
    Example,
    Prompting,
    Turn,
    prompt_ids,
    to_examples,
    tokenise,
)
from tests.data.chat_templates import FAMILIES, MARKED, THINKING, chat_tokenizer
from tests.data.word_tokenizer import word_tokenizer

TEXT = st.text(st.sampled_from("ab. ,\n\tThe sea?é中🙂<|/[]>"), max_size=12).filter(
    lambda text: "<s>" not in text and "</s>" not in text
)
QUESTION = TEXT.filter(str.strip)
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def trained_text(tokenizer, tokens):
    return decoded(tokenizer, [label for label in tokens["labels"] if label != -100])


def conversation(*turns, **settings):
    return Conversation(tuple(Turn(role, content) for role, content in turns), **settings)


def tokens_of(examples, tokenizer):
    found, _ = tokenise(examples, tokenizer, max_length=100_000)
    return found


@pytest.mark.parametrize("words", [True, False], ids=["words", "across-words"])
@pytest.mark.parametrize("name", FAMILIES)
@quick
@given(
    system=st.none() | QUESTION,
    pairs=st.lists(st.tuples(QUESTION, TEXT), min_size=1, max_size=3),
    left_over=st.booleans(),
)
def test_the_trained_tokens_are_the_answers_and_their_ends(name, words, system, pairs, left_over):
    tokenizer, family = chat_tokenizer(name, words), FAMILIES[name]
    turns = [("system", system)] if system else []
    for question, answer in pairs:
        turns += [("user", question), ("assistant", answer)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the chat template has no system turn")
        (example,) = ChatTemplate(tokenizer).examples(
            conversation(*turns, *([("user", "and?")] if left_over else []))
        )
    (tokens,) = tokens_of([example], tokenizer)
    assert trained_text(tokenizer, tokens) == family.expected([answer for _, answer in pairs])

    messages = [{"role": role, "content": content} for role, content in turns]
    if system and "system" in family.refuses:
        messages[:2] = [{"role": "user", "content": f"{system}\n\n{messages[1]['content']}"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    read = decoded(tokenizer, tokens["input_ids"])
    assert whole in (read, f"{read}\n")
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True
    )
    (start,) = prompt_ids([example], tokenizer)
    assert example.prompt == decoded(tokenizer, start) == prompt
    assert tokens["input_ids"][: len(start)] == start
    if family.bos:
        assert tokens["input_ids"].count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_one_question_trains_what_generation_would_be_given(name):
    """The prompt, tokenised as any user of the model would, and nothing but the answer after it."""
    tokenizer, family = chat_tokenizer(name), FAMILIES[name]
    (example,) = ChatTemplate(tokenizer).examples(
        conversation(("user", "The sea?"), ("assistant", "Wide."))
    )
    (tokens,) = tokens_of([example], tokenizer)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "The sea?"}], add_generation_prompt=True
    )["input_ids"]
    answer = tokenizer(family.expected(["Wide."]), add_special_tokens=False)["input_ids"]
    assert tokens == {"input_ids": asked + answer, "labels": [-100] * len(asked) + answer}
    assert example.response.strip() == "Wide."


TURNS = [("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("all", "1<|im_end|>2<|im_end|>"),
        ("last", "2<|im_end|>"),
        ("everything", None),
    ],
)
def test_train_on(train_on, expected):
    tokenizer = chat_tokenizer()
    (example,) = ChatTemplate(tokenizer).examples(conversation(*TURNS), train_on=train_on)
    (tokens,) = tokens_of([example], tokenizer)
    whole = decoded(tokenizer, tokens["input_ids"])
    assert trained_text(tokenizer, tokens) == (whole if expected is None else expected)


def test_an_answer_of_weight_zero_is_read_and_not_trained():
    tokenizer = chat_tokenizer()
    turns = [Turn("user", "One?"), Turn("assistant", "1", trained=False), Turn("user", "Two?")]
    record = Conversation((*turns, Turn("assistant", "2"), Turn("assistant", "3", trained=False)))
    (example,) = ChatTemplate(tokenizer).examples(record)
    (tokens,) = tokens_of([example], tokenizer)
    assert trained_text(tokenizer, tokens) == "2<|im_end|>"
    assert decoded(tokenizer, tokens["input_ids"]).endswith(
        "assistant\n1<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>"
    )


# ---------------------------------------------------------------- templates that rewrite


def test_reasoning_that_a_template_drops_later_is_trained_where_it_is_written():
    tokenizer = chat_tokenizer()
    said = conversation(
        ("user", "One?"),
        ("assistant", "<think>\nhm\n</think>\n\n1"),
        ("user", "Two?"),
        ("assistant", "2"),
    )
    with pytest.warns(UserWarning, match="several examples"):
        examples = ChatTemplate(tokenizer, THINKING).examples(said)
    found = [trained_text(tokenizer, tokens) for tokens in tokens_of(examples, tokenizer)]
    assert found == [
        "<think>\nhm\n</think>\n\n1<|im_end|>",
        "<think>\n\n</think>\n\n2<|im_end|>",
    ]
    assert "hm" not in examples[1].prompt
    (last,) = ChatTemplate(tokenizer, THINKING).examples(said, train_on="last")
    assert last == examples[1]


def test_an_answer_to_a_prompt_that_is_written_otherwise_later_is_not_trained_there():
    tokenizer = chat_tokenizer()
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} "
        "{{ 'new' if loop.index > messages|length - (1 if add_generation_prompt else 2) "
        "else 'old' }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant new\n{% endif %}"
    )
    with pytest.warns(UserWarning, match="several examples"):
        first, second = ChatTemplate(tokenizer, template).examples(conversation(*TURNS))
    assert "user new\nOne?" in first.prompt
    assert "user old\nOne?" in second.prompt
    assert second.trained == ()


def test_generation_markers_decide_where_a_template_has_them():
    tokenizer = chat_tokenizer()
    (marked,) = ChatTemplate(tokenizer, MARKED).examples(conversation(*TURNS))
    (tokens,) = tokens_of([marked], tokenizer)
    assert trained_text(tokenizer, tokens) == "\n1<|im_end|>\n2<|im_end|>"
    # the same mask as transformers makes of the same template
    messages = [{"role": role, "content": content} for role, content in TURNS]
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=MARKED, return_assistant_tokens_mask=True, return_dict=True
    )
    ours = [label != -100 for label in tokens["labels"]]
    assert tokens["input_ids"] == theirs["input_ids"][: len(ours)]
    assert ours == [bool(m) for m in theirs["assistant_masks"]][: len(ours)]
    assert not any(theirs["assistant_masks"][len(ours) :])


def test_a_marked_answer_takes_the_end_of_turn_that_follows_it():
    tokenizer = chat_tokenizer()
    template = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    assert template != MARKED
    (example,) = ChatTemplate(tokenizer, template).examples(conversation(*TURNS))
    (tokens,) = tokens_of([example], tokenizer)
    assert trained_text(tokenizer, tokens).endswith("2<|im_end|>")
    (last,) = ChatTemplate(tokenizer, template).examples(conversation(*TURNS), train_on="last")
    assert (last.trained, last.end) == ((), "<|im_end|>")


PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def test_without_an_end_of_turn_every_answer_ends_in_eos_in_a_text_of_its_own():
    tokenizer = chat_tokenizer()
    with pytest.warns(UserWarning, match="EOS is put|several examples") as told:
        examples = ChatTemplate(tokenizer, PLAIN).examples(conversation(*TURNS))
    assert {str(w.message).split(";")[1].strip() for w in told} == {
        "EOS is put behind them",
        "such conversations become several examples",
    }
    assert [(e.prompt, e.response, e.end) for e in examples] == [
        ("user: One?\nassistant: ", "1", "<|im_end|>"),
        ("user: One?\nassistant: 1\nuser: Two?\nassistant: ", "2", "<|im_end|>"),
    ]


def test_the_head_of_an_answer_is_read_where_the_template_has_no_prompt():
    tokenizer = chat_tokenizer()
    template = FAMILIES["qwen"].template.partition("{%- if add_generation_prompt %}")[0]
    (example,) = ChatTemplate(tokenizer, template).examples(conversation(*TURNS))
    (tokens,) = tokens_of([example], tokenizer)
    assert trained_text(tokenizer, tokens) == "1<|im_end|>2<|im_end|>"


def test_a_prompt_that_no_answer_follows_is_told():
    tokenizer = chat_tokenizer()
    template = FAMILIES["qwen"].template.replace(
        "{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}"
    )
    with pytest.warns(UserWarning, match=r"prompts for an answer by .*<think>\\n' but writes"):
        (example,) = ChatTemplate(tokenizer, template).examples(conversation(*TURNS))
    (tokens,) = tokens_of([example], tokenizer)
    assert trained_text(tokenizer, tokens) == "1<|im_end|>2<|im_end|>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("m.content + '<|im_end|>", "m.content.upper() + '<|im_end|>"), "turn 2 as it is"),
        (("m.content +", "'' +"), "cannot be told|as it is"),
        (("m.content +", "(m.content if m.role != 'user' else '') +"), r"leaves out turn 1 \(user"),
    ],
)
def test_a_template_that_changes_the_words_is_refused(change, message):
    template = FAMILIES["qwen"].template
    assert change[0] in template
    with pytest.raises(ValueError, match=message):
        ChatTemplate(chat_tokenizer(), template.replace(*change)).examples(
            conversation(("user", "one"), ("assistant", "two"))
        )


# ---------------------------------------------------------------- the system, and the task


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("own", [None, "Be brief."])
@pytest.mark.filterwarnings("ignore:the chat template has no system turn")
def test_a_task_description_comes_first(name, own):
    turns = [("system", own)] if own else []
    record = conversation(*turns, ("user", "One?"), ("assistant", "1"))
    (example,) = ChatTemplate(chat_tokenizer(name)).examples(record, task_prompt="Count.")
    assert f"Count.\n\n{own}" in example.prompt if own else "Count." in example.prompt
    assert example.prompt.index("Count.") < example.prompt.index("One?")


def test_a_template_without_a_system_turn_says_so():
    with pytest.warns(UserWarning, match="no system turn: its text goes before the first user's"):
        ChatTemplate(chat_tokenizer("gemma")).examples(
            conversation(("system", "Count."), ("user", "One?"), ("assistant", "1"))
        )


def test_what_a_template_refuses_is_an_error_in_its_words():
    record = conversation(("user", "a"), ("user", "b"), ("assistant", "c"))
    with pytest.raises(ValueError, match="refuses the conversation: user and assistant must take"):
        ChatTemplate(chat_tokenizer("mistral")).examples(record)


@pytest.mark.parametrize(("head", "count"), [("", 0), ("{{ bos_token }}", 1)])
@pytest.mark.parametrize("train_on", ["all", "everything"])
def test_bos_comes_from_the_template_only(head, count, train_on):
    """Of a tokenizer that would put one before every text."""
    tokenizer = word_tokenizer()
    template = head + "{% for m in messages %} {{ m.content }} {{ eos_token }}{% endfor %}"
    (example,) = ChatTemplate(tokenizer, template).examples(
        conversation(("user", "a b"), ("assistant", "c")), train_on=train_on
    )
    (tokens,) = tokens_of([example], tokenizer)
    assert tokens["input_ids"].count(tokenizer.bos_token_id) == count
    assert prompt_ids([example], tokenizer)[0].count(tokenizer.bos_token_id) == count
    assert trained_text(tokenizer, tokens).endswith("c </s>")


def test_a_text_that_spells_a_special_token_is_told():
    with pytest.warns(
        UserWarning, match=r"turn 1 \(user\) spells the special token '<\|im_end\|>'"
    ):
        ChatTemplate(chat_tokenizer()).examples(
            conversation(("user", "What is <|im_end|>?"), ("assistant", "An end."))
        )


def test_tools_and_their_answers_reach_the_template():
    template = (
        "{% if tools %}{{ tools[0]['name'] }};{% endif %}{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0]['name'] }}(){% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = chat_tokenizer()
    record = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]},
            {"role": "tool", "content": "rain", "name": "look"},
            {"role": "assistant", "content": "It rains."},
        ],
        "tools": [{"name": "look"}],
    }
    tokenizer.chat_template, own = template, tokenizer.chat_template
    try:
        (example,) = to_examples([record], tokenizer=tokenizer)
    finally:
        tokenizer.chat_template = own
    (tokens,) = tokens_of([example], tokenizer)
    assert trained_text(tokenizer, tokens) == "look()<|im_end|>It rains.<|im_end|>"
    assert example.prompt.startswith("look;<|im_start|>user\nWeather?")


# ---------------------------------------------------------------- which template


def test_auto_takes_the_chat_template_for_conversations_only():
    tokenizer = chat_tokenizer()
    chat = {"messages": [{"role": r, "content": c} for r, c in TURNS[:2]]}
    (talk,) = to_examples([chat], tokenizer=tokenizer)
    (task,) = to_examples([{"instruction": "One?", "output": "1"}], tokenizer=tokenizer)
    assert talk.prompt.startswith("<|im_start|>system")
    assert task == Example(task.prompt, "1")
    assert task.prompt.startswith("Below is")
    (asked,) = to_examples(
        [{"instruction": "One?", "input": "un", "output": "1"}],
        prompting=Prompting("chat"),
        tokenizer=tokenizer,
    )
    assert "user\nOne?\n\nun<|im_end|>" in asked.prompt


def test_a_template_of_ones_own_comes_from_a_file(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}[{{ m.content }}]{{ eos_token }}{% endfor %}")
    (example,) = to_examples(
        [{"instruction": "One?", "output": "1"}],
        prompting=Prompting(str(file)),
        tokenizer=chat_tokenizer(),
    )
    assert (example.prompt, example.response) == ("[One?]<|im_end|>[", "1]")
    assert example.end == "<|im_end|>"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{% for m in messages %}\n{{ m.content }\n", "bad.jinja, line 2: "),
        (
            "{{ messages.__class__.__mro__ }}{{ ''.__class__.__bases__[0].__subclasses__() }}",
            "unsaf",
        ),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_bad_template_file_is_named(tmp_path, content, message):
    file = tmp_path / "bad.jinja"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        to_examples(
            [{"instruction": "One?", "output": "1"}],
            prompting=Prompting(str(file)),
            tokenizer=chat_tokenizer(),
        )


def test_what_is_missing_for_a_template_is_said():
    chat = {"messages": [{"role": r, "content": c} for r, c in TURNS]}
    with pytest.raises(ValueError, match="needs a tokenizer"):
        to_examples([chat])
    bare = chat_tokenizer("llama3", words=True)
    bare.chat_template, own = None, bare.chat_template
    try:
        with pytest.raises(ValueError, match="has no chat template; use template 'alpaca'"):
            to_examples([chat], prompting=Prompting("chat"), tokenizer=bare)
        (fallen_back,) = to_examples([chat], tokenizer=bare)
    finally:
        bare.chat_template = own
    assert fallen_back.prompt.startswith("Below is")
    with pytest.raises(FileNotFoundError, match="no.jinja does not exist"):
        to_examples([chat], prompting=Prompting("no.jinja"), tokenizer=bare)
    with pytest.raises(ValueError, match="template 'chatml' is unknown; use one of: auto, alpaca"):
        Prompting("chatml")
    with pytest.raises(ValueError, match="train_on 'answers' is unknown; use one of: all, last"):
        Prompting(train_on="answers")
