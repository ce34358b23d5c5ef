"""Prompts to answer: whole, whatever the longest sequence of training was."""

from collections.abc import Iterator, Sequence, Set
from typing import NotRequired, TypedDict

from lit_adapters.data.batches import EvalOrder
from lit_adapters.data.examples import Example


class PromptRow(TypedDict):
    """One example of a split."""

    index: int  # in the split
    task: str
    source: NotRequired[str]  # there if there are several
    prompt: str
    prompt_ids: list[int]
    stop_ids: list[int]
    reference: str


class PromptLoader:
    """Examples of a split as batches of rows, in the order of the data.

    Args:
        examples: The split.
        ids: Their prompts as training sees them.
        order: Which examples form which batch.
        stop: Tokens that end an answer, beside EOS.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        ids: Sequence[list[int]],
        order: EvalOrder,
        stop: Sequence[int] = (),
    ) -> None:
        self.examples = examples
        self.ids = ids
        self.order = order
        self.stop = list(stop)
        self.answered: Set[int] = frozenset()
        """Indices to leave out; batches keep their number, so that they are as before."""

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[PromptRow]]:
        for batch in self.order.batches():
            yield [self._row(index) for index in batch if index not in self.answered]

    def _row(self, index: int) -> PromptRow:
        example = self.examples[index]
        row = PromptRow(
            index=index,
            task=example.task,
            prompt=example.prompt,
            prompt_ids=self.ids[index],
            stop_ids=self.stop,
            reference=example.response,
        )
        if example.source:
            row["source"] = example.source
        return row
