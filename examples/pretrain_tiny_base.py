"""Pretrain the ``tiny`` base model from scratch on two CPU cores.

The model is a Llama of about 1.4 million parameters with its own byte-level tokenizer. It reads two
kinds of text that any machine with the dependencies installed already has:

* prose from the docstrings of the Python standard library and of permissively licensed packages,
  found by parsing source files (nothing is imported or run), and
* text from the world of the tiny tasks without any answers, see ``make_tiny_tasks.py``.

A fifth of the blocks are random tokens that repeat: finding something in the context and writing
it down again is what small models learn last and adapters need most.

    python examples/pretrain_tiny_base.py --out lit_adapters/assets/tiny

The result is a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import itertools
import json
import math
import random
import re
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from make_tiny_tasks import DEFAULT_SEED, unlabelled_text
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DEFAULT_OUT: Final = Path(__file__).resolve().parent.parent / "lit_adapters" / "assets" / "tiny"

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
CONTEXT: Final = 512  # positions of the model
BLOCK: Final = 192  # tokens in a training sequence
VOCABULARY: Final = 2048

# Packages whose licences (BSD, MIT, Apache 2.0 and the like) allow their documentation to be used.
PACKAGES: Final = (
    *("torch", "numpy", "pandas", "sympy", "networkx", "transformers", "datasets", "peft"),
    *("accelerate", "huggingface_hub", "tokenizers", "lightning", "torchmetrics", "rich", "click"),
    *("jinja2", "pydantic", "setuptools", "fsspec", "aiohttp", "pygments", "werkzeug", "markdown"),
    *("typer", "jsonargparse", "pytest", "packaging"),
)

# A word takes the space before it along; digits stand alone so that sums can be done by column.
_PIECES: Final = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_CHAT_TEMPLATE: Final = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}"
    "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '### Response:\\n' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{{ '\\n\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)

_FRAME_WITH_INPUT: Final = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"
)
_FRAME: Final = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n{output}"
)


# --------------------------------------------------------------------------------------------------
# Prose from source files.


@dataclass(frozen=True)
class Source:
    """Where prose was taken from.

    Attributes:
        name: Name of the package.
        version: Installed version.
        licence: Licence as declared by the package.
        folder: Folder of its source files.
    """

    name: str
    version: str
    licence: str
    folder: Path


def _declared_licence(package: str) -> tuple[str, str]:
    """Return the version and the licence that an installed package declares."""
    metadata = importlib.metadata.metadata(package)
    classifiers = [
        line.rsplit(" :: ", 1)[-1]
        for line in metadata.get_all("Classifier") or []
        if line.startswith("License ::")
    ]
    free_text = metadata.get("License") or ""
    declared = metadata.get("License-Expression") or ", ".join(classifiers)
    # Some packages put the whole text of the licence in this field; its first line is the name.
    declared = declared or free_text.strip().partition("\n")[0]
    return metadata["Version"], declared or "see package"


def find_sources(packages: Iterable[str] = PACKAGES) -> list[Source]:
    """Find the standard library and those of the packages that are installed.

    Args:
        packages: Names of packages.

    Returns:
        The sources in a fixed order.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    version = f"{sysconfig.get_python_version()}"
    sources = [Source("Python standard library", version, "PSF-2.0", stdlib)]
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        folder = Path(next(iter(spec.submodule_search_locations)))
        sources.append(Source(package, *_declared_licence(package), folder))
    return sources


def _skipped(path: Path, folder: Path) -> bool:
    """Tell whether a file holds other people's code, tests or nothing to read."""
    parts = set(path.relative_to(folder).parts[:-1])
    return bool(parts & {"site-packages", "test", "tests", "_vendor", "idlelib", "__pycache__"})


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings and other long strings of one source file.

    Args:
        path: A Python file.

    Yields:
        One string at a time.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in ast.walk(tree):
        # Documentation does not always stand where docstrings do, so any long string may be some.
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 80:
            yield node.value


_ROLE: Final = re.compile(r":[a-z:]+:`~?([^`<]*)[^`]*`")
_PLAIN_WORD: Final = re.compile(r"^[\"'(]?[A-Za-z]+(?:['-][A-Za-z]+)*[\"')]?[.,;:!?]?[\"')]?$")
_SENTENCE_END: Final = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_CODE_MARK: Final = re.compile(r"[=<>{}\[\]|\\_#@$%^~]|::|\(\)|->|\.\.|^[-*.:>+]|https?:|\d\.\d")


def _is_prose(sentence: str) -> bool:
    """Tell whether a sentence reads like English rather than like code or a table."""
    words = sentence.split()
    if not 5 <= len(words) <= 45 or not sentence[0].isupper() or sentence[-1] not in ".!?":
        return False
    if _CODE_MARK.search(sentence):
        return False
    plain = sum(bool(_PLAIN_WORD.match(word)) for word in words)
    humps = sum(word[1:] != word[1:].lower() for word in words)
    return plain >= 0.9 * len(words) and humps <= 1


def prose(text: str) -> Iterator[str]:
    """Yield runs of neighbouring prose sentences, a paragraph at a time.

    Args:
        text: A docstring.

    Yields:
        Paragraphs of plain English on one line each.
    """
    for block in re.split(r"\n\s*\n", text):
        line = " ".join(_ROLE.sub(r"\1", block).replace("`", "").split())
        kept = [sentence for sentence in _SENTENCE_END.split(line) if _is_prose(sentence or "x")]
        if kept:
            yield " ".join(kept)


def gather_prose(sources: Sequence[Source], progress: Progress) -> dict[str, list[str]]:
    """Collect the prose of all sources, leaving out sentences that were seen before.

    Args:
        sources: Where to look.
        progress: Display to report to.

    Returns:
        The paragraphs of each source by its name.
    """
    seen: set[str] = set()
    gathered: dict[str, list[str]] = {}
    for source in progress.track(sources, description="Reading docs"):
        paragraphs: list[str] = []
        for path in sorted(source.folder.rglob("*.py")):
            if _skipped(path, source.folder):
                continue
            for paragraph in itertools.chain.from_iterable(map(prose, docstrings(path))):
                fresh = [part for part in _SENTENCE_END.split(paragraph) if part not in seen]
                seen.update(fresh)
                if fresh:
                    paragraphs.append(" ".join(fresh))
        gathered[source.name] = paragraphs
    return gathered


# --------------------------------------------------------------------------------------------------
# The mixture.


def _unrelated_frames(rng: random.Random, sentences: Sequence[str], count: int) -> list[str]:
    """Return prompt frames around sentences that have nothing to do with each other.

    They show what the frame looks like. Half of them ask to repeat the input, which teaches that
    a response draws on the input and keeps clear of the tasks.
    """
    frames: list[str] = []
    for _ in range(count):
        first, second, third = (rng.choice(sentences) for _ in range(3))
        if rng.random() < 0.5:
            order = rng.choice(("Repeat the text.", "Copy the input.", "Say this again."))
            frames.append(_FRAME_WITH_INPUT.format(instruction=order, input=first, output=first))
        elif rng.random() < 0.5:
            frames.append(_FRAME_WITH_INPUT.format(instruction=first, input=second, output=third))
        else:
            frames.append(_FRAME.format(instruction=first, output=second))
    return frames


def _first_sentence(paragraph: str) -> str:
    """Return the first sentence of a paragraph."""
    return _SENTENCE_END.split(paragraph)[0]


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and to judge by.

    Attributes:
        mixture: Prose and generated text, shuffled.
        held_out: Documents of the same kinds that are not trained on.
    """

    mixture: list[str]
    held_out: list[str]


def build_corpus(
    paragraphs: Sequence[str], seed: int, characters: int, world_share: float
) -> Corpus:
    """Mix prose with text from the world of the tasks.

    Args:
        paragraphs: Prose; it is repeated when there is not enough of it.
        seed: Seed of the mixture.
        characters: Length of the mixture.
        world_share: Share of the characters that comes from the world of the tasks.

    Returns:
        The corpus.
    """
    rng = random.Random(f"{seed} corpus")
    shuffled = list(paragraphs)
    rng.shuffle(shuffled)
    split = max(1, len(shuffled) // 50)
    held_out, kept = shuffled[:split], shuffled[split:]
    documents = list(_take(itertools.cycle(kept), round(characters * (1 - world_share))))
    held_prose = list(_take(iter(held_out), 150_000))

    world = unlabelled_text(seed, copying=True)
    held_length = sum(map(len, held_prose)) * world_share / (1 - world_share)
    held_world = list(_take(world, round(held_length)))
    forbidden = set(held_world)
    fresh = (document for document in world if document not in forbidden)
    documents += _take(fresh, round(0.97 * characters * world_share))

    sentences = [_first_sentence(paragraph) for paragraph in kept]
    documents += _unrelated_frames(rng, sentences, round(0.03 * characters * world_share / 400))
    rng.shuffle(documents)
    return Corpus(documents, held_prose + held_world)


def _take(documents: Iterator[str], characters: int) -> Iterator[str]:
    """Yield documents until they add up to a number of characters."""
    length = 0
    for document in documents:
        if length >= characters:
            return
        length += len(document)
        yield document


# --------------------------------------------------------------------------------------------------
# The tokenizer.


def train_tokenizer(documents: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can write down any text exactly.

    Args:
        documents: Text to learn pieces from.
        vocabulary: Number of pieces, with the 256 bytes and three special ones.

    Returns:
        A tokenizer that puts BOS in front and no EOS at the end.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        chat_template=_CHAT_TEMPLATE,
    )


def pack(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], length: int) -> torch.Tensor:
    """Put documents one after the other, each between BOS and EOS, and cut them into blocks.

    Args:
        tokenizer: The tokenizer.
        documents: Text.
        length: Tokens in a block.

    Returns:
        Token ids, one block a row. A last incomplete block is dropped.
    """
    backend = tokenizer.backend_tokenizer
    end = int(backend.token_to_id(EOS))
    ids: list[int] = []
    for start in range(0, len(documents), 10_000):
        for encoding in backend.encode_batch(list(documents[start : start + 10_000])):
            ids.extend(encoding.ids)
            ids.append(end)
    blocks = len(ids) // length
    return torch.tensor(ids[: blocks * length], dtype=torch.int16).view(blocks, length)


def repeat_random_tokens(blocks: torch.Tensor, seed: int, count: int) -> torch.Tensor:
    """Return blocks each of which repeats a short run of random tokens.

    Nothing in such a block can be predicted but by copying. Text alone, even text that repeats
    names, did not bring a model of this size to copy within millions of tokens; this does.

    Args:
        blocks: Blocks of text, from which the tokens are drawn.
        seed: Seed of the draw.
        count: Number of blocks to return.

    Returns:
        Token ids (count, length of a block).
    """
    generator = torch.Generator().manual_seed(seed)
    tokens, length = blocks.flatten(), blocks.shape[1]
    repeated = torch.empty(count, length, dtype=blocks.dtype)
    for row in repeated:
        period = int(torch.randint(6, 40, (1,), generator=generator))
        run = tokens[torch.randint(len(tokens), (period,), generator=generator)]
        row.copy_(run.repeat(length // period + 1)[:length])
    return repeated


# --------------------------------------------------------------------------------------------------
# The model.


def build_model(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """Return a new model with random weights.

    Args:
        vocabulary: Number of pieces of the tokenizer.
        seed: Seed of the weights.

    Returns:
        The model in float32.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def next_token_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of predicting each token from those before it."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, blocks: torch.Tensor, batch: int) -> float:
    """Return the mean loss over held-out blocks in nats per token."""
    model.eval()
    total = sum(
        next_token_loss(model, part.long()).item() * len(part) for part in blocks.split(batch)
    )
    model.train()
    return total / len(blocks)


def unigram_loss(train: torch.Tensor, held_out: torch.Tensor, vocabulary: int) -> float:
    """Return the held-out loss of always predicting the token frequencies of the training text."""
    counts = torch.bincount(train.flatten().long(), minlength=vocabulary).double() + 1.0
    log_probabilities = (counts / counts.sum()).log()
    return -log_probabilities[held_out[:, 1:].flatten().long()].mean().item()


def learning_rate(progress: float, peak: float, warmup: float = 0.03) -> float:
    """Return the learning rate after a share of the training: a short rise, then a cosine.

    Args:
        progress: Share of the training that is over, from 0 to 1.
        peak: Highest learning rate.
        warmup: Share of the training spent rising.

    Returns:
        The learning rate.
    """
    if progress < warmup:
        return peak * max(progress, 1e-3) / warmup
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, (progress - warmup) / (1.0 - warmup))))
    return peak * (0.03 + 0.97 * cosine)


def make_optimizer(model: LlamaForCausalLM, peak: float) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)


@dataclass(frozen=True)
class Outcome:
    """What the training took.

    Attributes:
        steps: Optimizer steps.
        seconds: Wall time.
    """

    steps: int
    seconds: float


def train(
    model: LlamaForCausalLM, blocks: torch.Tensor, options: argparse.Namespace, progress: Progress
) -> Outcome:
    """Train until the steps are done or the time is up, whichever comes first.

    Args:
        model: The model; changed in place.
        blocks: Training blocks, one a row.
        options: The command line.
        progress: Display to report to.

    Returns:
        What it took.
    """
    optimizer = make_optimizer(model, options.peak_lr)
    loss_of = torch.compile(next_token_loss) if options.compile else next_token_loss
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(options.seed))
    task = progress.add_task("Training", total=1.0)
    started, step, recent = time.monotonic(), 0, 0.0
    while True:
        elapsed = time.monotonic() - started
        done = max(step / options.steps, elapsed / (60.0 * options.minutes))
        progress.update(task, completed=done, description=f"Step {step}: {recent:.3f}")
        if step % 100 == 0:
            progress.console.log(f"step {step} loss {recent:.3f} {elapsed:.0f} s")
        if done >= 1.0:
            return Outcome(step, elapsed)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, options.peak_lr)
        rows = torch.arange(step * options.batch, (step + 1) * options.batch) % len(order)
        loss = loss_of(model, blocks[order[rows]].long())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        recent = loss.item() if step == 1 else 0.95 * recent + 0.05 * loss.item()


# --------------------------------------------------------------------------------------------------
# What is written.

_SAMPLE_PROMPTS: Final = ("The function returns", "If you want to", "There is a restaurant called")


@torch.no_grad()
def write_samples(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int
) -> list[str]:
    """Let the model carry on a few texts.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        seed: Seed of the sampling.

    Returns:
        The beginnings with what the model wrote.
    """
    torch.manual_seed(seed)
    model.eval()
    samples: list[str] = []
    for prompt in _SAMPLE_PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(
            **inputs, max_new_tokens=60, do_sample=True, temperature=0.7, top_k=40
        )
        samples.append(str(tokenizer.decode(output[0], skip_special_tokens=True)))
    return samples


def model_card(
    facts: dict[str, str], sources: Sequence[Source], sizes: dict[str, int], samples: Sequence[str]
) -> str:
    """Return the text of the model card.

    Args:
        facts: Numbers by their description.
        sources: Where the prose is from.
        sizes: Characters of prose by the name of the source.
        samples: Text that the model wrote.

    Returns:
        Markdown.
    """
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    used = [source for source in sources if sizes[source.name]]
    origins = "\n".join(
        f"| {source.name} {source.version} | {source.licence} | {sizes[source.name]:,} |"
        for source in used
    )
    written = "\n\n".join("> " + sample.replace("\n", "\n> ") for sample in samples)
    return f"""---
language: en
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# tiny

A Llama small enough to be pretrained, fine-tuned and tested on a laptop without a network. It
writes simple English and copies names from its context well, but knows next to nothing. It exists
to show what an adapter adds: it scores about zero on the tasks in `../tasks` until it is
fine-tuned on them.

## Numbers

| | |
| --- | --- |
{rows}

## Tokenizer

Byte-level BPE: any text survives encoding and decoding unchanged. Digits are separate pieces. BOS
is added in front by default, EOS is not added. Padding, BOS and EOS are three different tokens. The
chat template writes user turns as `### Instruction:` and assistant turns as `### Response:`, the
same marks as the Alpaca prompt.

## Data

Prose sentences from docstrings and documentation strings, exact repeats removed:

| Source | Licence | Characters |
| --- | --- | ---: |
{origins}

The rest is generated by `unlabelled_text` in `examples/make_tiny_tasks.py`: sentences, meaning
representations, queries, sums, table definitions and lists of names from the world of the tasks. No
input occurs together with its answer, and no combination that the validation or test split holds
out occurs at all. A small part shows the Alpaca prompt around unrelated or repeated sentences.

## Samples

Sampled with temperature 0.7 and top-k 40; the first words of each are the prompt.

{written}

## Limits

The model is a test article. It has no knowledge of the world and was not aligned; do not use what
it writes for anything but demonstrations and tests.

## Make it again

    python examples/pretrain_tiny_base.py

The numbers depend on the versions of the installed packages, since their documentation is the data.
Runs that are stopped by the clock rather than after a number of steps differ as well.
"""


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, card: str, out: Path) -> None:
    """Write the model in bfloat16, its tokenizer and its card.

    Args:
        model: The model; converted in place.
        tokenizer: Its tokenizer.
        card: Text of the model card.
        out: Folder to write to; it is created when missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    # Loaders prefer the template in the configuration when they look at a single file.
    settings_path = out / "tokenizer_config.json"
    settings = json.loads(settings_path.read_text(encoding="utf-8"))
    settings["chat_template"] = _CHAT_TEMPLATE
    # The name that every version of the library knows.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings_path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (out / "chat_template.jinja").unlink(missing_ok=True)
    (out / "README.md").write_text(card, encoding="utf-8")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Pretrain the tiny base model.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--steps", type=int, default=3689)
    parser.add_argument("--minutes", type=float, default=120.0, help="stop then at the latest")
    parser.add_argument("--tokens", type=int, default=11_000_000, help="size of the text")
    parser.add_argument("--batch", type=int, default=16, help=f"blocks of {BLOCK} tokens")
    parser.add_argument("--peak-lr", type=float, default=4e-3)
    parser.add_argument("--world-share", type=float, default=0.6, help="share of generated text")
    parser.add_argument("--repeat-share", type=float, default=0.2, help="share of repeated noise")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Gather text, train the tokenizer and the model, and write both.

    Args:
        arguments: Command line, without the name of the program.
    """
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        sources = find_sources()
        gathered = gather_prose(sources, progress)
        sizes = {name: sum(map(len, paragraphs)) for name, paragraphs in gathered.items()}
        paragraphs = [text for texts in gathered.values() for text in texts]
        # A token is a little under three characters.
        characters = round(2.9 * options.tokens)
        corpus = build_corpus(paragraphs, options.seed, characters, options.world_share)
        tokenizer = train_tokenizer(corpus.mixture[:40_000], options.vocabulary)
        text = pack(tokenizer, corpus.mixture, BLOCK)
        held_out = pack(tokenizer, corpus.held_out, BLOCK)
        console.log(f"{text.numel():,} tokens of text, {held_out.numel():,} held out")
        count = round(len(text) * options.repeat_share / (1 - options.repeat_share))
        repeated = repeat_random_tokens(text, options.seed, count)
        model = build_model(options.vocabulary, options.seed)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        outcome = train(model, torch.cat([text, repeated]), options, progress)
    loss = evaluate(model, held_out, options.batch)
    baseline = unigram_loss(text, held_out, options.vocabulary)
    facts = {
        "Parameters": f"{parameters:,}, embeddings tied, stored in bfloat16",
        "Vocabulary": f"{options.vocabulary:,} pieces",
        "Context": f"{CONTEXT} tokens, trained on {BLOCK}",
        "Tokens read": f"{outcome.steps * options.batch * BLOCK:,}",
        "Steps": f"{outcome.steps:,} of {options.batch * BLOCK:,} tokens",
        "Held-out loss": f"{loss:.3f} nats per token",
        "Loss on repeated noise": (
            f"{evaluate(model, repeat_random_tokens(held_out, 1, 64), options.batch):.3f} nats"
        ),
        "Unigram baseline": f"{baseline:.3f} nats per token",
        "Training time": f"{outcome.seconds / 60:.1f} minutes",
        "Hardware": f"{options.threads} CPU cores",
        "Seed": str(options.seed),
    }
    for name, value in facts.items():
        console.print(f"{name}: {value}")
    samples = write_samples(model, tokenizer, options.seed)
    for sample in samples:
        console.print(sample, markup=False)
    save(model, tokenizer, model_card(facts, sources, sizes, samples), options.out)
    console.print(f"Written to {options.out}")


if __name__ == "__main__":
    main()
