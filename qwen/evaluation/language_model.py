"""The model interface of the benchmarks: text in, log-probabilities or text out, greedy and in batches.

It handles tokens, caches and the limit of the context.
"""

import copy
from collections.abc import Sequence
from itertools import takewhile
from typing import TypedDict

import torch
from transformers import Cache, StoppingCriteria, StoppingCriteriaList

from ..model.modeling_qwen import CACHE_ARG, QWenLMHeadModel
from ..model.qwen_generation_utils import DEFAULT_SYSTEM
from ..model.tokenization_qwen import QWenTokenizer
from .case import Case

LOGITS_CHUNK = 1024  # positions; the logits of a whole long text would take more memory than the model


class LanguageModel:
    """A model and its tokenizer.

    Args:
        max_seq_len: maximum prompt length in tokens. If a case is longer, its first shots are dropped; if that is not
            enough, the prompt of a base model is cut at its beginning. `dropped_shots` has the number of dropped shots
            by case name.
    """

    def __init__(self, model: QWenLMHeadModel, tokenizer: QWenTokenizer, max_seq_len: int):
        self.model, self.tokenizer, self.max_seq_len = model, tokenizer, max_seq_len
        self.dropped_shots: dict[str, int] = {}
        self._prefix: tuple[tuple[int, ...], Cache] | None = None  # the prefix encoded last, and its KV cache

    def encode(self, text: str) -> list[int]:
        """Encode untrusted text: control tokens spelled out in it are encoded as plain text."""
        return self.tokenizer.encode(text, allowed_special=(), verbose=False)

    def fit_prompt(self, case: Case) -> tuple[list[int], int]:
        """Return the token ids of a case, at most `max_seq_len`, and how many of its shots were dropped."""
        for dropped in range(len(case.shots) + 1):
            ids = self.encode(case.text(dropped))
            if len(ids) <= self.max_seq_len:
                break
        if dropped:
            self.dropped_shots[case.name] = dropped
        return ids[-self.max_seq_len :], dropped

    @torch.inference_mode()
    def choice_logprobs(self, cases: Sequence[Case], choices: Sequence[str]) -> list[list[float]]:
        """Return the log-probability of each choice as the next token after the text of each case.

        The common prefix (`Case.context`) is encoded once, and its cache is kept for the next call. A prompt beyond the
        trained length is encoded whole, because dynamic NTK makes all rotations depend on its length. With an 8-bit
        cache the prefix is read back rounded.

        Args:
            choices: texts of one token each.

        Raises:
            ValueError: a choice is not a single token of this vocabulary, or two choices are the same.
        """
        tokens = [self.encode(choice) for choice in choices]
        if any(len(ids) != 1 for ids in tokens) or len({*map(tuple, tokens)}) < len(choices):
            raise ValueError(
                f"The vocabulary of this model does not have one token for each of {', '.join(map(repr, choices))}: "
                "this benchmark cannot be scored with it."
            )
        rows = [self.fit_prompt(case) for case in cases]
        trained_length = self.model.config.seq_length if self.model.config.use_dynamic_ntk else self.max_seq_len
        batched = [index for index, (ids, dropped) in enumerate(rows) if not dropped and len(ids) <= trained_length]
        single = sorted({*range(len(rows))}.difference(batched))

        scores: dict[int, torch.Tensor] = {}
        for members in ([batched] if batched else []) + [[index] for index in single]:
            prompts = [rows[index][0] for index in members]
            context = self.encode(cases[members[0]].context()) if members is batched else []
            # A token that straddles the end of the context belongs to the question.
            columns = zip(context, *prompts, strict=False)
            prefix = [ids[0] for ids in takewhile(lambda ids: len({*ids}) == 1, columns)]
            prefix = prefix[: min(map(len, prompts)) - 1]
            scores |= zip(members, self._next_token_logprobs(prompts, prefix), strict=True)
        chosen = torch.tensor([ids[0] for ids in tokens])
        return [scores[index][chosen].tolist() for index in range(len(rows))]

    def _next_token_logprobs(self, prompts: list[list[int]], prefix: list[int]) -> torch.Tensor:
        """Return the log-probabilities of the token after each prompt: (B, vocabulary), float32 on the CPU.

        Args:
            prefix: the tokens that all prompts start with.
        """
        cache = None
        if prefix:
            cache = self._prefix_cache(prefix)
            if len(prompts) > 1:
                cache = copy.deepcopy(cache)
                cache.batch_repeat_interleave(len(prompts))
        suffixes = [ids[len(prefix) :] for ids in prompts]
        longest = max(map(len, suffixes))
        # Right padding: no position that is read attends to it.
        padded = torch.tensor([suffix + [self.tokenizer.eod_id] * (longest - len(suffix)) for suffix in suffixes])
        ends = torch.tensor([len(suffix) for suffix in suffixes])
        mask = torch.arange(len(prefix) + longest)[None] < len(prefix) + ends[:, None]
        device = self.model.device
        hidden = self.model.transformer(
            input_ids=padded.to(device),
            attention_mask=mask.long().to(device),
            past_key_values=cache,
            use_cache=bool(prefix),
        ).last_hidden_state
        if cache is not None and len(prompts) == 1:
            cache.crop(-longest)  # not a copy: remove what the question added
        last = hidden[torch.arange(len(suffixes), device=hidden.device), ends.to(hidden.device) - 1]
        return self.model.lm_head(last).float().log_softmax(-1).cpu()

    def _prefix_cache(self, ids: list[int]) -> Cache:
        if self._prefix is None or self._prefix[0] != tuple(ids):
            self._prefix = None  # freed first, so that there are never two
            prompt = torch.tensor([ids], device=self.model.device)
            self._prefix = tuple(ids), self.model.transformer(prompt, use_cache=True)[CACHE_ARG]
        return self._prefix[1]

    @torch.inference_mode()
    def loss(self, ids: Sequence[int]) -> float:
        """Return the mean cross-entropy of all tokens but the first, in nats."""
        prompt = torch.tensor([ids], device=self.model.device)
        hidden = self.model.transformer(prompt, use_cache=False).last_hidden_state[0]
        total = 0.0
        for start in range(0, len(ids) - 1, LOGITS_CHUNK):
            part = slice(start, min(start + LOGITS_CHUNK, len(ids) - 1))
            logits = self.model.lm_head(hidden[part]).float()
            targets = prompt[0, part.start + 1 : part.stop + 1].to(logits.device)
            total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        return total / (len(ids) - 1)

    def generate(self, cases: Sequence[Case], *, stop: Sequence[str], max_new_tokens: int) -> list[str]:
        """Return the greedy continuation of each case's text, up to the first stop string or the end of text."""
        rows = [self.fit_prompt(case)[0] for case in cases]
        length = max(map(len, rows))
        padded = torch.tensor([[self.tokenizer.eod_id] * (length - len(ids)) + ids for ids in rows])
        mask = torch.arange(length)[None] >= length - torch.tensor([[len(ids)] for ids in rows])
        output = self.model.generate(
            padded.to(self.model.device),
            attention_mask=mask.long().to(self.model.device),
            eos_token_id=[self.tokenizer.eod_id, self.tokenizer.im_end_id],
            **self._greedy_options(stop, max_new_tokens),
            **dict.fromkeys(("temperature", "top_k", "top_p")),  # sampling options, unused in greedy decoding
        )
        replies = self.tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
        return [truncate_at_stop(reply, stop) for reply in replies]

    def chat(
        self, cases: Sequence[Case], *, max_new_tokens: int, stop: Sequence[str] = (), system: str = DEFAULT_SYSTEM
    ) -> list[str]:
        """Return a chat model's greedy reply to each case's text as the user turn, up to the first stop string."""
        queries = [case.text(self.fit_prompt(case)[1]) for case in cases]
        replies, _ = self.model.chat_batch(
            self.tokenizer, queries, system=system, **self._greedy_options(stop, max_new_tokens)
        )
        return [truncate_at_stop(reply, stop) for reply in replies]

    def _greedy_options(self, stop: Sequence[str], max_new_tokens: int) -> "GreedyOptions":
        criteria = [StopStringsCriteria(self.tokenizer, stop)] if stop else []
        return {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "repetition_penalty": 1.0,
            "stopping_criteria": StoppingCriteriaList(criteria),
        }


class GreedyOptions(TypedDict):
    """Options of `generate` for greedy decoding."""

    max_new_tokens: int
    do_sample: bool
    repetition_penalty: float
    stopping_criteria: StoppingCriteriaList


class StopStringsCriteria(StoppingCriteria):
    """Stops a row when its generated text contains one of the strings, however they are split into tokens."""

    def __init__(self, tokenizer: QWenTokenizer, stop: Sequence[str]):
        self.tokenizer, self.stop = tokenizer, stop
        self.prompt_length: int | None = None  # set at the first generated token
        # A string that the newest token completes spans at most this many tokens, as each has at least one byte.
        self.max_stop_tokens = max(len(text.encode()) for text in stop)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1] - 1
        start = max(self.prompt_length, input_ids.shape[1] - self.max_stop_tokens)
        tails = self.tokenizer.batch_decode(input_ids[:, start:])
        found = [any(text in tail for text in self.stop) for tail in tails]
        return torch.tensor(found, device=input_ids.device)


def truncate_at_stop(text: str, stop: Sequence[str]) -> str:
    """Return the text up to the first stop string."""
    found = [place for place in map(text.find, stop) if place >= 0]
    return text[: min(found)] if found else text
