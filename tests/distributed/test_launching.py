"""The command line on two ranks as users start it: torchrun, srun, by itself; against one process.

What srun does is done by hand: its variables are all that Lightning reads.
"""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run"]
LIMIT = 400  # seconds for one command

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="gloo on Linux"),
    pytest.mark.timeout(900),
]

COMMON = [
    "--config", "configs/alpaca_lora.yaml", "--trainer.accelerator=cpu", "--data.train_limit=8",
    "--data.group_by_length=false", "--data.cache_dir=null",
    "--model.max_new_tokens=3", "--samples.limit=3", "--samples.max_new_tokens=3",
    "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=3",
    "--trainer.limit_test_batches=3", "--trainer.limit_predict_batches=3",
]  # fmt: skip
FIT = [
    "fit", *COMMON, "--trainer.max_steps=2", "--trainer.max_epochs=1", "--model.warmup=0",
    "--trainer.log_every_n_steps=1", "--checkpoint.every_n_train_steps=1",
]  # fmt: skip
FSDP2 = ["--config", "configs/strategy/fsdp2.yaml"]
DDP = ["--config", "configs/strategy/ddp.yaml"]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def started(words, **variables):
    """A process of the command line, its output kept."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TORCHELASTIC"))}
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env={**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(*processes):
    """The output of each; all must succeed."""
    try:
        said = [process.communicate(timeout=LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text[-4000:]
    return "\n".join(said)


def alone(words):
    return finished(started(["-m", "lit_adapters", *words]))


def by_itself(words):
    """Lightning starts the second process."""
    return alone([*words, "--trainer.devices=2"])


def torchrun(words):
    launcher = [*TORCHRUN, "--standalone", "--nproc_per_node=2"]
    return finished(started([*launcher, "-m", "lit_adapters", *words, "--trainer.devices=2"]))


def torchrun_on_two_nodes(words):
    place = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1"]
    port, own = free_port(), ["--trainer.devices=1", "--trainer.num_nodes=2"]
    return finished(
        *(
            started(
                [*TORCHRUN, *place, f"--master_port={port}", f"--node_rank={node}",
                 "-m", "lit_adapters", *words, *own]
            )
            for node in range(2)
        )
    )  # fmt: skip


def srun(words):
    job = {
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_JOB_NAME": "fit",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "127.0.0.1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    command = ["-m", "lit_adapters", *words, "--trainer.devices=2"]
    return finished(
        *(started(command, **job, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in ("0", "1"))
    )


LAUNCHERS = {
    "by itself": (by_itself, FSDP2),
    "torchrun": (torchrun, DDP),
    "torchrun on two nodes": (torchrun_on_two_nodes, DDP),
    "srun": (srun, FSDP2),
}


def version(folder):
    (found,) = folder.glob("lightning_logs/version_*")  # one run, one folder
    return found


def numbers(folder):
    """What was logged of losses and norms."""
    with (version(folder) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ("train/loss", "train/grad_norm", "val/loss", "val/token_accuracy")
    return {name: [float(row[name]) for row in rows if row.get(name)] for name in names}


def trained(folder):
    return load_file(version(folder) / "checkpoints" / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One process with twice the batch."""
    folder = tmp_path_factory.mktemp("whole")
    alone([*FIT, "--data.batch_size=4", f"--trainer.default_root_dir={folder}"])
    return folder


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_fit_is_started_on_two_ranks_and_trains_as_one_process_does(whole, tmp_path, name):
    launch, strategy = LAUNCHERS[name]
    said = launch([*FIT, *strategy, "--data.batch_size=2",
                   f"--trainer.default_root_dir={tmp_path}"])  # fmt: skip
    assert "MEMBER: 2/2" in said
    assert "It is recommended" not in said
    expected, found = numbers(whole), numbers(tmp_path)
    assert len(found["train/loss"]) == 2
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-4), key
    weights = trained(tmp_path)
    assert weights.keys() == trained(whole).keys()
    for key, value in trained(whole).items():
        assert weights[key].allclose(value, rtol=1e-3, atol=2e-4), key


def test_a_checkpoint_is_tested_and_answers_in_order_on_two_ranks(whole, tmp_path):
    last = f"--ckpt_path={version(whole) / 'checkpoints' / 'last.ckpt'}"
    scores, rows = {}, {}
    for name, launch, more in (
        ("one", alone, ["--data.batch_size=4"]),
        ("two", torchrun, [*FSDP2, "--data.batch_size=2"]),
    ):
        folder = tmp_path / name
        own = [*COMMON, *more, last, f"--trainer.default_root_dir={folder}"]
        launch(["test", *own, f"--samples.scores_file={folder}.json"])
        launch(["predict", *own, f"--predictions.path={folder}.jsonl"])
        scores[name] = json.loads(Path(f"{folder}.json").read_text())
        rows[name] = Path(f"{folder}.jsonl").read_text()
    assert len(rows["one"].splitlines()) == 12
    assert rows["one"] == rows["two"]
    assert scores["one"].pop("answers") == scores["two"].pop("answers")
    assert scores["one"] == pytest.approx(scores["two"], rel=1e-5)
