"""What can be said about sharding in one process: units, arrangements, refusals."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from lit_adapters import AdapterFineTuneModule, LoRA, attach
from lit_adapters.sharding import (
    check_optimizer,
    decoder_layers,
    inside,
    shard,
    spread_over_all,
)
from lit_adapters.spread import plain_name
from tests.models import BUILDERS, llama, qwen2


@pytest.mark.parametrize("name", BUILDERS)
def test_units_are_the_layers_of_any_model(name):
    model = BUILDERS[name]()
    attach(model, LoRA(rank=2))
    kinds = {type(layer).__name__ for _, layer in decoder_layers(model)}
    found = dict(decoder_layers(model))
    assert len(found) == 2
    assert len(kinds) == 1
    assert all(model.get_submodule(name) is layer for name, layer in found.items())
    inner = {id(m) for layer in found.values() for m in layer.modules()}
    outer = [m for m in model.modules() if id(m) not in inner]
    assert not any(type(m).__name__.endswith("Attention") for m in outer)


def test_layers_of_a_model_that_is_not_of_transformers_are_its_first_list_of_one_class():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))

    model = nn.Module()
    model.ends = nn.ModuleList([nn.Linear(2, 2), nn.LayerNorm(2)])
    model.blocks = nn.ModuleList(Experts() for _ in range(3))
    assert [name for name, _ in decoder_layers(model)] == ["blocks.0", "blocks.1", "blocks.2"]


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="Sequential has no list of layers.*auto_wrap_policy"):
        decoder_layers(nn.Sequential(nn.Linear(2, 2)))


def arranged(**sizes):
    strategy = ModelParallelStrategy(**sizes)
    strategy.parallel_devices = [torch.device("cpu")] * 4
    strategy.num_nodes = 2
    spread_over_all(strategy)
    return strategy._data_parallel_size, strategy._tensor_parallel_size


def test_fsdp2_takes_all_devices_unless_told_otherwise():
    assert arranged() == (8, 1)
    assert arranged(data_parallel_size=8) == (8, 1)
    assert arranged(data_parallel_size=8, tensor_parallel_size=1) == (8, 1)
    spread_over_all(DDPStrategy())  # has nothing to arrange


def test_tensor_parallelism_is_refused():
    with pytest.raises(ValueError, match="tensor_parallel_size=2.*leave it out"):
        arranged(tensor_parallel_size=2)


def test_leaving_devices_out_is_refused():
    with pytest.raises(ValueError, match="data_parallel_size=4.*does not use all 8 devices"):
        arranged(data_parallel_size=4)


def test_a_folder_of_shards_is_refused():
    with pytest.raises(ValueError, match="state_dict_type='sharded'.*leave it at 'full'"):
        shard(llama(), FSDPStrategy(state_dict_type="sharded"))


@pytest.mark.parametrize("spec", [LoRA(rank=2, bias="all"), LoRA(modules_to_save=["lm_head"])])
def test_trained_copies_are_refused_under_fsdp_with_an_alternative(spec):
    model = qwen2()
    attach(model, spec)
    with pytest.raises(ValueError, match="puts trained copies in the place.*Take FSDP2"):
        shard(model, FSDPStrategy())


def test_weights_of_two_dtypes_in_a_layer_are_refused_under_fsdp_with_an_alternative():
    model = llama()
    attach(model, LoRA(rank=2))
    model.model.layers[0].mlp.down_proj.weight.data = torch.zeros(4, dtype=torch.bfloat16)
    strategy = FSDPStrategy(parallel_devices=[torch.device("cpu")])
    strategy.cluster_environment = type("One", (), {"local_rank": lambda self: 0})()
    with pytest.raises(ValueError, match="model.layers.0 are of torch.bfloat16 and torch.float32"):
        shard(model, strategy)


def test_any_other_strategy_leaves_the_model_as_it_is():
    model = llama()
    assert shard(model, DDPStrategy()) is model
    assert inside(model, lambda given: given) is model


def test_names_are_those_of_before():
    wrapped = "_fsdp_wrapped_module"
    assert (
        plain_name(f"{wrapped}.model.layers.0.{wrapped}.mlp.weight") == "model.layers.0.mlp.weight"
    )
    assert plain_name(f"model.layers.0.{wrapped}") == "model.layers.0"
    assert plain_name("model.norm") == "model.norm"


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_a_checkpoint_whose_optimizer_is_numbered_is_refused(tmp_path):
    from tests.test_module import examples, in_batches

    def trainer(steps):
        return Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            logger=False,
            max_steps=steps,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )

    batches = in_batches(examples(8), 2)
    first = trainer(1)
    first.fit(AdapterFineTuneModule(llama(), LoRA(rank=2)), batches)
    first.save_checkpoint(tmp_path / "named.ckpt")
    checkpoint = torch.load(tmp_path / "named.ckpt", weights_only=True)
    (state,) = checkpoint["optimizer_states"]
    numbers = {name: number for number, name in enumerate(state["state"])}
    state["state"] = {numbers[name]: values for name, values in state["state"].items()}
    for group in state["param_groups"]:
        group["params"] = [numbers[name] for name in group["params"]]
    torch.save(checkpoint, tmp_path / "numbered.ckpt")
    with pytest.raises(ValueError, match="stepped 0, which this one does not.*earlier version"):
        trainer(2).fit(
            AdapterFineTuneModule(llama(), LoRA(rank=2)),
            batches,
            ckpt_path=tmp_path / "numbered.ckpt",
        )


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_optimizers_whose_state_cannot_be_gathered_are_refused(strategy):
    eight_bit = pytest.importorskip("bitsandbytes").optim.AdamW8bit([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=f"AdamW8bit.*under {strategy.__name__}.*Take AdamW"):
        check_optimizer(eight_bit, strategy())
    check_optimizer(eight_bit, DDPStrategy())
    check_optimizer(torch.optim.AdamW(eight_bit.param_groups[0]["params"]), strategy())
