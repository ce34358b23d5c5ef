"""From data in files to padded batches: formats, prompts, tokens, batches, loading."""

from lit_adapters.data.batches import Batch, EvalOrder, TrainOrder, collate, sequences
from lit_adapters.data.chat import ChatTemplate
from lit_adapters.data.corpus import Corpus
from lit_adapters.data.endings import stop_ids, stop_ids_of_tokens
from lit_adapters.data.examples import Conversation, Example, TrainOn, Turn
from lit_adapters.data.fields import Record
from lit_adapters.data.formats import FORMATS, FormatName, choose_format, why
from lit_adapters.data.loading import BatchLoader
from lit_adapters.data.prompts import PromptLoader, PromptRow
from lit_adapters.data.records import Records, SplitName, Splits, is_hub_id, read_hub, read_splits
from lit_adapters.data.sources import shares, source_names, weights_of
from lit_adapters.data.splits import complete_splits, hold_out
from lit_adapters.data.streaming import CHUNK, StreamLoader, gathered, mixed, part, stream
from lit_adapters.data.templates import Prompting, alpaca_prompt, to_examples
from lit_adapters.data.tokens import (
    IGNORED,
    LengthReport,
    Overlong,
    Tokens,
    kept_tokens,
    prompt_ids,
    tokenise,
)

__all__ = [
    "CHUNK",
    "FORMATS",
    "IGNORED",
    "Batch",
    "BatchLoader",
    "ChatTemplate",
    "Conversation",
    "Corpus",
    "EvalOrder",
    "Example",
    "FormatName",
    "LengthReport",
    "Overlong",
    "Prompting",
    "PromptLoader",
    "PromptRow",
    "Record",
    "Records",
    "SplitName",
    "Splits",
    "StreamLoader",
    "Tokens",
    "TrainOn",
    "TrainOrder",
    "Turn",
    "alpaca_prompt",
    "choose_format",
    "collate",
    "complete_splits",
    "gathered",
    "hold_out",
    "is_hub_id",
    "kept_tokens",
    "mixed",
    "part",
    "prompt_ids",
    "read_hub",
    "read_splits",
    "sequences",
    "shares",
    "source_names",
    "stop_ids",
    "stop_ids_of_tokens",
    "stream",
    "to_examples",
    "tokenise",
    "weights_of",
    "why",
]
