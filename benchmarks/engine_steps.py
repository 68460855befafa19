"""Takes the steps of the server's engine one by one, in this thread, to time them and to count their work."""

from collections.abc import Sequence as Ids
from typing import Any

import torch

from qwen import QWenLMHeadModel
from qwen.kernels.fused_block import prepare
from qwen.serving.engine.block_manager import BLOCK_SIZE, BlockManager
from qwen.serving.engine.engine import PREFILL_TOKENS
from qwen.serving.engine.model_runner import ModelRunner, PendingStep
from qwen.serving.engine.sampling_params import SamplingParams
from qwen.serving.engine.scheduler import Scheduler
from qwen.serving.engine.sequence import Sequence


class EngineSteps:
    """Sequences that are served, with the host one step behind a GPU, as in the engine. They have no end tokens.

    Args:
        model: model in eval mode.
        rows: maximum number of sequences.
        cache_tokens: size of the key/value cache.
        max_length: maximum length of a sequence.
        captured: on a GPU, capture the steps that decode in CUDA graphs, now if their shapes are known.
    """

    @torch.inference_mode()
    def __init__(self, model: QWenLMHeadModel, *, rows: int, cache_tokens: int, max_length: int, captured: bool = True):
        blocks = BlockManager(-(-cache_tokens // BLOCK_SIZE), BLOCK_SIZE)
        self.scheduler = Scheduler(blocks, max_num_seqs=rows, max_num_batched_tokens=PREFILL_TOKENS)
        prepare(model, devices=("cpu", "cuda"), owned=True)
        self.runner = ModelRunner(model, blocks, rows, max_length)
        self.runner.decode_steps.capturable &= captured
        self.runner.warm_up()
        self.sequences: list[Sequence] = []
        self._pending: list[PendingStep] = []

    def add(self, prompt: Ids[int], **params: Any) -> Sequence:
        """Queue a prompt with sampling settings, and return its sequence."""
        sequence = Sequence(prompt, SamplingParams(**params), frozenset(), lambda token: False, lambda *_: None)
        self.scheduler.add(sequence)
        self.sequences.append(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Stop a sequence, and release its blocks, which others can find."""
        self.scheduler.name_blocks(sequence)
        self.scheduler.remove(sequence)
        self.runner.drop(sequence)
        self.sequences.remove(sequence)

    @torch.inference_mode()
    def take(self) -> None:
        """Launch a step, and wait for the one before it, or on a CPU for this one."""
        chunks = self.scheduler.schedule()
        self._pending.append(self.runner.launch(chunks))
        self._wait(keep=1 if self.runner.is_asynchronous else 0)

    def decode_all(self) -> None:
        """Take steps until all prompts are encoded.

        Raises:
            RuntimeError: the cache or the number of rows is too small for all of them.
        """
        while any(each.num_computed < each.num_prompt_tokens for each in self.sequences):
            self.take()
            if self.scheduler.num_preemptions or self.scheduler.num_waiting:
                raise RuntimeError(f"only {len(self.scheduler.running)} of {len(self.sequences)} sequences fit")
        self.finish()

    def finish(self) -> None:
        """Wait for all steps that were launched."""
        self._wait(keep=0)

    def _wait(self, keep: int) -> None:
        while len(self._pending) > keep:
            step = self._pending.pop(0)
            for sequence, token in zip(step.sequences, step.wait(), strict=True):
                sequence.num_pending -= 1
                if isinstance(token, Exception):
                    raise token
                if sequence in self.sequences:
                    sequence.token_ids.append(token.token_id)
