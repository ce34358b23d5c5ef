"""``check``: would this fit run on those devices, and what would each of them hold?"""

import json
import sys
from typing import Any, Literal

from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from lit_adapters.check.findings import examine
from lit_adapters.check.table import as_json, show
from lit_adapters.cli import CALLBACKS
from lit_adapters.estimate.command import WIDTH, EstimateCLI, parse_size, training_of

STRATEGIES = {
    "ddp": "ddp",
    "fsdp": "fsdp",
    "fsdp2": {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"},
}


class CheckCLI(EstimateCLI):
    """Reads what `fit` reads, and says what would become of it."""

    prog = "lit_adapters check"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add short names of what is asked most."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--devices", type=int | None, default=None, help="of each node")
        parser.add_argument("--num_nodes", type=int | None, default=None, help="machines")
        parser.add_argument(
            "--strategy",
            type=Literal["ddp", "fsdp", "fsdp2"] | None,
            default=None,
            help="instead of trainer.strategy",
        )

    def instantiate_classes(self) -> None:
        """Examine instead of building a trainer."""
        self.demand_base()
        said = {name: self.config[name] for name in ("devices", "num_nodes")}
        said["strategy"] = STRATEGIES.get(self.config.strategy)
        given = {name: value for name, value in said.items() if value is not None}
        if given:
            self.config = self.parser.parse_object({"trainer": given}, self.config)
        memory = None if self.config.memory is None else parse_size(self.config.memory)
        settings = self.parser.instantiate_classes(self.config)
        own: list[Callback] = [settings[name] for name in CALLBACKS]
        found = examine(
            settings.trainer.as_dict(),
            own,
            training_of(settings, meant_device(settings)),
            settings.data,
            memory,
        )
        if settings.json:
            print(json.dumps(as_json(found), indent=2))
        else:
            console = Console()
            if not console.is_terminal:
                console.width = WIDTH
            show(found, console)
        if found.problems:
            sys.exit(1)


def meant_device(settings: Any) -> str:
    """Return cpu if that is said anywhere; else cuda, which need not be here."""
    said = {str(settings.device), str(settings.trainer.accelerator)}
    return "cpu" if "cpu" in said else "cuda"
