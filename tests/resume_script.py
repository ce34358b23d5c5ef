"""Runs fits in processes of their own, so that they can be killed: one JSON request a line.

Libraries are imported once; every request is answered by a fork, which is as good as a new process
since this one never trains. Answers with the exit code, negative for a signal.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers.logger import Logger

import lit_adapters.__main__
import lit_adapters.callbacks.checkpoint
from lit_adapters import AdapterCheckpoint, AdapterFineTuneModule, InstructionDataModule, LoRA


class JsonLines(Logger):
    """Appends what is logged to a file, floats as exact hexadecimal; a kill loses nothing."""

    name, version = "lines", 0

    def __init__(self, file):
        super().__init__()
        self.file = file

    def log_hyperparams(self, *_):
        pass

    def log_metrics(self, metrics, step=None):
        kept = {
            key: float(value).hex()
            for key, value in metrics.items()
            if key in ("train/loss", "train/grad_norm", "lr", "val/loss", "val/token_accuracy")
        }
        if kept:
            with open(self.file, "a") as handle:
                handle.write(json.dumps({"step": step, **kept}) + "\n")


class Kill(Callback):
    """Ends the process as a power cut would, at a chosen moment.

    Args:
        where: ``batch`` (before the batch of that number), ``validation`` (inside that of an
            epoch), ``torn`` / ``rename`` / ``renamed`` (a checkpoint half written, complete but
            not renamed, just renamed), ``folder`` (before the adapter folder is written).
        at: The number of the batch or epoch from 0, or which of the saves, from 1.
    """

    def __init__(self, where: str, at: int):
        self.where = where
        self.at = at
        self.count = 0

    def setup(self, trainer, pl_module, stage):
        owner, name = {
            "torn": (Trainer, "save_checkpoint"),
            "rename": (os, "replace"),
            "renamed": (os, "replace"),
            "folder": (lit_adapters.callbacks.checkpoint, "save_adapter"),
        }.get(self.where, (None, None))
        if owner is None:
            return
        real = getattr(owner, name)

        def killing(*args, **options):
            path = str(args[1])
            if name == "replace" and not path.endswith(".ckpt"):
                return real(*args, **options)
            self.count += 1
            due = self.count == self.at
            if due and self.where in ("rename", "folder"):
                kill()
            result = real(*args, **options)
            if due and self.where == "torn":
                os.truncate(path, Path(path).stat().st_size // 2)
            if due:
                kill()
            return result

        setattr(owner, name, killing)

    def on_train_batch_start(self, trainer, *_):
        if self.where == "batch" and trainer.fit_loop.epoch_loop.total_batch_idx == self.at:
            kill()

    def on_validation_batch_start(self, trainer, *_):
        due = self.where == "validation" and trainer.current_epoch == self.at
        if due and not trainer.sanity_checking:
            kill()


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fit(request):
    """Train as asked; the last line of a complete run is its adapter's weights."""
    folder = Path(request["folder"])
    seed_everything(request["seed"], verbose=False)
    module = AdapterFineTuneModule(
        request["base"],
        LoRA(rank=4, dropout=0.1),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=2e-2, weight_decay=0.1),
        lr_scheduler=request["schedule"],
        warmup=request["warmup"],
    )
    data = InstructionDataModule(**request["data"])
    callbacks = [AdapterCheckpoint(folder / "out", every_n_train_steps=request["every"])]
    if request.get("kill"):
        callbacks.append(Kill(*request["kill"]))
    trainer = Trainer(
        **{
            "default_root_dir": folder,
            "accelerator": "cpu",
            "logger": JsonLines(folder / "log.jsonl"),
            "log_every_n_steps": 1,
            "max_epochs": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": callbacks,
            **request["trainer"],
        }
    )
    trainer.fit(module, data, ckpt_path=request.get("ckpt_path"))
    state = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    torch.save(state, folder / "final.pt")


def answer(request):
    """Do what one request says, in this process."""
    if "command" in request:
        lit_adapters.__main__.main(request["command"])
    else:
        fit(request)


def main():
    """Fork for each request on standard input."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with open(request["output"], "a") as output:
                    os.dup2(output.fileno(), 1)
                    os.dup2(output.fileno(), 2)
                answer(request)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
