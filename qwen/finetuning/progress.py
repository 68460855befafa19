"""What a person sees while a model trains: one bar on a terminal, a line for each logged step elsewhere."""

import sys

from tqdm import tqdm
from transformers import TrainerCallback


class ShowProgress(TrainerCallback):
    """Writes to standard error, in the main process only. Takes the place of the Trainer's own callbacks, which leave
    a copy of the bar behind every log entry."""

    def __init__(self):
        self._bar: tqdm | None = None
        self._evaluation: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and sys.stderr.isatty():
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit=" steps", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not (state.is_world_process_zero and sys.stderr.isatty()):
            return
        if self._evaluation is None:
            self._evaluation = tqdm(total=len(eval_dataloader), desc="Evaluating", leave=False, dynamic_ncols=True)
        self._evaluation.update()

    def on_evaluate(self, args, state, control, **kwargs):
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        place = f"step {state.global_step}/{state.max_steps}"
        if "eval_loss" in logs:
            self._write(f"{place}: evaluation: loss {logs['eval_loss']:.4f}, perplexity {logs['eval_perplexity']:.2f}")
        elif "loss" in logs and self._bar is not None:
            self._bar.set_postfix(loss=f"{logs['loss']:.4f}")
        elif "loss" in logs:
            rate, norm = (f"{logs[key]:.3g}" if key in logs else "?" for key in ("learning_rate", "grad_norm"))
            self._write(f"{place}: loss {logs['loss']:.4f}, learning rate {rate}, gradient norm {norm}")

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _write(self, line: str) -> None:
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.write(line, file=sys.stderr)
