"""Signals that end a command: SIGTERM and SIGHUP clean up as Ctrl-C does.

Commands that train have handlers of their own (gpt2c.train.stop), which finish a step first.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from gpt2c.screen.terminal import Terminated

__all__ = ["ended_as_by_ctrl_c"]


@contextmanager
def ended_as_by_ctrl_c() -> Iterator[None]:
    """Turn signals that end the process into `Terminated`, so that no file is left half-written.

    A signal that is ignored, as under nohup, stays ignored.
    """

    def stop(signum: int, frame: object) -> None:
        raise Terminated

    main_thread = threading.current_thread() is threading.main_thread()
    ends = [signal.SIGTERM, signal.SIGHUP] if main_thread else []
    changed = [number for number in ends if signal.getsignal(number) is signal.SIG_DFL]
    for number in changed:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)
