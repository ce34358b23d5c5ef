"""Runs cases one after the other, in this process or as one of several ranks (`python train.py`).

A case says what to train and under which strategy; what comes of it goes to a file.
"""

import hashlib
import json
import logging
import os
import signal
import sys
import traceback
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp.wrap import enable_wrap
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import lit_adapters
import lit_adapters.first_steps
import lit_adapters.loading_once
import lit_adapters.module
from lit_adapters import AdapterCheckpoint, AdapterFineTuneModule, InstructionDataModule
from lit_adapters.adapters import Adapter
from lit_adapters.callbacks import PredictionWriter
from lit_adapters.spread import plain_name, whole
from tests import models
from tests.data.word_tokenizer import word_tokenizer
from tests.distributed.traffic import StepTraffic
from tests.models import fingerprint

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Ragged: answers of 1 to 6 tokens.
RECORDS = [
    {"prompt": " ".join(LETTERS[i % 20 : i % 20 + 3]), "completion": " ".join(LETTERS[: 1 + i % 6])}
    for i in range(23)  # 7 for validation: the last batch of a rank is smaller
]
TIMEOUT = timedelta(seconds=int(os.environ.get("TIMEOUT", "120")))


class CPUFSDPStrategy(FSDPStrategy):
    """FSDP1 on processors, which Lightning 2.6 refuses: it hands FSDP the number of a device."""

    def _options(self):
        return {
            "cpu_offload": self.cpu_offload,
            "mixed_precision": self.mixed_precision_config,
            "sharding_strategy": self.sharding_strategy,
            "device_id": self.root_device,
            **self.kwargs,
        }

    def _setup_model(self, model):
        if not any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
            model = FullyShardedDataParallel(model, **self._options())
        return model

    @contextmanager
    def model_sharded_context(self):
        with enable_wrap(wrapper_cls=FullyShardedDataParallel, **self._options()):
            yield


STRATEGIES = {
    "single": lambda: "auto",
    "ddp": lambda: DDPStrategy(timeout=TIMEOUT),
    "ddp, small buckets": lambda: DDPStrategy(bucket_cap_mb=0.01, timeout=TIMEOUT),
    "fsdp": lambda: CPUFSDPStrategy(timeout=TIMEOUT),
    "fsdp, own units": lambda: CPUFSDPStrategy(
        auto_wrap_policy={LlamaDecoderLayer}, timeout=TIMEOUT
    ),
    "fsdp, SHARD_GRAD_OP": lambda: CPUFSDPStrategy(
        sharding_strategy="SHARD_GRAD_OP", timeout=TIMEOUT
    ),
    "fsdp, NO_SHARD": lambda: CPUFSDPStrategy(sharding_strategy="NO_SHARD", timeout=TIMEOUT),
    "fsdp2": lambda: ModelParallelStrategy(timeout=TIMEOUT),
}


class Watch(Callback):
    """Notes each step's loss and norm, and what this rank holds of the model."""

    def __init__(self, mutes=False, signal_at_step_2=None):
        self.mutes = mutes
        self.signal = signal_at_step_2
        self.loss, self.norm, self.held, self.units = [], [], 0, 0

    def on_train_start(self, trainer, module):
        local = [p.to_local() if hasattr(p, "to_local") else p for p in module.parameters()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in local}
        self.held = sum(storage.nbytes() for storage in storages.values())
        units = (FullyShardedDataParallel, FSDPModule)
        self.units = sum(isinstance(m, units) for m in module.modules())

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        """Leave nothing to be trained on rank 1, whose examples are every second one, once.

        Or send rank 1 a signal.
        """
        if self.signal and trainer.global_step == 2 and trainer.global_rank == 1:
            os.kill(os.getpid(), getattr(signal, self.signal))
        if self.mutes and trainer.global_step == 1 and trainer.world_size == 1:
            batch["labels"][1::2] = -100
        elif self.mutes and trainer.global_step == 1 and trainer.global_rank == 1:
            batch["labels"][:] = -100

    def on_train_batch_end(self, trainer, module, *_):
        logged = trainer.callback_metrics
        if len(self.loss) < trainer.global_step:
            self.loss.append(float(logged["train/loss"]))
            self.norm.append(float(logged["train/grad_norm"]))


class Edits(Callback):
    """Changes one value of what is trained, after ranks were made equal."""

    def on_fit_start(self, trainer, module):
        next(p for p in module.parameters() if p.requires_grad).data.view(-1)[3] += 1


def adamw(groups):
    # A large eps: gradients that are zero but for rounding shall not be steps.
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, eps=1e-4)


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.05)


FINDING = lit_adapters.first_steps.finding_shared_inputs
OPTIMIZERS = {"adamw": adamw, "sgd": sgd}


def built(text):
    """Such as ``LoRA(rank=4)``."""
    return eval(text, {name: getattr(lit_adapters, name) for name in lit_adapters.__all__})


def run(case):
    """Train as the case says; return what is to be compared."""
    torch.compiler.reset()
    counters.clear()
    # `nullcontext`: every layer computes its own product, as shards do.
    lit_adapters.first_steps.finding_shared_inputs = nullcontext if case.get("apart") else FINDING
    if os.environ.get("RANK") == "1":
        case = {**case, **case.get("on rank 1", {})}
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    seed_everything(case.get("seed", 0), verbose=False)
    settings = dict(case.get("settings", {}))
    if "quantization" in settings:
        settings["quantization"] = built(settings["quantization"])
    base = base_of(case) if case.get("passed_in") else case.get("base", str(saved_base(case)))
    module = AdapterFineTuneModule(
        base,
        built(case.get("adapter", "LoRA(rank=4)")),
        tokenizer=word_tokenizer(),
        optimizer=OPTIMIZERS[case.get("optimizer", "adamw")],
        lr_scheduler="constant",
        warmup=0.0,
        max_new_tokens=3,
        **settings,
    )
    data = InstructionDataModule(
        str(write_records(Path(case["folder"]), case.get("records", len(RECORDS)))),
        tokenizer=word_tokenizer(),
        val_size=case.get("val_size", 7),
        batch_size=case.get("batch", 4) // ranks,
        group_by_length=False,
        cache_dir=None,
        template="none",
        batching=case.get("batching", "auto"),
    )
    watch = Watch(case.get("mutes", False), case.get("signal"))
    traffic = StepTraffic()
    callbacks = [
        watch,
        *([traffic] if case.get("traffic") else []),
        *[built(text) for text in case.get("callbacks", [])],
    ]
    if case.get("edits_adapter"):
        callbacks.append(Edits())
    if "keep" in case:
        callbacks.append(AdapterCheckpoint(case["keep"], every_n_train_steps=1))
    if "predictions" in case:
        callbacks.append(PredictionWriter(case["predictions"]))

    def trainer_with(callbacks):
        return Trainer(
            **{
                "default_root_dir": case["folder"],
                "accelerator": "cpu",
                "devices": devices,
                "num_nodes": ranks // devices,
                "strategy": STRATEGIES[case.get("strategy", "single")](),
                "logger": False,
                "max_steps": 3,
                "max_epochs": 9,
                "limit_val_batches": 0,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "enable_checkpointing": "keep" in case,
                "callbacks": callbacks,
                **case.get("trainer", {}),
            }
        )

    trainer = trainer_with(callbacks)
    starts, received, said = [], [], []

    def digested(given, *args):
        received.append(all(p.is_meta for p in given.parameters()))
        model = real(given, *args)
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        values = {plain_name(n): fingerprint(whole(t, t)) for n, t in named}
        starts.append(hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest())
        return model

    real, lit_adapters.module.shard = lit_adapters.module.shard, digested
    lit_adapters.loading_once.rank_zero_info = said.append
    try:
        if case.get("fitted_before"):
            trainer_with([c for c in callbacks if c not in (watch, traffic)]).fit(module, data)
        trainer.fit(module, data, ckpt_path=case.get("resume"))
    finally:
        lit_adapters.module.shard = real
    state = {
        plain_name(name): whole(p, p).clone()
        for name, p in module.named_parameters()
        if p.requires_grad
    }
    inside = (m for m in module.modules() if isinstance(m, Adapter))
    found = {
        **{"loss": watch.loss, "norm": watch.norm, "held": watch.held, "units": watch.units},
        "start": starts[0],
        "traffic": traffic.steps,
        "graphs": counters["stats"]["unique_graphs"],
        "optimizer_bytes": sum(
            t.to_local().nbytes if hasattr(t, "to_local") else t.nbytes
            for values in trainer.optimizers[0].state.values()
            for t in values.values()
        ),
        "received": received[0],
        "said": said,
        "state": state,
        "adapter_bytes": sum(p.nbytes for adapter in inside for p in adapter.parameters()),
    }
    if "predictions" in case:
        trainer.limit_val_batches = 1.0
        (found["validation"],) = trainer.validate(module, data, verbose=False)
        (found["test"],) = trainer.test(module, data, verbose=False)
        trainer.predict(module, data, return_predictions=False)
    return found


def base_of(case):
    """The model that a case starts from."""
    base = getattr(models, case.get("model", "llama"))(case.get("base_seed", 0))
    if case.get("edits"):
        base.model.layers[0].mlp.up_proj.weight.data[-2, 1] += (
            1  # of rank 1, unseen by fingerprints
        )
    return base.to(getattr(torch, case.get("dtype", "float32")))


def saved_base(case):
    """The folder it is read from, written when it is first asked for: before there are ranks."""
    kinds = case.get("model", "llama"), case.get("dtype", "float32")
    place = Path(case["folder"]) / "-".join(["base", *kinds])
    if not place.exists():
        base_of(case).save_pretrained(place)
    return place


def write_records(folder, count):
    """Write the data."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"records-{os.getpid()}.json"
    path.write_text(json.dumps(RECORDS[:count]))
    return path


def main(cases_file, out, run=run):
    """Run all cases; a failure is a result, too."""
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric", "lit_adapters"):
        logging.getLogger(name).setLevel(logging.WARNING)
    rank = os.environ.get("RANK", "0")
    for number, case in enumerate(json.loads(Path(cases_file).read_text())):
        try:
            found = run(case)
        except Exception:
            found = {"error": traceback.format_exc()}
        torch.save(found, Path(out) / f"{number}-{rank}.pt")
        if "error" in found:
            print(found["error"], file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
