"""Checkpoints of one format from every strategy: whole tensors of what is trained, all by name."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from lit_adapters.sharding import is_sharded
from lit_adapters.spread import part, pieces_of, plain_name, whole
from lit_adapters.trained_state import trained_tensors

State = dict[str, Any]

# What groups hold beside the settings of an optimizer: schedules and ourselves put it there.
NOTED = {"params", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "lr_ratio"}


def make_portable(module: LightningModule) -> None:
    """Let the strategy of ``module`` write and read checkpoints that any other strategy reads.

    Lightning numbers the parameters of an optimizer, under sharding otherwise than on one device,
    and gathers the whole model, frozen or not, to write a checkpoint.
    """
    strategy: Any = module.trainer.strategy
    strategy.optimizer_state = partial(_optimizer_state, module)
    if not is_sharded(strategy):
        strategy.load_optimizer_state_dict = partial(_load_optimizers, module, strategy)
        return
    if isinstance(strategy, ModelParallelStrategy):
        strategy._save_distributed_checkpoint = False  # one file, as under every strategy
    strategy.lightning_module_state_dict = partial(_trained_state, module)
    strategy.load_checkpoint = partial(Strategy.load_checkpoint, strategy)
    strategy.load_model_state_dict = partial(_load_all, module, strategy)


def _trained_state(module: LightningModule) -> State:
    found = {name: whole(t, t).cpu() for name, t in trained_tensors(module).items()}
    return found if module.trainer.is_global_zero else {}


@torch.no_grad()
def _load_all(
    module: LightningModule, strategy: Strategy, checkpoint: Mapping[str, Any], strict: bool = True
) -> None:
    """Copy a checkpoint into what is sharded already, optimizers included."""
    state = checkpoint["state_dict"]
    for name, tensor in trained_tensors(module).items():
        if name in state:
            tensor.copy_(part(state[name].to(tensor.dtype), tensor))
    if module.trainer.state.fn == TrainerFn.FITTING and "optimizer_states" in checkpoint:
        _load_optimizers(module, strategy, checkpoint)


def _optimizer_state(module: LightningModule, optimizer: Any) -> State:
    """Return the state of an optimizer by names of parameters, with whole tensors."""
    if isinstance(optimizer, LightningOptimizer):
        optimizer = optimizer.optimizer
    strategy = module.trainer.strategy
    state: State = (
        optimizer.state_dict()
        if is_sharded(strategy)
        else type(strategy).optimizer_state(strategy, optimizer)  # ZeRO's is on several ranks
    )
    if not state:  # of all ranks but one
        return state
    parameters = dict(_named(module, optimizer))
    names = list(parameters)
    by_name = {names[number]: values for number, values in state["state"].items()}
    if is_sharded(strategy):
        by_name = _gathered(by_name, parameters)
    groups = [
        {**group, "params": [names[number] for number in group["params"]]}
        for group in state["param_groups"]
    ]
    return {**state, "state": by_name, "param_groups": groups}


def _gathered(state: Mapping[str, State], parameters: Mapping[str, Tensor]) -> dict[str, State]:
    """Make every tensor whole; a rank may hold none of a parameter, and no state then."""
    mine = {
        name: {key: _described(value, parameters[name]) for key, value in values.items()}
        for name, values in state.items()
    }
    layouts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(layouts, mine)
    union = {
        name: {key: value for one in layouts for key, value in one.get(name, {}).items()}
        for name in parameters
    }
    result: dict[str, State] = {}
    for name, described in union.items():
        for key, (is_part, dtype, value) in described.items():
            have = state.get(name, {}).get(key)
            if is_part:
                parameter = parameters[name]
                have = parameter.new_zeros(parameter.shape, dtype=dtype) if have is None else have
                value = whole(have, parameter).cpu()
            result.setdefault(name, {})[key] = value
    return result


def _described(value: Any, parameter: Tensor) -> tuple[bool, torch.dtype | None, Any]:
    """Whether ``value`` is spread over ranks, its dtype, and itself if it is not."""
    if not isinstance(value, Tensor):
        return False, None, value
    cut = pieces_of(parameter) is not None and value.shape == parameter.shape
    if cut or hasattr(value, "full_tensor"):
        return True, value.dtype, None
    return False, value.dtype, value.cpu()


def _load_optimizers(
    module: LightningModule, strategy: Strategy, checkpoint: Mapping[str, Any]
) -> None:
    """Load what `_optimizer_state` returned under any strategy.

    Raises:
        ValueError: if a checkpoint's parameters are not those of the optimizer.
    """
    numbered = []
    for optimizer, state in zip(strategy.optimizers, checkpoint["optimizer_states"], strict=True):
        parameters = dict(_named(module, optimizer))
        numbers = {name: number for number, name in enumerate(parameters)}
        saved = [name for group in state["param_groups"] for name in group["params"]]
        if any(name not in numbers for name in saved):
            odd = next(name for name in saved if name not in numbers)
            raise ValueError(
                f"the optimizer of the checkpoint stepped {odd!r}, which this one does not; was "
                "it written with another adapter, or by an earlier version?"
            )
        values = {
            numbers[name]: {
                key: part(value, parameters[name]) if isinstance(value, Tensor) else value
                for key, value in of_one.items()
            }
            for name, of_one in state["state"].items()
        }
        present = optimizer.state_dict()["param_groups"]
        _check_kind(optimizer, "optimizer", optimizer.defaults, state["param_groups"][0])
        if len(present) != len(state["param_groups"]):
            raise ValueError(
                f"the optimizer of the checkpoint has {len(state['param_groups'])} groups of "
                f"parameters and this one {len(present)}; were lora_plus_ratio or embedding_lr "
                "set in one run only?"
            )
        groups = [
            {**group, "params": now["params"]}
            for group, now in zip(state["param_groups"], present, strict=True)
        ]
        numbered.append({**state, "state": values, "param_groups": groups})
    configs = module.trainer.lr_scheduler_configs
    for config, state in zip(configs, checkpoint.get("lr_schedulers", ()), strict=False):
        _check_kind(config.scheduler, "schedule", config.scheduler.state_dict(), state)
    Strategy.load_optimizer_state_dict(strategy, {"optimizer_states": numbered})


def _check_kind(thing: Any, what: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise if each has settings that the other lacks; torch's next version may only add some."""
    missing, odd = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys() - NOTED)
    if missing and odd:
        raise ValueError(
            f"the {what} of the checkpoint is no {type(thing).__name__}: it has {', '.join(odd)}, "
            f"and not {', '.join(missing)}. Resume with the {what} of that run, or start a new fit "
            "from its weights: load_from_checkpoint, or load_adapter with its folder"
        )


def _named(module: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of an optimizer with their names, in its order."""
    names = {id(p): plain_name(name) for name, p in module.named_parameters()}
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(stepped):
        yield names.get(id(parameter), f"parameter {number}"), parameter
