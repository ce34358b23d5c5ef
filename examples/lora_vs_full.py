"""LoRA against full fine-tuning, after Anyscale's study of Llama 2 (2023), at the embedded size.

python examples/lora_vs_full.py [--seeds 1 2 3] [--steps 240] [--processes 2] [--json FILE]

Every run trains the embedded base on the embedded data, all three tasks together, and answers the
held-out records. The study's questions, each a group of runs:

* method: where does LoRA match full fine-tuning? Ranks 1 to 64 on all linear layers or on attention
* rate: how sensitive are both to the learning rate?
* prompt: what does a description of the task in front of each question buy?
* tokens: what do new special tokens around question and answer do, frozen or trained?
* memory: which batch fits a given memory, and how many tokens per second does it give?

Seconds are the processor's, so other work on the machine counts little.

Finished runs are kept in ``--out``, so a broken-off study goes on where it stopped; with
``--finished`` it is shown as far as it came. The plot needs matplotlib:
``pip install -e '.[plot]'``.
"""

import argparse
import hashlib
import json
import logging
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.progress import Progress

RANKS = (1, 4, 8, 16, 64)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
STABLE = {"full": 1e-3, "all": 5e-3, "attention": 5e-3}  # as in configs/alpaca_{full,lora}.yaml
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the stable rate
MARKS = ("<question>", "</question>", "<answer>")
TASKS = ("representation", "sql", "arithmetic")


@dataclass(frozen=True)
class Setting:
    """One line of a table: what is trained, and how it is asked."""

    trained: str  # full; all linear layers; attention only
    rank: int = 0
    factor: float = 1.0
    prompt: bool = True
    tokens: str = "none"  # none; frozen; trained

    def __str__(self) -> str:
        places = {"all": "all linear", "attention": "attention"}
        return f"LoRA r{self.rank}, {places[self.trained]}" if self.rank else "full"


FULL, LORA = Setting("full"), Setting("all", 8)
BOTH = (FULL, LORA)
GROUPS: dict[str, list[Setting]] = {
    "method": [
        FULL,
        *(Setting("all", rank) for rank in RANKS),
        *(Setting("attention", rank) for rank in (1, 8, 64)),
    ],
    "rate": [replace(one, factor=factor) for one in BOTH for factor in FACTORS],
    "prompt": [
        replace(one, factor=factor, prompt=prompt)
        for one in BOTH
        for factor in (1.0, 3.0)
        for prompt in (True, False)
    ],
    "tokens": [replace(one, tokens="none") for one in BOTH]
    + [replace(FULL, tokens="trained")]
    + [replace(LORA, tokens=tokens) for tokens in ("frozen", "trained")],
    "memory": [FULL, LORA, Setting("all", 64), Setting("attention", 8)],
}
MEMORIES = (50, 100, 200)  # MB


def write_data(setting: Setting, folder: Path) -> None:
    """Write the embedded records as prompts and completions of this setting."""
    from lit_adapters.data import alpaca_prompt, read_splits

    begin, end, reply = MARKS
    for split, records in read_splits("tiny").items():
        with (folder / f"{split}.jsonl").open("w") as file:
            for record in records:
                asked = record["input"]
                if setting.tokens != "none":
                    asked = f"{begin}{asked}{end}"
                if setting.prompt:
                    asked = alpaca_prompt(record["instruction"], asked)
                text = asked.rstrip() + ("\n" if setting.tokens == "none" else reply)
                row = {"prompt": text, "completion": record["output"], "task": record["task"]}
                file.write(json.dumps(row) + "\n")


def adapter_for(setting: Setting):  # noqa: ANN201 - imports are slow, so they are inside
    """Return what is trained."""
    from lit_adapters import FullFineTuning, LoRA

    if not setting.rank:
        return FullFineTuning()
    targets = "all-linear" if setting.trained == "all" else list(ATTENTION)
    marks = list(MARKS) if setting.tokens == "trained" else None
    return LoRA(setting.rank, 2 * setting.rank, targets=targets, new_tokens=marks)


def model_for(setting: Setting):  # noqa: ANN201
    """Return module arguments: base, adapter and tokenizer."""
    from lit_adapters.base_model import load_base, load_tokenizer

    base, tokenizer = load_base("tiny"), load_tokenizer("tiny")
    added = setting.tokens != "none" and not (setting.rank and setting.tokens == "trained")
    if added:  # rows of the base itself, drawn around the mean of the others
        tokenizer.add_tokens(list(MARKS))
        base.resize_token_embeddings(len(tokenizer))
    return base, adapter_for(setting), tokenizer


def run(setting: Setting, seed: int, steps: int, limit: int, out: Path) -> dict:
    """Train and answer once; the result is kept below ``out``."""
    file = place(out, setting, seed, steps, limit)
    if file.exists():
        return json.loads(file.read_text())
    import torch
    from lightning.pytorch import Trainer, seed_everything

    from lit_adapters import AdapterFineTuneModule, InstructionDataModule, save_adapter
    from lit_adapters.callbacks.samples import spread
    from lit_adapters.footprint import footprint, optimizer_bytes
    from lit_adapters.generation import generate
    from lit_adapters.metrics import exact_match

    be_quiet()
    seed_everything(seed, verbose=False)
    rate = STABLE[setting.trained] * setting.factor
    base, adapter, tokenizer = model_for(setting)
    module = AdapterFineTuneModule(
        base,
        adapter,
        tokenizer,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=rate, weight_decay=0.0),
    )
    with tempfile.TemporaryDirectory() as folder:
        write_data(setting, Path(folder))
        data = InstructionDataModule(folder, max_length=256, batch_size=8, seed=seed)
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            gradient_clip_val=1.0,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=steps,  # once, below
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        result: dict = {**asdict(setting), "name": str(setting), "seed": seed, "rate": rate}
        start = time.process_time()  # other work on the machine does not count
        try:
            trainer.fit(module, data)
        except RuntimeError as error:  # the guard against a loss that is no number
            if "the training loss is" not in str(error):
                raise
            result["diverged"] = str(error)
        result["seconds"] = time.process_time() - start
        (checked,) = trainer.validate(module, data, verbose=False)
        examples = spread(data.examples("test"), limit)
        answers = generate(module.model, tokenizer, [e.prompt for e in examples], 32)
        scores = exact_match(
            (e.task, a, e.response) for e, a in zip(examples, answers, strict=True)
        )
        saved = save_adapter(module.model, Path(folder) / "adapter")
        weights = (saved / "adapter_model.safetensors").stat().st_size
        result |= {
            "val_loss": checked["val/loss"],
            "exact_match": {task: score.share for task, score in scores.items()},
            "trainable": footprint(module.model).trainable,
            "adapter_bytes": weights,
            "resume_bytes": weights + sum(map(optimizer_bytes, trainer.optimizers)),
        }
    keep(file, result)
    return result


def fit_memory(setting: Setting, memory: int, out: Path) -> dict:
    """Measure the speed at the largest batch that fits ``memory`` MB; kept below ``out``."""
    file = place(out, "memory", setting, memory)
    if file.exists():
        return json.loads(file.read_text())
    import lora_vs_full_memory as measure

    be_quiet()
    adapter = adapter_for(setting)
    size = measure.fitting_batch(adapter, memory * 10**6)
    result = {"name": str(setting), "memory": memory, "batch": size, "length": measure.LENGTH}
    if size:
        result["tokens_per_second"] = measure.speed(adapter, size)
    keep(file, result)
    return result


def be_quiet() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def place(out: Path, *work: object) -> Path:
    """Return the file of a result."""
    key = " ".join(map(str, (repr(one) if isinstance(one, Setting) else one for one in work)))
    return out / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def keep(file: Path, result: dict) -> None:
    """Write a result under another name first: what is there is whole."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.replace(file)


def ranged(values: Iterable[float], form: str) -> str:
    """Return the mean, and the lowest and highest value."""
    values = list(values)
    return f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def table(group: str, results: list[dict]) -> str:
    """Return a group's results as Markdown, one line per setting, over its seeds."""
    asked = {
        "method": {},
        "rate": {"learning rate": lambda r: f"{r['rate']:g}"},
        "prompt": {
            "learning rate": lambda r: f"{r['rate']:g}",
            "task described": lambda r: "yes" if r["prompt"] else "no",
        },
        "tokens": {"new tokens": lambda r: r["tokens"]},
    }[group]
    sizes = ["trainable", "adapter file", "with optimizer state"] if group == "method" else []
    tasks = [task for task in TASKS if all(task in r["exact_match"] for r in results)]
    head = ["trained", *asked, "validation loss", *tasks, *sizes, "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for setting in dict.fromkeys(GROUPS[group]):
        own = [r for r in results if Setting(**{k: r[k] for k in asdict(setting)}) == setting]
        if not own:
            continue
        one, stopped = own[0], sum("diverged" in r for r in own)
        fewer = len(own) < len({r["seed"] for r in results})
        cells = [
            one["name"]
            + (f" ({stopped} of {len(own)} diverged)" if stopped else "")
            + (f" ({len(own)} seeds)" if fewer else ""),
            *(show(one) for show in asked.values()),
            ranged((r["val_loss"] for r in own), ".3f"),
            *(ranged((r["exact_match"][task] for r in own), ".0%") for task in tasks),
        ]
        if sizes:
            kept = (one["adapter_bytes"], one["resume_bytes"])
            cells += [f"{one['trainable']:,}", *(f"{size / 1e3:,.0f} kB" for size in kept)]
        lines.append("| " + " | ".join([*cells, f"{mean(r['seconds'] for r in own):.0f}"]) + " |")
    return "\n".join(lines)


def memory_table(results: list[dict]) -> str:
    """Return batches and speeds as Markdown, one line per setting."""
    given = dict.fromkeys(r["memory"] for r in results)
    head = ["trained", *(f"in {memory} MB" for memory in given)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in dict.fromkeys(r["name"] for r in results):
        cells = [
            f"{r['batch']} x {r['length']} tokens, {r['tokens_per_second']:,.0f} tokens/s"
            if r["batch"]
            else "nothing fits"
            for r in results
            if r["name"] == name
        ]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def plot(results: list[dict], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    def curve(axes: object, settings: dict[float, Setting], label: str, color: str) -> None:
        found = {
            x: [r["val_loss"] for r in results if Setting(**{k: r[k] for k in asdict(s)}) == s]
            for x, s in settings.items()
        }
        found = {x: values for x, values in found.items() if values}
        axes.plot(list(found), [mean(v) for v in found.values()], "o-", label=label, color=color)
        edges = [[pick(v) for v in found.values()] for pick in (min, max)]
        axes.fill_between(list(found), *edges, color=color, alpha=0.15, linewidth=0)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    curve(left, dict.fromkeys((1, 64), FULL), "full fine-tuning", "black")
    curve(left, {r: Setting("all", r) for r in RANKS}, "LoRA, all linear layers", "tab:blue")
    attention = {r: Setting("attention", r) for r in RANKS}
    curve(left, attention, "LoRA, attention only", "tab:orange")
    left.set(xscale="log", xlabel="rank", ylabel="validation loss (nats per token)")
    left.set_xticks(RANKS, map(str, RANKS))
    for one, label, color in ((FULL, "full", "black"), (LORA, "LoRA r8", "tab:blue")):
        for prompt, described in ((True, ""), (False, ", task not described")):
            shade = color if prompt else {"black": "gray", "tab:blue": "tab:cyan"}[color]
            settings = {f: replace(one, factor=f, prompt=prompt) for f in FACTORS}
            curve(right, settings, label + described, shade)
    relative = "learning rate, relative to each one's stable rate"
    right.set(xscale="log", yscale="log", xlabel=relative)  # the largest rates diverge
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--answers", type=int, default=80, help="held-out records answered")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/lora_vs_full"))
    parser.add_argument("--finished", action="store_true", help="make no runs, show what is there")
    parser.add_argument("--json", type=Path, help="also write all results to this file")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    trained = [group for group in options.groups if group != "memory"]
    # Seed by seed: a broken-off study is a whole one of fewer seeds.
    settings = list(dict.fromkeys(s for group in trained for s in GROUPS[group]))
    work = [(setting, seed) for seed in options.seeds for setting in settings]
    budgets = [(s, memory) for s in GROUPS["memory"] for memory in MEMORIES]
    budgets = budgets if "memory" in options.groups else []
    if options.finished:
        asked = (options.steps, options.answers)
        work = [one for one in work if place(options.out, *one, *asked).exists()]
        budgets = [one for one in budgets if place(options.out, "memory", *one).exists()]
    with (
        ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool,
        Progress(console=Console(stderr=True)) as bar,
    ):
        task = bar.add_task("runs", total=len(work) + len(budgets))
        waiting = [
            pool.submit(run, *one, options.steps, options.answers, options.out) for one in work
        ]
        for done in as_completed(waiting):
            done.result()
            bar.advance(task)
        runs, fits = [one.result() for one in waiting], []
        for one in budgets:  # one at a time: speeds are measured
            fits.append(pool.submit(fit_memory, *one, options.out).result())
            bar.advance(task)
    machine = {
        "steps": options.steps,
        "answers": options.answers,
        "seeds": sorted({run["seed"] for run in runs}),
        "processor": platform.processor() or platform.machine(),
        **{name: version(name) for name in ("torch", "transformers")},
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    for group in trained:
        print(f"\n### {group}\n\n{table(group, runs)}")
    if fits:
        print(f"\n### memory\n\n{memory_table(fits)}")
    if options.json:
        found = {"machine": machine, "runs": runs, "memory": fits}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if not runs:
        return
    if find_spec("matplotlib"):
        plot(runs, options.out / "lora_vs_full.png")
        print(f"plot: {options.out / 'lora_vs_full.png'}", file=sys.stderr)
    else:
        print("no plot: pip install matplotlib", file=sys.stderr)


if __name__ == "__main__":
    main()
