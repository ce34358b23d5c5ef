"""Several processes that find each other as those of torchrun do."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(rank, port, ranks=2, machines=1):
    """What torchrun would say."""
    local = ranks // machines
    return {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(local),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % local),
        "GROUP_RANK": str(rank // local),
        "TORCHELASTIC_RUN_ID": "tests",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }


def run_ranks(script, arguments, out, limit, ranks=2, machines=1, awaited=None):
    """Run a script as so many ranks, each with a log in ``out``; return their exit codes.

    Only the first ``awaited`` are waited for, if not all; the others are then killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [(out / f"log-{rank}").open("w") for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            cwd=ROOT,
            env=environment(rank, port, ranks, machines),
            stdout=file,
            stderr=file,
        )
        for rank, file in enumerate(files)
    ]
    try:
        return [process.wait(limit) for process in processes[:awaited]]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for file in files:
            file.close()


def log_of(out, rank):
    """What a rank printed."""
    return (out / f"log-{rank}").read_text()
