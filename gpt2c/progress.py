"""What a person sees while a loop runs: a bar on a terminal, plain lines elsewhere.

Knows nothing about what runs. Used by train and cli_eval.
"""

from __future__ import annotations

import shutil
import sys
import time
from contextlib import suppress

from tqdm import tqdm

# What a terminal says that has gone, a reader that left, a full disk, a stream that was closed or
# cannot encode a character. None of it may end the work that is shown.
_UNSHOWN = (OSError, ValueError)


class _Bar(tqdm):  # type: ignore[misc]
    monitor_interval = 0  # no thread, whose errors nobody would catch


class Progress:
    """Shows a count of steps, or of other work, with figures beside it.

    What cannot be shown is dropped.

    Parameters
    ----------
    start, total : the first step's number and the last's
    interval : where no one watches, every so many steps are a line
    noun : what a line calls a step
    """

    def __init__(self, start: int, total: int, interval: int, noun: str = "step") -> None:
        self._interval, self._noun = interval, noun
        self._start, self._total = start, total
        self._began = time.monotonic()
        layout = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}] {desc} |{bar}|"  # narrow: no bar
        size = shutil.get_terminal_size()  # tqdm draws nothing on terminals that say 0
        self._bar: _Bar | None = None
        with suppress(*_UNSHOWN):
            if sys.stdout is not None and sys.stdout.isatty():
                self._bar = _Bar(
                    initial=start,
                    total=total,
                    bar_format=layout,
                    file=sys.stdout,
                    ncols=size.columns,
                    nrows=size.lines,
                )

    def step(self, step: int, figures: str) -> bool:
        """Show that `step` steps are done; return whether their figures are a line that stays."""
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
        """Show a line that stays."""
        with suppress(*_UNSHOWN):
            if self._bar is not None:
                self._bar.write(text, file=sys.stdout)
            else:
                print(text, flush=True)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            with suppress(*_UNSHOWN):
                self._bar.close()
