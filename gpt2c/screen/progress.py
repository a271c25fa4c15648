"""Progress of a loop: a bar on a terminal, plain lines elsewhere.

Knows nothing about what runs.
"""

from __future__ import annotations

import shutil
import sys
import time
from contextlib import suppress
from typing import Any

from tqdm import tqdm

__all__ = ["Progress", "Reading"]

# Errors of a terminal or reader that is gone, a full disk, or a stream that is closed or cannot
# encode a character. None of them may end the work that is shown.
_UNSHOWN = (OSError, ValueError)
_QUICK = 0.5  # seconds: a shorter reading shows no bar
_BETWEEN = 10.0  # seconds from one line of a reading to the next
_EACH = 0.1  # seconds from one update of a bar to the next


class _Bar(tqdm):  # type: ignore[misc]
    monitor_interval = 0  # no monitor thread: nothing would catch its errors


def _bar(**options: Any) -> _Bar | None:
    """Return a bar on standard output, None if that is not a terminal."""
    size = shutil.get_terminal_size()  # tqdm draws nothing on a terminal that reports 0
    with suppress(*_UNSHOWN):
        if sys.stdout is not None and sys.stdout.isatty():
            return _Bar(file=sys.stdout, ncols=size.columns, nrows=size.lines, **options)
    return None


class Progress:
    """Shows a count of steps, or of other work, with figures beside it.

    Output that fails is dropped.

    Parameters
    ----------
    start, total : the number of the first step and of the last
    interval : steps from one line to the next where there is no terminal
    noun : the word for a step in a line
    """

    def __init__(self, start: int, total: int, interval: int, noun: str = "step") -> None:
        self._interval, self._noun = interval, noun
        self._start, self._total = start, total
        self._began = time.monotonic()
        layout = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}] {desc} |{bar}|"  # narrow: no bar
        self._bar = _bar(initial=start, total=total, bar_format=layout)

    def step(self, step: int, figures: str) -> bool:
        """Show that `step` steps are done; return whether `figures` were printed as a line."""
        if self._bar is not None:
            with suppress(*_UNSHOWN):
                self._bar.set_description_str(figures, refresh=False)
                self._bar.update(step - self._bar.n)
            return False
        if step % self._interval and step != self._total:
            return False
        pace = (time.monotonic() - self._began) / max(1, step - self._start)
        left = pace * (self._total - step)
        until = f"  {tqdm.format_interval(left)} left" if step < self._total else ""
        number = f"{step:>{len(str(self._total))}}/{self._total}"
        self.line(f"{self._noun} {number}  {figures}{until}")
        return True

    def line(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        with suppress(*_UNSHOWN):
            if self._bar is not None:
                self._bar.write(text, file=sys.stdout)
            else:
                print(text, flush=True)

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            with suppress(*_UNSHOWN):
                self._bar.close()


class Reading:
    """Shows the progress of readings, one after another, by a bar or by a line now and then.

    A short reading is not shown. Output that fails is dropped.
    """

    def __init__(self) -> None:
        self._name = "reading"
        self._bar: _Bar | None = None
        self._done = 0
        self._began = self._due = 0.0
        self._shown = False

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def stage(self, name: str) -> None:
        """Set the name of the next readings."""
        self.close()
        self._name = name

    def read(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are read; `total` is 0 if it is unknown.

        Fewer bytes than before begin a new reading.
        """
        now = time.monotonic()
        if not self._began or done < self._done:
            self._begin(now, total)
        is_last = self._done < done == total
        self._done = done
        if now < self._due and not (self._shown and is_last):
            return
        self._shown = True
        if self._bar is not None:
            self._due = now + _EACH
            with suppress(*_UNSHOWN):
                self._bar.update(done - self._bar.n)
            return
        self._due = now + _BETWEEN
        left = (now - self._began) / max(1, done) * (total - done)
        of = f" of {total / 1e6:,.0f}" if total else ""
        until = f"  {tqdm.format_interval(left)} left" if done < total else ""
        with suppress(*_UNSHOWN):
            print(f"{self._name}: {done / 1e6:,.0f}{of} MB{until}", flush=True)

    def _begin(self, now: float, total: int) -> None:
        self.close()
        layout = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}] |{bar}|"
        self._bar = _bar(
            desc=self._name,
            total=total or None,
            bar_format=layout,
            unit="B",
            unit_scale=True,
            delay=_QUICK,
        )
        self._began = now
        self._due = now + (_BETWEEN if self._bar is None else _QUICK)

    def close(self) -> None:
        """End the reading."""
        if self._bar is not None:
            with suppress(*_UNSHOWN):
                self._bar.close()
        self._bar, self._shown, self._began, self._done = None, False, 0.0, 0
