"""The commands that need no trainer: `generate`, `merge`, `export`. Parameters become flags."""

import sys
from collections.abc import Iterator
from json import dumps, loads
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_adapters.base_model import load_base, load_tokenizer
from lit_adapters.data import Prompting, Record, prompt_ids, stop_ids, to_examples
from lit_adapters.export import (
    ADAPTER,
    MODEL,
    export_merged,
    export_peft,
    free_folder,
    serving_notes,
)
from lit_adapters.generation import generate as generate_answers
from lit_adapters.io import load_adapter, peft_config
from lit_adapters.prompting import choose, prompting_of
from lit_adapters.quantization import Kind

Precision = Literal["float32", "bfloat16", "float16"]


def generate(
    adapter: str | None = None,
    base: str = "tiny",
    prompt: str | None = None,
    input: str = "",  # noqa: A002 - Alpaca's name
    file: str | None = None,
    raw: bool = False,
    template: str | None = None,
    task_prompt: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    dtype: Precision = "float32",
    tokenizer: str | None = None,
    revision: str | None = None,
    json: bool = False,
    quantization: Kind | None = None,
) -> None:
    """Answer a prompt, every line of a file, or what is typed (an empty line ends).

    Args:
        adapter: Adapter folder; the bare base (or a merged model) answers if null.
        base: The model: tiny, a local folder (a merged one too) or a hub id.
        prompt: An instruction; without prompt and file, instructions are read from the terminal.
        input: Its further input, for Alpaca's template.
        file: Text file with one instruction per line, or jsonl with instruction and input.
        raw: Take prompts as they are, without a template.
        template: alpaca; chat, the tokenizer's own; none; or the path of a .jinja file. If null,
            what the adapter's folder says it was trained with, else alpaca.
        task_prompt: A description of the task, in front of the prompt; that of the training if
            null.
        max_new_tokens: Longest answer, tokens.
        temperature: Of the sampling distribution; 0 is greedy.
        dtype: Data type of the weights.
        tokenizer: Folder or hub id of the tokenizer; that of the base if null.
        revision: Branch, tag or commit of a hub model.
        json: Print one JSON object per answer.
        quantization: Load the linear layers in 4 or 8 bits.

    Raises:
        ValueError: if options contradict each other.
    """
    if file is not None and prompt is not None:
        raise ValueError("give either --prompt or --file, not both")
    if input and prompt is None:
        raise ValueError("--input belongs to --prompt; a file has its own in each line")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    given = {"template": template, "task_prompt": task_prompt}
    if raw and (template is not None or task_prompt):
        raise ValueError("--raw takes prompts as they are; leave --template and --task_prompt out")
    choose(given, None)  # a mistake is said before a model is loaded
    asked = None if prompt is None else [(prompt, input)]
    if file is not None:
        asked = list(_read_requests(Path(file)))
        if not asked:
            raise ValueError(f"--file {file} holds no instruction; write one in each line")
    model, words = _load(base, adapter, dtype, tokenizer, revision, quantization)
    how, differs = choose(given, prompting_of(model), "alpaca")
    if raw:
        how = Prompting("none")
    if differs:
        print(f"note: {differs}", file=sys.stderr)

    def reply(requests: list[tuple[str, str]]) -> None:
        examples = to_examples(list(map(_asked, requests)), "alpaca", "", how, words)
        answers = generate_answers(
            model,
            words,
            prompt_ids(examples, words),
            max_new_tokens,
            temperature,
            stop=stop_ids(examples, words),
        )
        for (text, more), answer in zip(requests, answers, strict=True):
            if json:
                row = {"instruction": text, "input": more, "answer": answer}
                print(dumps(row, ensure_ascii=False))
            else:
                print(answer)

    if asked is not None:
        reply(asked)
    else:
        for line in _typed():
            reply([(line, "")])


def merge(
    adapter: str,
    output: str,
    base: str = "tiny",
    dtype: Precision = "float32",
    tokenizer: str | None = None,
    revision: str | None = None,
    untie: bool = False,
) -> None:
    """Fold an adapter into its base and write a stock Hugging Face model folder.

    Args:
        adapter: Adapter folder.
        output: Folder to write.
        base: The model that the adapter was trained on: tiny, a local folder or a hub id.
        dtype: Data type of the stored weights; the merge itself is computed in fp32.
        tokenizer: Folder or hub id of the tokenizer; that of the base if null.
        revision: Branch, tag or commit of a hub model.
        untie: Give a tied layer that is adapted at one end a weight of its own.
    """
    free_folder(output, ADAPTER)  # a mistake is said before a model is loaded
    model, words = _load(base, adapter, "float32", tokenizer, revision)
    folder = export_merged(model, output, words, getattr(torch, dtype), untie)
    Console().print(f"merged model ({dtype}) written to {folder}")


def export(
    adapter: str,
    output: str,
    base: str = "tiny",
    format: Literal["peft", "hf"] = "peft",  # noqa: A002 - the flag users expect
    dtype: Precision = "float32",
    tokenizer: str | None = None,
    revision: str | None = None,
    untie: bool = False,
) -> None:
    """Write an adapter for other software: a PEFT folder, or a merged Hugging Face model.

    Args:
        adapter: Adapter folder.
        output: Folder to write.
        base: The model that the adapter was trained on: tiny, a local folder or a hub id.
        format: peft is an adapter for PEFT, vLLM and others; hf is a merged model.
        dtype: Data type of a merged model's weights; adapters are fp32.
        tokenizer: Folder or hub id of the tokenizer; that of the base if null.
        revision: Branch, tag or commit of a hub model.
        untie: For a merged model: give a tied layer that is adapted at one end its own weight.
    """
    if format == "hf":
        merge(adapter, output, base, dtype, tokenizer, revision, untie)
        return
    free_folder(output, MODEL)
    model, words = _load(base, adapter, "float32", tokenizer, revision)
    folder = export_peft(model, output, words)
    Console().print(f"PEFT adapter written to {folder}")
    for note in serving_notes(peft_config(model)):
        Console().print(f"note: {note}", markup=False)


def _load(
    base: str,
    adapter: str | None,
    dtype: Precision,
    tokenizer: str | None,
    revision: str | None,
    quantization: Kind | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = load_base(base, getattr(torch, dtype), revision, quantization=quantization)
    words = load_tokenizer(tokenizer) if tokenizer else load_tokenizer(base, revision)
    if adapter is not None:
        load_adapter(model, adapter, tokenizer=words)
    if torch.cuda.is_available():
        torch.nn.Module.to(model, "cuda")
    return model.eval(), words


def _asked(request: tuple[str, str]) -> Record:
    """Return the record of training with this prompt; its answer plays no role."""
    return {"instruction": request[0], "input": request[1], "output": "answer"}


def _read_requests(file: Path) -> Iterator[tuple[str, str]]:
    try:
        text = file.read_text(encoding="utf-8-sig")  # with or without Windows' mark
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--file {file} cannot be read: {error}; expected text in UTF-8 with one instruction "
            "per line, or a .jsonl file"
        ) from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        if file.suffix != ".jsonl":
            yield line, ""
            continue
        try:
            record = loads(line)
            instruction, more = record["instruction"], record.get("input") or ""
            if not isinstance(instruction, str) or not isinstance(more, str):
                raise TypeError("no text")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{file}, line {number}: expected a JSON object with the texts 'instruction' and, "
                f"perhaps, 'input', got {line[:80]}"
            ) from error
        yield instruction, more


def _typed() -> Iterator[str]:
    """Lines from the terminal, until an empty one, or from a pipe, empty ones left out."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    while True:
        print("instruction (empty to end)> ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line
