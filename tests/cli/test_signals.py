"""SIGTERM and SIGHUP end a command as Ctrl-C does, and no handler stays behind."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from gpt2c.cli.signals import ended_as_by_ctrl_c
from gpt2c.screen.terminal import Terminated

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")


@pytest.fixture(params=["SIGTERM", "SIGHUP"])
def number(request):
    """Return a signal that has no handler during the test."""
    found = getattr(signal, request.param)
    before = signal.signal(found, signal.SIG_DFL)
    yield found
    signal.signal(found, before)


def test_signal_raises_and_has_no_handler_afterwards(number) -> None:
    with pytest.raises(Terminated), ended_as_by_ctrl_c():
        signal.raise_signal(number)
    assert signal.getsignal(number) is signal.SIG_DFL


def test_signal_that_is_ignored_stays_ignored(number) -> None:
    signal.signal(number, signal.SIG_IGN)
    with ended_as_by_ctrl_c():
        signal.raise_signal(number)
    assert signal.getsignal(number) is signal.SIG_IGN


def test_another_thread_changes_no_handler(number) -> None:
    def within() -> object:
        with ended_as_by_ctrl_c():
            return signal.getsignal(number)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(within).result() is signal.SIG_DFL
