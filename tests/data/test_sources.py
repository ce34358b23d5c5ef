"""Several sources: who gives how much of an epoch."""

from collections import Counter

import pytest

from lit_adapters.data import shares, source_names, weights_of


def test_without_weights_every_record_comes_once():
    assert shares([3, 2], [None, None], seed=0) == [[0, 1, 2], [0, 1]]


@pytest.mark.parametrize("sizes", [[10, 10], [100, 7], [7, 100], [1, 50]])
@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [0.2, 0.8]])
def test_weights_are_shares_of_the_shortest_epoch_that_holds_every_record(sizes, weights):
    found = shares(sizes, weights, seed=4)
    counts = [Counter(indices) for indices in found]
    total = sum(map(len, found))
    for size, weight, indices, count in zip(sizes, weights, found, counts, strict=True):
        assert set(count) == set(range(size))
        assert max(count.values()) - min(count.values()) <= 1  # repeated as evenly as can be
        assert abs(len(indices) - weight / sum(weights) * total) <= 1
    assert any(len(indices) == size for size, indices in zip(sizes, found, strict=True))
    assert shares(sizes, weights, seed=4) == found


def test_the_part_that_comes_once_more_is_drawn_by_the_seed():
    assert shares([100, 150], [1, 1], 1)[0] != shares([100, 150], [1, 1], 2)[0]


def test_names_are_short_where_they_tell_sources_apart():
    assert source_names(["a/b.jsonl"]) == [""]
    assert source_names(["a/b.jsonl", "owner/c:main", "tiny"]) == ["b", "c:main", "tiny"]
    assert source_names(["a/train.json", "b/train.json"]) == ["a/train.json", "b/train.json"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ([], "names no source"),
        ({}, "names no source"),
        (["a", "b", "a"], "lists a twice"),
        ({"a": 0}, "weight 0 of a is no positive number"),
        ({"a": -1.0}, "no positive number"),
        ({"a": float("nan")}, "no positive number"),
        ({"a": float("inf")}, "no positive number"),
        ({"a": True}, "no positive number"),
    ],
)
def test_a_mixture_that_means_nothing_is_refused(path, message):
    with pytest.raises(ValueError, match=message):
        weights_of(path)
