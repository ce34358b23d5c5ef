"""SIGINT and SIGTERM, held back until a fit can stop without losing work."""

import os
import signal
import threading
from types import FrameType
from typing import Any, NoReturn

from lightning.pytorch.utilities.exceptions import SIGTERMException

HANDLED = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Remembers a SIGINT or SIGTERM while ``hold`` is set, and else raises at once.

    A second SIGINT always raises at once; a second SIGTERM is what process groups, launchers and
    schedulers send beside the first, and does nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.hold = False
        self._earlier: dict[signal.Signals, Any] = {}
        self._replaced: dict[signal.Signals, Any] = {}

    def remember_earlier(self) -> None:
        """Note whom to call as well; before Lightning puts its own handler for SIGTERM there."""
        self.received, self.hold = None, False
        self._earlier = {number: signal.getsignal(number) for number in HANDLED}

    def install(self) -> None:
        """Take over, in the main thread; a signal that the process ignores stays ignored.

        To be called after Lightning has registered its handlers, which stop a fit inside an
        accumulation window and with status 0; its teardown then also restores what was before.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in HANDLED:
            present = signal.getsignal(number)
            unknown = present is None or self._earlier.get(number) is None  # set outside Python
            if unknown or signal.SIG_IGN in (present, self._earlier[number]):
                continue
            if present != self._handle:
                self._replaced[number] = present
                signal.signal(number, self._handle)

    def remove(self) -> None:
        """Put back what `install` replaced, unless somebody else has taken over since."""
        for number, handler in self._replaced.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        self._replaced = {}

    def stop(self) -> NoReturn:
        """Call the earlier handler, then raise.

        Raises:
            KeyboardInterrupt: for SIGINT.
            SIGTERMException: for SIGTERM; a SystemExit with status 143.
        """
        number = self.received = self.received or signal.SIGTERM  # or another rank received it
        earlier = self._earlier.get(number)
        if callable(earlier):
            earlier(number, None)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SIGTERMException(128 + number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = self.received is None
        if first:
            self.received = signal.Signals(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        if first and not self.hold:
            self.stop()
        if first:  # not print: the handler may have interrupted one
            text = f"\n{signal.Signals(number).name}: stopping after this optimizer step; "
            os.write(2, f"{text}Ctrl-C stops at once\n".encode())
