"""The loss of a causal language model on a batch, without its logits where the head allows it."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lit_adapters.adapters import adapters_of
from lit_adapters.attachment import apply_adapters, change_inputs, stand_in
from lit_adapters.losses import LossKind, TokenLoss, chunked_loss, liger_loss, token_loss
from lit_adapters.optim.projected_linear import ProjectedLinear

# What configs call a factor of the logits (or its inverse), and the bound of a soft cap.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SMALL, LARGE = 1.0, 300.0  # logits of the probe: one shows a scale, the other a soft cap


class ModelLoss:
    """Computes a model's `TokenLoss`; from the states before its head if the head is a plain one.

    The model runs as always, except that a hook takes what its head is called with and gives the
    head a single position instead. What the model does to logits behind its head is found out in
    the first call, when the head gets a probe: a scale and a soft cap that its config names are
    recognised; anything else, and any head that is more than a matrix, leads to full logits, with
    one line in the log that says why.

    Args:
        kind: ``auto``; ``full`` for logits at all times; ``liger`` for liger-kernel on a GPU.
    """

    def __init__(self, kind: LossKind = "auto") -> None:
        if kind not in ("auto", "full", "liger"):
            raise ValueError(f"loss must be 'auto', 'full' or 'liger', got {kind!r}")
        self.kind = kind
        self.shape: tuple[float, float | None] | None = None  # the model's scale and soft cap
        self.refused: str | None = None  # why the logits are needed, found out by running
        self.told: set[str] = set()
        self.chunk: int | None = None  # tokens scored at a time; null asks the device

    def __call__(
        self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, count_correct: bool
    ) -> TokenLoss:
        """Run ``model(**inputs)`` once.

        Args:
            model: A Hugging Face causal language model.
            inputs: Its arguments, without labels.
            labels: (batch, time) int64, aligned with the inputs; -100 is not trained.
            count_correct: Whether to count the tokens that the model ranks first.
        """
        if self.kind == "full" or torch.compiler.is_compiling():  # hooks would not be traced
            return token_loss(model(**inputs).logits, labels, count_correct)
        reason = self.refused or obstacle(model)
        if reason is None:
            head = model.get_output_embeddings()  # type: ignore[operator]
            shortcut = Shortcut(head, labels, probing=self.shape is None)
            handle = head.register_forward_pre_hook(shortcut, with_kwargs=True)
            try:
                output = model(**inputs)
            finally:
                handle.remove()
            reason = self.refused = shortcut.problem()
            if reason is None and self.shape is None:
                self.shape = behind_the_head(model, shortcut.raw, output.logits)
                if self.shape is None:
                    reason = self.refused = "the model changes the logits behind its output head"
            if reason is None:
                return self._fused(head, shortcut.hidden, labels, count_correct)
        self._tell(reason)
        return token_loss(model(**inputs).logits, labels, count_correct)

    def _fused(
        self, head: nn.Linear, hidden: Tensor, labels: Tensor, count_correct: bool
    ) -> TokenLoss:
        assert self.shape is not None
        scale, softcap = self.shape
        parts = (hidden, head.weight, labels, head.bias, softcap, scale)
        if self.kind == "liger" and not count_correct:
            if hidden.is_cuda:
                return liger_loss(*parts)
            self._tell(f"liger-kernel needs CUDA, not {hidden.device.type}", "in chunks of tokens")
        return chunked_loss(*parts, chunk=self.chunk, count_correct=count_correct)

    def _tell(self, reason: str, how: str = "from full logits, which take more memory") -> None:
        if reason not in self.told:
            self.told.add(reason)
            rank_zero_info(f"The loss is computed {how}: {reason}.")


class Shortcut:
    """A forward pre-hook that takes the states from a head and gives it next to nothing."""

    hidden: Tensor  # (batch, time, width)
    raw: Tensor  # (1, 2, vocabulary): what the head makes of the probe

    def __init__(self, head: nn.Linear, labels: Tensor, probing: bool) -> None:
        self.head = head
        self.labels = labels
        self.probing = probing
        self.calls = 0
        self.found: str | None = None

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Take what the head is called with; return what it gets instead."""
        self.calls += 1
        if kwargs or len(args) != 1 or args[0].shape[:-1] != self.labels.shape:
            self.found = "the output head is not called with one state for each token"
            return None
        self.hidden = args[0]
        if not self.probing:
            one = self.hidden[:1, :1].detach()
            # Its strides would have torch copy the weight for a batched product.
            return (one.clone(memory_format=torch.contiguous_format),), {}
        with torch.no_grad():
            width = self.hidden.shape[-1]
            wave = torch.arange(1, width + 1, device=self.hidden.device).sin()
            size = F.linear(wave.to(self.hidden.dtype), self.head.weight).abs().max().item()
            levels = torch.tensor([[[SMALL], [LARGE]]], device=self.hidden.device)
            probe = (levels / max(size, 1e-3) * wave).to(self.hidden.dtype)
            self.raw = F.linear(probe, self.head.weight, self.head.bias)
        return (probe,), {}

    def problem(self) -> str | None:
        """Return why the states cannot be used, after the model has run."""
        if self.calls != 1:
            return f"the output head was called {self.calls} times in one pass instead of once"
        return self.found


def obstacle(model: nn.Module) -> str | None:
    """Return why the states before the output head do not give the loss, as far as one can see."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if not isinstance(head, nn.Module):
        return "the model has no output head that transformers knows"
    if isinstance(model, torch._dynamo.OptimizedModule) or any(
        module._compiled_call_impl is not None for module in (model, head)
    ):
        return "the output head is compiled with the model; compile the layers below it instead"
    if type(head) not in (nn.Linear, ProjectedLinear):
        return f"the output head is a {type(head).__name__}, not a plain linear layer"
    # A layer that is trained itself computes what its weight says.
    acting = [a for a in adapters_of(head) if a.active and not a.trained(head)]
    if acting:
        named = ", ".join(f"{a.spec.name} ({a.slot})" for a in acting)
        return f"the output head is adapted by {named}"
    ours = (apply_adapters, change_inputs)
    hooks = [*head._forward_hooks.values(), *head._forward_pre_hooks.values()]
    forward = vars(head).get("forward")
    is_patched = forward is not None and getattr(forward, "func", None) is not stand_in
    if is_patched or any(hook not in ours for hook in hooks):
        return "the output head has hooks, which may change what it computes"
    if head._backward_hooks or head._backward_pre_hooks:
        return "the output head has backward hooks, which would not run"
    # The others: in an estimate, and sharded (it is whole whenever it is read).
    plain = (nn.Parameter, FakeTensor, Tensor, DTensor)
    if any(type(p) not in plain for p in head.parameters(recurse=False)):
        return f"the output head's weight is a {type(head.weight).__name__}, not a plain tensor"
    return None


def behind_the_head(
    model: nn.Module, raw: Tensor, logits: Tensor
) -> tuple[float, float | None] | None:
    """Return scale and soft cap that turn ``raw`` into ``logits``; None if nothing known does.

    Args:
        model: Its config names the candidates.
        raw: (1, 2, vocabulary), of the head; small in the first row, large in the other.
        logits: What the model has made of it.
    """
    if raw.shape != logits.shape:
        return None
    configs = _configs(model)
    scales = {1.0}
    for value in _numbers(configs, SCALES):
        scales |= {value, 1 / value}
    caps: list[float | None] = [None, *_numbers(configs, SOFT_CAPS)]
    found = raw.double(), logits.double()
    errors = {(scale, cap): _error(*found, scale, cap) for scale in scales for cap in caps}
    best = min(errors, key=lambda shape: errors[shape])
    rounding = max(torch.finfo(t.dtype).eps for t in (raw, logits))
    return best if errors[best] <= 4 * rounding else None


def stated_shape(model: nn.Module) -> tuple[float, float | None]:
    """Return the scale and soft cap that the config names, for a model that cannot be probed."""
    configs = _configs(model)
    return next(_numbers(configs, SCALES), 1.0), next(_numbers(configs, SOFT_CAPS), None)


def _configs(model: nn.Module) -> list[Any]:
    config: Any = getattr(model, "config", None)
    return [config, *([config.get_text_config()] if hasattr(config, "get_text_config") else [])]


def _numbers(configs: list[Any], names: tuple[str, ...]) -> Iterator[float]:
    values = (getattr(config, name, None) for config in configs for name in names)
    return (float(v) for v in values if isinstance(v, int | float) and v > 0)


def _error(raw: Tensor, logits: Tensor, scale: float, cap: float | None) -> float:
    """The largest deviation in either row, relative to the row's largest logit."""
    expected = raw * scale
    if cap is not None:
        expected = cap * (expected / cap).tanh()
    off = (expected - logits).abs().amax(-1) / logits.abs().amax(-1).clamp(min=1e-9)
    error = off.max().item()
    return error if error == error else float("inf")  # noqa: PLR0124 - not a number
