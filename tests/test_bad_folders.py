"""Adapter folders that someone spoilt, by accident or on purpose: one clear error, nothing changed.

What `test_io.py` has tried already (missing, transposed and non-finite tensors, truncated files,
pickles, most fields of the config) is not tried again.
"""

import json
import os
import resource
import time

import pytest
import torch
from safetensors.torch import load_file

from lit_adapters import load_adapter, save_adapter
from tests.models import llama, logits, snapshot
from tests.test_io import (
    CONFIG,
    EXTRA,
    KEY,
    WEIGHTS,
    edit_config,
    edit_tensors,
    refuse_everywhere,
    trained,
)


@pytest.fixture
def folder(tmp_path):
    return save_adapter(trained(), tmp_path / "adapter")


REMEDIES = ("save", "convert", "merge", "correct", "remove", "shorten", "list name", "pass ", "?")


def refuse(path, *words, limit=1500, seconds=10):
    """Refused with these words and a remedy, soon, in a message that a person can read.

    Soon is by the processor's time, which does not run while others are served.
    """
    start = time.process_time()
    for message in refuse_everywhere(path, *words):
        assert len(message) < limit, message[:limit]
        assert any(remedy in message.lower() for remedy in REMEDIES), message
    assert time.process_time() - start < seconds


def edit_text(path, old, new):
    """Change a JSON file in ways that `json.dumps` cannot."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def edit_notes(path, **changes):
    notes = {**json.loads((path / EXTRA).read_text()), **changes}
    (path / EXTRA).write_text(json.dumps(notes))


# ---------------------------------------------------------------- tensors


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float64, "F64"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.int64, "I64")],
)
def test_a_dtype_that_no_adapter_has_is_refused_with_those_expected(folder, dtype, name):
    edit_tensors(folder, lambda tensors: tensors.update({KEY: tensors[KEY].to(dtype)}))
    refuse(folder, WEIGHTS, KEY, name, "'BF16', 'F16', 'F32'", "convert")


def test_a_tensor_of_gigabytes_is_refused_by_its_shape_and_never_read(folder):
    size = 4 * 2**30
    entries, end = header_of(folder)
    entries[KEY] = {"dtype": "F32", "shape": [4, size // 16], "data_offsets": [end, end + size]}
    for key, entry in entries.items():  # the rest moves to the front, without a hole
        if key != KEY:
            entry["data_offsets"] = [offset - 512 for offset in entry["data_offsets"]]
    entries[KEY]["data_offsets"] = [end - 512, end - 512 + size]
    write_weights(folder, json.dumps(entries), end - 512 + size)  # a sparse file
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuse(folder, WEIGHTS, KEY, "[4, 268435456]", "[4, 32]")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


def test_a_key_of_a_megabyte_is_not_repeated_in_full(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"x" * 1_000_000: torch.zeros(1)}))
    refuse(folder, WEIGHTS, "unexpected", "xxx...xxx")


# ---------------------------------------------------------------- the header of the weights


def header_of(path):
    """The entries of the header, in the order of the data, and the number of data bytes."""
    entries, end = {}, 0
    for key, tensor in load_file(path / WEIGHTS).items():
        start, end = end, end + 4 * tensor.numel()
        entries[key] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    assert entries[KEY]["data_offsets"] == [0, 512]
    return entries, end


def write_weights(path, header, size):
    forget_digest(path)
    with (path / WEIGHTS).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + size)


def forget_digest(path):
    """Let only what the weights file says of itself count."""
    notes = json.loads((path / EXTRA).read_text())
    notes.pop("weights_sha256", None)
    (path / EXTRA).write_text(json.dumps(notes))


def test_what_the_cases_below_change_loads_unchanged(folder):
    entries, end = header_of(folder)
    write_weights(folder, json.dumps(entries), end)
    assert load_adapter(llama(), folder)


def _twice(entries):
    return json.dumps(entries)[:-1] + f', "{KEY}": {json.dumps(entries[KEY])}}}'


def _overlapping(entries):
    other = next(key for key in entries if key != KEY and entries[key]["shape"] == [4, 32])
    entries[other]["data_offsets"] = [0, 512]
    return json.dumps(entries)


def _with_a_hole(entries):
    for entry in entries.values():
        entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
    return json.dumps(entries)


def _negative(entries):
    entries[KEY]["shape"] = [-4, -32]
    return json.dumps(entries)


def _fractional(entries):
    entries[KEY]["data_offsets"] = [0.0, 512.0]
    return json.dumps(entries)


def _not_a_number(entries):
    return json.dumps(entries)[:-1] + ', "x": NaN}'


def _deep(entries):
    return "[" * 200_000


@pytest.mark.parametrize(
    ("change", "extra", "words"),
    [
        (_twice, 0, ["there 2 times", "lora_A"]),
        (_overlapping, 0, ["offset"]),
        (_with_a_hole, 8, ["offset"]),
        (json.dumps, 100, ["not fully covered"]),
        (json.dumps, -100, ["not fully covered"]),
        (_negative, 0, ["-4"]),
        (_fractional, 0, ["0.0"]),
        (_not_a_number, 0, ["NaN"]),
        (_deep, 0, ["nested too deeply"]),
    ],
)
def test_a_header_that_contradicts_itself_or_the_file_is_refused(folder, change, extra, words):
    entries, end = header_of(folder)
    write_weights(folder, change(entries), end + extra)
    refuse(folder, WEIGHTS, "not a readable safetensors file", *words)


@pytest.mark.parametrize("claimed", [2**63, 2**64 - 1, 10**8, 10_000_001])
@pytest.mark.parametrize("real", [False, True], ids=["short file", "sparse file"])
def test_a_giant_header_is_refused_before_it_is_read(folder, claimed, real):
    with (folder / WEIGHTS).open("wb") as file:
        file.write(claimed.to_bytes(8, "little") + b"{")
        if real:
            file.truncate(min(claimed + 8, 2**33))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuse(folder, WEIGHTS, f"claims {claimed} bytes", "10000000 allowed", seconds=2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


# ---------------------------------------------------------------- files that are not there


def test_an_adapter_in_parts_is_refused_with_the_remedy(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model-00001-of-00002.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": {}}')
    refuse(folder, WEIGHTS, "index.json", "into one")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, EXTRA])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_folder_or_pipe_in_a_files_place_is_called_so(folder, name, make):
    (folder / name).unlink()
    make(folder / name)
    for message in refuse_everywhere(folder, name):
        assert "no ordinary file" in message


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, EXTRA])
@pytest.mark.parametrize("target", ["nowhere", "/nowhere", "loop"])
def test_a_link_to_nothing_is_called_so(folder, name, target):
    (folder / name).unlink()
    (folder / name).symlink_to(name if target == "loop" else target)
    for message in refuse_everywhere(folder, name):
        assert "leads nowhere; copy the file" in message


@pytest.mark.parametrize("relative", [True, False])
def test_a_link_upwards_is_refused_though_its_file_is_good(folder, relative):
    (folder / WEIGHTS).rename(folder.parent / "weights")
    target = "../weights" if relative else folder.parent / "weights"
    (folder / WEIGHTS).symlink_to(target)
    for message in refuse_everywhere(folder, WEIGHTS):
        assert "leads out of the folder" in message


def test_a_folder_that_is_itself_a_link_loads(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    model = llama()
    load_adapter(model, tmp_path / "link")
    assert torch.equal(logits(model), logits(trained()))


def test_a_crowded_folder_is_not_listed_in_full(folder):
    (folder / WEIGHTS).unlink()
    for number in range(500):
        (folder / f"file-{number}").touch()
    for message in refuse_everywhere(folder, WEIGHTS):
        assert "483 more" in message
        assert len(message) < 1000


# ---------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"r": 4', '"r": 4, "r": 4', ["'r' is there 2 times"]),
        ('"r": 4', '"r": 4, "r": 8', ["'r' is there 2 times"]),
        ('"lora_alpha": 8', '"lora_alpha": NaN', ["NaN is no JSON number"]),
        ('"r": 4', '"r": 4, "task_type": -Infinity', ["-Infinity is no JSON number"]),
        ('"lora_dropout": 0.0', '"lora_dropout": 1e999', ["dropout", "inf"]),
        ('"r": 4', '"r": ' + "9" * 5000, ["5000 digits"]),
        ('"r": 4', '"r": ' + "9" * 4000, ["'r'", "no adapter is that large"]),
        ('"r": 4', '"r": 4, "foo": ' + "[" * 50_000 + "]" * 50_000, ["nested too deeply"]),
        ('"r": 4', '"r": 4, "foo": ' + "[" * 500 + "]" * 500, ["foo=[[["]),
        ('"r": 4', '"r": 4, "foo": {"a": [1]}', ["foo={'a': [1]}"]),
        ('"q_proj"', '"q_proj\\ud800"', ["q_proj\\ud800"]),
        ('"q_proj"', '"q_proj\\u0000"', ["q_proj\\x00"]),
    ],
    ids=lambda value: str(value)[:25],
)
def test_json_that_another_reader_may_take_otherwise_is_refused(folder, old, new, words):
    edit_text(folder / CONFIG, old, new)
    for message in refuse_everywhere(folder, CONFIG, *words):
        assert len(message) < 1000


def test_a_config_of_megabytes_is_refused_unread(folder):
    edit_config(folder, comment="x" * 3_000_000)
    refuse(folder, CONFIG, "3000", "2000000", seconds=5)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("target_modules", "q_proj|" * 200_000, ["1400000 characters", "at most 10000"]),
        ("target_modules", ["x"] * 200_000, ["200000 entries", "at most 50000"]),
        ("target_modules", ["q" * 1_000_000], ["entry of 1000000 characters"]),
        ("exclude_modules", "q_proj|" * 200_000, ["1400000 characters"]),
        ("layers_to_transform", [0] * 200_000, ["200000 entries"]),
        ("rank_pattern", {f"x{n}": 2 for n in range(9000)}, ["9000 entries", "at most 4096"]),
        ("rank_pattern", {"|".join(f"x{n}" for n in range(9000)): 2}, ["characters"]),
        ("alpha_pattern", {f"x{n}": 2 for n in range(9000)}, ["9000 entries"]),
        ("rank_pattern", {"q_proj": "2" * 1_000_000}, ["entry of 1000000 characters"]),
        ("peft_type", "x" * 1_000_000, ["peft_type", "xxx...xxx", "LORA"]),
        ("foo", "x" * 1_000_000, ["foo=", "xxx...xxx"]),
        ("foo" * 100_000, 1, ["=1", "foo"]),
        ("lora_alpha", [[1] * 1000] * 100, ["lora_alpha", "[[1, 1, 1"]),
    ],
    ids=lambda value: str(value)[:25],
)
def test_megabytes_are_refused_soon_and_in_few_words(folder, field, value, words):
    edit_config(folder, **{field: value})
    refuse(folder, CONFIG, *words, limit=2000, seconds=5)


FOREVER = "(.*?)" * 10 + "[x-z]"  # the tenth power of the length of the name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", FOREVER),
        ("exclude_modules", FOREVER),
        ("rank_pattern", {FOREVER: 2}),
        ("alpha_pattern", {FOREVER: 2}),
    ],
)
def test_a_pattern_that_runs_forever_is_stopped_and_shown(folder, field, value):
    edit_config(folder, **{field: value})
    refuse(folder, CONFIG, "(.*?)(.*?)", "takes longer than 1 s", "fewer repetitions", seconds=20)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_pattern_nested_too_deeply_is_refused_in_words(folder, field):
    pattern = "(" * 4000 + "a" + ")" * 4000
    edit_config(folder, **{field: {pattern: 2} if field == "rank_pattern" else pattern})
    refuse(folder, CONFIG, "nested too deeply", "list name endings")


@pytest.mark.parametrize("value", [True, False, 1.0, "all", {"0": 1}, [True], [1.0], [[0]], [-1]])
def test_layers_that_are_no_numbers_of_layers_are_refused(folder, value):
    edit_config(folder, layers_to_transform=value)
    for message in refuse_everywhere(folder, CONFIG, "layers"):
        assert json.dumps(value) in message.replace("'", '"').replace("T", "t").replace("F", "f")


@pytest.mark.parametrize("value", ["/etc/passwd", "../../elsewhere", 5, ["a"], {}])
def test_the_name_of_the_base_is_never_followed(folder, value):
    edit_config(folder, base_model_name_or_path=value)
    model = llama()
    load_adapter(model, folder)
    assert torch.equal(logits(model), logits(trained()))


# ---------------------------------------------------------------- the side file


@pytest.mark.parametrize("value", [5, True, [1], {"a": 1}, "x" * 100_000])
@pytest.mark.parametrize("field", ["base_fingerprint", "origin", "initialiser", "method"])
def test_a_note_of_another_type_is_refused_by_name(folder, field, value):
    edit_notes(folder, **{field: value})
    refuse(folder, EXTRA, repr(field), "text of at most 1000", str(value)[:9].strip("'x"))


def test_a_note_given_twice_is_refused(folder):
    """The second would win, and name the base of someone else."""
    edit_text(folder / EXTRA, '"format": 1', '"format": 1, "base_fingerprint": "a-b"')
    refuse(folder, EXTRA, "'base_fingerprint' is there 2 times")


@pytest.mark.parametrize("value", ["", "-", "abc", "a-b-c-d", "\x00"])
def test_a_fingerprint_that_is_none_is_that_of_another_base(folder, value):
    edit_notes(folder, base_fingerprint=value)
    refuse(folder, "another base", "check_base=False")


@pytest.mark.parametrize("field", ["r", "peft_type", "target_modules", "lora_alpha", "use_dora"])
def test_notes_do_not_override_the_config(folder, field):
    edit_notes(folder, **{field: 99})
    model = llama()
    load_adapter(model, folder)
    assert torch.equal(logits(model), logits(trained()))


def test_a_refused_folder_is_left_as_it_was(folder):
    edit_config(folder, r=-1)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = llama()
    state = snapshot(model)
    with pytest.raises(ValueError, match="rank must be a positive integer, got rank=-1"):
        load_adapter(model, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert snapshot(model) == state
