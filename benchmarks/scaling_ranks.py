"""What ranks send and hold, beside the arithmetic, and what that arithmetic says of large models.

    python benchmarks/scaling_ranks.py [--ranks 1 2 4 --hidden 128 --layers 4 --results FOLDER]

A random Llama is trained for two optimizer steps by real gloo processes, once for each strategy and
method. In the second step (GaLore chooses its subspaces in the first) every tensor that is handed
to a collective is counted: the whole that an all-gather makes, the whole that a reduce-scatter
takes, what an all-reduce or a broadcast is given. Held are the bytes of parameters, of gradients
before the step and of the optimizer's state after it, on the rank that holds most; GaLore's
subspaces, which every rank has, are not among them. There is no clock in this.

The arithmetic needs shapes only. With W the bytes of a unit's weights and T those of what is
trained in it (units are decoder layers, and the rest, which is gathered once as the loss reads the
head):

    ddp    all-reduce T of everything, of what GaLore projects the rank r of m x n: m r; broadcast
           of the buffers (DoRA's norms)
    fsdp   all-gather 2 W of every layer and W of the rest, without adapters; reduce-scatter T of
           what is trained of these; all-reduce T of the adapters
    fsdp2  all-gather 2 W of every layer and W of the rest; reduce-scatter T

On the wire, a ring of n ranks sends of every byte 2 (n - 1) / n for an all-reduce and (n - 1) / n
for the others. ratio is measured / arithmetic.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from machine import named
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lit_adapters import AdapterFineTuneModule, DoRA, FullFineTuning, GaLore, LoRA
from lit_adapters.adapters import AdapterSpec
from lit_adapters.check.shares import held, share_of
from lit_adapters.estimate import Training
from lit_adapters.estimate.memory_trace import MemoryTrace
from lit_adapters.estimate.shapes import built_with_shapes
from lit_adapters.optim import choose_layers
from lit_adapters.sharding import replicated, units
from lit_adapters.targets import match_targets

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.distributed.traffic import Traffic  # noqa: E402
from tests.distributed.train import STRATEGIES  # noqa: E402 - FSDP on processors is there

WAYS = ("ddp", "fsdp", "fsdp2")
GALORE = "GaLore"  # a callback beside full fine-tuning
METHODS: dict[str, AdapterSpec] = {
    "LoRA": LoRA(rank=16),
    "DoRA": DoRA(rank=16),
    "full": FullFineTuning(),
    GALORE: FullFineTuning(),
}
GALORE_RANK = 16
CASES = [(way, method) for way in WAYS for method in METHODS if (way, method) != ("fsdp", GALORE)]
VOCABULARY = 512
OPERATIONS = {
    "allgather": "all-gather",
    "allgather_base": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "reduce_scatter_base": "reduce-scatter",
    "allreduce": "all-reduce",
    "broadcast": "broadcast",
}
KINDS = set(OPERATIONS.values())
SCALARS = 1024  # bytes at most: sums of losses and tokens, norms of gradients, a few buffers
LLAMAS = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
DEVICES = (8, 64, 512)
Bytes = dict[str, int]


# ---------------------------------------------------------------- measured, in every rank


def by_kind(seen: list[list[Any]], ranks: int) -> Bytes:
    """Add up what was handed to collectives: of an all-gather, the whole that it makes."""
    found: Bytes = {}
    for operation, given in seen:
        size = given * ranks if "gather" in operation else given
        kind = OPERATIONS[operation] if size > SCALARS else "scalars"
        found[kind] = found.get(kind, 0) + size
    return found


def size_of(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def local_bytes(tensors: Iterator[Tensor]) -> int:
    own = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in own}
    return sum(storages.values())


class Watch(Callback):
    """Looks at the second step."""

    def __init__(self) -> None:
        self.sent = Traffic()
        self.held: Bytes = {}

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        """Look at the weights, which are all parameters now."""
        self.held["weights"] = local_bytes(module.parameters())

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, index: int) -> None:
        """Begin to count."""
        if index == 1:
            self.sent.__enter__()

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        """Look at the gradients, which are there now."""
        grads = (p.grad for p in module.parameters() if p.grad is not None)
        self.held["gradients"] = local_bytes(grads)

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        """Stop counting."""
        if index == 1:
            self.sent.__exit__(None, None, None)
        (optimizer,) = trainer.optimizers
        states = (v for s in optimizer.state.values() for k, v in s.items() if k != "step")
        self.held["optimizer"] = local_bytes(states)


def random_llama(options: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def galore() -> GaLore:
    return GaLore(GALORE_RANK, side="right")  # the side that all strategies have


def fitted(way: str, method: str, options: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """Train two steps; return what was sent and held."""
    ids = torch.randint(VOCABULARY, (2, 2, 16))
    batches = [{"input_ids": x, "labels": x, "attention_mask": torch.ones_like(x)} for x in ids]
    watch = Watch()
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=STRATEGIES[way](),
        max_steps=2,
        callbacks=[watch, *([galore()] if method == GALORE else [])],
        logger=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = AdapterFineTuneModule(random_llama(options), METHODS[method])
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return {"sent": by_kind(watch.sent.seen, ranks), "held": watch.held}


def work(options: argparse.Namespace) -> None:
    """Run all cases as one of the ranks that torchrun started."""
    torch.set_num_threads(1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = {f"{way} {method}": fitted(way, method, options, ranks) for way, method in CASES}
    Path(options.worker, f"{ranks}-{rank}.json").write_text(json.dumps(found))


# ---------------------------------------------------------------- arithmetic


def projected_by(model: nn.Module) -> list[Tensor]:
    """The weights that GaLore steps in a subspace."""
    callback = galore()
    layers = {n: model.get_submodule(n) for n in match_targets(model, callback.selection)}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    chosen, _ = choose_layers(layers, trained, callback.settings)
    return [layer.get_parameter("weight") for layer in chosen.values()]


def sent_by_arithmetic(
    model: nn.Module, way: str, ranks: int, projected: Sequence[Tensor] = ()
) -> Bytes:
    """Bytes handed to collectives in a step of one micro-batch; see the head of this file."""
    strategy = STRATEGIES[way]()

    def padded(parameter: Tensor) -> int:  # what all ranks hold of it together
        return held(parameter, strategy, ranks) * ranks

    trained = size_of(p for p in model.parameters() if p.requires_grad)
    if way == "ddp":
        low = sum(len(p) * GALORE_RANK + 1 for p in projected) * 4  # fp32; 1 says whether it is
        buffers = size_of(model.buffers())
        return {
            "all-reduce": trained - size_of(projected) + low,
            "broadcast": buffers if buffers > SCALARS else 0,
        }
    *layers, rest = (unit.parameters for unit in units(model, strategy))
    sharded = [p for unit in (*layers, rest) for p in unit]
    apart = replicated(model) if way == "fsdp" else []
    return {
        "all-gather": sum(2 * padded(p) for layer in layers for p in layer)
        + sum(map(padded, rest)),
        "reduce-scatter": sum(padded(p) for p in sharded if p.requires_grad),
        "all-reduce": size_of(p for p in apart if p.requires_grad),
    }


def held_by_arithmetic(
    model: nn.Module, way: str, ranks: int, projected: Sequence[Tensor] = ()
) -> Bytes:
    """Bytes of the rank that holds most: AdamW keeps two numbers for each that is stepped."""
    strategy = STRATEGIES[way]()
    share = share_of(model, strategy, ranks)
    trained = size_of(p for p in model.parameters() if p.requires_grad)
    own = {True: 0, False: 0}
    for p in projected:
        own[True] += held(p, strategy, ranks)
        own[False] += held(p[:, :GALORE_RANK], strategy, ranks)  # in its place
    stepped = round(share.trained * trained) - own[True] + own[False]
    return {
        "weights": share.base + share.adapter + own[False],
        "gradients": stepped,
        "optimizer": 2 * stepped,
    }


def on_the_wire(sent: Bytes, ranks: int) -> int:
    """Bytes that a rank of a ring sends."""
    once = sum(sent.get(kind, 0) for kind in KINDS) + sent.get("all-reduce", 0)
    return once * (ranks - 1) // ranks


# ---------------------------------------------------------------- the tables


def run_ranks(ranks: int, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Return what each of so many real processes found."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    sizes = [f"--hidden={options.hidden}", f"--layers={options.layers}"]
    subprocess.run(
        [*launcher, f"--nproc_per_node={ranks}", __file__, f"--worker={folder}", *sizes],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdout=sys.stderr,
    )
    return [json.loads((folder / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for every number of ranks, strategy and method."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for ranks in options.ranks:
            of_ranks = run_ranks(ranks, options, Path(name))
            for way, method in CASES:
                found = [one[f"{way} {method}"] for one in of_ranks]
                module = AdapterFineTuneModule(random_llama(options), METHODS[method])
                module.configure_model()
                projected = projected_by(module.model) if method == GALORE else []
                sent = sent_by_arithmetic(module.model, way, ranks, projected)
                kept = held_by_arithmetic(module.model, way, ranks, projected)
                rows.append(
                    {
                        "ranks": ranks,
                        "strategy": way,
                        "method": method,
                        "sent": found[0]["sent"],
                        "sent_arithmetic": sent,
                        "held": {
                            key: max(one["held"][key] for one in found) for key in found[0]["held"]
                        },
                        "held_arithmetic": kept,
                    }
                )
    return rows


def projected() -> list[dict[str, Any]]:
    """Return what large Llamas in bf16, adapters in fp32, take by arithmetic."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for size, shape in LLAMAS.items():
            LlamaConfig(**shape, architectures=["LlamaForCausalLM"]).save_pretrained(name)
            module = AdapterFineTuneModule(name, LoRA(rank=16))
            plain = Training(module, batch_size=1, max_length=1, precision="bf16-true")
            for method in ("LoRA", "full"):
                training = plain.with_module(adapter=METHODS[method])
                model = built_with_shapes(training, MemoryTrace()).model
                rows += [
                    {
                        "model": size,
                        "method": method,
                        "strategy": way,
                        "devices": devices,
                        "sent": on_the_wire(sent_by_arithmetic(model, way, devices), devices),
                        "held": held_by_arithmetic(model, way, devices),
                    }
                    for way in WAYS
                    for devices in DEVICES
                ]
    return rows


def ratio(found: int, expected: int) -> str:
    if not expected:
        return "-" if not found else "expected 0"
    return f"{found / expected:.3f}"


def measured_table(rows: list[dict[str, Any]]) -> list[str]:
    head = ["ranks", "strategy", "method", "sent, kB", "arithmetic", "ratio", "on the wire, kB",
            "scalars, bytes", "weights, kB", "ratio", "gradients, kB", "ratio", "optimizer, kB",
            "ratio"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * 3 + "---:|" * (len(head) - 3)]
    for row in rows:
        sent = sum(row["sent"].get(kind, 0) for kind in KINDS)
        expected = sum(row["sent_arithmetic"].values()) if row["ranks"] > 1 else 0
        cells = [
            str(row["ranks"]), row["strategy"], row["method"], kilo(sent), kilo(expected),
            ratio(sent, expected) if row["ranks"] > 1 else "-",
            kilo(on_the_wire(row["sent"], row["ranks"])), str(row["sent"].get("scalars", 0)),
        ]  # fmt: skip
        for key in ("weights", "gradients", "optimizer"):
            found, most = row["held"][key], row["held_arithmetic"][key]
            cells += [kilo(found), ratio(found, most)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def projection_table(rows: list[dict[str, Any]]) -> list[str]:
    head = ["model", "method", "strategy", "devices", "sent a step, GB", "weights, GB",
            "gradients, GB", "optimizer, GB"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * 3 + "---:|" * (len(head) - 3)]
    for row in rows:
        own = [giga(row["held"][key]) for key in ("weights", "gradients", "optimizer")]
        cells = [row["model"], row["method"], row["strategy"], str(row["devices"])]
        lines.append("| " + " | ".join([*cells, giga(row["sent"]), *own]) + " |")
    return lines


def kilo(value: int) -> str:
    return f"{value / 1e3:,.1f}"


def giga(value: int) -> str:
    return f"{value / 1e9:,.3f}"


def report(rows: list[dict[str, Any]], large: list[dict[str, Any]], options: Any) -> str:
    formula = __doc__.partition("The arithmetic needs")[2].rpartition("ratio is")[0]
    return "\n".join(
        [
            f"{named('cpu', 'lightning', 'transformers')}. Real gloo processes; Llama of "
            f"{options.hidden} x {options.layers} layers, vocabulary {VOCABULARY}, fp32, AdamW; "
            "one optimizer step of one micro-batch.",
            "",
            *measured_table(rows),
            "",
            f"The arithmetic needs{formula}".strip(),
            "",
            "On paper, for Llama 3 shapes (weights bf16, adapters fp32, AdamW's states as what is "
            "trained); a rank of a ring, one micro-batch a step. Activations are beside this: "
            "`python -m lit_adapters check` estimates them.",
            "",
            *projection_table(large),
            "",
        ]
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--results", type=Path, help="a folder for scaling_ranks.md and .json")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    if options.worker:
        work(options)
        return
    rows, large = measure(options), projected()
    text = report(rows, large, options)
    content = json.dumps({"measured": rows, "projected": large}, indent=1)
    print(content if options.json else text)
    if options.results:
        (options.results / "scaling_ranks.md").write_text(text)
        (options.results / "scaling_ranks.json").write_text(content + "\n")


if __name__ == "__main__":
    main()
