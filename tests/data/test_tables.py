"""CSV, Parquet, Arrow and saved data sets; the oracle is the package that wrote them."""

import csv

import pytest
from datasets import Dataset, DatasetDict

from lit_adapters.data import read_splits

ROWS = [
    {"instruction": 'Say "hi",\nplease', "input": "", "output": "hi"},
    {"instruction": "1+1?", "input": "x", "output": "2"},
    {"instruction": "é中", "input": "NA", "output": "None"},
]


def write_csv(file, delimiter=","):
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "arrow"])
def test_a_table_reads_as_it_was_written(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        Dataset.from_list(ROWS).to_parquet(file)
    elif suffix == "arrow":
        Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(file)
    else:
        write_csv(file, "\t" if suffix == "tsv" else ",")
    found = read_splits(str(file))
    assert found == {"train": ROWS}  # "2" is a text still, and so are "NA" and "None"
    unit = "line 4" if suffix in ("csv", "tsv") else "record 2"
    assert found["train"].place(1) == f"{file}, {unit}"


def test_a_saved_data_set_is_read_with_its_splits(tmp_path):
    data = Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "two")
    assert read_splits(str(tmp_path / "one")) == {"train": ROWS}
    assert read_splits(str(tmp_path / "two")) == {"train": ROWS, "test": ROWS[:1]}


def test_a_folder_takes_any_kind_and_shards_in_their_order(tmp_path):
    for number in (1, 0):
        part = Dataset.from_list(ROWS[number * 2 :][:2])
        part.to_parquet(tmp_path / f"train-0000{number}-of-00002.parquet")
    write_csv(tmp_path / "test.csv")
    assert read_splits(str(tmp_path)) == {"train": ROWS, "test": ROWS}
    write_csv(tmp_path / "train.csv")
    with pytest.raises(ValueError, match="holds train twice .train-00000-of.*train.csv"):
        read_splits(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "a,b\n1,2\n3\n", r"line 3: 1 fields, but the first line names 2 \(a, b\); quote"),
        ("a.csv", "a,b\n1,2,3\n", "line 2: 3 fields.*commas"),
        ("a.tsv", "a\tb\n1,2\n", "line 2: 1 fields.*tabs"),
        ("a.csv", 'a,b\n1,"2"x\n', r'line 2: malformed CSV.*twice \(""\)'),
        ("a.csv", 'a,b\n1,"2\n', "malformed CSV"),
        ("a.csv", "a,a\n1,2\n", "line 1: the names .*not all there and different"),
        ("a.csv", "a,\n1,2\n", "line 1: the names"),
        ("a.csv", "a,b\n", "holds no records"),
        ("a.parquet", "PAR1nothing", "cannot be read as parquet.*is it whole"),
        ("a.arrow", "nothing", "cannot be read as arrow"),
        ("a.parquet", "", "is empty"),
    ],
)
def test_a_bad_table_is_an_error_that_says_where(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_splits(str(file))
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_field_may_be_longer_than_the_limit_of_the_csv_module(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("text\n" + "x" * 200_000)
    assert len(read_splits(str(file))["train"][0]["text"]) == 200_000
