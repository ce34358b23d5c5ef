"""Token-level cross entropy, summed: whoever averages knows over what."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LossKind = Literal["auto", "full", "liger"]
IGNORE = -100  # label of a position that is not trained

# Bytes of one chunk of fp32 logits: about what the next chunk can take over without new memory on
# a processor; more on a GPU, which some hundred tokens keep busy.
CPU_CHUNK = 16 * 2**20
GPU_CHUNK = 256 * 2**20
FEWEST = 64  # tokens of a chunk: each reads the whole weight; 32 are half again as slow

HALF_UNIT = 1024  # keeps fp16 probabilities from vanishing before a GradScaler's factor arrives


class TokenLoss(NamedTuple):
    """Sums over the trained tokens of a batch; 0-dimensional tensors."""

    nll: Tensor  # summed negative log likelihood, nats, fp32
    tokens: Tensor  # trained tokens, int64
    correct: Tensor  # trained tokens that the model ranks first, int64; 0 if not counted


def token_loss(logits: Tensor, labels: Tensor, count_correct: bool = False) -> TokenLoss:
    """Cross entropy of predicting token t+1 from position t, summed over trained tokens.

    Args:
        logits: (batch, time, vocabulary), any floating dtype; computed in fp32.
        labels: (batch, time) int64, aligned with the inputs; -100 is not trained.
        count_correct: Whether to count the tokens ranked first.
    """
    targets = labels[:, 1:].flatten()
    trained = targets != IGNORE
    # Prompts and padding are dropped before the fp32 copy, which is the largest tensor of a step.
    scores = logits[:, :-1].flatten(0, 1)[trained].float()
    targets = targets[trained]
    nll = F.cross_entropy(scores, targets, reduction="sum")
    hits = scores.detach().argmax(-1) == targets if count_correct else targets.new_zeros(1)
    return TokenLoss(nll, trained.sum(), hits.sum())


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
    count_correct: bool = False,
) -> TokenLoss:
    """Return what `token_loss` gives for the logits ``hidden weight^T + bias``, never holding them.

    A chunk of tokens at a time is scored, summed and, where something is trained, differentiated:
    the gradients (summed over tokens) are kept instead of the logits. So the loss can be
    differentiated once, and prompts cost nothing. A weight that is not trained has no gradient
    buffer; a trained one has an fp32 buffer, whatever its dtype.

    Args:
        hidden: (batch, time, width), what the output head gets.
        weight: (vocabulary, width) of the output head.
        labels: (batch, time) int64, aligned with the inputs; -100 is not trained.
        bias: (vocabulary,) of the output head.
        softcap: Logits become ``softcap * tanh(logits / softcap)``, after the scale.
        scale: Factor of the logits.
        chunk: Tokens scored at a time; `tokens_per_chunk` of the vocabulary if null.
        count_correct: Whether to count the tokens ranked first.
    """
    states, targets = trained_positions(hidden, labels)
    device = hidden.device.type
    dtype = hidden.dtype  # in which the logits are computed
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    differentiate = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    )
    size = chunk or tokens_per_chunk(len(weight), device)
    options = (softcap, scale, size, dtype, count_correct, differentiate)
    nll, correct = _Chunked.apply(states, weight, bias, targets, *options)
    return TokenLoss(nll, targets.new_tensor(len(targets)), correct)


def liger_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> TokenLoss:
    """`chunked_loss` by liger-kernel's Triton kernels, which need a GPU; ranks nothing.

    Raises:
        ModuleNotFoundError: if liger-kernel is not installed.
    """
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "loss='liger' needs the package liger-kernel, which is not installed: pip install "
            "liger-kernel, or leave loss at 'auto', which holds no logits either"
        ) from error
    states, targets = trained_positions(hidden, labels)
    if len(targets) == 0:  # its kernels divide by the number of tokens
        return chunked_loss(hidden, weight, labels, bias, softcap, scale)
    if scale != 1.0:  # liger knows none
        states, bias = states * scale, None if bias is None else bias * scale
    fused = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE, reduction="sum", softcap=softcap)
    nll = fused(weight, states, targets, bias).float()
    return TokenLoss(nll, targets.new_tensor(len(targets)), targets.new_zeros(()))


def trained_positions(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the states (tokens, width) that predict a trained token, and those tokens."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()
    index = (targets != IGNORE).nonzero().squeeze(1)
    return hidden.flatten(0, 1).index_select(0, index), targets[index]


def tokens_per_chunk(vocabulary: int, device: str = "cpu") -> int:
    """Return how many tokens' fp32 logits fit into a chunk, at least `FEWEST`."""
    budget = CPU_CHUNK if device == "cpu" else GPU_CHUNK
    return max(FEWEST, budget // (4 * vocabulary))


class _Chunked(Function):
    """Summed loss of (tokens, width) states; its gradients are computed beside it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        scale: float,
        chunk: int,
        dtype: torch.dtype,
        count_correct: bool,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor]:
        wanted = [differentiate and need for need in ctx.needs_input_grad[:3]]
        exact = torch.promote_types(dtype, torch.float32)
        unit = HALF_UNIT if dtype == torch.float16 else 1
        kept = exact if dtype == torch.float16 else hidden.dtype
        to_hidden = torch.empty_like(hidden, dtype=kept) if wanted[0] else None
        to_weight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
        to_bias = torch.zeros_like(bias, dtype=exact) if wanted[2] and bias is not None else None
        nll = torch.empty(len(hidden), dtype=exact, device=hidden.device)
        correct = targets.new_zeros(())
        W = weight.to(dtype)  # once, not for each chunk
        b = None if bias is None else bias.to(dtype)
        # The memory of all chunks: new pages for each would cost a small model half its time.
        shape = (min(chunk, len(hidden)), len(weight))
        products = torch.empty(shape, dtype=dtype, device=hidden.device)
        exacts = products if dtype == exact else torch.empty_like(products, dtype=exact)
        bends = torch.empty_like(exacts) if softcap is not None and any(wanted) else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                x = hidden[start : start + chunk].to(dtype)
                target = targets[start : start + chunk, None]
                product, scores = products[: len(x)], exacts[: len(x)]
                bend = None if bends is None else bends[: len(x)]
                if b is None:
                    torch.mm(x, W.T, out=product)
                else:
                    torch.addmm(b, x, W.T, out=product)
                if dtype != exact:
                    scores.copy_(product)
                if scale != 1.0:
                    scores.mul_(scale)
                if softcap is not None:
                    scores.div_(softcap).tanh_()
                    if bend is not None:
                        bend.copy_(scores)
                    scores.mul_(softcap)
                if count_correct:
                    correct += (scores.argmax(-1, keepdim=True) == target).sum()
                top = scores.amax(-1, keepdim=True)
                picked = scores.gather(1, target) - top
                total = scores.sub_(top).exp_().sum(-1, keepdim=True)
                nll[start : start + chunk] = (total.log() - picked).squeeze(1)
                if not any(wanted):
                    continue
                # softmax minus one-hot, through tanh and scale
                slope = scores.div_(total)
                slope.scatter_add_(1, target, slope.new_full((), -1.0).expand(target.shape))
                if bend is not None:
                    slope.mul_(bend.square_().neg_().add_(1))
                if scale * unit != 1.0:
                    slope.mul_(scale * unit)
                if dtype != exact:
                    slope = product.copy_(slope)
                if to_hidden is not None:
                    to_hidden[start : start + chunk] = slope @ W
                if to_weight is not None and dtype == exact:
                    to_weight.addmm_(slope.T, x)
                elif to_weight is not None:
                    to_weight.add_(slope.T @ x)
                if to_bias is not None:
                    to_bias.add_(slope.sum(0, dtype=exact))
        ctx.save_for_backward(to_hidden, to_weight, to_bias)
        ctx.unit = unit
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        ctx.mark_non_differentiable(correct)
        return nll.sum(), correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_nll: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        factor = of_nll / ctx.unit
        # In place: a second copy of the weight's gradient would be the largest tensor of a step.
        gradients = [
            None if kept is None else kept.mul_(factor).to(dtype)
            for kept, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, *[None] * 7)
