"""``check``: its refusals are the fit's, its bytes those of torch's own sharding."""

import json
import logging
import re
from pathlib import Path

import models
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig

from lit_adapters import DoRA, FullFineTuning, LoRA, attach
from lit_adapters.__main__ import main
from lit_adapters.check.shares import Share, rank_bytes, share_of
from lit_adapters.estimate.memory_trace import CATEGORIES, Peak
from lit_adapters.sharding import shard, units

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
SMALL = ["--data.max_length=128", "--data.batch_size=2", "--data.train_limit=50"]

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")


def check(capsys, *words, config="alpaca_lora.yaml"):
    """Exit status and what ``check --json`` printed."""
    status = 0
    try:
        main(["check", "--config", str(CONFIGS / config), *SMALL, "--json", *words])
    except SystemExit as stop:
        status = stop.code
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp2"])
def test_a_fit_that_would_run(capsys, strategy):
    status, found = check(
        capsys, "--devices=3", "--num_nodes=2", f"--strategy={strategy}",
        "--trainer.accumulate_grad_batches=2", "--trainer.max_epochs=5",
    )  # fmt: skip
    assert found["problems"] == found["unknown"] == []
    assert (status, found["works"]) == (0, True)
    # 50 records are 8 for each of 6 ranks: 4 batches of 2, 2 windows of 2.
    assert found["counts"] == {
        "ranks": 6,
        "nodes": 2,
        "examples a step": 24,
        "records": 50,
        "batches of a rank": 4,
        "steps an epoch": 2,
        "steps": 10,
    }
    names = [(row["name"], row["count"]) for row in found["units"]]
    assert names == ([] if strategy == "ddp" else [("model.layers.0", 6), ("the rest", 1)])
    assert logging.getLogger("lightning.pytorch").level != logging.WARNING


def test_people_get_tables(capsys):
    words = ["--config", str(CONFIGS / "alpaca_lora.yaml"), "--strategy=fsdp", "--devices=2"]
    main(["check", *words, *SMALL])
    shown = capsys.readouterr().out
    for text in ("FSDPStrategy", "model.layers.0", "frozen base", "nothing here would stop"):
        assert text in shown


PARALLEL = "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy"
GUARD = ["--trainer.callbacks+=lit_adapters.SpikeGuard", "--trainer.callbacks.action=restore"]
REFUSED = {
    "a matrix split": (["--devices=4", PARALLEL, "--trainer.strategy.tensor_parallel_size=2"],
                       "trainer: .*tensor_parallel_size=2"),
    "devices left out": (["--devices=4", PARALLEL, "--trainer.strategy.data_parallel_size=2"],
                         "trainer: .*does not use all 4 devices"),
    "unknown number": (["--trainer.devices=auto"], "trainer: devices=auto.*--devices 8"),
    "Lightning's own": (["--devices=2", "--trainer.accelerator=cpu", "--strategy=fsdp"],
                        "trainer: .*requires a GPU accelerator"),
    "shards on disk": (["--devices=2", "--trainer.strategy=FSDPStrategy",
                        "--trainer.strategy.state_dict_type=sharded"], "sharding: .*'full'"),
    "copies": (["--devices=2", "--strategy=fsdp", "--model.adapter.modules_to_save=[lm_head]"],
               "sharding: .*trained copies"),
    "two dtypes": (["--devices=2", "--strategy=fsdp", "--model.quantization=nf4"],
                   "sharding: .*float32 and torch.uint8"),
    "packed states": (["--devices=2", "--strategy=fsdp2",
                       "--model.optimizer=bitsandbytes.optim.AdamW8bit"], "optimizer: AdamW8bit"),
    "copies of all": (["--devices=2", "--strategy=fsdp2", *GUARD], "SpikeGuard: .*whole weights"),
    "compiled shards": (["--devices=2", "--strategy=fsdp", "--model.compile=true"],
                        "compile: compile with FSDPStrategy.*Take FSDP2"),
    "few records": (["--devices=51", "--strategy=ddp"], "data: 50 examples.*51 devices"),
    "little memory": (["--devices=2", "--strategy=ddp", "--memory=1MB"], "memory: a rank needs"),
}  # fmt: skip


def test_a_quantised_weight_counts_with_the_numbers_it_stands_for(capsys):
    pytest.importorskip("bitsandbytes")
    _, found = check(capsys, "--devices=2", "--strategy=fsdp2", "--model.quantization=nf4")
    _, plain = check(capsys, "--devices=2", "--strategy=fsdp2")
    assert found["parameters"] == plain["parameters"]
    assert found["bytes"]["base"] < 0.5 * plain["bytes"]["base"]
    assert found["units"][0]["dtypes"] == ["float32", "uint8"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_fit_would_refuse(capsys, name):
    words, expected = REFUSED[name]
    if name in ("two dtypes", "packed states"):
        pytest.importorskip("bitsandbytes")
    status, found = check(capsys, *words)
    (problem,) = found["problems"]
    assert (status, found["works"]) == (1, False)
    assert re.search(expected, problem), problem


@pytest.mark.parametrize(
    ("strategy", "side", "problem"),
    [
        ("fsdp", "right", "GaLore cannot work under FSDPStrategy"),
        ("fsdp2", "std", r"GaLore\(side='std'\) projects the rows of 'model.layers"),
        ("fsdp2", "right", None),
        ("ddp", "std", None),
    ],
)
def test_galore_is_asked_itself(capsys, strategy, side, problem):
    words = ["--devices=2", f"--strategy={strategy}", f"--trainer.callbacks.side={side}"]
    status, found = check(capsys, *words, config="alpaca_galore.yaml")
    if problem is None:
        assert (status, found["problems"]) == (0, [])
    else:
        assert status == 1
        assert re.search(problem, found["problems"][0])


def test_galore_s_optimizer_is_asked_too(capsys):
    pytest.importorskip("bitsandbytes")
    words = ["--devices=2", "--strategy=ddp", "--trainer.callbacks.moments=reset"]
    status, found = check(capsys, *words, config="alpaca_galore_8bit.yaml")
    assert status == 1
    assert "moments='reset' needs moments that can be read" in found["problems"][0]


def test_ddp_has_no_buckets_for_what_galore_averages():
    model = models.llama()
    attach(model, FullFineTuning())
    weights = [p for n, p in model.named_parameters() if n.endswith("_proj.weight")]
    every, others = (share_of(model, DDPStrategy(), 2, alone) for alone in ((), weights))
    assert every.exchange - others.exchange == sum(p.nbytes for p in weights)
    assert every.exchange == sum(p.nbytes for p in model.parameters())


def test_a_model_of_8_billion_needs_its_config_alone(capsys, tmp_path):
    LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    status, found = check(
        capsys, f"--model.base={tmp_path}", "--model.tokenizer=tiny", "--devices=8",
        "--strategy=fsdp2", "--trainer.precision=bf16-true", "--model.gradient_checkpointing=full",
    )  # fmt: skip
    assert (status, found["problems"]) == (0, [])
    layers, rest = found["units"]
    dense = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336 + 2 * 4096
    lora = 16 * (4096 * 2 * 2 + (4096 + 1024) * 2 + (4096 + 14336) * 3)
    assert layers["count"] == 32
    assert layers["parameters"] == dense + lora
    assert layers["dtypes"] == ["bfloat16", "float32"]
    assert rest["parameters"] == 2 * 128256 * 4096 + 4096
    whole = 32 * dense + rest["parameters"]
    assert found["bytes"]["base"] == whole * 2 // 8
    assert found["bytes"]["optimizer"] == pytest.approx(2 * found["bytes"]["adapter"], rel=0.01)


# ---------------------------------------------------------------- bytes


@pytest.fixture
def ranks_of_three():
    """This process takes itself for the first of three ranks."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)
    yield init_device_mesh("cpu", (3,), mesh_dim_names=("data_parallel",))
    dist.destroy_process_group()


@pytest.mark.parametrize("spec", [LoRA(rank=4), DoRA(rank=4), FullFineTuning()])
def test_shares_are_what_fsdp2_leaves_on_a_rank(ranks_of_three, spec):
    model = models.llama(hidden_size=40)
    attach(model, spec)
    strategy = ModelParallelStrategy()
    share = share_of(model, strategy, 3)
    whole = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    strategy._device_mesh = {"data_parallel": ranks_of_three}
    shard(model, strategy)
    local = {True: 0, False: 0}
    for p in model.parameters():
        local[p.requires_grad] += p.to_local().untyped_storage().nbytes()
    assert (share.base, share.adapter) == (local[False], local[True])
    assert share.trained == local[True] / whole


def test_the_rest_comes_last_and_every_parameter_is_in_one_unit():
    model = models.llama_tied()
    attach(model, LoRA(rank=2))
    *layers, rest = units(model, ModelParallelStrategy())
    assert [unit.name for unit in layers] == ["model.layers.0", "model.layers.1"]
    assert rest.name == ""
    every = [id(p) for unit in (*layers, rest) for p in unit.parameters]
    assert sorted(every) == sorted(id(p) for p in model.parameters())
    own = {id(p) for n, p in model.named_parameters() if "lora" in n}
    flattened = {id(p) for unit in units(model, FSDPStrategy()) for p in unit.parameters}
    assert flattened == set(every) - own
    assert units(model, FSDPStrategy(auto_wrap_policy={torch.nn.Linear})) == []
    assert units(model, DDPStrategy()) == []


def test_adapters_are_whole_under_fsdp_and_everything_is_under_ddp():
    model = models.llama()
    attach(model, LoRA(rank=4))
    sizes = {
        kind: sum(p.nbytes for n, p in model.named_parameters() if ("lora" in n) == kind)
        for kind in (True, False)
    }
    fsdp, ddp = share_of(model, FSDPStrategy(), 4), share_of(model, DDPStrategy(), 4)
    assert (fsdp.adapter, fsdp.trained) == (sizes[True], 1.0)
    assert fsdp.base == pytest.approx(sizes[False] / 4, rel=0.01)
    assert (ddp.base, ddp.adapter, ddp.exchange) == (sizes[False], sizes[True], sizes[True])
    layer = sum(p.nbytes for p in units(model, FSDPStrategy())[0].parameters)
    rest = sum(p.nbytes for p in units(model, FSDPStrategy())[-1].parameters)
    assert fsdp.exchange == 2 * layer + rest
    lasting = share_of(model, FSDPStrategy(sharding_strategy="NO_SHARD"), 4)
    assert lasting.base == sizes[False]


def test_the_peak_of_a_rank_is_counted_with_its_shares():
    none = dict.fromkeys(CATEGORIES, 0)
    one = {**none, "base": 100, "gradients": 40, "optimizer": 80, "activations": 10}
    other = {**none, "base": 100, "optimizer": 80, "activations": 45}
    peaks = {part: Peak(sum(p.values()), p, p) for part, p in (("a", one), ("b", other))}
    found = rank_bytes(peaks, Share(base=25, adapter=0, trained=0.25, exchange=7))
    assert found["peak"] == 25 + 20 + 45 + 7  # no longer where one device has it
    assert (found["gradients"], found["optimizer"], found["activations"]) == (10, 20, 45)


def test_data_is_not_looked_at_where_the_hub_is_out_of_reach(capsys):
    status, found = check(capsys, "--devices=2", "--data.tokenizer=nobody/has_this")
    assert status == 0
    assert found["unknown"][0].startswith("data: 'nobody/has_this' could not be loaded")
    assert found["works"]
