"""The trainer's half of the command line: LightningCLI with our module, data and callbacks."""

import logging
import os
import sys
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    ModelSummary,
    ProgressBar,
    RichModelSummary,
    RichProgressBar,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lit_adapters.adapters import METHODS
from lit_adapters.callbacks import (
    AdapterCheckpoint,
    InitAdapters,
    PredictionWriter,
    RunReport,
    SampleGenerations,
)
from lit_adapters.callbacks.files import check_writable
from lit_adapters.datamodule import InstructionDataModule
from lit_adapters.initialisers import (
    Gaussian,
    Kaiming,
    LoftQ,
    LoRAGA,
    MiLoRA,
    OLoRA,
    PiSSA,
    QPiSSA,
)
from lit_adapters.metrics import TextMetric
from lit_adapters.module import AdapterFineTuneModule
from lit_adapters.saved_settings import trusted_settings
from lit_adapters.suggestions import ClearErrors
from lit_adapters.weights import hush

# Under keys of their own, so that a `trainer.callbacks` list adds to them instead of replacing.
CALLBACKS = {
    "init": InitAdapters,
    "checkpoint": AdapterCheckpoint,
    "samples": SampleGenerations,
    "predictions": PredictionWriter,
    "progress": RichProgressBar,
    "summary": RichModelSummary,
    "report": RunReport,
}
SWITCHED_OFF = {
    "samples": "samples.limit: 0",
    "progress": "trainer.enable_progress_bar: false",
    "summary": "trainer.enable_model_summary: false",
}
STARTS = (Gaussian, Kaiming, LoftQ, LoRAGA, MiLoRA, OLoRA, PiSSA, QPiSSA)
FOUND_BY_LIGHTNING = ("best", "last", "hpc", "registry")


class TrainingParser(ClearErrors, LightningArgumentParser):
    """LightningCLI's parser, with errors of one line."""

    # An initialiser is found by its whole name alone: it is no subclass, but has the signature.
    classes = (
        *(method.__name__ for method in METHODS),
        *(f"lit_adapters.{start.__name__}" for start in STARTS),
    )


class AdapterCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict``."""

    def __init__(self, args: list[str] | None = None, run: bool = True) -> None:
        _hush()
        self._words = sys.argv[1:] if args is None else args
        # Only warned about unless set; then jsonargparse's own list of dangerous calls is enforced.
        set_parsing_settings(import_path_denylist=["os", "subprocess", "builtins"])
        super().__init__(
            AdapterFineTuneModule,
            InstructionDataModule,
            args=args,
            run=run,
            seed_everything_default=42,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,  # the model does not exist yet when the CLI would
            parser_class=TrainingParser,
            # Abbreviations would take --trainer.max_step for max_steps, and mistakes for meaning.
            parser_kwargs={"prog": "lit_adapters", "allow_abbrev": False},
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the one that is asked for: the parser of each takes a tenth of a second."""
        every = LightningCLI.subcommands()
        word = next(iter(self._words), "")
        return {word: every[word]} if word in every else every

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give each standard callback its own group of flags."""
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        parser.add_argument(
            "--metrics",
            type=list[TextMetric] | None,
            default=None,
            help="Scores of generated answers besides exact match, as lit_adapters.metrics.ROUGE.",
        )

    def before_instantiate_classes(self) -> None:
        """Let `metrics` be those of every callback that has not been given its own.

        A link of arguments would be broken by parsing without defaults, as a resume does.
        """
        config = self.config[self.subcommand] if self.subcommand else self.config
        for key in CALLBACKS:
            if key in config and config[key] is None:
                off = SWITCHED_OFF.get(key)
                raise ValueError(
                    f"{key} is a group of settings, got null; leave it out for its defaults"
                    + (f", or switch it off with {off}" if off else "")
                )
        for key in ("samples", "predictions"):
            if config[key].metrics is None:
                config[key].metrics = config.metrics

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to TensorBoard and CSV side by side unless the config says otherwise."""
        chosen = self._get(self.config_init, "trainer.logger")
        if chosen in (None, True):
            root = self._get(self.config_init, "trainer.default_root_dir") or Path.cwd()
            board = TensorBoardLogger(root)
            kwargs["logger"] = [board, CSVLogger(root, version=board.version)]
        trainer = super().instantiate_trainer(**kwargs)
        if trainer.accumulate_grad_batches < 1:  # Lightning would divide by it
            raise ValueError(
                f"trainer.accumulate_grad_batches {trainer.accumulate_grad_batches} is below 1; "
                "give the number of batches of an optimizer step"
            )
        return trainer

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Leave out the bar and the summary if they are switched off, as Lightning's own are."""
        off: tuple[type[Callback], ...] = ()
        if config.get("enable_progress_bar") is False:
            off += (ProgressBar,)
        if config.get("enable_model_summary") is False:
            off += (ModelSummary,)
        wanted = [callback for callback in callbacks if not isinstance(callback, off)]
        return super()._instantiate_trainer(config, wanted)

    def before_fit(self) -> None:
        """Make a resume visible to callbacks while the model is being set up."""
        config = self.config_init["fit"]
        if self.trainer.is_global_zero and not getattr(self.trainer, "fast_dev_run", False):
            check_writable(Path(self.trainer.default_root_dir))  # loggers say it less clearly
        if Path(config.get("ckpt_path") or "").is_file():  # "last" and the like are Lightning's
            self.trainer.ckpt_path = config.pop("ckpt_path")

    def _parse_ckpt_path(self) -> None:
        """Fill in a checkpoint's hyper-parameters below what config files and flags say.

        Lightning puts them above, so that ``--model.adapter.init_args.rank 99`` is silently
        ignored, and imports whatever class a checkpoint names; here names come from our own list.
        """
        name = self.config.get("subcommand")
        given = self.config[name].get("ckpt_path") if name else None
        path = find_checkpoint(given) if given else None
        if path is None:
            return
        self.config[name]["ckpt_path"] = str(path)
        if path.is_dir():  # of several files, which hold no settings
            return
        checkpoint = read_checkpoint(path)
        saved = trusted_settings(checkpoint.get("hyper_parameters", {}))
        model = self.parser.parse_args(self._arguments, defaults=False)[name].get("model")
        said = model.as_dict() if model else {}
        settings = {name: {"model": _laid_over(saved, said)}}
        self.config = self.parser.parse_object(settings, self.config)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Keep the raw arguments, to tell what was said from what is a default."""
        self._arguments = args
        super().parse_arguments(parser, args)


def find_checkpoint(given: str) -> Path | None:
    """Return the file or files that ``--ckpt_path`` means; None where Lightning is to find it.

    Raises:
        ValueError: if there is no such file.
    """
    path = Path(given).expanduser()  # shells leave the ~ of --ckpt_path=~/last.ckpt
    if path.is_file():
        return path
    if (path / ".metadata").exists():  # it is of several files
        return path
    if given in FOUND_BY_LIGHTNING or given.startswith("registry:") or "://" in given:
        return None
    is_adapter = (path / "adapter_config.json").exists()
    folder = path if path.is_dir() and not is_adapter else path.parent
    files = ", ".join(sorted(file.name for file in folder.glob("*.ckpt")))
    what = "is a folder" if path.is_dir() else "is not there"
    if is_adapter:
        what = "is an adapter folder, which generate, merge and export take"
    raise ValueError(
        f"--ckpt_path takes a trainer checkpoint, last.ckpt or best.ckpt of a fit, and {given} "
        f"{what}. In {folder} there is {files or 'no file that ends in .ckpt'}"
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what a trainer checkpoint holds; nothing in it is run.

    Raises:
        ValueError: if it is none, or only the beginning of one.
    """
    size = path.stat().st_size
    remedy = "Resume from another checkpoint, such as best.ckpt beside it, or start again"
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a format that is none of ours
            checkpoint = torch.load(file, weights_only=True, map_location="cpu")
    except UnpicklingError as error:
        refused = "GLOBAL" in str(error)
        what = "names code to run, which is never done" if refused else "is no checkpoint"
        reason = str(error).rpartition("following error: ")[2].split(". ")[0].splitlines()[0]
        raise ValueError(f"{path} ({size} bytes) {what}: {reason}. {remedy}") from error
    except (EOFError, OSError, RuntimeError, KeyError, ValueError) as error:  # as torch says it
        raise ValueError(
            f"{path} ({size} bytes) is empty, cut off or damaged: no whole checkpoint can be read "
            f"from it. {remedy}"
        ) from error
    found = checkpoint if isinstance(checkpoint, dict) else {}
    missing = sorted({"state_dict", "loops"} - found.keys())
    if missing:
        raise ValueError(
            f"{path} is no trainer checkpoint: it lacks {' and '.join(missing)}. --ckpt_path takes "
            "last.ckpt or best.ckpt of a fit; an adapter folder goes to generate, merge and export"
        )
    return found


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge nested settings; a class that is named above replaces the whole one below."""
    if above.get("class_path", below.get("class_path")) != below.get("class_path"):
        return above
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = _laid_over(below[key], above[key])
    return merged


def _hush() -> None:
    """Silence what third parties say about our own, intended use of them."""
    hush()  # before a class path imports bitsandbytes
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # LightningCLI's calls
    for message in (
        ".*Experiment logs directory .* exists and is not empty",  # TensorBoard writes there too
        ".*LeafSpec.* is deprecated",  # lightning 2.6 with torch 2.13
        ".*does not have many workers",  # batches are ready in memory
    ):
        warnings.filterwarnings("ignore", message)

    def wanted(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "litlogger" not in text and "model summary callbacks" not in text

    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(wanted)
