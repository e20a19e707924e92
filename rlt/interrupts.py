# SPDX-License-Identifier: MIT
"""SIGTERM and Ctrl-C while a training loop runs: the first one means save and stop, the second stops at once."""

import os
import signal
import threading
import time

from rlt.distributed import WORLD

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def exit_code(number):
    """What a shell shows of a process that a signal has ended: 143 for SIGTERM, 130 for Ctrl-C."""
    return 128 + number


class StopSignals:
    """`with StopSignals(stop) as signals:` inside, the first signal sets signals.received, 0 before, to its number and
    calls stop(number), in the main thread between any two lines of Python; the second ends the process."""

    def __init__(self, stop):
        self.stop, self.received = stop, 0

    def __enter__(self):
        self.pid, self.before = os.getpid(), {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if os.getpid() != self.pid:  # a forked child has this handler, too
            os._exit(exit_code(number))
        if self.received:
            if WORLD == 1 or time.monotonic() - self.since > 1:  # torchrun and a terminal may both send the first one
                os._exit(exit_code(number))
            return
        self.received, self.since = number, time.monotonic()
        self.stop(number)
