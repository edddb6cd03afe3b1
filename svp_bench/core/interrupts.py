"""Signals that ask a run to stop and to go on later: SIGTERM, and SIGUSR1, which clusters send before time is up.

No torch: they are taken before it is imported, so that a signal never finds a run unprepared.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["INTERRUPTS", "Interrupts", "Preempted", "ignore_from_now_on"]


class Preempted(BaseException):  # not an error, and nothing that a library may swallow with its errors
    """Raised where a run stops because a signal asked for it; what there was to save is saved."""


class Interrupts:
    """The signals of this process.

    Attributes:
        asked: The signal that came first, or None.
        waits: Whether a signal is only noted, since something must not be cut in two; else it raises `Preempted`.
        ends_process: Whether the process ends with the command: its last moments belong to no signal either.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.waits = False
        self.ends_process = False
        self._old: dict[signal.Signals, Any] = {}

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take the signals while a command lasts. May be nested; behind the innermost block they are only noted.

        Raises:
            Preempted: If one came before, and whoever ran then swallowed it.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        outermost = not self._old
        if outermost:
            self._old = {number: signal.getsignal(number) for number in _signals()}
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
        """Take the signals back from a library that has taken them meanwhile."""
        for number in self._old:
            signal.signal(number, self._ask)

    def _ask(self, number: int, _: Any) -> None:
        self.asked = self.asked or signal.Signals(number)
        if not self.waits:
            raise Preempted

    def say_stopped_early(self) -> None:
        """Say that there was nothing to save yet."""
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of the processes of a run, one speaks
            name = self.asked.name if self.asked else "a signal"
            sys.stdout.write(
                f"Stopped by {name} before training; nothing to save yet\nGo on: the same command with --resume\n"
            )
            sys.stdout.flush()


INTERRUPTS = Interrupts()


def ignore_from_now_on() -> None:
    """Let no signal make a process look killed that has done its work and is shutting down."""
    for number in _signals():
        signal.signal(number, signal.SIG_IGN)


def _signals() -> list[signal.Signals]:
    return [signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
