"""Damaged and foreign checkpoints, folders that cannot be written, disks that are full."""

import os
import pickle
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from lit_adapters import (
    AdapterCheckpoint,
    AdapterFineTuneModule,
    DoRA,
    FullFineTuning,
    LoRA,
    PrefixTuning,
    attach,
    load_adapter,
    save_adapter,
)
from lit_adapters.__main__ import console
from lit_adapters.cli import read_checkpoint
from tests.models import llama, logits, shake, snapshot
from tests.test_checkpoint import (
    Batches,
    Foreign,
    ForeignWithHead,
    each_module,
    make_trainer,
    ours,
    read,
    step_in,
)

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "alpaca_lora.yaml"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def written(folder, module, batches=2):
    """The last checkpoint of a short run."""
    make_trainer(folder, AdapterCheckpoint(folder / "out")).fit(module, Batches(batches))
    return folder / "out" / "last.ckpt"


def resume(folder, module, path, **settings):
    trainer = make_trainer(folder, AdapterCheckpoint(folder / "new", **settings), max_epochs=2)
    trainer.fit(module, Batches(2), ckpt_path=path)
    return trainer


# --- files that are no checkpoint ----------------------------------------------------------------


class Runs:
    """What a pickle of somebody with bad intentions does when it is read."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (os.mkdir, (str(self.file),))


def truncated(file, good):
    file.write_bytes(good[: len(good) // 2])


def cut_by_a_byte(file, good):
    file.write_bytes(good[:-1])


def empty(file, good):
    file.write_bytes(b"")


def garbage(file, good):
    file.write_bytes(bytes(range(256)) * 40)


def text(file, good):
    file.write_text("not a checkpoint\n")


def hole(file, good):
    """Zeros, as a file system leaves them after a power cut."""
    file.write_bytes(b"\0" * len(good))


def code(file, good):
    torch.save({"state_dict": {}, "loops": {}, "more": Runs(file.parent / "ran")}, file)


def code_in_an_old_file(file, good):
    torch.save(Runs(file.parent / "ran"), file, _use_new_zipfile_serialization=False)


def weights_alone(file, good):
    torch.save({"lora_A": torch.zeros(2)}, file)


def a_list(file, good):
    torch.save([1, 2], file)


DAMAGE = {
    truncated: "empty, cut off or damaged",
    cut_by_a_byte: "empty, cut off or damaged",
    empty: "empty, cut off or damaged",
    garbage: "is no checkpoint|damaged",
    text: "is no checkpoint|damaged",
    hole: "is no checkpoint|damaged",
    code: "names code to run, which is never done",
    code_in_an_old_file: "names code to run, which is never done",
    weights_alone: r"lacks loops and state_dict\. --ckpt_path takes last\.ckpt",
    a_list: r"lacks loops and state_dict\. --ckpt_path takes last\.ckpt",
}
each_damage = pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return written(tmp_path_factory.mktemp("good"), ours()).read_bytes()


@each_damage
def test_a_file_that_is_no_checkpoint_is_named_with_the_reason(tmp_path, good, damage):
    file = tmp_path / "last.ckpt"
    damage(file, good)
    with pytest.raises(ValueError, match=DAMAGE[damage]) as caught:
        read_checkpoint(file)
    assert str(file) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


def test_a_whole_file_is_read(tmp_path, good):
    file = tmp_path / "last.ckpt"
    file.write_bytes(good)
    assert read_checkpoint(file)["global_step"] == 2


@each_damage
@each_module
def test_a_trainer_refuses_it_and_the_model_stays(tmp_path, good, build, damage):
    file = tmp_path / "last.ckpt"
    damage(file, good)
    module = build()
    before = values(module)
    with pytest.raises(
        (EOFError, OSError, RuntimeError, pickle.UnpicklingError, KeyError, TypeError)
    ):
        resume(tmp_path, module, file)
    assert values_are(module, before)
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "new").iterdir())


def values(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def values_are(module, before):
    """As they were; what was built since, such as ours in configure_model, is as it always is."""
    return all(torch.equal(module.state_dict()[name], value) for name, value in before.items())


def complain(monkeypatch, *words):
    """The message that the command line ends with, run in this process."""
    monkeypatch.setattr(sys, "argv", ["lit_adapters", *map(str, words)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            console()
    finally:
        signal.signal(signal.SIGTERM, before)
    return caught.value.code


@pytest.mark.parametrize("damage", [truncated, empty, garbage, code])
def test_the_command_line_says_it_in_one_line(tmp_path, monkeypatch, good, damage):
    file = tmp_path / "last.ckpt"
    damage(file, good)
    found = complain(
        monkeypatch, "fit", "--config", CONFIG, f"--ckpt_path={file}",
        f"--trainer.default_root_dir={tmp_path / 'runs'}",
    )  # fmt: skip
    assert isinstance(found, str)  # status 1
    first, hint = found.splitlines()
    assert first.startswith(f"error: {file} (")
    assert "Resume from another checkpoint" in first
    assert "LIT_ADAPTERS_TRACEBACK" in hint
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "runs").exists()


# --- checkpoints of something else ---------------------------------------------------------------

OTHERS = {
    "DoRA": (DoRA(rank=4), r"lacks '[\w.]+magnitude'|holds '[\w.]+magnitude'"),
    "Prefix": (PrefixTuning(3), r"lacks|holds"),
    "rank": (LoRA(rank=3), r"was it written with another rank or base"),
    "fewer targets": (LoRA(rank=4, targets=["q_proj"]), r"lacks|holds .*other targets"),
}


@each_module
@pytest.mark.parametrize("direction", ["there", "back"])
@pytest.mark.parametrize(("other", "message"), OTHERS.values(), ids=OTHERS)
def test_a_checkpoint_of_another_adapter_changes_nothing(
    tmp_path, build, other, message, direction
):
    saved, here = (LoRA(rank=4), other) if direction == "there" else (other, LoRA(rank=4))
    path = written(tmp_path, build(saved))
    module = build(here)
    if isinstance(module, AdapterFineTuneModule):
        module.configure_model()
    before = snapshot(module)
    with pytest.raises(ValueError, match=message):
        resume(tmp_path, module, path)
    assert snapshot(module)["state"] == before["state"]
    assert not module._load_state_dict_pre_hooks
    assert not list((tmp_path / "new").iterdir())


def other_base(build, spec=None):
    """The same module over a base of the same shapes and other weights."""
    spec = spec or LoRA(rank=4)
    if build is ours:
        optimizer = lambda groups: torch.optim.AdamW(groups, lr=1e-2)  # noqa: E731
        return AdapterFineTuneModule(llama(seed=1), spec, optimizer=optimizer)
    module = build(spec)
    fresh = llama(seed=1)
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            module.net.get_parameter(name).copy_(parameter)
    return module


@each_module
def test_a_checkpoint_of_another_base_is_refused(tmp_path, build):
    path = written(tmp_path, build())
    module = other_base(build)
    before = values(module)
    recorded = read(path)["base_fingerprint"]
    message = f"last.ckpt was trained on another base .fingerprint {recorded}.*check_base=False"
    with pytest.raises(ValueError, match=message):
        resume(tmp_path, module, path)
    assert values_are(module, before)
    assert not list((tmp_path / "new").iterdir())


@each_module
def test_another_base_can_be_insisted_on(tmp_path, build):
    path = written(tmp_path, build())
    assert resume(tmp_path, other_base(build), path, check_base=False).global_step == 4


@pytest.mark.parametrize("change", ["trained head", "full", "bf16", "old"])
def test_a_base_that_is_the_same_is_not_refused(tmp_path, change):
    """What is trained differs between runs, roundings differ, older files record nothing."""
    if change == "full":
        first, second = (Foreign(FullFineTuning()) for _ in range(2))
        shake(second)
    elif change == "trained head":
        torch.manual_seed(0)
        first = ForeignWithHead()
        torch.manual_seed(1)
        second = ForeignWithHead()
    else:
        first, second = Foreign(), Foreign()
    if change == "bf16":
        with torch.no_grad():
            for parameter in second.parameters():
                if not parameter.requires_grad:
                    parameter.copy_(parameter.to(torch.bfloat16))
    path = written(tmp_path, first)
    if change == "old":
        checkpoint = read(path)
        del checkpoint["base_fingerprint"]
        torch.save(checkpoint, path)
    assert resume(tmp_path, second, path).global_step == 4


def test_the_fingerprint_is_that_of_before_training(tmp_path):
    """A layer that a schedule unfreezes has moved by the end."""

    class Unfreezes(Foreign):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                head = self.net.get_parameter("lm_head.weight")
                head.requires_grad_(True)
                with torch.no_grad():
                    head.add_(1)

    first = Unfreezes()
    trainer = make_trainer(tmp_path, AdapterCheckpoint(tmp_path / "out"), max_epochs=2)
    trainer.fit(first, Batches(2))
    fresh = Foreign()
    checkpoint = read(tmp_path / "out" / "last.ckpt")
    assert checkpoint["base_fingerprint"] == read(written(tmp_path, fresh))["base_fingerprint"]


def test_a_module_may_load_its_own_weights_while_it_is_built(tmp_path):
    """Only the checkpoint that a trainer loads is compared."""

    class LoadsBase(Foreign):
        def configure_model(self):
            self.load_state_dict({"net.lm_head.weight": torch.ones_like(self.net.lm_head.weight)},
                                 strict=False)  # fmt: skip

    path = written(tmp_path, LoadsBase())
    assert resume(tmp_path, LoadsBase(), path).global_step == 4


# --- folders that cannot be written --------------------------------------------------------------


def below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "out"


def read_only(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    return folder


unwritable = pytest.mark.parametrize(
    "place",
    [
        below_a_file,
        pytest.param(
            read_only,
            marks=pytest.mark.skipif(
                not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere"
            ),
        ),
    ],
)


@unwritable
def test_an_unwritable_folder_is_noticed_before_training(tmp_path, place):
    folder = place(tmp_path)
    trainer = make_trainer(tmp_path, AdapterCheckpoint(folder))
    message = "cannot write checkpoints into .*--checkpoint.dirpath"
    with pytest.raises(OSError, match=message) as caught:
        trainer.fit(ours(), Batches(2))
    assert str(folder) in str(caught.value)
    assert trainer.global_step == 0


@unwritable
def test_an_adapter_saved_into_an_unwritable_folder_names_it(tmp_path, place):
    folder = place(tmp_path)
    model = llama()
    attach(model, LoRA(rank=2))
    before = snapshot(model)
    message = "cannot write the adapter folder .*no adapter is there"
    with pytest.raises(OSError, match=message) as caught:
        save_adapter(model, folder)
    assert str(folder) in str(caught.value)
    assert snapshot(model) == before


@unwritable
@pytest.mark.parametrize("option", ["--trainer.default_root_dir", "--checkpoint.dirpath"])
def test_the_command_line_names_the_unwritable_folder(tmp_path, monkeypatch, place, option):
    folder = place(tmp_path)
    root = f"--trainer.default_root_dir={tmp_path / 'runs'}"
    found = complain(
        monkeypatch, "fit", "--config", CONFIG, root, f"{option}={folder}",
        "--data.train_limit=16", "--samples.limit=0",
    )  # fmt: skip
    first, _ = found.splitlines()
    assert "cannot write checkpoints into" in first
    assert str(folder) in first
    assert "Choose another folder" in first


# --- a full disk ---------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A file system of a few hundred kilobytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "none", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder):
    """Leave nothing free."""
    with suppress(OSError), (folder / "filler").open("wb", buffering=0) as handle:
        while handle.write(b"x" * 4096):
            pass


class Fills(Callback):
    """Leaves no room from a step on."""

    def __init__(self, folder, step):
        self.folder = folder
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            fill(self.folder)


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@each_module
def test_a_full_disk_leaves_the_checkpoint_from_before(tmp_path, disk, build):
    path = written(disk, build())
    before = tree(disk / "out")
    module = build()
    callback = AdapterCheckpoint(disk / "out", every_n_train_steps=1)
    trainer = make_trainer(tmp_path, Fills(disk, step=2), callback, max_epochs=2)
    with pytest.raises(OSError, match="No space left on device; the file from before is whole"):
        trainer.fit(module, Batches(2), ckpt_path=path)
    (disk / "filler").unlink()
    assert trainer.global_step == 3  # the first of this run
    assert tree(disk / "out") == before
    assert step_in(path) == 2
    resume(tmp_path, build(), path)


def test_a_full_disk_leaves_the_adapter_from_before(disk):
    model = llama()
    attach(model, LoRA(rank=4))
    save_adapter(shake(model), disk / "adapter")
    before, expected = tree(disk), logits(model)
    shake(model, seed=2)
    held = snapshot(model)
    message = "cannot write the adapter folder .*the adapter from before is whole"
    fill(disk)
    with pytest.raises(OSError, match=message) as caught:
        save_adapter(model, disk / "adapter")
    (disk / "filler").unlink()
    assert "space" in str(caught.value)
    assert snapshot(model) == held
    assert tree(disk) == before
    assert not [path for path in disk.rglob("*") if path.name.startswith(".")]
    fresh = llama()
    load_adapter(fresh, disk / "adapter")
    assert torch.equal(logits(fresh), expected)


def test_the_command_line_says_what_could_not_be_written(tmp_path, disk):
    """Torch's and Lightning's own words for it are pages long."""
    words = [
        "fit", "--config", str(CONFIG), f"--trainer.default_root_dir={tmp_path / 'runs'}",
        f"--checkpoint.dirpath={disk}", "--data.train_limit=16", "--samples.limit=0",
        "--trainer.limit_val_batches=0", "--trainer.max_steps=2",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                   "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}  # fmt: skip
    left = set(tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-m", "lit_adapters", *words],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [row for row in done.stderr.splitlines() if row.startswith("error:")]
    assert f"cannot write the checkpoint {disk / 'last.ckpt'}: No space left on device" in line
    assert "no file is there" in line
    assert not list(disk.iterdir())
    assert {path.name for path in set(tmp_path.iterdir()) - left} <= {"runs"}
