#!/usr/bin/env python
"""New words for a vocabulary: the byte-pair merges that make each word of a list one token.

    python examples/add_merges.py checkpoints/qwen-tiny-chat/qwen.tiktoken plants.tiktoken examples/words.txt

Revolves around the order of merges. A word that the base vocabulary cuts into pieces becomes one token by merging the
most frequent pair of neighbouring pieces in all words, again and again (Sennrich et al. 2016,
https://arxiv.org/abs/1508.07909); what comes of it ranks behind all tokens that are there. What to do with it then,
examples/vocabulary_expansion.md shows.
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
    sys.exit(f"{error}. In the folder of the repository: pip install -e .")

import regex

from qwen.model.tokenization_qwen import SPLIT_PATTERN, QWenTokenizer

MAX_BYTES = 256  # of a word; the longest published token has 128
END_OF_IDS = 2**31
UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")


class Word(NamedTuple):
    """A line of the list."""

    line: int
    text: str
    frequency: int


def read_words(path: Path) -> list[Word]:
    """The words of a list, in NFC as the tokenizer reads them. Lines that are no new word are skipped with a warning.

    Raises:
        ValueError: the file cannot be read or is not UTF-8.
    """
    try:
        contents = path.read_bytes()
        lines = contents.decode("utf-8-sig").removesuffix("\n").split("\n")  # not splitlines: U+2028 is no line's end
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
            warn(path, number, "skipped, there is no word in it.")
        elif text in words:
            warn(path, number, f"{text!r} skipped, it is in line {words[text].line} already.")
        else:
            words[text] = Word(number, text, read_frequency(frequency, path, number) if tab else 1)
    return list(words.values())


def read_frequency(text: str, path: Path, line: int) -> int:
    """A frequency as it is written, 1 with a warning where it is none."""
    if text.isascii() and text.isdecimal() and len(text) < 20 and int(text) > 0:
        return int(text)
    warn(path, line, f"the frequency {text!r:.40} counts as 1, it is no whole number from 1 on.")
    return 1


def new_words(words: Iterable[Word], ranks: Mapping[bytes, int], path: Path) -> list[Word]:
    """The words that can become one token and are none yet; the others are named in warnings."""
    found = []
    for word in words:
        token = word.text.encode()
        parts = regex.findall(SPLIT_PATTERN, word.text)
        if token in ranks:
            warn(path, word.line, f"{word.text!r} skipped, it is a token already, with id {ranks[token]}.")
        elif len(parts) > 1:
            cut = " + ".join(map(repr, parts[:8])) + (" + …" if len(parts) > 8 else "")
            warn(path, word.line, f"{word.text!r:.80} skipped, texts are cut into {cut} before anything is merged.")
        elif len(token) > MAX_BYTES:
            warn(path, word.line, f"{word.text!r:.40}… skipped, it has {len(token)} bytes, more than {MAX_BYTES}.")
        else:
            found.append(word)
    return found


def learn_merges(frequencies: Mapping[bytes, int], ranks: Mapping[bytes, int]) -> list[bytes]:
    """The tokens that make every word one token, in the order in which they have to be merged.

    Pairs are counted by what they would become: tiktoken merges any two neighbours that together are a token, however
    that token was learned. Of equally frequent ones the first in byte order is taken.

    Args:
        frequencies: the words, as bytes, and how much each one counts.
        ranks: the tokens that are there.
    """
    ranks = dict(ranks)
    rank = max(ranks.values(), default=-1)
    words = [merge_pieces(single_bytes(word), ranks) for word in frequencies]
    counts = list(frequencies.values())
    weights: Counter[bytes] = Counter()
    places: defaultdict[bytes, set[int]] = defaultdict(set)  # the words that may hold the pair

    def pairs_of(index: int) -> list[bytes]:
        return [left + right for left, right in pairwise(words[index])]

    for index in range(len(words)):
        for pair in pairs_of(index):
            weights[pair] += counts[index]
            places[pair].add(index)
    heap = [(-weight, pair) for pair, weight in weights.items()]
    heapq.heapify(heap)

    merges = []
    while heap:
        weight, token = heapq.heappop(heap)
        if weights[token] != -weight or not weight:  # the count has changed since
            continue
        rank += 1
        ranks[token] = rank
        merges.append(token)
        changed = set()
        for index in places.pop(token):
            old = pairs_of(index)
            words[index] = merge_pieces(words[index], ranks)
            new = pairs_of(index)
            for pair in old:
                weights[pair] -= counts[index]
            for pair in new:
                weights[pair] += counts[index]
                places[pair].add(index)
            changed.update(old, new)
        for pair in changed:
            heapq.heappush(heap, (-weights[pair], pair))
    return merges


def choose_ids(merges: list[bytes], base: QWenTokenizer, start: int | None) -> dict[bytes, int]:
    """Ids for the new tokens, one after another from `start`, or from the first one above all that are taken.

    Raises:
        ValueError: an id is taken, or there are not so many.
    """
    start = len(base) if start is None else start
    ids = range(start, start + len(merges))
    if taken := [index for index in base.decoder if index in ids]:
        raise ValueError(
            f"--start-id {start}: id {min(taken)} is taken by {base.decoder[min(taken)]!r}, and {len(merges)} ids are "
            f"needed. The first from which all are free is {len(base)}."
        )
    if ids.stop > END_OF_IDS:
        raise ValueError(f"--start-id {start}: the ids would go to {ids.stop - 1}, beyond {END_OF_IDS - 1}.")
    return dict(zip(merges, ids, strict=True))


def check_output(out: Path, *inputs: Path) -> None:
    """Raises ValueError where the result cannot be written, before the work is done."""
    if out.is_dir():
        raise ValueError(f"{out} is a folder: name the file to write in it, such as {out / 'extra.tiktoken'}.")
    if out.exists() and not out.is_file():
        raise ValueError(f"{out} is no regular file.")
    if not out.parent.is_dir():
        raise ValueError(f"{out} cannot be written: there is no folder {out.parent}.")
    for path in inputs:
        if out.exists() and path.exists() and out.samefile(path):
            raise ValueError(f"{out} would overwrite what is read from {path}: name another file.")


def write_checked(ranks: Mapping[bytes, int], base: Path, out: Path) -> QWenTokenizer:
    """Write a tiktoken file, all of it or nothing, and return the tokenizer of both files.

    Raises:
        ValueError: it cannot be written.
    """
    out = out.resolve()  # a link stays a link
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(b"".join(b"%s %d\n" % (b64encode(token), rank) for token, rank in ranks.items()))
        tokenizer = QWenTokenizer(base, extra_vocab_file=unfinished)
        os.replace(unfinished, out)
    except OSError as error:
        raise ValueError(f"{out} cannot be written ({error.strerror}).") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return tokenizer


def check_words(words: Iterable[Word], tokenizer: QWenTokenizer, path: Path) -> int:
    """How many words the finished tokenizer makes one token; the others, and those missed after a space, are named."""
    single = 0
    missed: list[tuple[Word, str]] = []
    for word in words:
        index = tokenizer.mergeable_ranks[word.text.encode()]
        if (ids := tokenizer.encode(word.text)) != [index]:
            warn(path, word.line, f"{word.text!r} is still {cut_text(tokenizer, ids)}.")
            continue
        single += 1
        ids = tokenizer.encode(f" {word.text}")
        if len(ids) > 1 and index not in ids and not UNSPACED.match(word.text):
            # the old merges come first, among them one of the space and the first letters
            missed.append((word, cut_text(tokenizer, ids)))
    if missed:
        word, cut = missed[0]
        more = f", and so are {len(missed) - 1} other words" if missed[1:] else ""
        lines = ", ".join(str(word.line) for word, _ in missed[:10]) + (", …" if missed[10:] else "")
        warn(
            path,
            lines,
            f"after a space {word.text!r} is still {cut}{more}. For use within sentences write such words into the "
            f"list a second time, with the space in front: {' ' + word.text!r}.",
        )
    return single


def cut_text(tokenizer: QWenTokenizer, ids: list[int]) -> str:
    return " + ".join(repr(tokenizer.decode(index)) for index in ids)


def warn(path: Path, line: int | str, message: str) -> None:
    print(f"{path}, line {line}: {message}", file=sys.stderr)


def add_merges(base_path: Path, out: Path, words_path: Path, start: int | None) -> None:
    """Everything from the files that are read to the one that is written, and a line about it.

    Raises:
        ValueError: a file is missing or broken, an id is taken, or there is nothing to add.
    """
    check_output(out, base_path, words_path)
    base = QWenTokenizer(base_path)
    words = new_words(read_words(words_path), base.mergeable_ranks, words_path)
    if not words:
        raise ValueError(f"{words_path} has no word that could be added: {out} was not written.")
    merges = learn_merges({word.text.encode(): word.frequency for word in words}, base.mergeable_ranks)
    ranks = choose_ids(merges, base, start)
    tokenizer = write_checked(ranks, base_path, out)
    single = check_words(words, tokenizer, words_path)
    first, last = ranks[merges[0]], ranks[merges[-1]]
    if first > len(base):
        print(f"The ids {len(base)} to {first - 1} stay without a token.", file=sys.stderr)
    print(
        f"{out}: {len(merges)} tokens with ids {first} to {last}, "
        f"{len(words)} words and {len(merges) - len(words)} pieces of them. "
        f"{single} of the {len(words)} words are one token now; a model needs {len(tokenizer)} rows."
    )


def start_id(text: str) -> int:
    """A whole number from 0 on, as argparse wants its types."""
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 on, not {text!r}")
    return int(text)


def main() -> int:
    """Returns the exit status: 0, 1 where nothing was written, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description="Learn the merges that make each word of a list one token.")
    parser.add_argument("base", type=Path, metavar="BASE.tiktoken", help="the vocabulary of a model, its qwen.tiktoken")
    parser.add_argument(
        "out", type=Path, metavar="OUT.tiktoken", help="where the new tokens go, and they alone: an extra_vocab_file"
    )
    parser.add_argument(
        "words",
        type=Path,
        metavar="WORDS.txt",
        help="UTF-8, in each line a word, or a word, a tab and its frequency (default 1); spaces are part of the word",
    )
    parser.add_argument("--start-id", type=start_id, metavar="N", help="the first new id (default: the first free one)")
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
