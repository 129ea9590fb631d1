"""Signals that stop a run: SIGTERM, SIGUSR1 and Ctrl-C.

Outside the training loop the process exits at once. Between `defer()` and `act_at_once()` a signal only
sets a flag, so that the loop can finish its step, agree with the other ranks, and save."""

import os
import signal
import sys

STOP_SIGNALS = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
EXIT_CODE = 128 + signal.SIGTERM

_requested = _deferred = False


def install() -> None:
    """Handle the stop signals in this process."""
    for number in STOP_SIGNALS:
        signal.signal(number, _on_signal)


def stop_requested() -> bool:
    """Return whether this process has received a stop signal."""
    return _requested


def defer() -> None:
    """Let signals only set the flag, from the first training step on."""
    global _deferred
    _deferred = True


def act_at_once() -> None:
    """Let signals end the process at once, when everything is saved; also one that arrived in the
    meantime."""
    global _deferred
    _deferred = False
    if _requested:
        exit_after_save()


def exit_after_save() -> None:
    """Exit with the code of a stopped run."""
    print("stopped by a signal", file=sys.stderr, flush=True)
    sys.exit(EXIT_CODE)


def _on_signal(number, _) -> None:
    global _requested
    _requested = True
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)  # a second Ctrl-C ends the process at once
    if not _deferred:
        print(f"stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)  # sys.exit would wait for collectives that are under way
