import json
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_adapters.data import Records, complete_splits, hold_out, is_hub_id, read_splits
from lit_adapters.data.splits import held_out_of

RECORDS = Records({"instruction": f"number {i}", "output": str(i)} for i in range(20))
LINES = "\n".join(map(json.dumps, RECORDS))


def test_a_json_list_and_json_lines_read_the_same(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    (tmp_path / "a.jsonl").write_text("\n" + LINES + "\n\n")
    for name in ("a.json", "a.jsonl"):
        assert read_splits(str(tmp_path / name)) == {"train": RECORDS}


def test_unicode_line_separators_and_a_byte_order_mark_are_part_of_the_text(tmp_path):
    record = {"instruction": "one\u2028two\x85three", "output": "é"}
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8-sig")
    assert read_splits(str(file)) == {"train": [record]}


def test_a_folder_holds_a_file_per_split(tmp_path):
    (tmp_path / "train.jsonl").write_text(LINES)
    (tmp_path / "test.json").write_text(json.dumps(RECORDS[:2]))
    assert read_splits(str(tmp_path)) == {"train": RECORDS, "test": RECORDS[:2]}


def test_the_embedded_data_has_every_split():
    splits = read_splits("tiny")
    assert set(splits) == {"train", "validation", "test"}
    assert all({"instruction", "output"} <= set(records[0]) for records in splits.values())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "is empty"),
        ("a.jsonl", b" \n\n", "is empty"),
        ("a.json", b"[]", "an empty list"),
        ("a.json", b'{"data": []}', "holds dict at the top; expected a list of objects"),
        ("a.json", b'"text"', "holds str at the top"),
        ("a.json", b'[{"a": 1}, 2]', "record 2: found int, expected an object"),
        ("a.json", b'[{"a": 1},\n{"b" 2}]', r"line 2: malformed JSON.*column 6"),
        ("a.jsonl", b'{"a": 1}\n\n{"b": \n', "line 3: malformed JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "line 2: found list, expected an object"),
        ("a.jsonl", b'[\n{"a": 1}\n]', r"line 1: malformed JSON.*one list \(.json\)"),
        ("a.jsonl", b'{"a": "\xff"}', r"not UTF-8 \(byte 7\); convert it"),
        ("a.txt", b"a,b", "suffix '.txt'; expected .json or .jsonl or .csv"),
    ],
)
def test_a_bad_file_is_an_error_that_says_where(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_splits(str(file))
    assert str(file) in str(raised.value)


def test_a_missing_file_lists_near_names(tmp_path):
    (tmp_path / "alpaca.json").write_text("[]")
    with pytest.raises(FileNotFoundError, match=r"did you mean alpaca.json\?"):
        read_splits(str(tmp_path / "alpacca.json"))
    with pytest.raises(FileNotFoundError, match="nor does its folder"):
        read_splits(str(tmp_path / "no" / "where.json"))
    with pytest.raises(FileNotFoundError, match="nothing there has a similar name"):
        read_splits(str(tmp_path / "zzzz"))


def test_a_folder_needs_train_and_each_split_once(tmp_path):
    (tmp_path / "tests.json").write_text("[]")
    with pytest.raises(FileNotFoundError, match=r"no train.jsonl or train.json .*found: tests"):
        read_splits(str(tmp_path))
    for suffix in ("json", "jsonl"):
        (tmp_path / f"train.{suffix}").write_text(LINES)
    with pytest.raises(ValueError, match="holds train twice"):
        read_splits(str(tmp_path))


def test_what_counts_as_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    assert is_hub_id("tatsu-lab/alpaca")
    assert is_hub_id("openai/gsm8k:main")
    for local in ("tiny", "own", "a.json", "x/a.jsonl", "./a/b", "../b", "/a/b", "~/a", "a/b/c"):
        assert not is_hub_id(local), local


def hub(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))


def test_a_hub_data_set_is_asked_for_by_name_and_config_only(monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return {"train": iter(RECORDS), "test": iter(RECORDS[:1]), "extra": iter(RECORDS)}

    hub(monkeypatch, load)
    assert read_splits("owner/name:main") == {"train": RECORDS, "test": RECORDS[:1]}
    read_splits("owner/name")
    assert asked == [(("owner/name", "main"), {}), (("owner/name", None), {})]


def test_a_hub_failure_names_both_readings_of_the_path(monkeypatch, tmp_path):
    def load(*args):
        raise ConnectionError("offline")

    hub(monkeypatch, load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alpaca.json").write_text("[]")
    with pytest.raises(FileNotFoundError, match=r"did you mean alpaca.json\?.*hub.*offline"):
        read_splits("alpaca")
    hub(monkeypatch, lambda *args: {"dev": []})
    with pytest.raises(ValueError, match=r"no records in a train split; its splits: \['dev'\]"):
        read_splits("owner/name")


def test_hold_out_depends_on_the_seed_only():
    train, validation = hold_out(RECORDS, 0.25, seed=1)
    assert (len(train), len(validation)) == (15, 5)
    assert sorted(train + validation, key=RECORDS.index) == RECORDS
    assert hold_out(RECORDS, 5, seed=1) == (train, validation)
    assert hold_out(RECORDS, 0.25, seed=2) != (train, validation)
    assert len(hold_out(RECORDS, 0.001, seed=1)[1]) == 1
    assert hold_out(RECORDS, 0, seed=1) == (RECORDS, [])


@pytest.mark.parametrize("val_size", [-1, 2.5, 20, 0.99])
def test_hold_out_refuses_sizes_that_make_no_sense(val_size):
    with pytest.raises(ValueError, match=f"val_size {val_size}"):
        hold_out(RECORDS, val_size, seed=0)


@given(
    st.lists(st.integers(1, 50), min_size=2, max_size=5).flatmap(
        lambda sizes: st.tuples(st.just(sizes), st.integers(1, sum(sizes) - 1))
    )
)
def test_a_count_is_shared_out_in_proportion(drawn):
    sizes, count = drawn
    held = held_out_of(count, sizes)
    assert all(0 <= mine < size for mine, size in zip(held, sizes, strict=True))
    exact = [count * size / sum(sizes) for size in sizes]
    assert all(abs(mine - share) <= 1 for mine, share in zip(held, exact, strict=True))
    if min(sizes) > count:  # room everywhere
        assert sum(held) == count


def test_missing_splits_are_made_up_for():
    splits = complete_splits({"train": RECORDS}, 2, seed=0)
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [18, 2, 2]
    assert splits["test"] is splits["validation"]
    own = {"train": RECORDS, "validation": RECORDS[:1], "test": RECORDS[:3]}
    assert complete_splits(own, 0.5, seed=0) == own
