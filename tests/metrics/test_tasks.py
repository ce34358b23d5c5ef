"""Calls with slots, and numbers: what is equal is equal however it is written."""

import json
import random
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_adapters.metrics import Answer, NumericAnswer, SlotF1, score, score_by_task
from lit_adapters.metrics.numeric import final_number
from lit_adapters.metrics.slots import parse

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k_test.jsonl"

names = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
values = st.none() | st.text(st.characters(exclude_characters="[]"), max_size=10)
slots = st.lists(st.tuples(names, values), max_size=6)


def write(act, parts, space=""):
    shown = [name if value is None else f"{name}{space}[{value}]" for name, value in parts]
    return f"{space}{act}{space}({f'{space},{space}'.join(shown)}){space}"


@given(names, slots, st.randoms(), st.sampled_from([" ", "\n", "\t "]))
def test_order_and_white_space_do_not_matter(act, parts, random_: random.Random, space):
    shuffled = random_.sample(parts, len(parts))
    found = parse(write(act, shuffled, space))
    assert found is not None
    assert found == parse(write(act, parts))
    assert found.act == act
    assert sorted(found.slots.elements(), key=repr) == sorted(
        parse(write(act, parts)).slots.elements(), key=repr
    )
    assert found.slots.total() == len(parts)


@given(names, slots, names, values)
def test_one_slot_more_is_another_call(act, parts, name, value):
    assert parse(write(act, parts)) != parse(write(act, [*parts, (name, value)]))


@pytest.mark.parametrize(
    "text",
    [
        *("", "inform", "inform(", "inform(name[A]", "inform(name[A]))", "inform(name[A],)"),
        *("inform(name[A] food[B])", "inform(name[A]) yes", "(name[A])", "inform(name[[A]])"),
        *("inform(name]A[)", "inform(,)", "a(b(c))"),
    ],
)
def test_anything_else_is_no_call(text):
    assert parse(text) is None


@pytest.mark.parametrize(
    ("prediction", "f1", "exact"),
    [
        ("inform(name[A], price[low])", 1, 1),
        ("inform(price[low], name[A])", 1, 1),
        ("request(name[A], price[low])", 1, 0),  # another act
        ("inform(name[A])", 2 * 1 / 3, 0),
        ("inform(name[A], price[high])", 2 * 1 / 4, 0),
        ("inform(name[A], price)", 2 * 1 / 4, 0),
        ("inform(name[A], name[A], price[low])", 2 * 2 / 5, 0),
        ("inform(name[a], price[low])", 2 * 1 / 4, 0),  # values keep their case
        ("inform(name[A], price[low]", 0, 0),
        ("", 0, 0),
    ],
)
def test_slot_scores_of_one_answer(prediction, f1, exact):
    found = score(Answer("", prediction, "inform(name[A], price[low])"), [SlotF1()])
    assert found == {"slot_f1": pytest.approx(f1), "slot_exact": exact}


def test_slot_f1_is_taken_over_the_slots_of_all_answers():
    answers = [
        Answer("", "a(x[1])", "a(x[1])"),
        Answer("", "a(x[1], y[2], z[0])", "a(x[1], y[2], z[3], u)"),
        Answer("", "a()", "a()"),
    ]
    right, given_, expected = 1 + 2, 1 + 3, 1 + 4
    precision, recall = right / given_, right / expected
    found = score_by_task(answers, [SlotF1()])["all"]
    assert found["slot_f1"].value == pytest.approx(2 * precision * recall / (precision + recall))
    assert found["slot_exact"] == (pytest.approx(2 / 3), 3)


@given(st.integers(-(10**12), 10**12), st.integers(0, 3))
def test_a_number_is_the_same_however_it_is_written(number, zeros):
    plain = f"#### {number}"
    tail = "." + "0" * zeros if zeros else ""
    for text in (f"{number:,}{tail}", f"{number}{tail}", f" {number:,} apples", f"${number}."):
        written = text.replace("$-", "-$")
        assert final_number(f"so\n####{written}") == final_number(plain) == Decimal(number)
    assert final_number(f"#### {number + 1}") != final_number(plain)


@given(st.decimals(-1000, 1000, places=2))
def test_decimals_compare_by_value(number):
    assert final_number(f"#### {number}") == number
    assert final_number(f"#### {number}0") == number


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("5 * 200 = 1000\n#### 1000", 1),
        ("#### 1,000", 1),
        ("#### 1000.0", 1),
        ("#### $1,000.00", 1),
        ("#### 7\n#### 1000", 1),  # the last counts
        ("#### -1000", 0),
        ("#### 1,0000", 0),
        ("#### 10000", 0),
        ("####", 0),
        ("1000", 0),  # the form is part of the task
        ("#### one thousand", 0),
        ("", 0),
    ],
)
def test_numeric_answers(prediction, right):
    answer = Answer("", prediction, "two hundred times five\n#### 1,000")
    assert score(answer, [NumericAnswer()]) == {"numeric": right}


@pytest.mark.skipif(not GSM8K.exists(), reason="the shared inputs are not here")
def test_every_answer_of_gsm8k_has_its_number():
    records = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    for record in records:
        worked, _, final = record["answer"].rpartition("#### ")
        plain = Answer("", f"{worked}#### {float(final.replace(',', ''))}", record["answer"])
        assert score(plain, [NumericAnswer()]) == {"numeric": 1}
        wrong = plain._replace(prediction=f"#### {final}1")
        assert score(wrong, [NumericAnswer()]) == {"numeric": 0}
    assert len(records) > 1000


def test_metrics_of_a_task_say_nothing_about_others():
    assert score(Answer("", "blue", "blue"), [SlotF1(), NumericAnswer()]) == {}
