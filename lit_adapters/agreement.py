"""What ranks must have in common, compared before they train; else they would hang, or differ."""

import hashlib
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lit_adapters.adapters import Adapter
from lit_adapters.datamodule import InstructionDataModule
from lit_adapters.fingerprint import fingerprint, sampled
from lit_adapters.optim import SHADOW
from lit_adapters.spread import pieces_of

Facts = dict[str, Any]

SHOWN = 60  # characters of a value in a message; of a longer one a digest
LISTED = 5  # differences in a message
TRAINER = (
    *("precision", "max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val"),
    *("gradient_clip_algorithm", "limit_train_batches", "limit_val_batches", "overfit_batches"),
    *("val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps"),
)
# Each machine may have files of its own, and as many processes as it likes.
OWN = {"base", "tokenizer", "path", "cache_dir", "num_workers"}


def compare(facts: Callable[[], Facts]) -> None:
    """Let all ranks, if there are several, compare their ``facts()``; every rank calls it.

    Raises:
        ValueError: on all ranks, saying what differs and where.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, as_texts(facts()))
    if said := differences(every):
        raise ValueError(
            f"the ranks of this run differ: {said}. Run the same command on all of them, on the "
            "same files (is a copy on one machine older?); what starts at random needs "
            "seed_everything"
        )


def as_texts(facts: Facts) -> dict[str, str]:
    """Return ``facts``, perhaps inside each other, as short texts by dotted name."""
    return {name: _shown(value) for name, value in _flat(facts)}


def differences(every: Sequence[Mapping[str, str]]) -> str:
    """Say in what the texts of ranks differ, and on which; empty if they do not."""
    names = dict.fromkeys(name for one in every for name in one)
    of_ranks = {name: [one.get(name, "missing") for one in every] for name in names}
    said = [f"{n} is {_by_rank(texts)}" for n, texts in of_ranks.items() if len(set(texts)) > 1]
    more = [f"and {len(said) - LISTED} more"] if len(said) > LISTED else []
    return "; ".join([*said[:LISTED], *more])


def settings_of(module: Any) -> Facts:
    """Return the settings of an `AdapterFineTuneModule`, its trainer and its data."""
    trainer = module.trainer
    data = trainer.datamodule.hparams if _is_ours(trainer.datamodule) else {}
    ours = [c for c in trainer.callbacks if type(c).__module__.startswith("lit_adapters.")]
    return {
        "module": {key: value for key, value in module.hparams.items() if key not in OWN},
        "data": {key: value for key, value in data.items() if key not in OWN},
        "trainer": {name: getattr(trainer, name) for name in TRAINER},
        "callbacks": [type(callback).__name__ for callback in ours],
        "initialisers": [c.initialiser for c in ours if hasattr(c, "initialiser")],
        "resumes": trainer.ckpt_path is not None,
    }


def structure_of(model: nn.Module) -> Facts:
    """Return what is trained of ``model``, and on which base."""
    trained = [(name, tuple(p.shape), p.dtype) for name, p in _trained(model)]
    return {
        "number of trained tensors": len(trained),
        "names and shapes of trained tensors": trained,
        "base model": fingerprint(model),
    }


def start_of(module: Any) -> Facts:
    """Return from where a fit starts: values, optimizer, data."""
    trainer, model = module.trainer, module.model
    whole = [(n, p) for n, p in _trained(model) if pieces_of(p) is None and not _is_shard(p)]
    digest = hashlib.sha256()
    for name, parameter in whole:
        digest.update(f"{name}{_checksum(parameter)}".encode())
    return {
        "values of trained tensors": digest.hexdigest(),
        "optimizer": {
            f"{number} ({type(one).__name__})": [
                {key: value for key, value in group.items() if key != "params"}
                for group in one.param_groups
            ]
            for number, one in enumerate(trainer.optimizers)
        },
        "training batches": None
        if trainer.train_dataloader is None
        else trainer.num_training_batches,
        **_data(trainer.datamodule),
    }


def _data(data: Any) -> Facts:
    if not _is_ours(data):
        return {}
    facts: Facts = {}
    for split in ("train", "validation"):
        lengths = [len(example["input_ids"]) for example in data.tokens(split)]
        facts[f"number of examples ({split})"] = len(lengths)
        facts[f"lengths of examples ({split})"] = hashlib.sha256(array("q", lengths)).hexdigest()
    return facts


def _is_ours(data: Any) -> bool:
    return isinstance(data, InstructionDataModule)


def _trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    adapters = {id(p) for m in model.modules() if isinstance(m, Adapter) for p in m.parameters()}
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] == SHADOW:  # of GaLore; ranks hold rows of their own
            continue
        if parameter.requires_grad or id(parameter) in adapters:
            yield name, parameter


def _is_shard(parameter: Tensor) -> bool:
    return hasattr(parameter, "full_tensor")


def _checksum(tensor: Tensor) -> tuple[int, bytes]:
    """A sum that any changed bit changes, and some values in their places."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().view(-1).view(kinds[tensor.element_size()])
    return int(bits.sum(dtype=torch.int64)), sampled(bits).cpu().numpy().tobytes()


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    text = re.sub(" at 0x[0-9a-f]+", "", repr(value))  # of an object without a text of its own
    if len(text) <= SHOWN:
        return text
    return f"of digest {hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _by_rank(values: Sequence[str]) -> str:
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(str(rank))
    said = [f"{v} on rank{'s' * (len(r) > 1)} {', '.join(r)}" for v, r in ranks.items()]
    return " and ".join(said)
