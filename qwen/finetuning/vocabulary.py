"""Adds tokens to a model: splits them with the old vocabulary and initializes their embedding and output rows."""

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import cast

import torch
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from ..model.tokenization_qwen import QWenTokenizer


def merge_pieces(pieces: Iterable[bytes], ranks: Mapping[bytes, int]) -> list[bytes]:
    """Byte-pair encoding as in tiktoken: merge the adjacent pair with the lowest rank, leftmost first, until no pair is
    a token. `pieces` may be single bytes, or the result of merging with fewer ranks.
    """
    pieces = list(pieces)
    while True:
        candidates = ((ranks.get(left + right, math.inf), i) for i, (left, right) in enumerate(pairwise(pieces)))
        rank, i = min(candidates, default=(math.inf, 0))
        if rank == math.inf:
            return pieces
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


def single_bytes(token: bytes) -> list[bytes]:
    """Split a token into its bytes, each as `bytes`."""
    return [token[i : i + 1] for i in range(len(token))]


def expand_embeddings(model: PreTrainedModel, tokenizer: QWenTokenizer, base_tokenizer: QWenTokenizer) -> list[int]:
    """Initialize the embedding and output rows of all tokens that `tokenizer` has beyond `base_tokenizer`.

    A new row is the mean of the rows of the pieces into which `base_tokenizer` splits the token (Koto et al. 2021,
    https://arxiv.org/abs/2109.04607), so that the model starts from what it has learned of the word. If the tokens do
    not fit, both matrices grow to `len(tokenizer)` rows, the size that peft gives the base model of an adapter with
    this tokenizer beside it. Rows of old tokens do not change; rows between them and the new ids that belong to no
    token are random. Call it before adding adapters to the model, and before DeepSpeed or FSDP wrap it.

    Args:
        model: a model trained with `base_tokenizer`, in any dtype, its two matrices tied or not; changed in place.
        tokenizer: the same vocabulary with `extra_vocab_file=`, or a saved one.
        base_tokenizer: the vocabulary without the new tokens.

    Returns:
        The new ids in ascending order; empty if the vocabularies are the same.

    Raises:
        ValueError: a token of `base_tokenizer` is missing from `tokenizer` or has another id there, or the model has
            fewer rows than `base_tokenizer` has ids.
    """
    known, vocabulary = base_tokenizer.get_vocab(), tokenizer.get_vocab()
    if changed := known.items() - vocabulary.items():
        token, index = min(changed, key=lambda item: item[1])
        there = f"has id {vocabulary[token]}" if token in vocabulary else "is missing"
        raise ValueError(
            f"The new vocabulary does not extend the model's: token {token!r} with id {index} {there} in it. Create it "
            "from the model's own qwen.tiktoken: `python examples/add_merges.py MODEL/qwen.tiktoken OUT WORDS`."
        )
    rows = model.config.vocab_size
    if len(base_tokenizer) > rows:
        raise ValueError(
            f"The model has {rows} embedding rows for a vocabulary of {len(base_tokenizer)}: the weights and the "
            "qwen.tiktoken beside them belong to different models."
        )
    added = sorted((index, token) for token, index in vocabulary.items() if token not in known)
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)

    ranks = base_tokenizer.mergeable_ranks
    pieces = {
        # Only regular tokens, which are bytes, can be new: all vocabularies have the same control tokens.
        index: [ranks[piece] for piece in merge_pieces(single_bytes(cast(bytes, token)), ranks)]
        for index, token in added
    }
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    matrices = [cast(torch.nn.Parameter, module.weight) for module in modules]
    distinct = list({id(weight): weight for weight in matrices}.values())  # one if tied
    with torch.no_grad(), _gathered(distinct):
        for weight in distinct:
            for index, ids in pieces.items():
                weight[index] = weight[ids].float().mean(dim=0).to(weight.dtype)
    return list(pieces)


def _gathered(weights: list[torch.nn.Parameter]) -> AbstractContextManager:
    """Under ZeRO 3, gather the matrices, of which each process holds a slice, and distribute the changes on exit."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(weights, modifier_rank=0)
