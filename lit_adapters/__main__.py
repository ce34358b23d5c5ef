"""``python -m lit_adapters``: choose the half of the command line that is asked for."""

import os
import sys

OVERVIEW = """\
usage: python -m lit_adapters COMMAND [options]

train and evaluate (a LightningCLI: --config FILE, any number, later ones win; then flags)
  fit        fine-tune:  fit --config configs/alpaca_lora.yaml
  validate   loss, perplexity and token accuracy of a checkpoint on the validation split
  test       the same on the test split, and exact matches of generated answers
  predict    answer the test split into predictions.jsonl

use an adapter folder
  generate   answer a prompt, a file of prompts, or what you type
  merge      fold an adapter into its base: a stock Hugging Face model folder
  export     write it for other software: a PEFT folder or a merged model

COMMAND --help lists the options of each.
"""
TRAINING = ("fit", "validate", "test", "predict")
USING = ("generate", "merge", "export")
SWITCHES = ("--json", "--raw")


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
        from jsonargparse import auto_cli

        from lit_adapters import commands

        functions = {name: getattr(commands, name) for name in USING}
        auto_cli(functions, as_positional=False, args=_switched(words), prog="lit_adapters")
    elif command in TRAINING or command.startswith("-"):
        from lit_adapters.cli import AdapterCLI

        AdapterCLI(args=arguments)
    else:
        known = ", ".join((*TRAINING, *USING))
        sys.exit(f"error: unknown command {command!r}; expected one of: {known}")


def _switched(words: list[str]) -> list[str]:
    """Let a switch stand alone; jsonargparse wants ``true`` or ``false`` after it."""
    after = [*words[1:], ""]
    return [
        f"{word}=true" if word in SWITCHES and following not in ("true", "false") else word
        for word, following in zip(words, after, strict=True)
    ]


def console() -> None:
    """Run `main` for a person: what is wrong with the input is one line, not a traceback."""
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("LIT_ADAPTERS_TRACEBACK"):
            raise
        sys.exit(f"error: {error}\n(LIT_ADAPTERS_TRACEBACK=1 shows where it was raised)")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    console()
