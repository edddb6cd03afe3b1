"""Signals that ask a run to stop and be resumed later: SIGTERM, SIGHUP, and SIGUSR1, which clusters send before time is
up.

No torch: they are handled before it is imported, so that a signal never finds a run unprepared.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Preempted(BaseException):  # not an Exception: a library must not swallow it with its errors
    """Raised where a run stops because of a signal, after its state is saved."""


class Interrupts:
    """The signals of this process.

    Attributes:
        asked: The first signal that came, or None.
        waits: Whether a signal is only noted, because a step or a file must be finished; else it raises `Preempted`.
        ends_process: Whether the process ends with the command, so that signals during its shutdown are ignored.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.waits = False
        self.ends_process = False
        self._old: dict[signal.Signals, Any] = {}

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Handle the signals while a command lasts. May be nested.

        Raises:
            Preempted: If a signal came before and its exception was swallowed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        outermost = not self._old
        if outermost:  # an ignored SIGHUP (nohup) stays ignored
            handlers = {number: signal.getsignal(number) for number in _signals()}
            self._old = {number: old for number, old in handlers.items() if old is not signal.SIG_IGN}
        self.take_again()
        try:
            if self.asked is not None and not self.waits:
                raise Preempted
            yield
        finally:
            self.waits = True
            if outermost:
                for number, handler in self._old.items():
                    after = signal.SIG_DFL if handler is None else handler
                    signal.signal(number, signal.SIG_IGN if self.ends_process else after)
                self._old, self.asked, self.waits = {}, None, False

    def take_again(self) -> None:
        """Install the handlers again, after a library has replaced them."""
        for number in self._old:
            signal.signal(number, self._ask)

    def shield(self) -> None:
        """Let no signal, ctrl-C included, interrupt what remains of a command."""
        self.waits = True
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _ask(self, number: int, _: Any) -> None:
        first, self.asked = self.asked is None, self.asked or signal.Signals(number)
        if first and not self.waits:  # a second one would interrupt the end of the run
            raise Preempted

    def print_stopped_early(self) -> None:
        """Print that the run stopped before there was anything to save."""
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once for all processes of a run
            name = self.asked.name if self.asked else "a signal"
            sys.stdout.write(
                f"Stopped by {name} before training; nothing to save yet\nContinue with the same command and --resume\n"
            )
            sys.stdout.flush()


INTERRUPTS = Interrupts()


def ignore_from_now_on() -> None:
    """Ignore the signals and ctrl-C: a process that has finished its work must not look killed while it shuts down."""
    for number in (*_signals(), signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _signals() -> list[signal.Signals]:
    names = ("SIGTERM", "SIGHUP", "SIGUSR1")  # Windows has the first only
    return [getattr(signal, name) for name in names if hasattr(signal, name)]
