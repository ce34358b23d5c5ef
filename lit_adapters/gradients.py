"""Gradients of frozen weights on real batches, one layer at a time."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from lit_adapters.adapters import Adapted
from lit_adapters.attachment import bypassed
from lit_adapters.gradient_factors import take_factors
from lit_adapters.initialisers import Factored
from lit_adapters.losses import IGNORE
from lit_adapters.trained_state import random_state, set_random_state
from lit_adapters.weights import as_matrix, matrix_shape, multiplies_rows

Loss = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]  # mean over tokens, number of tokens
Consume = Callable[[Adapted, Any], None]
Take = Callable[[Adapted, Any, int], None]
Reduce = Callable[[Tensor], Tensor]

LOSS_SCALE = 1024.0  # keeps fp16 gradients from vanishing; a power of two changes no bit elsewhere


def mean_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return ``model(**batch).loss`` and the number of tokens it is the mean over.

    Args:
        model: A Hugging Face causal language model.
        batch: Its arguments, with ``labels`` (batch, time) int64, -100 where nothing is trained.

    Raises:
        ValueError: if the batch is no mapping with ``labels``.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
        found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"a gradient needs batches that are mappings with 'labels', got {found}; add labels, "
            "or pass loss=..., which returns the mean loss of a batch and its number of tokens"
        )
    device = next(model.parameters()).device
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return model(**inputs).loss, (inputs["labels"][..., 1:] != IGNORE).sum()


def each_gradient(
    model: nn.Module,
    adapted: Sequence[Adapted],
    batches: Iterable[Any],
    consume: Consume,
    loss: Loss = mean_loss,
    gradient_bytes: int | None = None,
    reduce: Reduce | None = None,
    factored: bool = False,
) -> None:
    """Call ``consume(one, gradient)`` for each adapted layer, on the frozen base alone.

    The gradient is ``sum_b n_b dL_b/dW / sum_b n_b`` over batches with mean loss ``L_b`` over
    ``n_b`` trained tokens: that of the mean over all tokens. With one batch each layer's gradient
    is handed over during the backward pass, when it appears, and freed; ``consume`` may then change
    the layer's adapter. With several, fp32 sums wait in host memory.

    Dropout is off, and modes, flags, ``.grad`` of parameters and random state are as before
    afterwards. Gradient checkpointing stays in force in layers that are transformers'
    ``GradientCheckpointingLayer``.

    Args:
        model: Holds the adapters, which are bypassed meanwhile.
        adapted: The layers wanted; a tied weight gets the gradient of its use in this layer.
        batches: What ``loss`` takes.
        consume: Gets the gradient (out, in), fp32, on the weight's device. Should it come in parts
            (one module in several reentrant checkpoints; with factors, a weight that is also read
            elsewhere), it is called for the layer once more, with the sum, which counts.
        loss: Returns the mean loss of a batch and its trained tokens; 0 leaves the batch out.
        gradient_bytes: Host memory for the sums; more takes one pass over the batches for each
            group of layers that fits, of one layer at least. None is no limit.
        reduce: Returns the sum of a tensor over all ranks, each of which calls this with batches
            of its own: the gradient is then that of all their tokens. None if this is the only one.
        factored: With one batch, hand over a gradient as `Factored`, what went into the layer and
            the gradient of what came out, where those take no more room. The matrix is not formed.

    Raises:
        ValueError: if there is no batch or no trained token, or a layer has no gradient.
        TypeError: if a weight is stored so that it cannot be differentiated.
    """
    seen = list(batches)
    if not seen:
        raise ValueError("no batches to take gradients on; pass at least one real training batch")
    for one in adapted:
        _check_differentiable(one)
    with (
        at_rest(model),
        bypassed(model),
        torch.inference_mode(False),  # gradients on as well
        torch.compiler.set_stance("force_eager"),  # nothing is compiled for these few passes
    ):
        remaining = list(adapted)
        if len(seen) == 1 and reduce is None:
            remaining = _hand_over_at_once(model, remaining, seen[0], consume, loss, factored)
        for group in _groups(remaining, gradient_bytes):
            _hand_over_means(model, group, seen, consume, loss, reduce)


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Let ``model`` compute without dropout and caches and train nothing, then as it did before.

    The random state, too, is restored at the end.
    """
    state = random_state()
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    configs: dict[int, Any] = {id(c): c for c in (getattr(m, "config", None) for m in modules)}
    caching = [c for c in configs.values() if getattr(c, "use_cache", False)]
    checkpointed: list[Any] = [
        module
        for module in modules
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
    functions = [layer._gradient_checkpointing_func for layer in checkpointed]
    try:
        for module in modules:
            module.training = False
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for config in caching:
            config.use_cache = False
        for layer, function in zip(checkpointed, functions, strict=True):
            layer.training = True  # or it would not checkpoint; inside, it evaluates
            layer._gradient_checkpointing_func = partial(_checkpoint_evaluating, layer, function)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for config in caching:
            config.use_cache = True
        for layer, function in zip(checkpointed, functions, strict=True):
            layer._gradient_checkpointing_func = function
        set_random_state(state)


def _checkpoint_evaluating(
    layer: nn.Module, checkpoint: Callable[..., Any], forward: Callable[..., Any], *args: Any
) -> Any:
    """Checkpoint ``forward`` so that ``layer`` is in evaluation mode whenever it runs."""

    def evaluating(*args: Any) -> Any:
        layer.training = False
        try:
            return forward(*args)
        finally:
            layer.training = True

    return checkpoint(evaluating, *args)


def _check_differentiable(one: Adapted) -> None:
    weight = one.layer._parameters.get("weight")
    if (
        weight is None
        or weight.is_meta
        or not weight.is_floating_point()
        or as_matrix(one.layer, weight).shape != matrix_shape(one.layer)
    ):
        stored = "nothing" if weight is None else f"{weight.dtype} of shape {tuple(weight.shape)}"
        raise TypeError(
            f"{one.name!r} ({type(one.layer).__name__}) stores its weight as {stored}"
            f"{' without values' if weight is not None and weight.is_meta else ''}, which has no "
            "gradient; estimate on a float base (load it without quantisation; an adapter saved "
            "there loads on the quantised one), or exclude the layer"
        )


def _hand_over_at_once(
    model: nn.Module,
    adapted: list[Adapted],
    batch: Any,
    consume: Consume,
    loss: Loss,
    factored: bool,
) -> list[Adapted]:
    """Consume gradients as they appear; return the layers for which one came in parts."""
    times: Counter[str] = Counter()

    def take(one: Adapted, gradient: Tensor | Factored, tokens: int) -> None:
        times[one.name] += 1
        if times[one.name] == 1:
            consume(one, gradient)

    _check_complete(_backward(model, adapted, batch, take, loss, factored), adapted, times)
    return [one for one in adapted if times[one.name] > 1]


def _hand_over_means(
    model: nn.Module,
    group: list[Adapted],
    batches: list[Any],
    consume: Consume,
    loss: Loss,
    reduce: Reduce | None,
) -> None:
    sums: dict[str, Tensor] = {}

    def add(one: Adapted, gradient: Tensor, tokens: int) -> None:
        if one.name in sums:
            sums[one.name].add_(gradient.cpu(), alpha=tokens)
        else:
            sums[one.name] = gradient.cpu() * tokens

    total = sum(_backward(model, group, batch, add, loss) for batch in batches)
    if reduce is not None:
        device = next(group[0].layer.parameters()).device
        total = int(reduce(torch.tensor(total, device=device)))
        # A rank may have no token, or none for this expert of a mixture.
        found = torch.tensor([one.name in sums for one in group], dtype=torch.int64, device=device)
        for one, ranks in zip(group, reduce(found).tolist(), strict=True):
            if ranks:
                sums.setdefault(one.name, torch.zeros(matrix_shape(one.layer)))
    _check_complete(total, group, sums)
    for one in group:
        summed = sums.pop(one.name).to(one.layer.get_parameter("weight").device)
        consume(one, (summed if reduce is None else reduce(summed)).div_(total))


def _backward(
    model: nn.Module,
    adapted: list[Adapted],
    batch: Any,
    take: Take,
    loss: Loss,
    factored: bool = False,
) -> int:
    """Hand each weight's gradient on one batch to ``take``; return the batch's trained tokens."""
    tokens = 0

    def hand_over(one: Adapted, leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        matrix = as_matrix(one.layer, gradient.to_dense()).float()
        take(one, matrix.div_(LOSS_SCALE), tokens)

    def hand_over_sum(one: Adapted, gradient: Tensor | Factored) -> None:
        take(one, gradient / LOSS_SCALE, tokens)

    originals = [(one.layer, one.layer._parameters["weight"]) for one in adapted]
    handles: list[RemovableHandle] = []
    try:
        for one in adapted:
            # A leaf of its own on the same memory: a tied weight would sum over all its uses.
            leaf = nn.Parameter(one.layer.get_parameter("weight").detach())
            leaf.register_post_accumulate_grad_hook(partial(hand_over, one))
            one.layer._parameters["weight"] = leaf
            # A forward of its own, as of accelerate's hooks, may do more than its class.
            if factored and multiplies_rows(one.layer) and "forward" not in vars(one.layer):
                handles += take_factors(one.layer, leaf, partial(hand_over_sum, one))
        mean, count = loss(model, batch)
        tokens = int(count)
        if tokens and mean.requires_grad:
            (mean * LOSS_SCALE).backward()
    finally:
        for handle in handles:
            handle.remove()
        for layer, weight in originals:
            layer._parameters["weight"] = weight
    return tokens


def _check_complete(tokens: int, adapted: list[Adapted], got: Mapping[str, Any]) -> None:
    if tokens < 1:
        raise ValueError(
            "the batches train no token (all labels are -100), so there is no gradient; are "
            "responses cut off by the length limit?"
        )
    missing = [one.name for one in adapted if one.name not in got]
    if missing:
        raise ValueError(
            f"no gradient reached {len(missing)} of {len(adapted)} adapted layers (first: "
            f"{missing[0]!r}): on these batches the loss does not depend on them. Pass more "
            "batches if they are experts of a mixture; call model.enable_input_require_grads() if "
            "checkpointing is reentrant; else leave them out with `exclude`"
        )


def _groups(adapted: list[Adapted], gradient_bytes: int | None) -> Iterator[list[Adapted]]:
    """Split layers, in order, so that each group's fp32 sums fit."""
    group: list[Adapted] = []
    size = 0
    for one in adapted:
        more = 4 * prod(matrix_shape(one.layer))
        if group and gradient_bytes is not None and size + more > gradient_bytes:
            yield group
            group, size = [], 0
        group.append(one)
        size += more
    if group:
        yield group
