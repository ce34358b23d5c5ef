"""Tokens that end an answer beside EOS: those that a chat template ends turns with."""

from collections.abc import Sequence
from typing import Any

from lit_adapters.data.examples import Example


def stop_ids(examples: Sequence[Example], tokenizer: Any) -> list[int]:
    """Return what else than EOS generation must stop at, as ``<end_of_turn>`` of Gemma.

    Of what a template writes behind an answer, that is the first special token: what an answer
    itself may end with, such as a closing tag of a tool call, is an added token, but no special
    one. Where none is special, it is the last added one, such as a token that an adapter teaches.
    """
    ends = dict.fromkeys(example.end for example in examples if example.end)
    added = tokenizer.added_tokens_decoder if ends else {}
    stops = set()
    for end in ends:
        ids = tokenizer(end, add_special_tokens=False)["input_ids"]
        known = [token for token in ids if token in added]
        special = [token for token in known if added[token].special]
        stops.update(special[:1] or known[-1:])
    return sorted(stops - {tokenizer.eos_token_id})
