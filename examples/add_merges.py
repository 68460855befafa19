#!/usr/bin/env python
"""Learns the byte-pair merges that make each word of a list one token.

    python examples/add_merges.py checkpoints/qwen-tiny-chat/qwen.tiktoken plants.tiktoken examples/words.txt

The most frequent pair of neighbouring pieces in all words is merged until each word is one token (Sennrich et al. 2016,
https://arxiv.org/abs/1508.07909). The new tokens rank after all tokens of the base vocabulary.
examples/vocabulary_expansion.md shows how to use the result.
"""

import argparse
import heapq
import os
import sys
import unicodedata
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

try:
    from qwen_cli.console import quiet_imports

    quiet_imports()  # before transformers is imported

    from qwen.finetuning.vocabulary import merge_pieces, single_bytes
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e .")

import regex

from qwen.model.tokenization_qwen import SPLIT_PATTERN, QWenTokenizer

MAX_BYTES = 256  # per word; the longest published token has 128
ID_LIMIT = 2**31
SCRIPTS_WITHOUT_SPACES = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")


class Word(NamedTuple):
    """A line of the list."""

    line: int
    text: str
    frequency: int


def read_words(path: Path) -> list[Word]:
    """Read a list of words in NFC, as the tokenizer does. Skip empty and duplicate lines with a warning.

    Raises:
        ValueError: the file cannot be read or is not UTF-8.
    """
    try:
        contents = path.read_bytes()
        lines = contents.decode("utf-8-sig").removesuffix("\n").split("\n")  # splitlines also splits at U+2028
    except OSError as error:
        raise ValueError(f"{path}: cannot read the list of words ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        line = contents[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8. Save the list of words as UTF-8.") from error

    words: dict[str, Word] = {}
    for number, line in enumerate(lines, start=1):
        text, tab, frequency = line.removesuffix("\r").partition("\t")
        text = unicodedata.normalize("NFC", text)
        if not text:
            warn(path, number, "skipped: the line has no word.")
        elif text in words:
            warn(path, number, f"{text!r} skipped: duplicate of line {words[text].line}.")
        else:
            words[text] = Word(number, text, read_frequency(frequency, path, number) if tab else 1)
    return list(words.values())


def read_frequency(text: str, path: Path, line: int) -> int:
    """Parse a frequency; an invalid one counts as 1, with a warning."""
    if text.isascii() and text.isdecimal() and len(text) < 20 and int(text) > 0:
        return int(text)
    warn(path, line, f"invalid frequency {text!r:.40}, counted as 1: write a positive integer.")
    return 1


def select_words(words: Iterable[Word], ranks: Mapping[bytes, int], path: Path) -> list[Word]:
    """Return the words that can become one new token; warn about the others."""
    found = []
    for word in words:
        token = word.text.encode()
        parts = regex.findall(SPLIT_PATTERN, word.text)
        if token in ranks:
            warn(path, word.line, f"{word.text!r} skipped: already a token (id {ranks[token]}).")
        elif len(parts) > 1:
            pieces = " + ".join(map(repr, parts[:8])) + (" + …" if len(parts) > 8 else "")
            warn(path, word.line, f"{word.text!r:.80} skipped: the tokenizer splits it into {pieces} before merging.")
        elif len(token) > MAX_BYTES:
            warn(path, word.line, f"{word.text!r:.40}… skipped: {len(token)} bytes, the maximum is {MAX_BYTES}.")
        else:
            found.append(word)
    return found


def learn_merges(frequencies: Mapping[bytes, int], ranks: Mapping[bytes, int]) -> list[bytes]:
    """Return the new tokens that make every word one token, in merge order.

    Pairs are counted by their concatenation: tiktoken merges any two neighbours that together are a token, however
    that token was learned. Ties are broken by byte order.

    Args:
        frequencies: the words, as bytes, and their frequencies.
        ranks: the tokens of the base vocabulary.
    """
    ranks = dict(ranks)
    rank = max(ranks.values(), default=-1)
    words = [merge_pieces(single_bytes(word), ranks) for word in frequencies]
    word_counts = list(frequencies.values())
    pair_counts: Counter[bytes] = Counter()
    pair_words: defaultdict[bytes, set[int]] = defaultdict(set)  # indices of words that may contain the pair

    def pairs_in(index: int) -> list[bytes]:
        return [left + right for left, right in pairwise(words[index])]

    for index in range(len(words)):
        for pair in pairs_in(index):
            pair_counts[pair] += word_counts[index]
            pair_words[pair].add(index)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)

    merges = []
    while heap:
        count, token = heapq.heappop(heap)
        if pair_counts[token] != -count or not count:  # stale entry: the count has changed
            continue
        rank += 1
        ranks[token] = rank
        merges.append(token)
        changed = set()
        for index in pair_words.pop(token):
            old = pairs_in(index)
            words[index] = merge_pieces(words[index], ranks)
            new = pairs_in(index)
            for pair in old:
                pair_counts[pair] -= word_counts[index]
            for pair in new:
                pair_counts[pair] += word_counts[index]
                pair_words[pair].add(index)
            changed.update(old, new)
        for pair in changed:
            heapq.heappush(heap, (-pair_counts[pair], pair))
    return merges


def choose_ids(merges: list[bytes], base: QWenTokenizer, start: int | None) -> dict[bytes, int]:
    """Assign consecutive ids to the new tokens, from `start` or, if None, from the first id after all used ones.

    Raises:
        ValueError: an id is already used or too large.
    """
    start = len(base) if start is None else start
    ids = range(start, start + len(merges))
    if taken := [index for index in base.decoder if index in ids]:
        raise ValueError(
            f"--start-id {start}: id {min(taken)} is taken by {base.decoder[min(taken)]!r}, and {len(merges)} "
            f"consecutive ids are needed. Use --start-id {len(base)} or higher."
        )
    if ids.stop > ID_LIMIT:
        raise ValueError(f"--start-id {start}: the last id would be {ids.stop - 1}, the maximum is {ID_LIMIT - 1}.")
    return dict(zip(merges, ids, strict=True))


def check_output(out: Path, *inputs: Path) -> None:
    """Raise ValueError if the result cannot be written, before the merges are learned."""
    if out.is_dir():
        raise ValueError(f"{out} is a folder. Name a file in it, for example {out / 'extra.tiktoken'}.")
    if out.exists() and not out.is_file():
        raise ValueError(f"{out} is not a regular file.")
    if not out.parent.is_dir():
        raise ValueError(f"Cannot write {out}: the folder {out.parent} does not exist.")
    for path in inputs:
        if out.exists() and path.exists() and out.samefile(path):
            raise ValueError(f"{out} would overwrite the input {path}. Name another output file.")


def write_vocabulary(ranks: Mapping[bytes, int], base: Path, out: Path) -> QWenTokenizer:
    """Write a tiktoken file atomically and return the tokenizer of both files.

    Raises:
        ValueError: the file cannot be written.
    """
    out = out.resolve()  # replace the target of a link, not the link
    staged = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        staged.write_bytes(b"".join(b"%s %d\n" % (b64encode(token), rank) for token, rank in ranks.items()))
        tokenizer = QWenTokenizer(base, extra_vocab_file=staged)
        os.replace(staged, out)
    except OSError as error:
        raise ValueError(f"Cannot write {out} ({error.strerror}).") from error
    finally:
        staged.unlink(missing_ok=True)
    return tokenizer


def check_words(words: Iterable[Word], tokenizer: QWenTokenizer, path: Path) -> int:
    """Count the words that are one token now. Warn about the others, and about words still split after a space."""
    single = 0
    split_after_space: list[tuple[Word, str]] = []
    for word in words:
        index = tokenizer.mergeable_ranks[word.text.encode()]
        if (ids := tokenizer.encode(word.text)) != [index]:
            warn(path, word.line, f"{word.text!r} is still split into {format_pieces(tokenizer, ids)}.")
            continue
        single += 1
        ids = tokenizer.encode(f" {word.text}")
        if len(ids) > 1 and index not in ids and not SCRIPTS_WITHOUT_SPACES.match(word.text):
            # an old merge of the space and the first letters has priority
            split_after_space.append((word, format_pieces(tokenizer, ids)))
    if split_after_space:
        word, pieces = split_after_space[0]
        more = f", as are {len(split_after_space) - 1} other words" if split_after_space[1:] else ""
        lines = ", ".join(str(word.line) for word, _ in split_after_space[:10]) + (
            ", …" if split_after_space[10:] else ""
        )
        warn(
            path,
            lines,
            f"after a space, {word.text!r} is still split into {pieces}{more}. To use such words within sentences, "
            f"also list them with a leading space: {' ' + word.text!r}.",
        )
    return single


def format_pieces(tokenizer: QWenTokenizer, ids: list[int]) -> str:
    return " + ".join(repr(tokenizer.decode(index)) for index in ids)


def warn(path: Path, line: int | str, message: str) -> None:
    print(f"{path}, line {line}: {message}", file=sys.stderr)


def add_merges(base_path: Path, out: Path, words_path: Path, start: int | None) -> None:
    """Learn the merges, write them to `out` and print a summary.

    Raises:
        ValueError: a file is missing or invalid, an id is already used, or there is nothing to add.
    """
    check_output(out, base_path, words_path)
    base = QWenTokenizer(base_path)
    words = select_words(read_words(words_path), base.mergeable_ranks, words_path)
    if not words:
        raise ValueError(f"{words_path}: no words to add, {out} was not written.")
    merges = learn_merges({word.text.encode(): word.frequency for word in words}, base.mergeable_ranks)
    ranks = choose_ids(merges, base, start)
    tokenizer = write_vocabulary(ranks, base_path, out)
    single = check_words(words, tokenizer, words_path)
    first, last = ranks[merges[0]], ranks[merges[-1]]
    if first > len(base):
        print(f"Ids {len(base)} to {first - 1} have no token.", file=sys.stderr)
    print(
        f"{out}: {len(merges)} tokens with ids {first} to {last}, "
        f"{len(words)} words and {len(merges) - len(words)} pieces of them. "
        f"{single} of the {len(words)} words are one token now; a model needs {len(tokenizer)} rows."
    )


def parse_start_id(text: str) -> int:
    """Parse a non-negative integer (an argparse type)."""
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise argparse.ArgumentTypeError(f"must be a non-negative integer, not {text!r}")
    return int(text)


def main() -> int:
    """Return the exit status: 0, 1 if nothing was written, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description="Learn the merges that make each word of a list one token.")
    parser.add_argument("base", type=Path, metavar="BASE.tiktoken", help="vocabulary of the model (its qwen.tiktoken)")
    parser.add_argument(
        "out", type=Path, metavar="OUT.tiktoken", help="output file with the new tokens only, an extra_vocab_file"
    )
    parser.add_argument(
        "words",
        type=Path,
        metavar="WORDS.txt",
        help="UTF-8, one word per line, optionally with a tab and a frequency (default: 1); spaces belong to the word",
    )
    parser.add_argument(
        "--start-id", type=parse_start_id, metavar="N", help="first new id (default: the first free id)"
    )
    arguments = parser.parse_args()
    try:
        add_merges(arguments.base, arguments.out, arguments.words, arguments.start_id)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
