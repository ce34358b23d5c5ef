"""Compiled layers in two processes against one that compiles nothing."""

import pytest

from tests.distributed.test_strategies import (
    BF16,
    CASES,
    METHODS,
    VARIANTS,
    Ranks,
    assert_equal_runs,
    deviations,
    tolerances,
    within,
)
from tests.distributed.test_strategies import pytestmark as pytestmark

SPREAD = ["ddp", "fsdp2"]
SMALL = "ddp, small buckets"  # which torch would cut a compiled layer into
TWICE = {"trainer": {"accumulate_grad_batches": 2}}


def padded(case):
    """Fewer graphs than for packed rows, and so less time."""
    return {**case, **VARIANTS["padded"]}


FEW = {
    "lora": padded(METHODS["lora"]),
    "full window": padded({**METHODS["full"], **TWICE}),
}
MANY = {
    **{name: padded(case) for name, case in METHODS.items() if name != "lora_ga"},
    "packed": METHODS["dora"],
    "window": padded({**METHODS["lora"], **TWICE}),
    "lora, recomputed": padded(VARIANTS["recompute"]),
    "full, recomputed": padded({**METHODS["full"], **VARIANTS["recompute"]}),
    "bf16": BF16,
    **{name: CASES[name] for name in ("gpt2", "qlora", "new tokens", "trained copies")},
    **{name: padded(CASES[name]) for name in CASES if name.startswith("a rank with nothing")},
    "galore": {**METHODS["full"], "callbacks": ["GaLore(rank=4, update_gap=2, side='right')"]},
}


def compiled(case, backend):
    return {**case, "settings": {**case.get("settings", {}), "compile": backend}}


def trained(folder, cases, strategies, backend):
    done = Ranks(folder)
    done.single({(name, "single"): case for name, case in cases.items()})
    done.pair(
        {
            (name, s): {**compiled(case, backend), "strategy": s}
            for name, case in cases.items()
            for s in strategies
        }
    )
    return done


def assert_trained_alike(ranks, name, strategy):
    (expected,) = ranks[name, "single"]
    assert expected["graphs"] == 0
    for found in ranks[name, strategy]:
        assert found["graphs"] > 0
        if name == "bf16":
            apart = deviations(found, expected)
            assert within(apart, tolerances("lora", True)), apart
        else:
            assert_equal_runs(found, expected)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("few"), FEW, [*SPREAD, SMALL, "fsdp"], "eager")


@pytest.mark.parametrize("strategy", [*SPREAD, SMALL])
@pytest.mark.parametrize("name", FEW)
def test_two_ranks_train_compiled_as_one_does_plainly(few, name, strategy):
    assert_trained_alike(few, name, strategy)


@pytest.mark.parametrize("name", FEW)
def test_fsdp1_is_refused(few, name):
    for result in few.found[name, "fsdp"]:
        assert "compile with CPUFSDPStrategy" in result["error"]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    # Like torch's default, without a compiler of C++.
    return trained(tmp_path_factory.mktemp("many"), MANY, SPREAD, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", SPREAD)
@pytest.mark.parametrize("name", MANY)
def test_every_method_trains_compiled_in_two_ranks(many, name, strategy):
    assert_trained_alike(many, name, strategy)
