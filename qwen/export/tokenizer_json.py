"""The tokenizer as `tokenizer.json`, which the library `tokenizers` and every current engine read.

The same ids for every text, as far as the two libraries agree on Unicode: `tokenizers` brings its own tables of NFC
and of letters.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..model.tokenization_qwen import CHAT_TEMPLATE, ENDOFTEXT, IM_END, SPLIT_PATTERN, QWenTokenizer

_LETTERS = bytes_to_unicode()


def as_text(token: bytes) -> str:
    """A token in the letters that byte-level BPE writes bytes with."""
    return "".join(_LETTERS[byte] for byte in token)


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges that lead to the tokens, first things first.

    tiktoken merges the neighbours whose union has the lowest rank. Up to that rank it treats a token's bytes in any
    word as it treats them alone, so each token has just one last merge, which is found by letting the merges before it
    do their work. A token that they do not leave in two pieces comes about only as a word of its own.
    """
    found = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        pieces = [token[i : i + 1] for i in range(len(token))]
        while len(pieces) > 1:
            unions = [ranks.get(left + right, rank) for left, right in pairwise(pieces)]
            lowest = min(unions)
            if lowest >= rank:
                break
            place = unions.index(lowest)
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
        if len(pieces) == 2:
            found.append((pieces[0], pieces[1]))
    return found


def fast_tokenizer(tokenizer: QWenTokenizer) -> Tokenizer:
    """The same tokenizer, of the library `tokenizers`."""
    ranks = tokenizer.mergeable_ranks
    # The control tokens among them keep their ids: the library would give new ones where the vocabulary was expanded.
    # No word is one, as the split pattern separates their letters from their bars.
    vocabulary = {as_text(token): rank for token, rank in ranks.items()} | tokenizer.special_tokens
    fast = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(as_text(left), as_text(right)) for left, right in merges(ranks)],
            ignore_merges=True,  # a word that is a token is that token, as in tiktoken
        )
    )
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.ByteLevel(trim_offsets=False)
    # "normalized": looked for after NFC, as we do, which may join their last letter with what follows.
    fast.add_special_tokens([AddedToken(token, normalized=True) for token in tokenizer.special_tokens])
    return fast


def chat_template(tokenizer: QWenTokenizer) -> str:
    """The one that engines use, where a checkpoint has several."""
    template = tokenizer.chat_template
    return template if isinstance(template, str) else template.get("default", CHAT_TEMPLATE)


def write_tokenizer(tokenizer: QWenTokenizer, folder: Path, max_length: int, chat: bool) -> None:
    """Write tokenizer.json, its config, for a chat model chat_template.jinja, and for our own code qwen.tiktoken.

    Args:
        max_length: tokens that the model is offered for.
        chat: whether replies end with <|im_end|>; texts of a base model end with <|endoftext|>.
    """
    fast_tokenizer(tokenizer).save(str(folder / "tokenizer.json"))
    tokenizer.save_vocabulary(str(folder))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # one that takes tokenizer.json as it is
        "model_max_length": max_length,
        "eos_token": IM_END if chat else ENDOFTEXT,
        "pad_token": ENDOFTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if chat:
        (folder / "chat_template.jinja").write_text(chat_template(tokenizer), encoding="utf-8")
