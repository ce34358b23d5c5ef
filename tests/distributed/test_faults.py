"""Ranks that disagree, have too little data or die: each is one clear error, or works.

A pair of processes for each strategy; the last of its cases kills one of them.
"""

import json
import sys
import warnings

import pytest
import torch
from lightning.pytorch import Trainer
from torch import distributed as dist

from lit_adapters.callbacks.lost_rank import ExplainLostRank, is_of_connection
from tests.distributed import train
from tests.distributed.processes import log_of, run_ranks
from tests.distributed.test_strategies import SPREAD, assert_equal_runs

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="gloo and FSDP on Linux"),
    pytest.mark.timeout(1500),
]
LIMIT = 900  # seconds, where much else runs

# What is otherwise on rank 1, and what all ranks say of it.
DIFFERENT = {
    "adapter": (
        {"adapter": "LoRA(rank=8)"},
        "module.adapter.init_args.rank is 4 on rank 0 and 8 on rank 1",
    ),
    "method": ({"adapter": "PrefixTuning(length=3)"}, "module.adapter.class_path is 'lit_ada"),
    "warmup": ({"settings": {"gradient_checkpointing": "full"}}, "'none' on rank 0 and 'full'"),
    "accumulation": (
        {"trainer": {"accumulate_grad_batches": 2}},
        "trainer.accumulate_grad_batches is 1 on rank 0 and 2 on rank 1",
    ),
    "start": ({"callbacks": ["InitAdapters(PiSSA())"]}, "callbacks is ['"),
    "base": ({"base_seed": 1}, "the ranks of this run differ: base model is of digest"),
    "records": ({"records": 22}, "number of examples (train) is 16 on rank 0 and 15 on rank 1"),
    "batch": ({"batch": 8}, "data.batch_size is 2 on rank 0 and 4 on rank 1"),
    "optimizer": ({"optimizer": "sgd"}, "optimizer.0 (AdamW) is of digest"),
    "values": ({"edits_adapter": True}, "differ: values of trained tensors is of digest"),
}
# The model is that of rank 0, whatever others have.
ONE_MODEL = {
    "edit": {"edits": True, "on rank 1": {"edits": False}},
    "seed": {"on rank 1": {"seed": 5}},
    "seed of a start": {
        "callbacks": ["InitAdapters(PiSSA(niter=2))"],
        "on rank 1": {"seed": 5},
    },
}
LITTLE = {
    "two examples": {"records": 2, "val_size": 0},
    "short last batch": {"records": 6, "val_size": 0},
    "one example to evaluate": {"records": 17, "val_size": 1},
    "three examples to evaluate": {"records": 19, "val_size": 3},
}
EVALUATED = [name for name in LITTLE if name.endswith("to evaluate")]
LONGER = {"trainer": {"max_steps": 5}}


def different(strategy):
    """What can differ under a strategy: ranks of FSDP2 hold no values in common."""
    return {n: d for n, d in DIFFERENT.items() if (n, strategy) != ("values", "fsdp2")}


def listed(folder, strategy):
    """The cases of one strategy, by name."""
    cases = {**ONE_MODEL, **LITTLE}
    for name in EVALUATED:
        cases[name] = {**cases[name], "predictions": str(folder / f"{strategy}-{name}.jsonl")}
    if strategy == "single":
        cases["whole"] = LONGER
    else:
        cases |= {f"different {n}": {"on rank 1": d} for n, (d, _) in different(strategy).items()}
        cases["one example"] = {"records": 1, "val_size": 0}
        keep = {"keep": str(folder / strategy)}
        cases["killed"] = {**LONGER, **keep, "signal": "SIGKILL"}  # the last
    common = {"folder": str(folder), "passed_in": True, "strategy": strategy}
    return {name: {**common, **case} for name, case in cases.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Results by strategy and case, of each rank; a fault is an error text."""
    folder = tmp_path_factory.mktemp("faults")
    results = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, case in listed(folder, "single").items():
            results["single", name] = [train.run(case)]
    for strategy in SPREAD:
        cases = listed(folder, strategy)
        out = folder / f"results {strategy}"
        out.mkdir()
        (out / "cases.json").write_text(json.dumps(list(cases.values())))
        codes = run_ranks(train.__file__, [out / "cases.json", out], out, LIMIT)
        assert codes == [0, -9], log_of(out, 0)[-3000:] + log_of(out, 1)[-3000:]
        for number, name in enumerate(cases):
            files = [out / f"{number}-{rank}.pt" for rank in range(2)]
            results[strategy, name] = [
                torch.load(file, weights_only=False) for file in files if file.exists()
            ]
        resumed = {"resume": str(folder / strategy / "last.ckpt"), "folder": str(folder)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results[strategy, "resumed"] = [train.run({**LONGER, **resumed, "passed_in": True})]
    return results


def errors(results):
    """The last lines of what ranks raised."""
    return [result.get("error", "no error").strip().splitlines()[-1] for result in results]


@pytest.mark.parametrize(("strategy", "name"), [(s, n) for s in SPREAD for n in different(s)])
def test_ranks_that_differ_are_told_in_what(found, name, strategy):
    said = errors(found[strategy, f"different {name}"])
    assert said[0] == said[1]
    assert "the ranks of this run differ: " in said[0]
    assert DIFFERENT[name][1] in said[0]
    assert "Run the same command on all of them" in said[0]


@pytest.mark.parametrize("strategy", SPREAD)
@pytest.mark.parametrize("name", [*ONE_MODEL, *LITTLE])
def test_ranks_train_the_model_and_the_data_of_one(found, name, strategy):
    (expected,) = found["single", name]
    assert len(found[strategy, name]) == 2
    for result in found[strategy, name]:
        assert "error" not in result, result["error"]
        assert_equal_runs(result, expected)
        assert strategy == "ddp" or result["start"] == expected["start"]


@pytest.mark.parametrize("strategy", SPREAD)
@pytest.mark.parametrize("name", EVALUATED)
def test_ranks_without_an_example_take_part_in_evaluation(found, name, strategy):
    (expected,) = found["single", name]
    for result in found[strategy, name]:
        assert result["validation"] == pytest.approx(expected["validation"], rel=1e-5)


@pytest.mark.parametrize("strategy", SPREAD)
def test_fewer_examples_than_ranks_are_refused_on_all(found, strategy):
    for said in errors(found[strategy, "one example"]):
        assert "1 examples cannot be shared by 2 devices; use fewer devices or more" in said


@pytest.mark.parametrize("strategy", SPREAD)
def test_a_rank_that_dies_ends_the_run_with_a_way_to_go_on(found, strategy):
    (survivor,) = found[strategy, "killed"]
    (said,) = errors([survivor])
    assert said.startswith("RuntimeError: rank 0 of 2 lost another one after optimizer step 2: ")
    path = said.partition("--ckpt_path ")[2].partition(" (in Python")[0]
    assert path.endswith(f"{strategy}/last.ckpt")
    assert "What the connection said: " in said


@pytest.mark.parametrize("strategy", SPREAD)
def test_a_run_that_lost_a_rank_goes_on_on_those_left(found, strategy):
    (expected,), (resumed,) = found["single", "whole"], found[strategy, "resumed"]
    assert len(resumed["loss"]) == 3
    assert_equal_runs(resumed, expected)


@pytest.mark.slow
def test_a_rank_that_does_not_answer_ends_the_run_after_the_timeout(tmp_path, monkeypatch):
    monkeypatch.setenv("TIMEOUT", "30")  # seconds, of the strategy
    common = {"folder": str(tmp_path), "passed_in": True, "strategy": "fsdp2"}
    (tmp_path / "cases.json").write_text(json.dumps([{**common, "signal": "SIGSTOP"}]))
    run_ranks(train.__file__, [tmp_path / "cases.json", tmp_path], tmp_path, LIMIT, awaited=1)
    (said,) = errors([torch.load(tmp_path / "0-0.pt", weights_only=False)])
    assert said.startswith("RuntimeError: rank 0 of 2 lost another one after optimizer step 2: ")
    assert "There is no checkpoint yet to go on from" in said
    assert "Timed out waiting 30000ms" in said


def test_errors_of_other_kinds_are_left_alone():
    assert is_of_connection(dist.DistBackendError("anything"))
    assert is_of_connection(RuntimeError("Timed out waiting 1800000ms for recv operation"))
    assert not is_of_connection(RuntimeError("CUDA out of memory"))
    assert not is_of_connection(ValueError("Connection closed by peer"))
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    error = RuntimeError("Connection closed by peer")  # of a logger, say: there is one rank
    ExplainLostRank().on_exception(trainer, None, error)
    assert str(error) == "Connection closed by peer"
