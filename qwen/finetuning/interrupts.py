"""Ctrl-C, and a scheduler's SIGTERM, end training at the next step with a checkpoint instead of a loss.

Knows signals and the trainer's callbacks; what a checkpoint holds is the trainer's business.
"""

import os
import signal
import sys
from types import FrameType

from transformers import TrainerCallback

from .processes import any_rank, is_main_process

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SaveOnInterrupt(TrainerCallback):
    """Saves and stops at the end of the step in which a signal arrives; a second signal stops at once.

    Every process asks all others after every step, for a signal may reach them in different steps, and saving is done
    together.
    """

    def __init__(self):
        self.interrupted = False
        self._received = 0  # the first signal
        self._previous: dict = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self._process = os.getpid()
        self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}

    def on_step_end(self, args, state, control, **kwargs):
        if any_rank(self._received > 0, args.device):
            self.interrupted = True
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker of the data loader, forked with this handler: its parent tells it
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        # After Ctrl-C any other stops: of a second one torchrun makes SIGTERM. A first SIGTERM may come twice, from a
        # scheduler and passed on by the launcher.
        if self._received == signal.SIGINT or (self._received and number == signal.SIGINT):
            raise KeyboardInterrupt
        self._received = number
        if is_main_process():
            print("\nStopping after this step, with a checkpoint. Ctrl-C again stops at once.", file=sys.stderr)
