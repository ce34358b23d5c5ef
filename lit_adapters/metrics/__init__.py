"""Scores of generated answers; each is a torchmetrics container around two pure functions."""

from lit_adapters.metrics.base import Answer, TextMetric, Value, score, score_by_task
from lit_adapters.metrics.bleu import BLEU
from lit_adapters.metrics.exact_match import ExactMatch, Score, exact_match, matches
from lit_adapters.metrics.numeric import NumericAnswer
from lit_adapters.metrics.rouge import ROUGE
from lit_adapters.metrics.slots import SlotF1
from lit_adapters.metrics.sql import SQLMatch

__all__ = [
    "Answer",
    "BLEU",
    "ExactMatch",
    "NumericAnswer",
    "ROUGE",
    "Score",
    "SlotF1",
    "SQLMatch",
    "TextMetric",
    "Value",
    "exact_match",
    "matches",
    "score",
    "score_by_task",
]
