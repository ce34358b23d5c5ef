"""From data in files to padded batches: formats, prompts, tokens, batches, loading."""

from lit_adapters.data.batches import Batch, EvalOrder, TrainOrder, collate, sequences
from lit_adapters.data.formats import FORMATS, Example, FormatName, Record, to_examples
from lit_adapters.data.loading import BatchLoader
from lit_adapters.data.records import SplitName, Splits, is_hub_id, read_hub, read_splits
from lit_adapters.data.splits import complete_splits, hold_out
from lit_adapters.data.templates import alpaca_prompt
from lit_adapters.data.tokens import IGNORED, LengthReport, Overlong, Tokens, tokenise

__all__ = [
    "FORMATS",
    "IGNORED",
    "Batch",
    "BatchLoader",
    "EvalOrder",
    "Example",
    "FormatName",
    "LengthReport",
    "Overlong",
    "Record",
    "SplitName",
    "Splits",
    "Tokens",
    "TrainOrder",
    "alpaca_prompt",
    "collate",
    "complete_splits",
    "hold_out",
    "is_hub_id",
    "read_hub",
    "read_splits",
    "sequences",
    "to_examples",
    "tokenise",
]
