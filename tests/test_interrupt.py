"""Ctrl-C and SIGTERM during a fit: the step is finished, the state written, the run goes on."""

import csv
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors.torch import load_file

from lit_adapters import AdapterCheckpoint, LoRA
from lit_adapters.__main__ import OVERVIEW
from lit_adapters.callbacks.interrupt import StopSignals
from tests.models import trainable
from tests.test_checkpoint import Batches, Foreign, make_trainer, read, step_in

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "alpaca_lora.yaml"
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
both_signals = pytest.mark.parametrize("number", STATUS, ids=lambda number: number.name)


class At(Callback):
    """Does something at one moment of a fit.

    Args:
        where: ``step`` (in the second micro-batch of a window), ``validation``, ``start``, ``end``
            or ``sanity``.
        at: Optimizer steps done by then.
    """

    def __init__(self, where: str, at: int = 0):
        self.where = where
        self.at = at
        self.done = False

    def act(self, trainer):
        raise NotImplementedError

    def look(self, where, trainer):
        if where == self.where and trainer.global_step == self.at and not self.done:
            self.done = True
            self.act(trainer)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.look("step", trainer)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, *_):
        if batch_idx == 1:
            self.look("sanity" if trainer.sanity_checking else "validation", trainer)

    def on_train_start(self, trainer, pl_module):
        self.look("start", trainer)

    def on_train_end(self, trainer, pl_module):
        self.look("end", trainer)


class Signal(At):
    """Sends this process signals."""

    def __init__(self, where, at, *numbers):
        super().__init__(where, at)
        self.numbers = numbers

    def act(self, trainer):
        for number in self.numbers:
            os.kill(os.getpid(), number)


class Announce(At):
    """Says on a file that the moment is there, and waits for the signal to come.

    Args:
        where: As `At`.
        at: As `At`.
        file: Made at that moment.
        signals: How many have to come.
    """

    def __init__(self, where: str, at: int, file: str, signals: int = 1):
        super().__init__(where, at)
        self.file = file
        self.signals = signals

    def act(self, trainer):
        Path(self.file).touch()
        (callback,) = [c for c in trainer.callbacks if isinstance(c, AdapterCheckpoint)]
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if self.signals == 1 and callback._stopping.signals.received:
                return
            time.sleep(0.01)
        raise AssertionError("no signal came")


@pytest.fixture(scope="module", autouse=True)
def _signals_are_those_of_a_fresh_process():
    """A shell has background jobs ignore Ctrl-C; command lines run in this process took SIGTERM."""
    fresh = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in fresh.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _handlers_are_restored():
    before = {number: signal.getsignal(number) for number in STATUS}
    yield
    assert {number: signal.getsignal(number) for number in STATUS} == before


# --- somebody's own Trainer and module -----------------------------------------------------------


class WithDropout(Foreign):
    """Random numbers are drawn at every batch, in training and in validation."""

    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            super().__init__(LoRA(rank=4, dropout=0.2))
        self.validated = []

    def validation_step(self, batch, batch_idx):
        torch.rand(1)
        super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.validated.append(self.trainer.global_step)


class Fixed:
    """The same batches for every validation, however the one before ended."""

    def __init__(self, count):
        self.batches = Batches(count, seed=5).batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


SETTINGS = {"accumulate_grad_batches": 2, "max_epochs": 3, "num_sanity_val_steps": 2}
BATCHES = 8  # four optimizer steps an epoch


def fit(folder, *callbacks, every=100, path=None, **settings):
    """Fit, or resume under another seed; returns module, trainer and checkpoint callback."""
    torch.manual_seed(1 if path is None else 2)
    module = WithDropout()
    keeper = AdapterCheckpoint(folder / "out", every_n_train_steps=every)
    trainer = make_trainer(folder, *callbacks, keeper, **{**SETTINGS, **settings})
    raised = None
    try:
        trainer.fit(module, Batches(BATCHES), Fixed(3), ckpt_path=path)
    except BaseException as error:
        raised = error
        if not isinstance(error, SystemExit):
            raise
    return module, trainer, raised


def assert_same_end(folder, expected_folder, module, expected):
    found = trainable(module)
    assert all(torch.equal(found[name], value) for name, value in trainable(expected).items())
    for name in ("last.ckpt", "best.ckpt"):
        states = [read(each / "out" / name)["state_dict"] for each in (folder, expected_folder)]
        assert all(torch.equal(states[0][key], value) for key, value in states[1].items()), name


MOMENTS = {
    "in a step": ("step", 5, {}),
    "in the first step": ("step", 0, {}),
    "in the last step of an epoch": ("step", 3, {}),
    "in the last step": ("step", 11, {}),
    "in an epoch's validation": ("validation", 8, {}),
    "in the last validation": ("validation", 12, {}),
    "in a validation within an epoch": ("validation", 6, {"val_check_interval": 4}),
    "in a step before such a validation": ("step", 5, {"val_check_interval": 4}),
    "in the last step of an epoch that is not validated": (
        "step",
        3,
        {"check_val_every_n_epoch": 2},
    ),
    "after training": ("end", 12, {}),
    "in a step, limited by steps": ("step", 5, {"max_steps": 11, "max_epochs": -1}),
    "in an epoch's validation, limited by steps": (
        "validation",
        8,
        {"max_steps": 11, "max_epochs": -1},
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody stopped, by settings."""
    done = {}

    def run(**settings):
        key = str(settings)
        if key not in done:
            folder = tmp_path_factory.mktemp("whole")
            done[key] = folder, fit(folder, **settings)[0]
        return done[key]

    return run


@both_signals
@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path, whole, capsys, number, moment):
    where, at, settings = moment
    last = tmp_path / "out" / "last.ckpt"
    _, trainer, raised = fit(tmp_path, Signal(where, at, number), **settings)
    stopped = at + (where == "step")
    assert trainer.global_step == step_in(last) == stopped
    assert raised.code == {signal.SIGINT: 1, signal.SIGTERM: 143}[number]
    if number == signal.SIGINT:
        assert isinstance(raised.__context__, KeyboardInterrupt)
    else:
        assert type(raised) is SIGTERMException
    (line,) = [row for row in capsys.readouterr().err.splitlines() if "to go on" in row]
    assert line.startswith(f"{number.name}: stopped after optimizer step {stopped}; to go on: ")
    assert f"--ckpt_path {last}" in line

    module, trainer, raised = fit(tmp_path, path=last, **settings)
    assert raised is None
    folder, expected = whole(**settings)
    assert_same_end(tmp_path, folder, module, expected)
    done = stopped + 1 if where == "end" else stopped  # one that was begun is made up for
    assert module.validated == [step for step in expected.validated if step >= done]


def test_a_run_can_be_stopped_and_resumed_twice_in_one_epoch(tmp_path, whole):
    """The second time after a validation that was made up for."""
    last = tmp_path / "out" / "last.ckpt"
    settings = {"val_check_interval": 4}
    fit(tmp_path, Signal("validation", 6, signal.SIGINT), **settings)
    fit(tmp_path, Signal("step", 6, signal.SIGTERM), path=last, **settings)
    assert step_in(last) == 7
    module, _, raised = fit(tmp_path, path=last, **settings)
    assert raised is None
    folder, expected = whole(**settings)
    assert_same_end(tmp_path, folder, module, expected)
    assert module.validated == [8, 10, 12]


def test_a_second_ctrl_c_stops_at_once(tmp_path, capsys):
    interrupt = [signal.SIGINT] * 2
    _, trainer, raised = fit(tmp_path, Signal("step", 5, *interrupt), every=2)
    assert raised.code == 1
    assert trainer.global_step == 5
    assert step_in(tmp_path / "out" / "last.ckpt") == 4
    assert "to go on (of step 4): --ckpt_path" in capsys.readouterr().err


def test_a_second_sigterm_does_not_shorten_the_first(tmp_path):
    """Launchers send it to the process and to its group."""
    fit(tmp_path, Signal("step", 5, signal.SIGTERM, signal.SIGTERM))
    assert step_in(tmp_path / "out" / "last.ckpt") == 6


@both_signals
@pytest.mark.parametrize("where", ["sanity", "start"])
def test_before_the_first_step_there_is_nothing_to_write(tmp_path, capsys, number, where):
    _, trainer, raised = fit(tmp_path, Signal(where, 0, number))
    assert raised.code == {signal.SIGINT: 1, signal.SIGTERM: 143}[number]
    assert trainer.global_step == 0
    assert not list((tmp_path / "out").iterdir())
    assert "nothing to resume" in capsys.readouterr().err


def test_before_the_first_step_of_a_resumed_run_its_checkpoint_still_counts(tmp_path, capsys):
    fit(tmp_path, Signal("step", 5, signal.SIGINT))
    path = tmp_path / "first.ckpt"
    (tmp_path / "out" / "last.ckpt").rename(path)
    capsys.readouterr()
    fit(tmp_path, Signal("start", 6, signal.SIGINT), path=path)
    assert f"step 6; to go on: --ckpt_path {path}" in capsys.readouterr().err
    assert not (tmp_path / "out" / "last.ckpt").exists()


def test_a_validation_inside_an_accumulation_window_leaves_the_last_checkpoint(tmp_path):
    """The gradients of the begun window are in no checkpoint."""
    settings = {"val_check_interval": 3, "every": 2}
    _, trainer, _ = fit(tmp_path, Signal("validation", 5, signal.SIGTERM), **settings)
    assert trainer.global_step == 5  # and a half
    assert step_in(tmp_path / "out" / "last.ckpt") == 4


def test_the_validation_after_max_steps_can_be_made_up_for(tmp_path, whole):
    """Lightning resumes nothing at max_steps, so the state from before has to stay."""
    settings = {"max_steps": 11, "max_epochs": -1}
    last = tmp_path / "out" / "last.ckpt"
    fit(tmp_path, Signal("validation", 11, signal.SIGTERM), every=4, **settings)
    assert step_in(last) == 8
    module, _, _ = fit(tmp_path, path=last, **settings)
    folder, expected = whole(**settings)
    assert_same_end(tmp_path, folder, module, expected)


def test_a_complete_run_of_max_steps_has_its_adapter_folder(tmp_path):
    settings = {"max_steps": 6, "max_epochs": -1, "limit_val_batches": 0}
    fit(tmp_path, Signal("step", 5, signal.SIGTERM), **settings)
    assert step_in(tmp_path / "out" / "last.ckpt") == 6
    assert load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")


@both_signals
def test_a_handler_from_before_the_fit_is_called_once_the_step_is_done(tmp_path, number):
    calls, before = [], signal.getsignal(number)
    signal.signal(number, lambda *_: calls.append(step_in(tmp_path / "out" / "last.ckpt")))
    try:
        mine = signal.getsignal(number)
        _, trainer, raised = fit(tmp_path, Signal("step", 5, number), every=4)
        assert signal.getsignal(number) == mine
    finally:
        signal.signal(number, before)
    assert calls == [4]
    assert raised is not None
    assert step_in(tmp_path / "out" / "last.ckpt") == trainer.global_step == 6


class Note(At):
    """Remembers the handlers at a moment."""

    def act(self, trainer):
        self.handlers = {n: signal.getsignal(n) for n in (*STATUS, signal.SIGUSR1)}


def ours(handler):
    return isinstance(getattr(handler, "__self__", None), StopSignals)


def test_the_handlers_are_ours_during_a_fit_alone(tmp_path):
    note = Note("step", 2)
    before = {n: signal.getsignal(n) for n in (*STATUS, signal.SIGUSR1)}
    fit(tmp_path, note, max_epochs=1)
    assert all(ours(note.handlers[number]) for number in STATUS)
    assert {n: signal.getsignal(n) for n in before} == before


def test_the_handlers_are_restored_when_training_fails(tmp_path):
    class Fails(At):
        def act(self, trainer):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, Fails("step", 2))
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("how", ["fast_dev_run", "thread", "save_last", "ignored"])
def test_signals_are_left_alone(tmp_path, how):
    note = Note("step", 0)
    keeper = AdapterCheckpoint(tmp_path / "out", save_last=how != "save_last")
    settings = {"fast_dev_run": 4} if how == "fast_dev_run" else {"max_epochs": 1}
    trainer = make_trainer(tmp_path, note, keeper, accumulate_grad_batches=2, **settings)

    def run():
        trainer.fit(WithDropout(), Batches(BATCHES), Batches(2))

    if how == "ignored":
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            run()
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        finally:
            signal.signal(signal.SIGINT, before)
        assert ours(note.handlers[signal.SIGTERM])
        assert not ours(note.handlers[signal.SIGINT])
        return
    if how == "thread":
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    else:
        run()
    assert note.done
    assert not any(map(ours, note.handlers.values()))


def test_the_requeue_handler_of_slurm_stays(tmp_path):
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    class OneTask(SLURMEnvironment):
        """As on a cluster, with one process."""

        world_size = global_rank = local_rank = node_rank = lambda self: 0
        main_address, main_port, creates_processes_externally = "localhost", 1, True

        def __init__(self):
            super().__init__(auto_requeue=True)

        @staticmethod
        def detect():
            return False

        def validate_settings(self, num_devices, num_nodes):
            pass

    note = Note("step", 2)
    fit(tmp_path, note, max_epochs=1, plugins=[OneTask()])
    assert ours(note.handlers[signal.SIGTERM])
    (requeue,) = note.handlers[signal.SIGUSR1].signal_handlers
    assert requeue.__name__ == "_slurm_sigusr_handler_fn"


# --- the command line ----------------------------------------------------------------------------


def command(root, *more):
    return [
        *("fit", "--config", str(CONFIG), f"--trainer.default_root_dir={root}"),
        *("--data.train_limit=96", "--trainer.max_epochs=2", "--trainer.limit_val_batches=3"),
        *("--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=6"),
        "--trainer.log_every_n_steps=1",
        *("--model.adapter.init_args.dropout=0.1", "--model.adapter.init_args.rank=4"),
        *("--samples.limit=2", "--samples.max_new_tokens=2"),
        *more,
    ]


ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}


def start(folder, words):
    return subprocess.Popen(
        [sys.executable, "-m", "lit_adapters", *words],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # not ignored, as it is in a shell's background jobs
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process):
    """Exit status and standard error."""
    _, text = process.communicate(timeout=300)
    return process.returncode, text


def interrupted(folder, where, at, *numbers):
    """Run until a moment, send the signals, return status and standard error."""
    flag = folder / "now"
    announce = [
        "--trainer.callbacks+=tests.test_interrupt.Announce",
        f"--trainer.callbacks.where={where}",
        f"--trainer.callbacks.at={at}",
        f"--trainer.callbacks.file={flag}",
        f"--trainer.callbacks.signals={len(numbers)}",
    ]
    process = start(folder, command(folder / "runs", *announce))
    while not flag.exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.02)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.3)  # two pending signals of a kind are one
    return finish(process)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, text = finish(start(folder, command(folder / "runs")))
    assert code == 0, text[-3000:]
    return folder


def losses(folder):
    found = {}
    for file in sorted(folder.rglob("metrics.csv")):
        with file.open() as handle:
            for row in csv.DictReader(handle):
                for key in ("train/loss", "val/loss"):
                    if row.get(key):
                        name = row["step"], key
                        assert found.setdefault(name, row[key]) == row[key], name
    return found


@pytest.mark.parametrize(
    ("number", "where", "at"),
    [
        (signal.SIGINT, "step", 4),
        (signal.SIGTERM, "validation", 3),
        pytest.param(signal.SIGTERM, "step", 7, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "validation", 6, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "end", 12, marks=pytest.mark.slow),
    ],
)
def test_the_command_line_says_how_to_go_on_and_does(tmp_path, uninterrupted, number, where, at):
    code, text = interrupted(tmp_path, where, at, number)
    assert code == STATUS[number], text[-3000:]
    stopped = at + (where == "step")
    (last,) = tmp_path.rglob("last.ckpt")
    assert step_in(last) == stopped
    (line,) = [row for row in text.splitlines() if "to go on" in row]
    assert line.startswith(f"{number.name}: stopped after optimizer step {stopped}")
    option, path = line.partition("to go on: ")[2].split()[:2]
    assert (option, path) == ("--ckpt_path", str(last))
    assert "Traceback" not in text

    code, text = finish(start(tmp_path, command(tmp_path / "runs", option, path)))
    assert code == 0, text[-3000:]
    _, resumed = sorted(tmp_path.rglob("version_*"))
    (whole,) = uninterrupted.rglob("version_*")
    weights = Path("checkpoints") / "adapter" / "adapter_model.safetensors"
    lasts = [read(each / "checkpoints" / "last.ckpt") for each in (resumed, whole)]
    tensors = [each["state_dict"] for each in lasts]
    assert lasts[0]["global_step"] == lasts[1]["global_step"] == 12
    assert all(torch.equal(tensors[0][key], value) for key, value in tensors[1].items())
    folders = sorted(tmp_path.rglob("adapter"), key=lambda path: path.stat().st_mtime)
    found, expected = load_file(folders[-1] / weights.name), load_file(whole / weights)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert losses(tmp_path) == losses(uninterrupted)


def test_ctrl_c_twice_ends_the_command_at_once(tmp_path):
    code, text = interrupted(tmp_path, "step", 4, signal.SIGINT, signal.SIGINT)
    assert code == 130, text[-3000:]
    assert not list(tmp_path.rglob("last.ckpt"))
    assert "stopping after this optimizer step" in text
    assert "nothing to resume" in text


@both_signals
def test_a_signal_while_answers_are_generated_does_not_wait(tmp_path, number):
    code, text = interrupted(tmp_path, "start", 0, number)
    assert code == STATUS[number], text[-3000:]
    assert "nothing to resume" in text


@both_signals
def test_a_command_without_a_trainer_ends_with_the_same_status(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-m", "lit_adapters", "generate", "--raw"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    process.stdin.write("One day\n")
    process.stdin.flush()
    assert process.stdout.readline().strip()  # the model is there, and it waits for more
    process.send_signal(number)
    _, text = process.communicate(timeout=120)
    assert process.returncode == STATUS[number], text
    assert "Traceback" not in text


def test_the_overview_names_every_exit_status():
    assert "0 done, 1 error, 2 wrong usage, 130 Ctrl-C (SIGINT), 143 SIGTERM" in OVERVIEW
