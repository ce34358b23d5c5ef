"""Token-level cross entropy, summed: whoever averages knows over what."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100  # label of a position that is not trained


class TokenLoss(NamedTuple):
    """Sums over the trained tokens of a batch; 0-dimensional tensors."""

    nll: Tensor  # summed negative log likelihood, nats, fp32
    tokens: Tensor  # trained tokens, int64
    correct: Tensor  # trained tokens that the model ranks first, int64


def token_loss(logits: Tensor, labels: Tensor) -> TokenLoss:
    """Cross entropy of predicting token t+1 from position t, summed over trained tokens.

    Args:
        logits: (batch, time, vocabulary), any floating dtype; computed in fp32.
        labels: (batch, time) int64, aligned with the inputs; -100 is not trained.
    """
    targets = labels[:, 1:].flatten()
    trained = targets != IGNORE
    # Prompts and padding are dropped before the fp32 copy, which is the largest tensor of a step.
    scores = logits[:, :-1].flatten(0, 1)[trained].float()
    targets = targets[trained]
    nll = F.cross_entropy(scores, targets, reduction="sum")
    with torch.no_grad():
        correct = (scores.argmax(-1) == targets).sum()
    return TokenLoss(nll, trained.sum(), correct)
