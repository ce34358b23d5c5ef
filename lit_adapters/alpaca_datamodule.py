"""Instruction data in Alpaca's records."""

from typing import Any, Literal

from lit_adapters.datamodule import InstructionDataModule


class AlpacaDataModule(InstructionDataModule):
    """Instruction data whose records have `instruction`, `output` and perhaps `input`."""

    def __init__(
        self,
        path: str | list[str] | dict[str, float] = "tiny",
        format: Literal["alpaca"] = "alpaca",
        **settings: Any,
    ) -> None:
        """Settings only; nothing is read before it is needed.

        Args:
            path: "tiny" (embedded tasks), a file, a folder, a hub id, or several of them, as for
                InstructionDataModule.
            format: Always "alpaca".
            settings: The other arguments of InstructionDataModule.
        """
        super().__init__(path, format, **settings)
