"""What a person sees while a loop runs: a bar on a terminal, plain lines elsewhere.

Knows nothing about what runs. Used by train.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import suppress

from tqdm import tqdm


class Progress:
    """Shows a count of steps with figures beside it.

    Parameters
    ----------
    start, total : the first step's number and the last's
    interval : where no one watches, every so many steps are a line
    """

    def __init__(self, start: int, total: int, interval: int) -> None:
        self._interval = interval
        self._total = total
        watched = sys.stdout.isatty()
        layout = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}] {desc} |{bar}|"  # narrow: no bar
        size = shutil.get_terminal_size()  # tqdm draws nothing on terminals that say 0
        self._bar = (
            tqdm(
                initial=start,
                total=total,
                bar_format=layout,
                file=sys.stdout,
                ncols=size.columns,
                nrows=size.lines,
            )
            if watched
            else None
        )

    def step(self, step: int, figures: str) -> None:
        """Show that `step` steps are done."""
        if self._bar is not None:
            self._bar.set_description_str(figures, refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % self._interval == 0 or step == self._total:
            self.line(f"step {step:>{len(str(self._total))}}/{self._total}  {figures}")

    def line(self, text: str) -> None:
        """Show a line that stays."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            with suppress(BrokenPipeError):  # a reader that left (head) must not end the work
                print(text, flush=True)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
