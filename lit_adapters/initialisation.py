"""Run an initialiser over the adapters of a whole model."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_adapters.adapters import METHOD, Adapted, Adapter
from lit_adapters.attachment import adapted_layers
from lit_adapters.dense_weights import DenseWeights, Matrices, in_fp32
from lit_adapters.gradients import Loss, Reduce, each_gradient, mean_loss
from lit_adapters.initialisers import Factored, Initialiser, RewritesBase, named_generator
from lit_adapters.remainders import digest_of, with_taken
from lit_adapters.weights import is_plain, requantise

Remember = Callable[[Adapted], None]


def initialise(
    model: nn.Module,
    initialiser: Initialiser,
    batches: Iterable[Any] | None = None,
    seed: int | None = None,
    *,
    loss: Loss = mean_loss,
    gradient_bytes: int | None = None,
    progress: Callable[[str], None] | None = None,
    weights: Matrices | None = None,
    reduce: Reduce | None = None,
) -> list[str]:
    """Give every adapter of ``model`` the start that ``initialiser`` computes, in place.

    Args:
        model: A model with attached adapters; its own weights are read, never written, but by
            `QPiSSA` and `LoftQ`, which are for quantised bases.
        initialiser: Such as ``Kaiming()``.
        batches: Real training batches, for initialisers that read gradients.
        seed: Seeds the random choices together with each layer's name; None takes the global seed.
        loss: Returns a batch's mean loss and its number of trained tokens, for models that are
            not called as ``model(**batch).loss``.
        gradient_bytes: Host memory for sums of gradients over several batches; None is no limit.
        progress: Called with the name of each layer that is done.
        weights: For an initialiser that writes a quantised base: gives a layer's matrix (out, in)
            as it was before, by the layer's name. None reads the files that the model came from.
        reduce: Returns the sum of a tensor over all ranks, if several take gradients together, each
            on batches of its own.

    Returns:
        The names of the initialised layers.

    Raises:
        ValueError: if the model holds no adapters, batches are needed and missing, or a layer
            cannot be started like that.
        TypeError: if an adapter has no low-rank factors, a weight needed has no gradient, or one to
            be written is not quantised.
    """
    adapted = list(adapted_layers(model, METHOD))  # what is trained beside has its own start
    if not adapted:
        raise ValueError("the model holds no adapters; call `attach(model, spec)` first")

    def start(remember: Remember, one: Adapted, gradient: Tensor | Factored | None = None) -> None:
        generator = named_generator(one.name, seed)
        remember(one)
        try:
            with _in_full_precision(one.layer):
                one.adapter.start(one.layer, initialiser, generator, gradient)
        except ValueError as error:
            raise ValueError(f"{one.name}: {error}") from error
        if progress is not None:
            progress(one.name)

    if initialiser.reads_gradient and batches is None:
        raise ValueError(
            f"{type(initialiser).__name__} reads gradients; pass real training batches, "
            "initialise(model, initialiser, batches=...)"
        )
    if isinstance(initialiser, RewritesBase):
        _rewrite(model, initialiser, adapted, seed, progress, weights or DenseWeights(model))
        return [name for name, *_ in adapted]
    with _all_or_none() as remember:
        if not initialiser.reads_gradient:
            for one in adapted:
                start(remember, one)
        else:
            for one in adapted:
                if type(one.adapter).start is Adapter.start:
                    start(remember, one)  # raises now, and not after the passes over the batches
            consume = partial(start, remember)
            factored = initialiser.reads_gradient == "factored"
            each_gradient(
                model, adapted, batches or (), consume, loss, gradient_bytes, reduce, factored
            )
    return [name for name, *_ in adapted]


def _rewrite(
    model: nn.Module,
    initialiser: RewritesBase,
    adapted: Sequence[Adapted],
    seed: int | None,
    progress: Callable[[str], None] | None,
    weights: Matrices,
) -> None:
    """Split each layer's unquantised matrix between base and adapter, one layer at a time."""
    kind = type(initialiser).__name__
    for one in adapted:
        if type(one.adapter).start is Adapter.start:
            one.adapter.start(one.layer, initialiser, named_generator(one.name, seed))  # raises
        if is_plain(one.layer):
            raise TypeError(
                f"{kind} splits weights that are quantised, and {one.name!r} "
                f"({type(one.layer).__name__}) is not; set quantization: nf4, narrow `targets`, or "
                "take PiSSA"
            )
    done: list[Adapted] = []

    def split(one: Adapted) -> None:
        dense = in_fp32(weights[one.name], one.layer)
        remember(one)
        done.append(one)
        generator = named_generator(one.name, seed)
        with _in_full_precision(one.layer):
            one.adapter.start(one.layer, initialiser, generator, dense=dense)

    try:
        with _all_or_none() as remember:
            for one in adapted:
                split(one)  # a function of its own: the matrix is gone when it returns
                if progress is not None:
                    progress(one.name)
            names = [one.name for one, _ in with_taken(adapted)]
            digest = digest_of(names, weights)
    except BaseException:
        for one in done:
            requantise(one.layer, in_fp32(weights[one.name], one.layer))
        raise
    for _, adapter in with_taken(adapted):
        adapter.taken_from = digest


def _in_full_precision(layer: nn.Module) -> torch.autocast:
    """A caller's autocast is for the passes over the batches."""
    device = next(layer.parameters()).device.type
    return torch.autocast("cpu" if device == "meta" else device, enabled=False)  # knows no meta


@contextmanager
def _all_or_none() -> Iterator[Remember]:
    """Give every adapter back what it had if one of them fails.

    Yields what to call with each before it is changed: copies of all from the beginning would be
    there at the peak of the backward pass.
    """
    before: list[tuple[Adapter, dict[str, Tensor], str | None]] = []

    def remember(one: Adapted) -> None:
        state = {name: value.clone() for name, value in one.adapter.state_dict().items()}
        before.append((one.adapter, state, one.adapter.start_name))

    try:
        yield remember
    except BaseException:
        for adapter, state, name in reversed(before):  # one may be there twice
            adapter.load_state_dict(state)
            adapter.start_name = name
        raise
