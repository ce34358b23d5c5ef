"""Settings that mean nothing: the command line names what was probably meant, in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from jsonargparse import ArgumentParser, auto_cli, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lit_adapters import LoRA, attach
from lit_adapters.__main__ import console, main
from lit_adapters.cli import find_checkpoint
from lit_adapters.datamodule import InstructionDataModule
from lit_adapters.module import AdapterFineTuneModule
from lit_adapters.suggestions import ClearErrors, clearer
from tests.models import llama, snapshot

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = [
    "config",
    "model.base",
    "model.lora_plus_ratio",
    "model.optimizer",
    "trainer.max_steps",
    "trainer.max_epochs",
    "data.max_length",
]

# ---------------------------------------------------------------- the words, by themselves


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            "unrecognized arguments: --model.lora_pluss_ratio 4",
            "unknown option '--model.lora_pluss_ratio'; did you mean --model.lora_plus_ratio?",
        ),
        (
            "unrecognized arguments: --model.lora_pluss_ratio=4 --other",
            "unknown option '--model.lora_pluss_ratio'; did you mean --model.lora_plus_ratio?",
        ),
        (
            "Subcommand 'fit' does not accept option 'modle.base'",
            "unknown option 'modle.base'; did you mean model.base?",
        ),
        (
            "Group 'model' does not accept option 'model.bse'",
            "unknown option 'model.bse'; did you mean model.base?",
        ),
        (
            "unrecognized arguments: --optimizer x",
            "unknown option '--optimizer'; did you mean --model.optimizer?",
        ),
        (
            "unrecognized arguments: -zzz",
            "unknown option '--zzz'; did you forget a part of its name? COMMAND --help lists all",
        ),
        (
            "unrecognized arguments: --max_step 4",
            "unknown option '--max_step'; did you mean --trainer.max_steps?",
        ),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(message, line):
    assert clearer(message, OPTIONS) == line


@pytest.mark.parametrize(
    "message",
    [
        "",
        "something else",
        "the following arguments are required: merge.adapter",
        "Errors:\n  - one\n  - two\nGiven value type: x",
        "Option 'x' is not accepted before subcommand fit",
    ],
)
def test_what_is_not_about_a_name_is_left_as_it_is(message):
    assert clearer(message, OPTIONS) == message


# ---------------------------------------------------------------- in the parsers


class TrainingParser(ClearErrors, LightningArgumentParser):
    classes = ("LoRA", "DoRA")


class PlainParser(ClearErrors, ArgumentParser):
    pass


def said(act, capsys):
    """What ``act`` writes before it exits as a wrong usage does: one line and where to look."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        act()
    assert stopped.value.code == 2
    written = capsys.readouterr().err.strip().splitlines()
    assert len(written) == 2, written
    assert written[0].startswith("error: ")
    assert "--help" in written[1]
    return written[0].removeprefix("error: ")


def fit(*words):
    set_parsing_settings(import_path_denylist=["os", "subprocess", "builtins"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lit_adapters", "fit", *map(str, words)])
        LightningCLI(
            AdapterFineTuneModule,
            InstructionDataModule,
            parser_class=TrainingParser,
            parser_kwargs={"allow_abbrev": False},
            seed_everything_default=42,
            auto_configure_optimizers=False,
        )


LORA = ["--model.adapter", "LoRA"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--model.adapter.init_args.rnk", "4"], "--model.adapter LoRA"),
        ([*LORA, "--model.adapter.init_args.rnk", "4"], "option 'rnk'; did you mean rank?"),
        ([*LORA, "--model.adapter.rnk=4"], "model.adapter: lit_adapters.LoRA: unknown option"),
        ([*LORA, "--model.adapter.rank", "eight"], "LoRA: rank must be int, got 'eight'"),
        (
            [*LORA, "--model.adapter.modules_to_save", "lm_head"],
            "LoRA: modules_to_save must be a list, got 'lm_head'; write '[lm_head]', or end the "
            "flag in + to add one entry: modules_to_save+ lm_head",
        ),
        ([*LORA, "--model.adapter.layers", "3"], "LoRA: layers must be a list, got '3'; write"),
        (["--model.adapter", "LoRAA"], "'LoRAA' is unknown; did you mean LoRA"),
        (["--model.lora_pluss_ratio", "4"], "did you mean --model.lora_plus_ratio?"),
        (["--model.lr_scheduler", "cosin"], "'cosin' is unknown; did you mean cosine?"),
        (
            ["--model.gradient_checkpointing", "ful"],
            "gradient_checkpointing: 'ful' is none of bool, none, full, int; did you mean full?",
        ),
        (["--model.gradient_checkpointing=1.5"], "'1.5' is none of bool, none, full, int"),
        (["--trainer.max_step", "4"], "did you mean --trainer.max_steps"),
        (["--data.max_len", "4"], "did you mean --data.max_length?"),
        (["--confg", "x.yaml"], "did you mean --config?"),
        (["--model.dtype=float33"], "model.dtype: 'float33' is none of auto, float32,"),
        (["--data.overlong=drops"], "is none of truncate, truncate-prompt, drop; did you mean dr"),
        (["--model.quantization=nf44"], "model.quantization: 'nf44' is unknown; did you mean nf4?"),
        (["--trainer.precision=bf16-mix"], "bf16-mixed, 32-true"),
        (
            ["--trainer.callbacks+=lit_adapters.GaLore"],
            "trainer.callbacks: lit_adapters.GaLore: the following arguments are required: rank",
        ),
    ],
)
def test_a_mistyped_flag_of_a_training_is_one_line(words, line, capsys):
    assert line in said(lambda: fit(*words), capsys)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("modle:\n  base: tiny\n", "unknown option 'modle.base'; did you mean model.base?"),
        ("model:\n  bse: tiny\n", "unknown option 'model.bse'; did you mean model.base"),
        ("trainer:\n  max_step: 4\n", "did you mean trainer.max_steps"),
        (
            "model:\n  adapter:\n    class_path: lit_adapters.LoRA\n    init_args:\n      rnk: 4\n",
            "model.adapter: lit_adapters.LoRA: unknown option 'rnk'; did you mean rank?",
        ),
        (
            "model:\n  optimizer:\n    class_path: torch.optim.AdamW\n"
            "    init_args:\n      lrr: 4\n",
            "model.optimizer: unknown option 'lrr'; did you mean lr?",
        ),
    ],
    ids=["group", "key", "trainer", "adapter", "optimizer"],
)
def test_a_mistyped_key_of_a_config_is_one_line(text, line, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(text)
    assert line in said(lambda: fit("--config", tmp_path / "bad.yaml"), capsys)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_setting_that_its_class_refuses_is_one_line():
    with pytest.raises(ValueError, match="rank must be") as caught:
        fit(*LORA, "--model.adapter.rank=-1", "--data.val_size=0")
    assert len(str(caught.value).splitlines()) > 3  # what jsonargparse makes of it
    line = "lit_adapters.LoRA: rank must be a positive integer, got rank=-1"
    assert clearer(str(caught.value), ()) == line


def answer(adapter: str | None = None, prompt: str = "") -> None:
    """Stand in for a command without a trainer."""


def test_a_mistyped_flag_of_the_other_commands_is_one_line(capsys):
    def act():
        auto_cli(
            {"generate": answer},
            as_positional=False,
            args=["generate", "--adaptr=x"],
            parser_class=PlainParser,
        )

    assert said(act, capsys) == "unknown option '--adaptr'; did you mean --adapter?"


# ---------------------------------------------------------------- as a user runs it


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model.adapter.rank=999"], ["999", "128", "q_proj", "lower `rank`"]),
        (["--model.adapter.targets=[q_prj, v_proj]"], ["'q_prj'", "q_proj"]),
        (["--data.path=bad.jsonl"], ["bad.jsonl, line 2", "malformed", "correct"]),
        (["--data.path=long.jsonl"], ["long.jsonl (train)", "none of", "truncate-prompt"]),
        (["--data.path=long.jsonl", "--data.max_length=900"], ["601", "512 at most", "max_length"]),
    ],
    ids=["rank", "targets", "malformed", "long", "context"],
)
def test_a_fit_that_cannot_start_says_why_and_writes_no_checkpoint(tmp_path, more, words):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
    record = json.dumps({"prompt": "word " * 299, "completion": "b"})
    (tmp_path / "long.jsonl").write_text("\n".join([record] * 8))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lit_adapters", "fit", "--trainer.accelerator=cpu"),
            *(f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=1", *LORA),
            *("--data.max_length=256", "--data.val_size=1", *more),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in line
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not list(tmp_path.rglob("*.safetensors"))


def typed(*words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lit_adapters", *map(str, words)])
        main()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--init.initialiser=PiSSA", "did you mean lit_adapters.PiSSA?"),
        ("--init.initialiser=MiLora", "did you mean lit_adapters.MiLoRA?"),
        ("--model.adapter=DoRa", "did you mean DoRA"),
    ],
)
def test_a_class_without_its_package_is_answered_with_its_whole_name(flag, line, capsys):
    assert line in said(lambda: typed("fit", flag), capsys)


NOT_NEGATIVE = {
    "--model.learning_rate=-1": r"learning_rate must not be negative, got -1\.0",
    "--model.warmup=-1": r"warmup must be 0 or more steps.*got -1\.0",
    "--trainer.gradient_clip_val=-1": r"gradient_clip_val -1 would turn gradients around",
    "--trainer.accumulate_grad_batches=0": "accumulate_grad_batches 0 is below 1",
    "--samples.limit=-1": "limit -1 is below 0",
    "--model.max_new_tokens=0": "max_new_tokens 0 is below 1",
    "--data.batch_size=0": "batch_size 0 is below 1",
    "--data.streaming=true": "batch_size 0 is below 1",
}


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("flag", NOT_NEGATIVE)
def test_a_number_that_means_nothing_is_refused_before_a_step(flag, tmp_path):
    more = ["--data.batch_size=0", "--data.val_size=1"] if "streaming" in flag else []
    with pytest.raises(ValueError, match=NOT_NEGATIVE[flag]):
        typed(
            *("fit", "--config", ROOT / "configs" / "alpaca_lora.yaml", "--samples.limit=0"),
            *(f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=1"),
            *("--data.train_limit=8", "--trainer.limit_val_batches=0", *more, flag),
        )
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
def test_a_checkpoint_that_is_none_is_said_before_anything_is_loaded(command, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    (tmp_path / "best.ckpt").touch()
    for path, words in {
        "nowhere.ckpt": r"nowhere\.ckpt is not there\. In .* there is best\.ckpt",
        "": r"is a folder\. In .* there is best\.ckpt",
        "adapter": r"adapter is an adapter folder, which generate.* there is best\.ckpt",
        "no/where.ckpt": r"is not there.* no file that ends in \.ckpt",
    }.items():
        with pytest.raises(ValueError, match=words):
            typed(command, f"--ckpt_path={tmp_path / path}")


def test_a_checkpoint_may_be_named_as_shells_leave_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "last.ckpt").touch()
    assert find_checkpoint("~/last.ckpt") == tmp_path / "last.ckpt"
    assert [find_checkpoint(word) for word in ("last", "s3://a/b.ckpt", "registry:a:v1")] == [
        None
    ] * 3


def test_settings_that_do_not_go_together_are_no_traceback(monkeypatch, capsys):
    """Also those that Lightning, or a class that is no fit for another, refuses."""
    for error in (TypeError("no fit"), ImportError("no torch_xla"), MisconfigurationException("0")):
        monkeypatch.setattr("lit_adapters.__main__.main", Mock(side_effect=error))
        with pytest.raises(SystemExit, match=f"^error: {error}\n"):
            console()
    for mistake in (AttributeError("ours"), ZeroDivisionError("ours")):
        monkeypatch.setattr("lit_adapters.__main__.main", Mock(side_effect=mistake))
        with pytest.raises(type(mistake)):
            console()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("samples: null\n", "samples is a group.*null.*switch it off with samples.limit: 0"),
        ("progress: null\n", "switch it off with trainer.enable_progress_bar: false"),
        ("checkpoint: null\n", "checkpoint is a group of settings, got null; leave it out"),
    ],
)
def test_a_group_of_settings_that_is_null_is_named(text, line, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=line):
        typed("fit", "--config", tmp_path / "bad.yaml")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_group_of_settings_that_is_null_in_a_flag_is_named(capsys):
    line = said(lambda: typed("fit", "--samples", "null"), capsys)
    assert line == (
        "samples is a group of settings, and 'null' no file of them; give --samples.NAME=VALUE"
    )


# ---------------------------------------------------------------- in Python


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"targets": "(" * 4000 + "a" + ")" * 4000}, ["nested too deeply", "list name endings"]),
        ({"targets": "q_proj|" * 5000}, ["35000 characters", "at most 20000", "list name"]),
        ({"rank_pattern": {"(" * 4000 + "a" + ")" * 4000: 2}}, ["nested too deeply"]),
        ({"exclude": "q_proj|" * 5000}, ["exclude=", "35000 characters"]),
    ],
    ids=["deep", "long", "deep-pattern", "long-exclude"],
)
def test_a_pattern_that_no_engine_should_be_given_is_refused(settings, words):
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match="=") as caught:
        attach(model, LoRA(rank=2, **settings))
    message = str(caught.value)
    assert len(message) < 600
    for word in words:
        assert word in message
    assert snapshot(model) == before


def test_a_pattern_for_every_module_of_a_large_model_is_no_trouble():
    """As PEFT writes after ranks were chosen by data; each is compiled once."""
    names = [
        f"model.layers.{layer}.{part}_proj" for layer in range(200) for part in ("q", "k", "v")
    ]
    patterns = {name.replace(".", r"\."): 2 for name in names}
    spec = LoRA(rank_pattern=patterns)
    assert [spec.rank_and_scale(name)[0] for name in names[::40]] == [2] * 15
