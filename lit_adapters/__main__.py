"""``python -m lit_adapters``: choose the half of the command line that is asked for."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lit_adapters.suggestions import ClearErrors, clearer

OVERVIEW = """\
usage: python -m lit_adapters COMMAND [options]

train and evaluate (a LightningCLI: --config FILE, any number, later ones win; then flags)
  fit        fine-tune:  fit --config configs/alpaca_lora.yaml
  validate   loss, perplexity and token accuracy of a checkpoint on the validation split
  test       the same on the test split, and exact matches of generated answers
  predict    answer the test split into predictions.jsonl

look before a fit
  estimate   its memory, part by part, and that of alternatives, without weights or data
  check      a fit on many devices, without them: --devices 8 --num_nodes 2 --strategy fsdp2;
             what would be refused, what each device would hold, batches and steps
  data       data preview --config FILE: the first records as the model sees them, what is
             trained on in colour, and their lengths; --records N, --split NAME, --json

use an adapter folder
  generate   answer a prompt, a file of prompts, or what you type
  merge      fold an adapter into its base: a stock Hugging Face model folder
  export     write it for other software: a PEFT folder or a merged model

COMMAND --help lists the options of each.

Ctrl-C or SIGTERM ends a fit after the step it is in and writes last.ckpt; to go on, repeat the
command with --ckpt_path FILE. A second Ctrl-C ends it at once.
Exit status: 0 done, 1 error, 2 wrong usage, 130 Ctrl-C (SIGINT), 143 SIGTERM.
"""
ESTIMATE, CHECK, PREVIEW = "estimate", "check", "data"
TRAINING = ("fit", "validate", "test", "predict")
USING = ("generate", "merge", "export")
SWITCHES = ("--json", "--raw", "--untie")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; heavy libraries are imported only by the command that needs them."""
    words = sys.argv[1:] if arguments is None else arguments
    command = next(iter(words), "--help")
    if command in ("-h", "--help"):
        print(OVERVIEW, end="")
    elif command == "--version":
        from lit_adapters.version import __version__

        print(__version__)
    elif command in USING:
        with importing():
            from jsonargparse import ArgumentParser, auto_cli

            from lit_adapters import commands

        class Parser(ClearErrors, ArgumentParser):
            pass

        functions = {name: getattr(commands, name) for name in USING}
        auto_cli(
            functions,
            as_positional=False,
            args=_switched(words),
            prog="lit_adapters",
            parser_class=Parser,
        )
    elif command == PREVIEW:
        with importing():
            from lit_adapters.preview import preview

        preview(words[1:])
    elif command == ESTIMATE:
        with importing():
            from lit_adapters.estimate.command import EstimateCLI

        EstimateCLI(_switched(words)[1:])
    elif command == CHECK:
        with importing():
            from lit_adapters.check.command import CheckCLI

        CheckCLI(_switched(words)[1:])
    elif command in TRAINING or command.startswith("-"):
        with importing():
            from lit_adapters.cli import AdapterCLI

        AdapterCLI(args=arguments)
    else:
        known = ", ".join((*TRAINING, ESTIMATE, CHECK, PREVIEW, *USING))
        sys.exit(f"error: unknown command {command!r}; expected one of: {known}")


@contextmanager
def importing() -> Iterator[None]:
    """Import without looking for garbage: that is a fifth of the time until the first step.

    What was imported is not looked at later either; it stays as long as the process. Not so where
    torch was there before: garbage of earlier runs would stay as well.
    """
    was_on, is_first = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.freeze()
        if was_on:
            gc.enable()


def _switched(words: list[str]) -> list[str]:
    """Let a switch stand alone; jsonargparse wants ``true`` or ``false`` after it."""
    after = [*words[1:], ""]
    return [
        f"{word}=true" if word in SWITCHES and following not in ("true", "false") else word
        for word, following in zip(words, after, strict=True)
    ]


def console() -> None:
    """Run `main` for a person: what is wrong with the input is one line, not a traceback.

    The exit status is that of the overview.
    """
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)  # process 1 of a container has no default
    try:
        main()
    except Exception as error:
        if os.environ.get("LIT_ADAPTERS_TRACEBACK") or not _is_of_input(error):
            raise
        where = "(LIT_ADAPTERS_TRACEBACK=1 shows where it was raised)"
        sys.exit(f"error: {clearer(str(error), ())}\n{where}")
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as stopped:
        if isinstance(stopped.__context__, KeyboardInterrupt):  # Lightning makes it status 1
            sys.exit(130)
        raise


def _is_of_input(error: Exception) -> bool:
    """Whether an error says what is wrong with what was asked for, or with what is installed."""
    kinds = (ValueError, TypeError, OSError, RuntimeError, ImportError)
    # Lightning's, which is a plain Exception; most commands do not import it.
    return isinstance(error, kinds) or type(error).__name__ == "MisconfigurationException"


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    console()
