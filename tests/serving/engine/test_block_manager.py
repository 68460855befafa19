"""The blocks of the key/value cache: who holds them, how their contents are found again, which are used next."""

import random
from hashlib import sha256

import pytest

from qwen.serving.engine.block_manager import BlockManager, OutOfBlocks
from tests.serving.engine.sequences import sequence


def names(*texts: str) -> list[bytes]:
    return [text.encode() for text in texts]


def named(blocks: BlockManager, *texts: str) -> list[int]:
    """Allocate and release a run of blocks with these names."""
    held = blocks.allocate(len(texts))
    for block, name in zip(held, names(*texts), strict=True):
        blocks.set_name(block, name)
    blocks.release(held)
    return held


def test_released_blocks_are_found_by_name():
    blocks = BlockManager(100, 16)
    held = named(blocks, "a", "b", "c")
    assert list(blocks.find(names("a", "b", "c", "d"))) == held
    assert list(blocks.find(names("x", "b"))) == []  # up to the first that is missing
    assert blocks.num_free == 100


def test_without_reuse_nothing_has_a_name():
    blocks = BlockManager(100, 16, reuse=False)
    named(blocks, "a", "b")
    assert list(blocks.find(names("a", "b"))) == []


def test_least_recently_used_contents_are_forgotten_first():
    blocks = BlockManager(6, 16)
    named(blocks, "old 1", "old 2")
    named(blocks, "new 1", "new 2")
    blocks.allocate(2)  # never used: nothing is forgotten
    assert len(list(blocks.find(names("old 1", "old 2")))) == len(list(blocks.find(names("new 1", "new 2")))) == 2
    blocks.allocate(1)
    assert len(list(blocks.find(names("old 1", "old 2")))) == 1  # the end of a conversation before its beginning
    assert len(list(blocks.find(names("new 1", "new 2")))) == 2
    blocks.allocate(1)
    assert not list(blocks.find(names("old 1")))
    assert len(list(blocks.find(names("new 1", "new 2")))) == 2


def test_using_contents_again_makes_them_recent():
    blocks = BlockManager(4, 16)
    named(blocks, "old 1", "old 2")
    named(blocks, "new 1", "new 2")
    found = list(blocks.find(names("old 1", "old 2")))
    for block in found:
        blocks.share(block)
    blocks.release(found)
    blocks.allocate(2)
    assert list(blocks.find(names("old 1", "old 2"))) == found
    assert not list(blocks.find(names("new 1")))


def test_shared_blocks_are_free_when_their_last_holder_leaves():
    blocks = BlockManager(3, 16)
    held = blocks.allocate(2)
    blocks.set_name(held[0], b"a")
    blocks.share(held[0])
    blocks.release(held)
    assert blocks.num_free == 2
    assert not blocks.is_free(held[0])
    with pytest.raises(OutOfBlocks, match="3 blocks are needed, and 2 of 3 are free"):
        blocks.allocate(3)
    assert blocks.num_free == 2  # none is held by the attempt
    blocks.release([held[0]])
    assert blocks.is_free(held[0])
    assert blocks.num_free == 3


def test_one_of_two_blocks_with_the_same_contents_has_the_name():
    blocks = BlockManager(4, 16)
    first, second = blocks.allocate(1), blocks.allocate(1)
    blocks.set_name(first[0], b"a")
    blocks.set_name(second[0], b"a")
    blocks.release(second)
    assert list(blocks.find([b"a"])) == first
    blocks.forget(first)
    assert list(blocks.find([b"a"])) == []
    blocks.set_name(first[0], b"b")
    blocks.forget()
    assert list(blocks.find([b"b"])) == []


@pytest.mark.parametrize("seed", range(5))
def test_random_use_against_a_simple_model(seed):
    """Blocks are held by those who should, and a name leads to the contents that it was given for."""
    draw = random.Random(seed)
    blocks = BlockManager(draw.choice([7, 40, 100]), 4)
    contents: dict[int, bytes] = {}  # of blocks, as far as nobody has overwritten them
    holders: list[list[int]] = []
    counter = 0
    for _ in range(3000):
        action = draw.random()
        if action < 0.35:
            count = draw.randrange(1, 6)
            if count > blocks.num_free:
                with pytest.raises(OutOfBlocks):
                    blocks.allocate(count)
                continue
            held = {block for table in holders for block in table}
            new = blocks.allocate(count)
            assert len(set(new)) == count
            assert not held & set(new)
            for block in new:
                contents.pop(block, None)
            holders.append(new)
        elif action < 0.6 and holders:
            block = draw.choice(draw.choice(holders))
            if block not in contents:
                counter += 1
                contents[block] = b"%d" % counter
                blocks.set_name(block, contents[block])
        elif action < 0.75 and contents:
            block, name = draw.choice(list(contents.items()))
            assert list(blocks.find([name])) == [block]
            blocks.share(block)
            holders.append([block])
        elif action < 0.77:
            blocks.forget(list(contents)[:2])
            contents = dict(list(contents.items())[2:])
        elif holders:
            blocks.release(holders.pop(draw.randrange(len(holders))))
        held = {block for table in holders for block in table}
        assert blocks.num_free == blocks.num_blocks - len(held)
        assert all(blocks.is_free(block) == (block not in held) for block in range(blocks.num_blocks))
    for table in holders:
        blocks.release(table)
    assert blocks.num_free == blocks.num_blocks


def test_names_are_equal_only_for_equal_beginnings():
    draw = random.Random(0)
    prompt = [draw.randrange(150_000) for _ in range(64)]
    block_names = [sequence(prompt).block_name(index, 16) for index in range(4)]
    assert len(set(block_names)) == 4
    for position in range(64):
        other = [*prompt[:position], prompt[position] + 1, *prompt[position + 1 :]]
        found = [sequence(other).block_name(index, 16) for index in range(4)]
        first = position // 16
        assert found[:first] == block_names[:first]
        assert not set(found[first:]) & set(block_names)  # all later ones differ, too
    assert sequence(prompt[16:]).block_name(0, 16) not in block_names  # the same tokens elsewhere


def test_names_are_sha_256_over_everything_before():
    """Not a hash of 64 bits, whose collisions show somebody else's text."""
    name = sequence([1, 2, 3, 4]).block_name(1, 2)
    assert len(name) == sha256().digest_size == 32
    assert name == sequence([1, 2, 3, 4, 5]).block_name(1, 2)


def test_alpha_adapter_and_salt_separate_names():
    variants = [{}, {"alpha_index": 1}, {"cache_key": ("adapter",)}, {"cache_key": ("salt 'a'",)}]
    variants += [{"cache_key": ("adapter", "salt 'a'")}, {"cache_key": ("adapter', 'salt 'a'",)}]
    found = {sequence(range(16), **variant).block_name(0, 16) for variant in variants}
    assert len(found) == len(variants)


def test_names_include_the_reply():
    one = sequence([1, 2, 3])
    one.token_ids.append(4)
    assert one.block_name(0, 4) == sequence([1, 2, 3, 4]).block_name(0, 4)
