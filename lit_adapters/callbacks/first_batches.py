"""Look at the first training batches of a trainer without a trace."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lit_adapters.trained_state import random_state, set_random_state

# Attributes of a loader that may own random generators, at any depth.
PARTS = ("sampler", "batch_sampler", "dataset", "data_source")


def first_batches(trainer: Trainer, count: int) -> list[Any]:
    """Return up to ``count`` batches of the data of a fit that begins, as training will see them.

    Wherever the data comes from: the data module, the module or the loaders given to ``fit``.
    Global random states are as before afterwards, and so are the generators (torch, NumPy, Python)
    on the loader, its samplers and its data set, and a loader's ``state_dict``.

    Raises:
        ValueError: if there is no training data, or it can only be read once.
    """
    source = trainer.fit_loop._data_source
    if not source.is_defined():
        raise ValueError(
            "no training data to take gradients on: give the module a train_dataloader, or pass "
            "a data module or loaders to fit"
        )
    state = random_state()
    try:
        given: Any = source.dataloader()
        loader = (
            given if isinstance(given, CombinedLoader) else CombinedLoader(given, "max_size_cycle")
        )
        for one in loader.flattened:
            if isinstance(one, Iterator):
                raise ValueError(
                    f"the training data is a {type(one).__name__}, which can only be read once, so "
                    "batches read for the initialiser would be lost to training; pass an iterable "
                    "such as a DataLoader"
                )
        with _left_alone(loader.flattened):
            found = [batch for batch, *_ in islice(iter(loader), count)]
            loader.reset()  # stops workers
        return found
    finally:
        set_random_state(state)


@contextmanager
def _left_alone(loaders: list[Any]) -> Iterator[None]:
    restorers = [restore for loader in loaders for restore in _restorers(loader, set())]
    for loader in loaders:
        if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
            restorers.append(partial(loader.load_state_dict, loader.state_dict()))
    try:
        yield
    finally:
        for restore in restorers:
            restore()


def _restorers(thing: Any, seen: set[int]) -> Iterator[Callable[[], Any]]:
    """Yield a function for each generator on ``thing`` that sets it back to its present state."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    for value in getattr(thing, "__dict__", {}).values():
        if isinstance(value, torch.Generator):
            yield partial(value.set_state, value.get_state())
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator
            yield partial(setattr, bits, "state", bits.state)
        elif isinstance(value, np.random.RandomState):
            yield partial(value.set_state, value.get_state())
        elif isinstance(value, random.Random):
            yield partial(value.setstate, value.getstate())
    for part in PARTS:
        yield from _restorers(getattr(thing, part, None), seen)
