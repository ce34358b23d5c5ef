"""The benchmarks at their tiniest: their tables have every row, and both sides compute the same."""

import importlib
import json
import math
import platform
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--hidden=64", "--layers=2", "--vocabulary=256", "--rounds=1"]
QUIET = [
    "ignore:.*gradient_checkpointing.*:FutureWarning",  # transformers, of what PEFT calls
    "ignore:Full backward hook is firing:UserWarning",  # PEFT's LoRA-GA
    "ignore:This implementation of AdamW:FutureWarning",  # galore-torch
    # Of torch's own, while it looks at what a layer is called with.
    "ignore:The .grad attribute of a Tensor that is not a leaf",
    "ignore:.*should not be instantiated:DeprecationWarning",
]
pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run a benchmark in this process; return its tables, and everything it wrote as JSON."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def main(name, *options):
        module = importlib.import_module(name)
        file = tmp_path / f"{name}.json"
        module.main([*options, f"--json={file}"])
        printed = capsys.readouterr().out
        found = json.loads(file.read_text())
        written = file.with_suffix(".md").read_text()
        assert written.strip() in printed
        assert found["machine"].startswith("CPU, ")
        assert len(platform.node()) < 4 or platform.node() not in written
        for title, rows in found["tables"].items():
            assert f"## {title}\n" in written
            assert all(f"\n| {first(row)} |" in written for row in rows)
        return found["tables"], found

    yield main
    for path in (ROOT / "benchmarks").glob("*.py"):  # their names are too plain to stay
        sys.modules.pop(path.stem, None)


def first(row):
    return next(iter(row.values()))


def by_name(rows):
    return {first(row): row for row in rows}


def test_step_compares_gradients_and_counts_what_is_kept(run):
    tables, found = run("step", *TINY, "--tokens=16", "--dtypes=float32")
    assert list(tables) == [f"float32, gradient checkpointing {how}" for how in ("off", "on")]
    plain, recomputed = map(by_name, tables.values())
    assert plain.keys() == recomputed.keys()
    assert len(plain) == 15
    for rows in (plain, recomputed):
        for name in ("LoRA", "LoRA, our loss", "DoRA", "PiSSA (pinned)", "LLaMA-Adapter"):
            assert rows[name]["gradients off by"] < 1e-4
            assert rows[name]["loss off by"] < 1e-5
        again = rows["LoRA again (A/A)"]
        assert again["peak / peer"] == 1
        assert rows["frozen base"]["/ bound"] == 1
    assert plain["DoRA"]["saved / peer"] < 0.7
    assert plain["LoRA, dropout 0.05"]["peak / peer"] < 0.9
    kept = [plain[name]["saved, MB"] for name in ("LoRA", "frozen base", "LoRA, blocks not lean")]
    assert kept == sorted(kept)
    for name, row in plain.items():
        assert recomputed[name]["saved, MB"] < 0.6 * row["saved, MB"]
    turns = found["seconds"]["float32, gradient checkpointing off"]
    assert all(len(one["spent"]) == len(one["wall"]) == 1 for one in turns.values())


def test_a_fault_in_one_side_is_seen_in_its_gradients(run, monkeypatch):
    step = importlib.import_module("step")
    stock = step.stock_loss
    monkeypatch.setattr(step, "our_loss", lambda: lambda model, ids: 1.001 * stock(model, ids))
    tables, _ = run(
        "step", *TINY, "--tokens=16", "--dtypes=float32", "--recompute=off", "--only=none"
    )
    rows = by_name(next(iter(tables.values())))
    assert rows["LoRA, our loss"]["gradients off by"] == pytest.approx(1e-3, rel=0.1)
    assert rows["LoRA"]["gradients off by"] < 1e-4


ONE_PAIR = [*TINY, "--tokens=16", "--dtypes=float32", "--recompute=off", "--only=none"]


def test_compiled_sides_are_compiled_alike_and_once(run):
    tables, _ = run("step", *ONE_PAIR, "--compile", "off", "on", "--backend=eager")
    plain, compiled = map(by_name, tables.values())
    assert list(tables)[1] == "float32, gradient checkpointing off, compiled"
    assert plain.keys() - compiled.keys() == {"LoRA, blocks not lean"}  # none is, compiled
    assert compiled["LoRA"]["graphs"] == compiled["PEFT LoRA"]["graphs"] == 2
    assert compiled["LoRA again (A/A)"]["graphs"] == 0  # it is given those of the first
    assert compiled["LoRA again (A/A)"]["first pass, s"] < compiled["LoRA"]["first pass, s"]
    assert compiled["LoRA"]["gradients off by"] < 1e-4
    assert "graphs" not in plain["LoRA"]


def test_a_side_that_keeps_others_from_being_compiled_whole_is_refused(run):
    """As PEFT's DoRA does: ours, compiled as a whole before, is compiled again in pieces."""
    chosen = [*ONE_PAIR[:-1], "--only=DoRA"]
    with pytest.raises(RuntimeError, match="graphs were compiled after the first pass"):
        run("step", *chosen, "--compile=on", "--backend=eager")


def test_starts_are_near_the_exact_ones(run):
    tables, _ = run("initialise", *TINY, "--hidden=128", "--tokens=16", "--rank=4")
    rows = by_name(*tables.values())
    assert len(rows) == 12
    assert rows["PiSSA"]["error"] < 1e-4
    for name in ("PiSSA, exact", "OLoRA", "MiLoRA", "LoRA-GA", "PEFT pissa", "PEFT olora"):
        assert rows[name]["error"] < 1e-3, name
    niter = rows["PiSSA, niter 4"]["error"]
    assert rows["PiSSA, exact"]["error"] < rows["PiSSA"]["error"] < niter
    assert niter < rows["PEFT pissa_niter_4"]["error"] < 1
    assert rows["PiSSA again (A/A)"]["error"] == rows["PiSSA"]["error"]


def test_both_galores_end_at_the_same_weights(run):
    pytest.importorskip("galore_torch")
    tables, found = run("galore", *TINY, "--tokens=16", "--rank=4")
    assert max(found["weights_apart"].values()) < 1e-3
    rows = by_name(*tables.values())
    assert rows["ours again (A/A)"]["peak / peer"] == 1
    freed = rows["forward and backward, gradients freed"]["peak, MB"]
    assert freed < rows["forward and backward alone"]["peak, MB"]
    assert rows["ours"]["peak, MB"] < rows["galore-torch"]["peak, MB"]
    assert rows["ours"]["peak, MB"] < rows["AdamW, fused"]["peak, MB"]


def test_folders_of_either_side_load_in_either(run):
    tables, found = run("checkpoint", *TINY, "--rank=2")
    works, sizes = tables.values()
    kinds = ("attach", "save", "load", "merge")
    assert {row["work"] for row in works} == {f"{m}: {w}" for m in ("LoRA", "DoRA") for w in kinds}
    assert found["logits_off"] < 1e-4
    for row in sizes:
        ratio = int(row["ours"].replace(",", "")) / int(row["against"].replace(",", ""))
        assert row["ratio"] == pytest.approx(ratio)
    assert by_name(sizes)["LoRA: adapter folder, against PEFT's"]["ratio"] < 1.05


def test_exponents_of_what_can_be_counted_are_those_of_theory(run):
    tables, _ = run("scaling", *TINY, "--points", "8", "16", "32", "--axes", "tokens", "adapters")
    found = {(row["axis"], row["of"]): row for row in tables["Exponents"]}
    for side in ("ours", "PEFT"):
        assert found["adapters", "bytes of all adapters"][side] == pytest.approx(1)
        assert found["adapters", "peak of a step"][side] == pytest.approx(0, abs=0.02)
        assert found["tokens", "peak of a step"][side] == pytest.approx(1, abs=0.2)
    points = tables["Points: adapters"]
    assert [row["at"] for row in points] == [8, 16, 32]
    assert points[0]["ours, held MB"] == pytest.approx(points[0]["PEFT, held MB"])


def test_exponents_are_fitted():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from measuring import exponent
    finally:
        sys.path.pop(0)
    b, error = exponent([1, 2, 4, 8], [3, 12, 48, 192])
    assert (b, error) == (pytest.approx(2), pytest.approx(0, abs=1e-9))
    b, error = exponent([1, 2, 4], [1, 3, 4])
    off = (2 * math.log(3) - math.log(4)) / 6  # the residuals are -off, 2 off, -off
    assert (b, error) == (1, pytest.approx(math.sqrt(3) * off / math.log(2)))


@pytest.fixture
def records(tmp_path):
    file = tmp_path / "records.json"
    words = "one two three four five six seven eight nine ten eleven twelve".split()
    rows = [
        {"instruction": f"Count to {n}.", "input": "", "output": " ".join(words[:n])}
        for n in range(1, 13)
    ]
    file.write_text(json.dumps(rows))
    return f"--data={file}"


SMALL = ["--records=8", "--held-out=4", "--batch-size=2", "--max-length=96"]


def test_whole_trainings_learn_the_same(run, records, monkeypatch):
    end_to_end = importlib.import_module("end_to_end")
    monkeypatch.setattr(end_to_end, "find_spec", lambda name: None)  # TRL takes long to import
    tables, found = run("end_to_end", records, *SMALL, *TINY, "--base=tiny", "--lr=0.005")
    rows = by_name(*tables.values())
    assert list(rows) == [
        end_to_end.OURS, end_to_end.AGAIN, end_to_end.PADDED, end_to_end.FILLED
    ]  # fmt: skip
    losses = [row["held-out loss"] for row in rows.values()]
    assert max(losses) < 0.9 * found["loss_before"]
    assert max(losses) < 1.2 * min(losses)
    assert rows[end_to_end.AGAIN]["held-out loss"] == rows[end_to_end.OURS]["held-out loss"]
    assert found["tokens"] > 8 * 10


@pytest.mark.slow
def test_trl_trains_on_the_same_records(run, records):
    pytest.importorskip("trl")
    tables, _ = run("end_to_end", records, *SMALL, *TINY, "--base=tiny", "--lr=0.005")
    rows = by_name(*tables.values())
    packed = rows["TRL + PEFT, packed"]["held-out loss"]
    assert packed == pytest.approx(rows["ours, filled by tokens"]["held-out loss"], rel=0.2)


def test_help_starts_in_a_fraction_of_torch(run):
    tables, _ = run("startup", "--rounds=1", "--only", "lit_adapters --help", "again")
    rows = by_name(*tables.values())
    assert list(rows) == ["import torch", "import torch again (A/A)", "lit_adapters --help"]
    assert rows["lit_adapters --help"]["/ import torch"] < 0.5


GPU = ["--device=cpu", "--shape=tiny", "--tokens=16", "--rounds=1", "--warm-ups=0", "--rank=4"]


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
def test_gpu_runs_on_a_processor(run):
    for package in ("bitsandbytes", "accelerate", "galore_torch"):
        pytest.importorskip(package)
    tables, _ = run("gpu", *GPU, "--tflops=1")
    assert list(tables) == ["bf16 base", "NF4 base", "All weights"]
    rows = {name: row for table in tables.values() for name, row in by_name(table).items()}
    for name in ("LoRA", "DoRA", "QLoRA"):
        assert rows[name]["gradients off by"] < 0.05  # bf16
        assert rows[name]["peak / peer"] < 1
        assert 0 < rows[name]["MFU"] < 1
    assert rows["frozen base"]["of bound"] == 1
    assert rows["QLoRA"]["peak, MB"] < rows["LoRA"]["peak, MB"]
    assert {"GaLore", "galore-torch", "AdamW, everything"} <= rows.keys()


def test_gpu_leaves_out_in_words_what_is_missing(run, monkeypatch, capsys):
    gpu = importlib.import_module("gpu")
    there = ("transformers", "lightning")
    monkeypatch.setattr(gpu, "find_spec", lambda name: name in there or None)
    tables, _ = run("gpu", *GPU)
    assert list(tables) == ["bf16 base", "All weights"]
    assert not any("PEFT" in row["step"] for row in tables["bf16 base"])
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="needs transformers and lightning"):
        gpu.main(GPU)


def test_gpu_says_that_there_is_none(run, monkeypatch):
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        gpu.main(["--shape=1b"])


def test_a_side_that_does_not_fit_is_said_to(run):
    gpu = importlib.import_module("gpu")
    sides = gpu.Sides("cpu")

    def too_large():
        raise gpu.torch.OutOfMemoryError("8 GiB")

    sides.add("large", too_large)
    options = gpu.parsed(["--shape=tiny", "--device=cpu"])
    assert gpu.rows_of(sides, {}, {}, options) == [{"step": "large: out of memory"}]


def test_flops_are_those_of_the_shape(run):
    gpu = importlib.import_module("gpu")
    shape = gpu.SHAPES["8b"]
    inside = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336
    weights = 32 * inside + 128_256 * 4096
    attention = 6 * 32 * 4096 * 2048
    assert gpu.flops_of_token(shape, 2048, False) == 4 * weights + attention
    assert gpu.flops_of_token(shape, 2048, True) == 6 * weights + attention
