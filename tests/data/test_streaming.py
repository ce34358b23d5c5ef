"""Streams: what is read while it is trained on is what reading it whole gives."""

import json
from collections import Counter
from itertools import islice

import pytest
from datasets import Dataset, IterableDataset

from lit_adapters.data import StreamLoader, gathered, mixed, part, read_splits, stream, streaming
from tests.data.test_tables import ROWS, write_csv

RECORDS = [{"prompt": str(i), "completion": "b"} for i in range(25)]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK", 4)


def places(records):
    return [(records.place(index), record) for index, record in enumerate(records)]


@pytest.mark.parametrize("kind", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "saved"])
def test_a_stream_holds_what_reading_the_whole_gives(tmp_path, kind):
    file = tmp_path / kind
    if kind == "saved":
        Dataset.from_list(RECORDS).save_to_disk(file)
    elif kind == "a.arrow":
        Dataset.from_list(RECORDS).save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(file)
    elif kind == "a.parquet":
        Dataset.from_list(RECORDS).to_parquet(file)
    elif kind == "a.csv":
        write_csv(file)
    elif kind == "a.json":
        file.write_text(json.dumps(RECORDS))
    else:
        file.write_text("\n\n".join(map(json.dumps, RECORDS)), encoding="utf-8-sig")
    whole = read_splits(str(file))["train"]
    chunks = list(stream(str(file)))
    assert whole == (ROWS if kind == "a.csv" else RECORDS)
    assert gathered(chunks) == whole
    if kind != "saved":  # whose place a stream gives without the split
        assert places(gathered(chunks)) == places(whole)
    assert list(stream(str(file), "test")) == []


def test_a_data_set_of_the_hub_is_streamed_and_never_read_ahead(monkeypatch):
    asked, read = [], []

    def records():
        for record in RECORDS:
            read.append(record)
            yield record

    def load_dataset(name, config, streaming):
        asked.append((name, config, streaming))
        return {"train": IterableDataset.from_generator(records)}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    chunks = stream("someone/pairs:small")
    assert list(next(chunks)) == RECORDS[:4]
    assert len(read) <= 5
    assert [record for chunk in chunks for record in chunk] == RECORDS[4:]
    assert asked == [("someone/pairs", "small", True)]
    assert list(stream("someone/pairs", "test")) == []


def test_a_folder_is_streamed_by_split_and_shard(tmp_path):
    for number, start in ((0, 0), (1, 13)):
        shard = tmp_path / f"train-0000{number}-of-00002.jsonl"
        shard.write_text("\n".join(map(json.dumps, RECORDS[start : start + 13])))
    (tmp_path / "test.json").write_text(json.dumps(RECORDS[:2]))
    assert gathered(stream(str(tmp_path))) == RECORDS
    assert gathered(stream(str(tmp_path), "test")) == RECORDS[:2]
    assert gathered(stream("tiny")) == read_splits("tiny")["train"]


def test_a_part_of_a_stream(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, RECORDS)))
    for start, stop in ((0, None), (3, None), (4, 5), (0, 4), (6, 21), (30, None), (2, 99)):
        found = [record for chunk in part(stream(str(file)), start, stop) for record in chunk]
        assert found == RECORDS[start:stop]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": ', "a.jsonl, line 26: malformed JSON"),
        (b"[]", "a.jsonl, line 26: found list"),
        (b'{"prompt": "\xff"}', r"a.jsonl, line 26 is not UTF-8 \(byte 12 of the line\)"),
    ],
)
def test_a_bad_line_is_named_when_it_is_reached_and_not_before(tmp_path, line, message):
    file = tmp_path / "a.jsonl"
    file.write_bytes("\n".join(map(json.dumps, RECORDS)).encode() + b"\n" + line)
    running = stream(str(file))
    assert len(list(islice(running, 6))) == 6
    with pytest.raises(ValueError, match=message):
        next(running)


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match="no.jsonl does not exist"):
        next(stream("no.jsonl"))


# ---------------------------------------------------------------- mixtures

A, B = range(10), range(100, 103)
BOTH = [lambda: iter(A), lambda: iter(B)]


def test_without_weights_sources_come_after_each_other():
    assert list(mixed(BOTH, [None, None], 0)) == [*A, *B]


@pytest.mark.parametrize("weights", [[1, 1], [9, 1], [0.1, 0.9]])
def test_with_weights_every_record_comes_and_in_their_proportion(weights):
    totals = Counter()
    for seed in range(200):
        found = list(mixed(BOTH, weights, seed))
        assert set(found) == {*A, *B}
        assert found == list(mixed(BOTH, weights, seed))
        own = [item for item in found if item < 100]
        assert own == [A[i % 10] for i in range(len(own))]  # each source keeps its order
        totals["a"] += len(own)
        totals["all"] += len(found)
    assert totals["a"] / totals["all"] == pytest.approx(weights[0] / sum(weights), abs=0.05)


# ---------------------------------------------------------------- batches

LENGTHS = [(7 * i) % 11 + 2 for i in range(43)]
EXAMPLES = [{"input_ids": [i] * n, "labels": [i] * n} for i, n in enumerate(LENGTHS)]


def loader(rank=0, devices=1, window=12, **settings):
    order = {"batch_size": 3, "seed": 5, "shuffle": True, "group_by_length": True, **settings}
    order.update(rank=rank, devices=devices)
    return StreamLoader(lambda epoch: iter(EXAMPLES), order, pad_id=0, window=window)


def seen(batches):
    return [batch["input_ids"][:, 0].tolist() for batch in batches]


def test_an_epoch_holds_every_example_once_in_an_order_of_its_own():
    running = loader()
    first, second = seen(running), seen(running)
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(43))
    assert first != second
    assert seen(loader()) == first
    assert seen(loader(seed=6)) != first
    assert {max(batch) // 12 for batch in first[:4]} == {0}  # one window after the other
    assert sum(seen(loader(shuffle=False)), []) == list(range(43))


@pytest.mark.parametrize("done", range(15))
def test_a_stream_goes_on_after_any_batch(done):
    running = loader()
    whole, after = seen(running), seen(running)
    resumed = loader()
    resumed._next = (0, done)
    assert len(whole) == 15
    assert seen(resumed) == whole[done:]
    assert seen(resumed) == after


def test_a_stream_that_was_trained_to_its_end_goes_on_with_the_next_epoch():
    running, resumed = loader(), loader()
    whole, after = seen(running), seen(running)
    resumed._next = (0, len(whole))
    assert seen(resumed) == after
    resumed.load_state_dict(running.state_dict())
    assert seen(resumed) == seen(running)


def test_devices_share_the_batches_of_a_larger_batch_size():
    shares = [seen(loader(rank, devices=2, window=12)) for rank in (0, 1)]
    one = seen(loader(batch_size=6))
    together = [sorted(a + b) for a, b in zip(*shares, strict=True)]
    assert together[:-1] == [sorted(batch) for batch in one][: len(together) - 1]
    assert len(sum(together, [])) == 42  # the odd one out has nobody to go with


def test_a_stream_without_a_single_batch_is_an_error():
    empty = loader()
    empty.examples = lambda epoch: iter(())
    with pytest.raises(ValueError, match="the stream holds no example"):
        list(empty)
