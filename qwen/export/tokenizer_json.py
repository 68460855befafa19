"""Writes the tokenizer as `tokenizer.json`, the format of the `tokenizers` library and of all current engines.

Ids are the same for every text on whose Unicode the two libraries agree: `tokenizers` has its own tables for NFC and
letters.
"""

import json
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..model.tokenization_qwen import CHAT_TEMPLATE, ENDOFTEXT, IM_END, SPLIT_PATTERN, QWenTokenizer

_BYTE_TO_CHAR = bytes_to_unicode()


def token_to_str(token: bytes) -> str:
    """Map the bytes of a token to the printable characters of byte-level BPE."""
    return "".join(_BYTE_TO_CHAR[byte] for byte in token)


def bpe_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Recover the BPE merges from tiktoken's ranks, in order.

    tiktoken merges the neighbours whose union has the lowest rank. Below a token's rank it merges the token's bytes the
    same way inside any word as alone. So each token has exactly one last merge, found by applying all merges of lower
    rank to its bytes. A token that these do not reduce to two pieces only occurs as a whole word.
    """
    found = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        pieces = [token[i : i + 1] for i in range(len(token))]
        while len(pieces) > 1:
            pair_ranks = [ranks.get(left + right, rank) for left, right in pairwise(pieces)]
            lowest = min(pair_ranks)
            if lowest >= rank:
                break
            index = pair_ranks.index(lowest)
            pieces[index : index + 2] = [pieces[index] + pieces[index + 1]]
        if len(pieces) == 2:
            found.append((pieces[0], pieces[1]))
    return found


def fast_tokenizer(tokenizer: QWenTokenizer) -> Tokenizer:
    """Return the same tokenizer as a `tokenizers.Tokenizer`."""
    ranks = tokenizer.mergeable_ranks
    # Includes the control tokens, so that they keep their ids: the library would assign new ones if the vocabulary was
    # expanded. No word matches one, because the split pattern separates their letters from their bars.
    vocabulary = {token_to_str(token): rank for token, rank in ranks.items()} | tokenizer.special_tokens
    fast = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(token_to_str(left), token_to_str(right)) for left, right in bpe_merges(ranks)],
            ignore_merges=True,  # a word that is a token is not split, as in tiktoken
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
    # normalized: matched after NFC, as in QWenTokenizer. NFC may combine their last character with the next one.
    fast.add_special_tokens([AddedToken(token, normalized=True) for token in tokenizer.special_tokens])
    return fast


def chat_template(tokenizer: QWenTokenizer) -> str:
    """Return the chat template, or the default one if the checkpoint has several."""
    template = tokenizer.chat_template
    return template if isinstance(template, str) else template.get("default", CHAT_TEMPLATE)


def write_tokenizer(tokenizer: QWenTokenizer, folder: Path, max_length: int, chat: bool) -> None:
    """Write tokenizer.json, tokenizer_config.json, qwen.tiktoken and, for a chat model, chat_template.jinja.

    Args:
        max_length: `model_max_length`, in tokens.
        chat: EOS is <|im_end|>; for a base model it is <|endoftext|>.
    """
    fast_tokenizer(tokenizer).save(str(folder / "tokenizer.json"))
    tokenizer.save_vocabulary(str(folder))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # loads tokenizer.json unchanged
        "model_max_length": max_length,
        "eos_token": IM_END if chat else ENDOFTEXT,
        "pad_token": ENDOFTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if chat:
        (folder / "chat_template.jinja").write_text(chat_template(tokenizer), encoding="utf-8")
