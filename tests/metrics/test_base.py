"""Every metric: the same whatever the batching and sharing, one answer or many."""

import pytest

from lit_adapters.data import read_splits, to_examples
from lit_adapters.metrics import (
    BLEU,
    ROUGE,
    Answer,
    ExactMatch,
    NumericAnswer,
    SlotF1,
    SQLMatch,
    score,
    score_by_task,
)

METRICS = [ExactMatch, ROUGE, BLEU, SlotF1, SQLMatch, NumericAnswer]
every_metric = pytest.mark.parametrize("build", METRICS)


def some_answers(count=24):
    """Of all three tasks: some right, some the answer to another prompt of the task."""
    examples = to_examples(read_splits("tiny")["test"])
    chosen = [e for t in ("representation", "sql", "arithmetic") for e in examples if e.task == t]
    step = len(chosen) // count
    chosen = chosen[::step][:count]
    guesses = [e if i % 3 else chosen[i - 1] for i, e in enumerate(chosen)]
    pairs = zip(chosen, guesses, strict=True)
    return [Answer(e.prompt, guess.response, e.response, e.task) for e, guess in pairs]


@every_metric
def test_batches_and_their_order_make_no_difference(build):
    answers = some_answers()
    whole, parts = build(), build()
    whole.update(answers)
    for start in range(20, -1, -5):
        parts.update(answers[start : start + 5])
    assert list(whole.compute()) == list(build.names)
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-6)
    assert all(0 < value < 100 for value in whole.compute().values())


@every_metric
def test_the_container_and_the_pure_functions_agree(build):
    metric = build()
    answers = [answer._replace(task="") for answer in some_answers()]
    metric.update(answers)
    (found,) = score_by_task(answers, [build()]).values()
    assert {name: value for name, (value, _) in found.items()} == pytest.approx(metric.compute())
    one = build()
    one.update(answers[:1])
    assert one.compute() == pytest.approx(score(answers[0], [build()]))


@every_metric
def test_a_right_answer_has_the_best_score_and_an_empty_one_the_worst(build):
    metric = build()
    for answer in some_answers():
        best = score(answer._replace(prediction=answer.reference), [metric])
        assert all(v == pytest.approx(100 if name == "bleu" else 1) for name, v in best.items())
        assert not any(score(answer._replace(prediction=""), [metric]).values())


@every_metric
def test_nothing_is_said_before_the_first_answer_and_after_a_reset(build):
    metric = build()
    metric.update([])
    assert metric.compute() == {}
    metric.update(some_answers())
    metric.reset()
    metric.update([])
    assert metric.compute() == {}


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_task_metrics_speak_of_their_own_task_and_all_of_it(split):
    owners = {"representation": "slot_exact", "sql": "sql_exact", "arithmetic": "numeric"}
    answers = [
        Answer(e.prompt, e.response, e.response, e.task)
        for e in to_examples(read_splits("tiny")[split])
    ]
    found = score_by_task(answers, [SlotF1(), SQLMatch(), NumericAnswer()])
    for task, name in owners.items():
        own = sum(answer.task == task for answer in answers)
        assert found[task][name] == (1.0, own)
        assert len(found[task]) == (1 if name == "numeric" else 2)


def test_scores_by_task_come_in_order_of_appearance():
    answers = [Answer("", "x", "x", task) for task in ("b", "a", "", "b")]
    found = score_by_task(answers, [ExactMatch()])
    assert list(found) == ["b", "a", "all"]
    assert [values["exact_match"] for values in found.values()] == [(1, 2), (1, 1), (1, 1)]


def test_answers_of_several_sources_are_scored_by_source_too():
    answers = [
        Answer("", "x", right, task, source)
        for right, task, source in ["xaq", "yaq", "xbp", "xbq"]  # reference, task, source
    ]
    found = score_by_task(answers, [ExactMatch()])
    assert list(found) == ["a", "b", "source/q", "source/p"]
    assert [values["exact_match"] for values in found.values()] == [
        (0.5, 2),
        (1, 2),
        (pytest.approx(2 / 3), 3),
        (1, 1),
    ]
    assert list(score_by_task(answers[:2], [ExactMatch()])) == ["a"]  # one source is no source
