"""Tokens that end an answer beside EOS: those that a chat template ends turns with."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
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
        special, known = _added(tokenizer(end, add_special_tokens=False)["input_ids"], added)
        stops.update(special[:1] or known[-1:])
    return sorted(stops - {tokenizer.eos_token_id})


def stop_ids_of_tokens(answers: Sequence[Sequence[int]], tokenizer: Any) -> list[int]:
    """Return the same of answers whose tokens alone are known, each up to its trained end.

    Where none is special, an answer may have been cut: then it is a token that ends all of them.
    """
    added, unknown = tokenizer.added_tokens_decoder, tokenizer.unk_token_id

    def closes(token: int) -> bool:
        return token in added and token != unknown or tokenizer.decode([token]).isspace()

    tails = [list(takewhile(closes, reversed(ids)))[::-1] for ids in answers]
    found = [_added(tail, added) for tail in tails]
    stops = {special[0] for special, _ in found if special}
    last = {tuple(known[-1:]) for _, known in found}
    if not stops and len(last) == 1:
        stops.update(*last)
    return sorted(stops - {tokenizer.eos_token_id})


def _added(ids: Sequence[int], added: Mapping[int, Any]) -> tuple[list[int], list[int]]:
    """Return which tokens are special, and which were added to the vocabulary at all."""
    known = [token for token in ids if token in added]
    return [token for token in known if added[token].special], known
