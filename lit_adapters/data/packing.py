"""Batches of at most, or of nearly, so many tokens, in a number that is known beforehand."""

import bisect
import heapq
from collections.abc import Sequence

Batches = list[list[int]]


def fill(indices: Sequence[int], lengths: Sequence[int], tokens: int, packed: bool) -> Batches:
    """Distribute examples over few batches of at most ``tokens`` tokens each.

    Packed, by best fit, longest first: each example goes where it leaves the least room. Padded,
    examples of similar length stay together. Equally long examples keep the order they come in.

    Args:
        indices: Which examples.
        lengths: Tokens of each example of the whole; none above ``tokens``.
        tokens: Most tokens of a batch, padding included if there is any.
        packed: Whether sequences are concatenated instead of padded to the longest.
    """
    ordered = sorted(indices, key=lambda index: -lengths[index])
    if not packed:
        return in_a_row(ordered, lengths, tokens, packed)
    batches: Batches = []
    room: list[tuple[int, int]] = []  # what is left in a batch, and which, in ascending order
    for index in ordered:
        place = bisect.bisect_left(room, (lengths[index], -1))
        if place == len(room):
            batches.append([])
            left, batch = tokens, len(batches) - 1
        else:
            left, batch = room.pop(place)
        batches[batch].append(index)
        bisect.insort(room, (left - lengths[index], batch))
    return batches


def in_a_row(indices: Sequence[int], lengths: Sequence[int], tokens: int, packed: bool) -> Batches:
    """Cut ``indices`` into batches of at most ``tokens`` tokens, order kept."""
    batches: Batches = []
    total = longest = 0
    for index in indices:
        total, longest = total + lengths[index], max(longest, lengths[index])
        size = total if packed else longest * (len(batches[-1]) + 1 if batches else 1)
        if not batches or size > tokens:
            batches.append([])
            total = longest = lengths[index]
        batches[-1].append(index)
    return batches


def evenly(indices: Sequence[int], lengths: Sequence[int], sizes: Sequence[int]) -> Batches:
    """Distribute examples over batches of given sizes that hold nearly the same number of tokens.

    Longest first, each goes to the batch of fewest tokens that has room.

    Args:
        indices: Which examples.
        lengths: Tokens of each example of the whole.
        sizes: Examples of each batch; as many as ``indices`` together.
    """
    batches: Batches = [[] for _ in sizes]
    lightest = [(0, number) for number, size in enumerate(sizes) if size]
    for index in sorted(indices, key=lambda index: -lengths[index]):
        tokens, number = heapq.heappop(lightest)
        batches[number].append(index)
        if len(batches[number]) < sizes[number]:
            heapq.heappush(lightest, (tokens + lengths[index], number))
    return batches


def exactly(count: int, batches: Batches) -> Batches:
    """Split the batches of most examples, or leave some out, until there are ``count``.

    Args:
        count: At most the number of examples.
        batches: None of them empty.
    """
    batches = list(batches)
    if len(batches) >= count:
        return batches[:count]
    # Those with most examples last; a half goes back to where it belongs among the others.
    batches.sort(key=len)
    while len(batches) < count:
        whole = batches.pop()
        for half in (whole[::2], whole[1::2]):
            bisect.insort(batches, half, key=len)
    return batches
