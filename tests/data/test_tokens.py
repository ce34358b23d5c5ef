from pathlib import Path

import pytest

from lit_adapters.data import Example, to_examples, tokenise
from lit_adapters.data.records import read_file
from tests.data.word_tokenizer import BOS, EOS, A, word_tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared"


def one(prompt, response, tokenizer, **options):
    kept, _ = tokenise([Example(prompt, response)], tokenizer, **options)
    return kept[0]


def test_response_and_eos_are_trained_and_the_prompt_is_not():
    tokens = one("a b", "c d", word_tokenizer())
    assert tokens["input_ids"] == [BOS, A, A + 1, A + 2, A + 3, EOS]
    assert tokens["labels"] == [-100, -100, -100, A + 2, A + 3, EOS]


@pytest.mark.parametrize(
    ("settings", "prompt", "start"),
    [
        ({"bos": True}, "a", [BOS, A]),
        ({"bos": False}, "a", [A]),
        ({"bos": True}, "<s> a", [BOS, A]),  # spelled out in the prompt: not doubled
        ({"bos": True, "suffix": True}, "a", [BOS, A]),  # EOS of the tokenizer's own: not inside
    ],
)
def test_bos_comes_at_most_once(settings, prompt, start):
    tokens = one(prompt, "b", word_tokenizer(**settings))
    assert tokens["input_ids"] == [*start, A + 1, EOS]


def test_eos_is_trained_where_it_is_also_the_padding():
    tokenizer = word_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert one("a", "b", tokenizer)["labels"] == [-100, -100, A + 1, EOS]


def test_an_empty_response_still_teaches_to_stop():
    assert one("a", "", word_tokenizer())["labels"] == [-100, -100, EOS]


def test_without_eos_is_an_error_with_the_remedy():
    with pytest.raises(ValueError, match=r"no EOS token.*set tokenizer.eos_token"):
        one("a", "b", word_tokenizer(eos=False))


def test_overlong_examples_are_truncated_on_the_right_without_eos():
    tokens = one("a", "b c d", word_tokenizer(), max_length=4)
    assert tokens["input_ids"] == [BOS, A, A + 1, A + 2]
    assert tokens["labels"] == [-100, -100, A + 1, A + 2]
    assert one("a", "b", word_tokenizer(), max_length=4)["input_ids"] == [BOS, A, A + 1, EOS]


EXAMPLES = [Example("a", "b"), Example("a", "b c d"), Example("a a a a a", "b")]  # 4, 6, 8 tokens


def test_the_report_counts_what_was_truncated_and_dropped():
    kept, report = tokenise(EXAMPLES, word_tokenizer(), max_length=5)
    assert [len(tokens["input_ids"]) for tokens in kept] == [4, 5]
    assert (report.examples, report.kept, report.truncated, report.dropped) == (3, 2, 1, 1)
    assert (report.p10, report.p50, report.p90, report.longest) == (4, 6, 8, 8)
    assert report.trained_share == 5 / 9
    assert "2 of 3 examples kept, 1 of them truncated to 5 tokens (33.3%), 1 dropped" in str(report)
    assert "56% of the kept tokens" in str(report)
    metrics = report.metrics()
    assert (metrics["truncated_share"], metrics["dropped_share"]) == (1 / 3, 1 / 3)
    assert (metrics["p50"], metrics["trained_share"]) == (6, 5 / 9)


def test_overlong_examples_can_be_dropped():
    kept, report = tokenise(EXAMPLES, word_tokenizer(), max_length=6, overlong="drop")
    assert [len(tokens["input_ids"]) for tokens in kept] == [4, 6]
    assert (report.kept, report.truncated, report.dropped) == (2, 0, 1)


@pytest.mark.parametrize(
    ("overlong", "limit", "remedy"),
    [("truncate", 2, "raise max_length$"), ("drop", 3, "or use overlong='truncate'$")],
)
def test_nothing_left_is_an_error(overlong, limit, remedy):
    with pytest.raises(ValueError, match=rf"none of 3 examples.*longest 8.*{remedy}"):
        tokenise(EXAMPLES, word_tokenizer(), max_length=limit, overlong=overlong)


def test_a_label_that_nothing_predicts_does_not_count_as_trained():
    with pytest.raises(ValueError, match="none of 1 examples has a trained token"):
        tokenise([Example("", "")], word_tokenizer(bos=False))


def test_unknown_overlong_and_no_examples_are_errors():
    with pytest.raises(ValueError, match="'cut' is unknown; use 'truncate' or 'drop'"):
        tokenise(EXAMPLES, word_tokenizer(), overlong="cut")
    with pytest.raises(ValueError, match="no examples"):
        tokenise([], word_tokenizer())


@pytest.mark.skipif(not SHARED.exists(), reason="real files are not here")
def test_real_data_with_a_real_tokenizer():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "stories260k")
    examples = to_examples(read_file(SHARED / "data" / "alpaca_en_demo.json"))
    kept, report = tokenise(examples, tokenizer, max_length=512)
    assert report.examples == 999
    assert report.kept + report.dropped == 999
    assert report.truncated > 0
    for tokens in kept:
        ids, labels = tokens["input_ids"], tokens["labels"]
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id
        assert len(ids) == len(labels) <= 512
        assert len(ids) == 512 or labels[-1] == tokenizer.eos_token_id
    first, trained = kept[0], [label for label in kept[0]["labels"] if label != -100]
    if first["labels"][-1] == tokenizer.eos_token_id:
        assert tokenizer.decode(trained[:-1]).strip() == examples[0].response.strip()
