"""Trainer callbacks: save a checkpoint on Ctrl-C or SIGTERM, and show progress."""

import os
import signal
import sys
from types import FrameType

from tqdm import tqdm
from transformers import TrainerCallback

from .distributed import any_rank, is_main_process

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SaveOnInterrupt(TrainerCallback):
    """Saves a checkpoint and stops after the step in which a signal arrives; a second signal stops at once.

    The processes exchange the flag after every step: a signal may reach them in different steps, and all must save
    together.
    """

    def __init__(self):
        self.interrupted = False
        self._signal = 0  # the first signal; 0 without one
        self._previous_handlers: dict = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self._pid = os.getpid()
        self._previous_handlers = {number: signal.signal(number, self._receive) for number in _SIGNALS}

    def on_step_end(self, args, state, control, **kwargs):
        if any_rank(self._signal > 0, args.device):
            self.interrupted = True
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked data loader worker, which its parent stops
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        # After Ctrl-C any signal stops: torchrun turns a second Ctrl-C into SIGTERM. A first SIGTERM may arrive twice,
        # from a scheduler and forwarded by the launcher.
        if self._signal == signal.SIGINT or (self._signal and number == signal.SIGINT):
            raise KeyboardInterrupt
        self._signal = number
        if is_main_process():
            print("\nStopping after this step, with a checkpoint. Ctrl-C again stops at once.", file=sys.stderr)


class ShowProgress(TrainerCallback):
    """Shows progress on standard error, in the main process only. Replaces the Trainer's own callbacks, which leave a
    copy of the bar behind at every log entry."""

    def __init__(self):
        self._bar: tqdm | None = None
        self._eval_bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and sys.stderr.isatty():
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit=" steps", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not (state.is_world_process_zero and sys.stderr.isatty()):
            return
        if self._eval_bar is None:
            self._eval_bar = tqdm(total=len(eval_dataloader), desc="Evaluating", leave=False, dynamic_ncols=True)
        self._eval_bar.update()

    def on_evaluate(self, args, state, control, **kwargs):
        if self._eval_bar is not None:
            self._eval_bar.close()
            self._eval_bar = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        step = f"step {state.global_step}/{state.max_steps}"
        if "eval_loss" in logs:
            self._write(f"{step}: evaluation: loss {logs['eval_loss']:.4f}, perplexity {logs['eval_perplexity']:.2f}")
        elif "loss" in logs and self._bar is not None:
            self._bar.set_postfix(loss=f"{logs['loss']:.4f}")
        elif "loss" in logs:
            rate, norm = (f"{logs[key]:.3g}" if key in logs else "?" for key in ("learning_rate", "grad_norm"))
            self._write(f"{step}: loss {logs['loss']:.4f}, learning rate {rate}, gradient norm {norm}")

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _write(self, line: str) -> None:
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.write(line, file=sys.stderr)
