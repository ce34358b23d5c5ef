"""ROUGE against torchmetrics' own, BLEU against sacrebleu's corpus score, both in other scripts."""

import builtins
import random

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.text.rouge import rouge_score

from lit_adapters.metrics import BLEU, ROUGE, Answer, score
from lit_adapters.metrics.bleu import tokenizer_for
from lit_adapters.metrics.rouge import f1, longest_common, words

ENGLISH = (
    "The cat sat on the mat, didn't it? A dog, 3.5 years old, ran past the cat; the mat_1 was red. "
    "It's 10% off today - everything must go! No one knows why the dog ran."
).split()


def texts(seed, count=20, source=ENGLISH, space=" "):
    random_ = random.Random(seed)
    return [space.join(random_.choices(source, k=random_.randint(1, 15))) for _ in range(count)]


def scores(metric, predictions, references):
    metric.update(Answer("", p, r) for p, r in zip(predictions, references, strict=True))
    return metric.compute()


def test_rouge_of_english_is_that_of_another_library():
    predictions, references = texts(1), texts(2)
    keys = ("rouge1", "rouge2", "rougeL")
    theirs = rouge_score(predictions, references, rouge_keys=keys)
    expected = {key: theirs[f"{key}_fmeasure"].item() for key in keys}
    assert scores(ROUGE(), predictions, references) == pytest.approx(expected, rel=1e-5)


def test_rouge_of_chinese_is_that_of_another_library_told_how_to_split_it():
    source = list("我们在河边看见一只红色的鸟它飞走了")
    predictions, references = texts(1, source=source, space=""), texts(2, source=source, space="")
    keys = ("rouge1", "rouge2", "rougeL")
    theirs = rouge_score(
        predictions, references, rouge_keys=keys, tokenizer=list, normalizer=lambda text: text
    )
    expected = {key: theirs[f"{key}_fmeasure"].item() for key in keys}
    assert expected["rouge1"] > 0.2
    assert scores(ROUGE(), predictions, references) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("The mat_1 isn't 3.5m!", ["the", "mat", "1", "isn", "t", "3", "5m"]),
        ("Ärger in Łódź", ["ärger", "in", "łódź"]),
        ("Привет, мир", ["привет", "мир"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("我用GPT4写", ["我", "用", "gpt4", "写"]),
        ("犬が3匹。", ["犬", "が", "3", "匹"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("e\u0301te\u0301", ["e\u0301te\u0301"]),
        ("?!", []),
    ],
)
def test_words_of_any_script(text, split):
    assert words(text) == split


@given(st.text("ab ", max_size=12), st.text("ab ", max_size=12))
@settings(max_examples=100, deadline=None)
def test_the_longest_common_subsequence_by_its_definition(one, other):
    def recursive(a, b):
        if not a or not b:
            return 0
        if a[-1] == b[-1]:
            return recursive(a[:-1], b[:-1]) + 1
        return max(recursive(a[:-1], b), recursive(a, b[:-1]))

    one, other = one[:6], other[:6]
    assert longest_common(one, other) == recursive(one, other)


def test_f1_is_the_harmonic_mean_of_precision_and_recall():
    precision, recall = 3 / 4, 3 / 10
    assert f1(3, 4, 10) == pytest.approx(2 * precision * recall / (precision + recall))
    assert f1(0, 0, 0) == 0


@pytest.mark.parametrize("seeds", [(1, 2), (3, 4)])
@pytest.mark.parametrize("tokenize", ["13a", "intl", "char", "auto"])
def test_bleu_is_sacrebleus_of_the_corpus(tokenize, seeds):
    predictions, references = (texts(seed) for seed in seeds)
    own = "13a" if tokenize == "auto" else tokenize
    expected = sacrebleu.corpus_bleu(predictions, [references], tokenize=own).score
    assert scores(BLEU(tokenize), predictions, references)["bleu"] == pytest.approx(expected)


def test_bleu_of_chinese_is_not_zero_and_needs_no_setting():
    prediction, reference = "我们在河边看见一只红色的鸟", "我们在河边看见一只蓝色的鸟"
    expected = sacrebleu.corpus_bleu([prediction], [[reference]], tokenize="zh").score
    found = scores(BLEU(), [prediction], [reference])["bleu"]
    assert found == pytest.approx(expected)
    assert found > 50
    assert sacrebleu.corpus_bleu([prediction], [[reference]]).score == 0


@pytest.mark.parametrize(
    ("text", "name"),
    [("plain", "13a"), ("naïve", "13a"), ("中文", "zh"), ("犬が", "char"), ("ไทย", "char")],
)
def test_the_tokenizer_follows_the_script(text, name):
    assert tokenizer_for(text) == name


def test_short_right_answers_have_full_bleu():
    assert score(Answer("", "blue", "blue"), [BLEU()]) == {"bleu": pytest.approx(100)}


def test_an_unknown_tokenizer_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="'jp' is unknown; use auto or .*13a.*char"):
        BLEU("jp")


def test_without_sacrebleu_the_error_says_what_to_install(monkeypatch):
    original = builtins.__import__

    def absent(name, *rest):
        if name.startswith("sacrebleu"):
            raise ImportError("No module named 'sacrebleu'")
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ValueError, match=r"needs the package sacrebleu.*lit_adapters\[eval\]"):
        BLEU()
