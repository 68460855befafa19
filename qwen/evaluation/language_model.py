"""A model as benchmarks see it: text in, log-probabilities or text out. Greedy, in batches.

This file handles tokens, caches and the end of the model's context; what is asked and what is right is with the tasks.
"""

import copy
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from transformers import Cache, StoppingCriteria, StoppingCriteriaList

from ..model.modeling_qwen import CACHE, QWenLMHeadModel
from ..model.qwen_generation_utils import DEFAULT_SYSTEM
from ..model.tokenization_qwen import QWenTokenizer
from .case import Case

LOGITS_AT_ONCE = 1024  # positions; those of a long text together would be larger than the model


class LanguageModel:
    """A model and its tokenizer.

    Args:
        max_seq_len: the longest prompt in tokens. Where a case's is longer, its first shots are left out, and if that
            is not enough, its beginning (not that of a chat's turn). `dropped_shots` tells for which cases, by name,
            how many were left out.
    """

    def __init__(self, model: QWenLMHeadModel, tokenizer: QWenTokenizer, max_seq_len: int):
        self.model, self.tokenizer, self.max_seq_len = model, tokenizer, max_seq_len
        self.dropped_shots: dict[str, int] = {}
        self._shared: tuple[tuple[int, ...], Cache] | None = None  # the ids encoded last, and their keys and values

    def encode(self, text: str) -> list[int]:
        """Token ids of a text of strangers: control tokens that it spells out stay text."""
        return self.tokenizer.encode(text, allowed_special=(), verbose=False)

    def fit(self, case: Case) -> tuple[list[int], int]:
        """The token ids of a case, at most `max_seq_len`, and how many of its shots had to be left out."""
        for dropped in range(len(case.shots) + 1):
            ids = self.encode(case.text(dropped))
            if len(ids) <= self.max_seq_len:
                break
        if dropped:
            self.dropped_shots[case.name] = dropped
        return ids[-self.max_seq_len :], dropped

    @torch.inference_mode()
    def choose(self, cases: Sequence[Case], choices: Sequence[str]) -> list[list[float]]:
        """The log-probability of each choice right behind the text of each case, as of the next token.

        What stands in front of all the questions (`Case.context`) is encoded once and kept for the next call. Where a
        prompt is longer than the model was trained on, dynamic NTK rotates all of it by its own length: there it is
        encoded whole. Beside an 8-bit cache what is encoded once is read back rounded.

        Args:
            choices: texts of one token each.

        Raises:
            ValueError: a choice is no single token of this vocabulary, or two are the same.
        """
        tokens = [self.encode(choice) for choice in choices]
        if any(len(ids) != 1 for ids in tokens) or len({*map(tuple, tokens)}) < len(choices):
            raise ValueError(
                f"The vocabulary of this model does not have one token for each of {', '.join(map(repr, choices))}: "
                "this benchmark cannot be scored with it."
            )
        rows = [self.fit(case) for case in cases]
        trained = self.model.config.seq_length if self.model.config.use_dynamic_ntk else self.max_seq_len
        together = [index for index, (ids, dropped) in enumerate(rows) if not dropped and len(ids) <= trained]
        alone = sorted({*range(len(rows))}.difference(together))

        scores: dict[int, torch.Tensor] = {}
        for members in ([together] if together else []) + [[index] for index in alone]:
            prompts = [rows[index][0] for index in members]
            context = self.encode(cases[members[0]].context()) if members is together else []
            # Some tokens may straddle the end of the context; they belong to the question.
            columns = zip(context, *prompts, strict=False)
            shared = [ids[0] for ids in takewhile(lambda ids: len({*ids}) == 1, columns)]
            shared = shared[: min(map(len, prompts)) - 1]
            scores |= zip(members, self._next_token(prompts, shared), strict=True)
        chosen = torch.tensor([ids[0] for ids in tokens])
        return [scores[index][chosen].tolist() for index in range(len(rows))]

    def _next_token(self, prompts: list[list[int]], shared: list[int]) -> torch.Tensor:
        """Log-probabilities of the token behind each prompt: (B, vocabulary), float32 on the CPU.

        Args:
            shared: what all of them begin with.
        """
        cache = None
        if shared:
            cache = self._encoded(shared)
            if len(prompts) > 1:
                cache = copy.deepcopy(cache)
                cache.batch_repeat_interleave(len(prompts))
        rests = [ids[len(shared) :] for ids in prompts]
        longest = max(map(len, rests))
        # Padded behind the end, where nothing that is read looks at it.
        padded = torch.tensor([rest + [self.tokenizer.eod_id] * (longest - len(rest)) for rest in rests])
        ends = torch.tensor([len(rest) for rest in rests])
        mask = torch.arange(len(shared) + longest)[None] < len(shared) + ends[:, None]
        device = self.model.device
        hidden = self.model.transformer(
            input_ids=padded.to(device),
            attention_mask=mask.long().to(device),
            past_key_values=cache,
            use_cache=bool(shared),
        ).last_hidden_state
        if cache is not None and len(prompts) == 1:
            cache.crop(-longest)  # no copy: what the question added goes again
        last = hidden[torch.arange(len(rests), device=hidden.device), ends.to(hidden.device) - 1]
        return self.model.lm_head(last).float().log_softmax(-1).cpu()

    def _encoded(self, ids: list[int]) -> Cache:
        if self._shared is None or self._shared[0] != tuple(ids):
            self._shared = None  # before the next one is made, so that two are never held
            prompt = torch.tensor([ids], device=self.model.device)
            self._shared = tuple(ids), self.model.transformer(prompt, use_cache=True)[CACHE]
        return self._shared[1]

    @torch.inference_mode()
    def loss(self, ids: Sequence[int]) -> float:
        """Mean cross-entropy of all tokens but the first, given those in front of them, in nats."""
        prompt = torch.tensor([ids], device=self.model.device)
        hidden = self.model.transformer(prompt, use_cache=False).last_hidden_state[0]
        total = 0.0
        for start in range(0, len(ids) - 1, LOGITS_AT_ONCE):
            part = slice(start, min(start + LOGITS_AT_ONCE, len(ids) - 1))
            logits = self.model.lm_head(hidden[part]).float()
            targets = prompt[0, part.start + 1 : part.stop + 1].to(logits.device)
            total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        return total / (len(ids) - 1)

    def complete(self, cases: Sequence[Case], *, stop: Sequence[str], max_new_tokens: int) -> list[str]:
        """The greedy continuation of each case's text, up to the first of the stop strings or the end of the text."""
        rows = [self.fit(case)[0] for case in cases]
        length = max(map(len, rows))
        padded = torch.tensor([[self.tokenizer.eod_id] * (length - len(ids)) + ids for ids in rows])
        mask = torch.arange(length)[None] >= length - torch.tensor([[len(ids)] for ids in rows])
        output = self.model.generate(
            padded.to(self.model.device),
            attention_mask=mask.long().to(self.model.device),
            eos_token_id=[self.tokenizer.eod_id, self.tokenizer.im_end_id],
            **self._greedy(stop, max_new_tokens),
            **dict.fromkeys(("temperature", "top_k", "top_p")),  # settings of sampling, without a meaning here
        )
        replies = self.tokenizer.batch_decode(_tokens(output[:, length:], self.tokenizer), skip_special_tokens=True)
        return [cut(reply, stop) for reply in replies]

    def reply(
        self, cases: Sequence[Case], *, max_new_tokens: int, stop: Sequence[str] = (), system: str = DEFAULT_SYSTEM
    ) -> list[str]:
        """A chat model's greedy reply to each case's text as the user's turn, up to the first of the stop strings."""
        queries = [case.text(self.fit(case)[1]) for case in cases]
        replies, _ = self.model.chat_batch(self.tokenizer, queries, system=system, **self._greedy(stop, max_new_tokens))
        return [cut(reply, stop) for reply in replies]

    def _greedy(self, stop: Sequence[str], max_new_tokens: int) -> dict[str, Any]:
        criteria = [StopStrings(self.tokenizer, stop)] if stop else []
        return {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "repetition_penalty": 1.0,
            "stopping_criteria": StoppingCriteriaList(criteria),
        }


class StopStrings(StoppingCriteria):
    """Ends a row when what was generated in it holds one of the strings, wherever their tokens are split."""

    def __init__(self, tokenizer: QWenTokenizer, stop: Sequence[str]):
        self.tokenizer, self.stop = tokenizer, stop
        self.prompt_length: int | None = None  # known at the first token behind it
        # A string that the newest token completes lies in so many tokens, as each has at least one byte.
        self.reach = max(len(text.encode()) for text in stop)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1] - 1
        start = max(self.prompt_length, input_ids.shape[1] - self.reach)
        tails = self.tokenizer.batch_decode(_tokens(input_ids[:, start:], self.tokenizer))
        found = [any(text in tail for text in self.stop) for tail in tails]
        return torch.tensor(found, device=input_ids.device)


def _tokens(ids: torch.Tensor, tokenizer: QWenTokenizer) -> torch.Tensor:
    """Generated ids as the tokenizer knows them: a matrix has more rows than it has tokens."""
    return ids.masked_fill(ids >= len(tokenizer), tokenizer.eod_id)


def cut(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    found = [place for place in map(text.find, stop) if place >= 0]
    return text[: min(found)] if found else text
