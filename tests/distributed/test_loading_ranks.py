"""What loading costs ranks in memory, and ranks of two machines."""

import json
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.distributed import load, train
from tests.distributed.processes import log_of, run_ranks
from tests.distributed.test_strategies import METHODS, assert_equal_runs

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="/proc; gloo and FSDP on Linux"),
    pytest.mark.timeout(1500),
]
LIMIT = 900  # seconds, where much else runs


@pytest.fixture(scope="module")
def cost(tmp_path_factory):
    """Bytes that loading took at its peak, by case: one number for each of two ranks."""
    folder = tmp_path_factory.mktemp("load")
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6}
    config = LlamaConfig(vocab_size=2048, num_attention_heads=8, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    common = {"folder": str(folder), "base": str(folder / "base")}
    cases = {
        "first": {**common, "base": "tiny", "strategy": "fsdp"},  # pays for imports
        "fsdp": {**common, "strategy": "fsdp"},
        "fsdp2": {**common, "strategy": "fsdp2"},
        "fsdp2, by every rank": {**common, "strategy": "fsdp2", "everywhere": True},
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    codes = run_ranks(load.__file__, [folder / "cases.json", folder], folder, LIMIT)
    assert codes == [0, 0], log_of(folder, 0)[-2000:] + log_of(folder, 1)[-2000:]
    ranks = [json.loads((folder / str(rank)).read_text()) for rank in range(2)]
    base = (folder / "base" / "model.safetensors").stat().st_size
    return {name: [rank[name] / base for rank in ranks] for name in cases}


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_one_rank_of_a_machine_holds_the_whole_base_and_no_other_does(cost, strategy):
    reader, other = cost[strategy]
    assert reader > 1.2  # all of it, and half of it once more: on a CPU the shard is there, too
    assert other < 0.95  # half, and one unit at a time


def test_a_measurement_sees_what_every_rank_reads(cost):
    assert min(cost["fsdp2, by every rank"]) > 1.2


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_each_of_two_machines_reads_the_base(machines, strategy):
    (expected,) = machines[strategy, "single"]
    found = machines[strategy, "machines"]
    assert [rank["received"] for rank in found] == [False, True, False, True]
    for rank in found:
        assert_equal_runs(rank, expected)
        assert rank["start"] == expected["start"]


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """What two machines of two ranks each train, beside one rank."""
    folder = tmp_path_factory.mktemp("machines")
    out = folder / "results"
    out.mkdir()
    case = {**METHODS["pissa"], "folder": str(folder)}
    found = {(s, "single"): [train.run(case)] for s in ("fsdp", "fsdp2")}
    cases = [{**case, "strategy": s} for s in ("fsdp", "fsdp2")]
    (folder / "cases.json").write_text(json.dumps(cases))
    run_ranks(train.__file__, [folder / "cases.json", out], out, LIMIT, ranks=4, machines=2)
    for number, strategy in enumerate(("fsdp", "fsdp2")):
        files = [out / f"{number}-{rank}.pt" for rank in range(4)]
        found[strategy, "machines"] = [torch.load(file, weights_only=False) for file in files]
    return found
