"""Run an initialiser over the adapters of a whole model."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lit_adapters.adapters import METHOD, Adapted, Adapter
from lit_adapters.attachment import adapted_layers
from lit_adapters.gradients import Loss, each_gradient, mean_loss
from lit_adapters.initialisers import Initialiser, named_generator


def initialise(
    model: nn.Module,
    initialiser: Initialiser,
    batches: Iterable[Any] | None = None,
    seed: int | None = None,
    *,
    loss: Loss = mean_loss,
    gradient_bytes: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[str]:
    """Give every adapter of ``model`` the start that ``initialiser`` computes, in place.

    Args:
        model: A model with attached adapters; its own weights are read, never written.
        initialiser: Such as ``Kaiming()``.
        batches: Real training batches, for initialisers that read gradients.
        seed: Seeds the random choices together with each layer's name; None takes the global seed.
        loss: Returns a batch's mean loss and its number of trained tokens, for models that are
            not called as ``model(**batch).loss``.
        gradient_bytes: Host memory for sums of gradients over several batches; None is no limit.
        progress: Called with the name of each layer that is done.

    Returns:
        The names of the initialised layers.

    Raises:
        ValueError: if the model holds no adapters, batches are needed and missing, or a layer
            cannot be started like that.
        TypeError: if an adapter has no low-rank factors, or a weight needed has no gradient.
    """
    adapted = list(adapted_layers(model, METHOD))  # what is trained beside has its own start
    if not adapted:
        raise ValueError("the model holds no adapters; call `attach(model, spec)` first")

    def start(one: Adapted, gradient: Tensor | None = None) -> None:
        generator = named_generator(one.name, seed)
        try:
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
    with _all_or_none(adapted):
        if not initialiser.reads_gradient:
            for one in adapted:
                start(one)
        else:
            for one in adapted:
                if type(one.adapter).start is Adapter.start:
                    start(one)  # raises now, and not after the passes over the batches
            each_gradient(model, adapted, batches or (), start, loss, gradient_bytes)
    return [name for name, *_ in adapted]


@contextmanager
def _all_or_none(adapted: Sequence[Adapted]) -> Iterator[None]:
    """Give every adapter back what it had if one of them fails."""
    before = [
        {name: value.clone() for name, value in one.adapter.state_dict().items()} for one in adapted
    ]
    names = [one.adapter.start_name for one in adapted]
    try:
        yield
    except BaseException:
        for one, state, name in zip(adapted, before, names, strict=True):
            one.adapter.load_state_dict(state)
            one.adapter.start_name = name
        raise
