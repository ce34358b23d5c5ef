"""``data preview``: the first records as the model sees them, and what is trained on."""

import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby
from json import dumps
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lit_adapters.cli import AdapterCLI
from lit_adapters.data import IGNORED, SplitName, Tokens
from lit_adapters.datamodule import InstructionDataModule

TRAINED, READ, SPECIAL = "bold green", "dim", "reverse"


class PreviewCLI(AdapterCLI):
    """Takes what ``fit`` takes, and makes the data and its tokenizer alone."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what is shown and how to the options of ``fit``."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--records", type=int, default=3, help="how many records to show")
        parser.add_argument("--split", type=SplitName, default="train", help="which split to show")
        parser.add_argument("--json", type=bool, default=False, help="print one JSON object")

    def instantiate_classes(self) -> None:
        """Leave the trainer out; the model is not loaded before a trainer asks for it."""
        self.config_init = self.parser.instantiate_classes(self.config)

    def _run_subcommand(self, subcommand: str) -> None:
        settings = self.config_init[subcommand]
        data: InstructionDataModule = settings["data"]
        if data.tokenizer is None:
            data.tokenizer = settings["model"].tokenizer
        show(data, settings["split"], settings["records"], settings["json"])


def preview(words: Sequence[str]) -> None:
    """Run ``data preview`` with these options."""
    command, *options = words or ["--help"]
    if command != "preview":
        usage = "usage: python -m lit_adapters data preview --config FILE [--records N] "
        sys.exit(f"{usage}[--split NAME] [--json] [options of fit]")
    # The words are those of a command line, less the two that LightningCLI does not know.
    warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
    PreviewCLI(args=["fit", *("--json=true" if word == "--json" else word for word in options)])


def show(data: InstructionDataModule, split: SplitName, records: int, as_json: bool) -> None:
    """Print the first records of a split and the statistics of all it holds.

    Raises:
        ValueError: There is nothing to show.
    """
    if records < 1:
        raise ValueError(f"--records {records} shows nothing; give at least 1")
    tokens, tokenizer = data.tokens(split), data.tokenizer
    if not tokens or not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"there is no {split} split to show; raise val_size, or add its records")
    reports = {
        name: report
        for name, report in data.reports.items()
        if name == split or name.startswith(f"{split}/")  # several sources are evaluated apart
    }
    found = [described(tokenizer, one) for one in tokens[:records]]
    if as_json:
        said = {name: {**one.metrics(), "summary": str(one)} for name, one in reports.items()}
        statistics = said.get(split, said)
        print(
            dumps({"split": split, "statistics": statistics, "records": found}, ensure_ascii=False)
        )
        return
    console = Console(highlight=False)
    for number, record in enumerate(found, start=1):
        source = f" of {record['source']}" if record["source"] else ""
        console.rule(
            f"{split} {number}{source}: {record['tokens']} tokens, {record['trained']} trained on"
        )
        console.print(coloured(record["pieces"], tokenizer.all_special_tokens))
    console.rule()
    console.print(
        Text.assemble(
            ("trained on", TRAINED), "   ", ("read only", READ), "   ", ("special", SPECIAL)
        )
    )
    for name, report in reports.items():
        console.print(_statistics(None if name == split else name, report.metrics()))


def described(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> dict[str, Any]:
    """Return the text of an example in pieces, each trained on or not, and the counts of both."""
    trained = [label != IGNORED for label in tokens["labels"]]
    return {
        "source": tokens.get("source", ""),
        "tokens": len(trained),
        "trained": sum(trained[1:]),  # nothing predicts the first
        "pieces": list(_pieces(tokenizer, tokens["input_ids"], trained)),
    }


def _pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], trained: Sequence[bool]
) -> Iterator[dict[str, Any]]:
    text, end = "", 0
    for flag, group in groupby(trained):
        start, end = end, end + len(list(group))
        # Decoded from the beginning: alone, a piece may lose the space that it begins with.
        whole = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))
        yield {"text": whole[len(text) :], "trained": flag, "ids": list(ids[start:end])}
        text = whole


def coloured(pieces: Sequence[dict[str, Any]], special: Sequence[str]) -> Text:
    """Return the pieces as one text in colours; special tokens stand out."""
    text = Text()
    for piece in pieces:
        text.append(piece["text"], style=TRAINED if piece["trained"] else READ)
    if special:
        text.highlight_regex("|".join(map(re.escape, special)), SPECIAL)
    return text


def _statistics(title: str | None, metrics: dict[str, float]) -> Table:
    table = Table(title=title, show_header=False)
    for key, value in metrics.items():
        shown = f"{value:.1%}" if key.endswith("_share") else f"{value:,}"
        table.add_row(key.replace("_", " "), shown)
    return table
