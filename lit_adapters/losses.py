"""Token-level cross entropy, summed: whoever averages knows over what."""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

IGNORE = -100  # label of a position that is not trained


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
