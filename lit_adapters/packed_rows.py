"""Whether a model keeps the sequences of a packed row apart, found out by trying."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lit_adapters.attachment import adapted_layers
from lit_adapters.blockwise_attention import BLOCKWISE
from lit_adapters.gradients import at_rest
from lit_adapters.weights import is_plain

# Implementations of transformers that read packed positions themselves, without a mask.
NATIVE = ("flash_attention", "flex_attention")
LENGTH = 5  # tokens of each of the two sequences of the probe
EXACT, ROUNDED = 1e-3, 0.1  # of what naive concatenation gets wrong; the latter below fp32


def keep_rows_apart(model: nn.Module) -> str | None:
    """Let ``model`` attend within each sequence of a packed row; return why it cannot, or None.

    Whether that is enough is computed, not looked up: two short sequences in one row must give the
    logits that they give alone. Recurrent layers, convolutions over time and attention that does
    not ask for its mask in transformers' way fail, and the model is then left as it was.

    Args:
        model: With its adapters, on the device its weights are on.
    """
    reason = _obstacle(model)
    if reason is not None:
        return reason
    own = _implementation(model)
    native = own.startswith(NATIVE)
    switch: Any = model.set_attn_implementation
    switch(BLOCKWISE["sdpa" if native else own])
    try:
        reason = _mixes(model)
    except Exception as error:  # whatever a model of any kind makes of such inputs
        reason = f"a packed row fails with {type(error).__name__}: {error}"
    if reason is not None or native:
        switch(own)
    return reason


def _implementation(model: Any) -> str:
    """Attention as transformers calls it, whether or not it is already ours that runs."""
    named = str(model.config._attn_implementation)
    return next((own for own, ours in BLOCKWISE.items() if ours == named), named)


def _obstacle(model: Any) -> str | None:
    """Return what is known without running the model."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "set_attn_implementation"):
        return f"{type(model).__name__} is no model of transformers"
    if getattr(config, "is_encoder_decoder", False):
        return "the model has an encoder"
    own = _implementation(model)
    if own not in BLOCKWISE and not own.startswith(NATIVE):
        return f"attention {own!r} is not known to keep sequences apart"
    if not model._can_set_attn_implementation():
        return f"{type(model).__name__} computes attention in a way of its own"
    if (reason := put_in_front(model)) is not None:
        return reason
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return "the model is compiled, and would be again for all lengths that come up"
    if any(p.is_meta or isinstance(p, FakeTensor) for p in model.parameters()):
        return "the model has no weights yet to try it with"
    return None


def put_in_front(model: nn.Module) -> str | None:
    """Return why the adapters that ``model`` holds now keep rows from being packed, or None."""
    moved = {a.spec.name for *_, a in adapted_layers(model) if a.changes_inputs}
    if not moved:
        return None
    return f"{', '.join(sorted(moved))} puts something before the first sequence only"


def _mixes(model: Any) -> str | None:
    """Return how far two sequences in a row change each other's logits, if they do."""
    device = model.get_input_embeddings().weight.device
    ids = (torch.arange(2 * LENGTH, device=device) * 7 + 3) % min(model.config.vocab_size, 1000)
    positions = torch.arange(LENGTH, device=device).repeat(2)

    def logits(shape: tuple[int, int], **more: Tensor) -> Tensor:
        output = model(input_ids=ids.view(shape), use_cache=False, **more)
        return output.logits.float().view(2 * LENGTH, -1)

    with at_rest(model), torch.no_grad():
        alone = logits((2, LENGTH))
        packed = logits((1, 2 * LENGTH), position_ids=positions[None])
        naive = logits((1, 2 * LENGTH))
    error, leak = ((other - alone).abs().max().item() for other in (packed, naive))
    exact = all(is_plain(m) for m in model.modules()) and all(
        p.dtype in (torch.float32, torch.float64) for p in model.parameters()
    )
    if error <= (EXACT if exact else ROUNDED) * leak:
        return None
    return (
        f"{type(model).__name__} mixes sequences that share a row: logits are off by {error:.1g}, "
        f"where plain concatenation is off by {leak:.1g}"
    )
