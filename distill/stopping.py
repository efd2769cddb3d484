"""SIGTERM and SIGINT: the first one stops where nothing is lost, a later one kills at once."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

EXIT_CODE = os.EX_TEMPFAIL
"""75, "try again later": what a script that was stopped and can continue exits with."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 1.0
"""Repetitions within this time count as one signal: paddle.distributed.launch sends three, 0.2 s apart."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the work, and what was to be saved is saved. The message is for the user."""


class StopRequest:
    """Within the context, the first SIGTERM or SIGINT is noted in `name`, to be looked at where stopping is safe.

    Contexts may be nested: the innermost one takes the signal. Outside the main thread nothing is caught.

    Args:
        raising: the signal raises `Interrupted` at once, wherever the main thread is.

    Attributes:
        name: of the signal that came, such as "SIGTERM", or None.
    """

    def __init__(self, raising: bool = False):
        self.raising, self.name = raising, None
        self._outer: StopRequest | None = None
        self._previous: dict[signal.Signals, signal.Handlers] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
            owner = getattr(self._previous[signal.SIGTERM], "__self__", None)
            self._outer = owner if isinstance(owner, StopRequest) else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.name is not None and self._outer is None:
            signal.setitimer(signal.ITIMER_REAL, 0)  # Python's exit gives SIGALRM its default back, which kills
        ending = self.name is not None and (self.raising or self._outer is not None)
        if not ending:  # else the process is about to exit, and a repeated signal must not disturb that
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        if self._outer is not None:
            self._outer.name = self.name
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        # The kernel itself shall drop repetitions and then kill: Python's handlers wait for the running operator.
        signal.signal(signal.SIGALRM, _kill_from_now_on)
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
        if self.raising:
            raise Interrupted(f"stopped by {self.name}")


def _kill_from_now_on(number: int, frame: FrameType | None) -> None:
    for each in SIGNALS:
        signal.signal(each, signal.SIG_DFL)
