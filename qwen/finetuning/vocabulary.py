"""New tokens: what the old vocabulary makes of them, and the rows that they start from.

Revolves around the difference between two tokenizers, the model's own and one with tokens added to it. It knows the
embedding and the output matrix of a model, but no files and no trainer.
"""

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from ..model.tokenization_qwen import QWenTokenizer


def merge_pieces(pieces: Iterable[bytes], ranks: Mapping[bytes, int]) -> list[bytes]:
    """Byte-pair encoding as tiktoken does it: the two neighbours that together have the lowest rank become one, the
    leftmost first, until no two are a token. It may start anywhere: from single bytes, or from what fewer ranks left.
    """
    pieces = list(pieces)
    while True:
        candidates = ((ranks.get(left + right, math.inf), i) for i, (left, right) in enumerate(pairwise(pieces)))
        rank, i = min(candidates, default=(math.inf, 0))
        if rank == math.inf:
            return pieces
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


def single_bytes(token: bytes) -> list[bytes]:
    """The bytes of a token, each as `bytes`."""
    return [token[i : i + 1] for i in range(len(token))]


def expand_embeddings(model: PreTrainedModel, tokenizer: QWenTokenizer, base_tokenizer: QWenTokenizer) -> list[int]:
    """Give every token that `tokenizer` has beyond `base_tokenizer` a row in the model's embedding and output matrix.

    A new row is the mean of the rows of the pieces that `base_tokenizer` cuts the token into (Koto et al. 2021,
    https://arxiv.org/abs/2109.04607): the model starts from what it knows of the word. Where the tokens do not fit,
    both matrices grow to `len(tokenizer)` rows, which is the size that peft gives the base model of an adapter with
    this tokenizer beside it. Rows of old tokens stay as they are; rows between them and the new ids that belong to no
    token are random. To be called before adapters are put on the model, and before DeepSpeed or FSDP wrap it.

    Args:
        model: a model trained with `base_tokenizer`, in any dtype, its two matrices tied or not; changed in place.
        tokenizer: the same vocabulary with `extra_vocab_file=`, or a saved one.
        base_tokenizer: the vocabulary without the new tokens.

    Returns:
        The new ids in ascending order; none where the two vocabularies are the same.

    Raises:
        ValueError: a token of `base_tokenizer` is missing from `tokenizer` or has another id there, or the model has
            fewer rows than `base_tokenizer` has ids.
    """
    known, vocabulary = base_tokenizer.get_vocab(), tokenizer.get_vocab()
    if changed := known.items() - vocabulary.items():
        token, index = min(changed, key=lambda item: item[1])
        there = f"has id {vocabulary[token]}" if token in vocabulary else "is missing"
        raise ValueError(
            f"The new vocabulary does not continue the model's: token {token!r} with id {index} {there} in it. Make it "
            "from the model's own qwen.tiktoken: `python examples/add_merges.py MODEL/qwen.tiktoken OUT WORDS`."
        )
    rows = model.config.vocab_size
    if len(base_tokenizer) > rows:
        raise ValueError(
            f"The model has {rows} rows of embedding for a vocabulary of {len(base_tokenizer)}: the weights and the "
            "qwen.tiktoken beside them belong to different models."
        )
    added = sorted((index, token) for token, index in vocabulary.items() if token not in known)
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)

    ranks = base_tokenizer.mergeable_ranks
    pieces = {index: [ranks[piece] for piece in merge_pieces(single_bytes(token), ranks)] for index, token in added}
    matrices = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    distinct = list({id(weight): weight for weight in matrices}.values())  # tied, they are one
    with torch.no_grad(), _gathered(distinct):
        for weight in distinct:
            for index, ids in pieces.items():
                weight[index] = weight[ids].float().mean(dim=0).to(weight.dtype)
    return list(pieces)


def _gathered(weights: list[torch.nn.Parameter]) -> AbstractContextManager:
    """Under ZeRO 3 a process holds a slice of each matrix: bring the whole together, and spread what was written."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(weights, modifier_rank=0)
