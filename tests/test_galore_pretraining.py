"""The pre-training benchmark: what each row trains, its bytes by formula, and what it writes."""

import importlib
import json
import math
import re
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from transformers import AutoConfig, LlamaForCausalLM

from lit_adapters.base_model import resolve_base

ROOT = Path(__file__).resolve().parents[1]
MATRICES = [(128, 128), (64, 128), (64, 128), (128, 128), (352, 128), (352, 128), (128, 352)] * 6
BESIDE = [(2048, 128)] + [(128,)] * 13  # embedding and norms
OPTIONS = {"steps": 3, "update_gap": 2, "scale": 0.25}


@pytest.fixture
def benchmark(monkeypatch):
    for folder in ("examples", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module("galore_pretraining")


@pytest.fixture
def blocks():
    return torch.randint(3, 2048, (14, 32)).split([12, 2])


def numbers(shapes):
    return sum(map(math.prod, shapes))


def states(shapes):  # two moments in fp32, and a count a tensor
    return 8 * numbers(shapes) + 4 * len(shapes)


def factors(rank):
    return [shape for m, n in MATRICES for shape in ((m, rank), (rank, n))]


def galore(rank):  # of the paper: m r + 2 n r for m <= n
    return sum(4 * (min(s) * rank + 2 * max(s) * rank) + 4 for s in MATRICES)


OPTIMIZER = {
    "Full rank": lambda rank: states(MATRICES + BESIDE),
    "GaLore": lambda rank: galore(rank) + states(BESIDE),
    "LoRA": lambda rank: states(factors(rank) + BESIDE),
    "Low rank": lambda rank: states(factors(rank) + BESIDE),
    "Matrices frozen": lambda rank: states(BESIDE),
}
WEIGHTS = {
    "LoRA": lambda rank: MATRICES + factors(rank) + BESIDE,
    "Low rank": lambda rank: factors(rank) + BESIDE,
}


def test_the_bytes_of_every_row_are_those_of_the_formula(benchmark, blocks):
    for method in benchmark.METHODS:
        run = benchmark.pretrain(method, 1, *blocks, Namespace(**OPTIONS))
        rank = {0: 0, 1 / 4: 32, 1 / 2: 64}[method.part]
        assert run["rank"] == rank
        assert run["optimizer_bytes"] == OPTIMIZER[method.name](rank), method
        weights = WEIGHTS.get(method.name, lambda _: MATRICES + BESIDE)(rank)
        assert run["weight_bytes"] == 4 * numbers(weights), method
        assert len(run["train_loss"]) == 3
        assert run["untrained_loss"] != run["loss"] == pytest.approx(math.log(2048), rel=0.2)


def test_what_differs_is_what_becomes_of_the_matrices(benchmark):
    endings = {
        "Full rank": {"embed_tokens.weight", "norm.weight", "proj.weight"},
        "GaLore": {"embed_tokens.weight", "norm.weight", "proj.weight"},
        "LoRA": {"embed_tokens.weight", "norm.weight", "lora_A", "lora_B"},
        "Low rank": {"embed_tokens.weight", "norm.weight", "proj.A", "proj.B"},
        "Matrices frozen": {"embed_tokens.weight", "norm.weight"},
    }
    for method in benchmark.METHODS:
        torch.manual_seed(0)
        model = LlamaForCausalLM(AutoConfig.from_pretrained(resolve_base("tiny"))).float()
        head, layer = model.lm_head.weight.clone(), model.model.layers[0].mlp.up_proj
        size = layer.weight.std().item()
        method.prepare(model, 32)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        found = {end for name in trained for end in endings[method.name] if name.endswith(end)}
        assert found == endings[method.name]
        assert all(name.endswith(tuple(found)) for name in trained), (method.name, trained)
        assert len([n for n in trained if "norm" in n]) == 13
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, head)
    product = benchmark.Factors(layer, 32)
    assert (product.B @ product.A).std().item() == pytest.approx(size, rel=0.05)


def test_every_method_reads_the_same_blocks_once_in_an_order_of_the_seed(benchmark, monkeypatch):
    reads = []
    loss = benchmark.summed_loss
    monkeypatch.setattr(
        benchmark, "summed_loss", lambda model, ids: reads.append(ids) or loss(model, ids)
    )
    blocks = torch.arange(3, 15).repeat_interleave(16).view(12, 16)
    for method, seed in [(0, 1), (1, 1), (4, 1), (0, 2)]:
        benchmark.pretrain(
            benchmark.METHODS[method], seed, blocks, blocks[:1], Namespace(**OPTIONS)
        )
    orders = [torch.cat(reads[5 * i + 1 : 5 * i + 4])[:, 0].tolist() for i in range(4)]
    assert orders[0] == orders[1] == orders[2] != orders[3]
    assert sorted(orders[0]) == list(range(3, 15))


def test_the_command_writes_table_json_and_plot(benchmark, blocks, monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(benchmark, "prose", lambda packages, progress: blocks)
    arguments = ["--steps", "2", "--seeds", "1", "2"]
    wanted = ["Full rank", "GaLore", "Matrices frozen"]
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    monkeypatch.setattr(sys, "argv", ["", *arguments, "--methods", *wanted, *files])
    benchmark.main()
    said, _, head, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert re.match(r"CPU, .*, torch .*, one thread\. 2 steps of ", said)
    assert "GaLore: 2 subspaces, 1 steps each" in said
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in (head, *rows)]
    assert [row[0] for row in cells[1:]] == ["Full rank", "GaLore", "GaLore", "Matrices frozen"]
    assert {len(row) for row in cells} == {11}
    runs = json.loads((tmp_path / "a.json").read_text())["runs"]
    assert [run["seed"] for run in runs] == [1] * 4 + [2] * 4
    assert (tmp_path / "a.png").stat().st_size > 10_000
    column = dict(zip(cells[0], cells[1], strict=True))
    assert column["gain closed"] == "100.0%"
    assert column["of the matrices' gain"] == "100%"
    assert column["over full rank"] == "1.000"
    losses = [run["loss"] for run in runs if run["method"] == "Full rank"]
    assert column["perplexity (each seed)"].startswith(f"{math.exp(sum(losses) / 2):.2f} (")


def test_more_steps_than_there_is_text_are_refused(benchmark, blocks, monkeypatch):
    monkeypatch.setattr(benchmark, "prose", lambda packages, progress: blocks)
    monkeypatch.setattr(sys, "argv", ["", "--steps", "4"])
    with pytest.raises(SystemExit, match="the text has 3 steps; lower --steps"):
        benchmark.main()


def test_held_out_paragraphs_are_not_trained_on(benchmark, monkeypatch, tmp_path):
    example = importlib.import_module("pretrain_tiny_base")
    words = [f"{a}{b}" for a in ("red", "old", "wet", "low") for b in ("fox", "owl", "elk", "ant")]
    ends = ("once again", "at noon", "in the snow", "far from here")
    written = {f"Here the {a} and the {b} meet {e}." for a in words for b in words for e in ends}
    (tmp_path / "a.py").write_text('"""' + "\n\n".join(sorted(written)) + '"""')
    source = example.Source("a", "1", "MIT", tmp_path)
    monkeypatch.setattr(example, "find_sources", lambda packages: [source])
    with Progress(disable=True) as progress:
        parts = benchmark.prose([], progress)
    decode = benchmark.load_tokenizer("tiny").decode
    pieces = [decode(part.flatten()).split(example.BOS) for part in parts]
    train, held_out = (
        {text.strip().removesuffix(example.EOS) for text in found if example.EOS in text}
        for found in pieces
    )
    assert len(train) > 20 * len(held_out) > 0
    assert train | held_out <= written
    assert not train & held_out


def test_a_rate_of_ones_own_replaces_each_methods(benchmark, blocks, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "prose", lambda packages, progress: blocks)
    more = ["--steps", "1", "--seeds", "1", "--methods", "Low rank", "--lr", "0.1", "0.2"]
    monkeypatch.setattr(sys, "argv", ["", *more])
    benchmark.main()
    rows = capsys.readouterr().out.strip().splitlines()[4:]
    assert [row.split(" | ")[2] for row in rows] == ["0.1", "0.2"] * 2
    first = benchmark.METHODS[0]
    lrs = [replace(first, lr=lr) for lr in (1e-3, 1e-2)]
    losses = [benchmark.pretrain(m, 1, *blocks, Namespace(**OPTIONS))["loss"] for m in lrs]
    assert losses[0] != losses[1]
