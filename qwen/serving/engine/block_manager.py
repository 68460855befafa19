"""Blocks of the key/value cache: which are free, who holds them, and what is in them.

A block holds the keys and values of `block_size` consecutive tokens. Sequences with the same beginning share its full
blocks (Kwon et al. 2023, https://arxiv.org/abs/2309.06180, section 4.4). A block that nobody holds keeps its contents,
to be found again by its name, until it is the least recently used one and another is needed.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator

BLOCK_SIZE = 16  # tokens, where attention does not demand more


class OutOfBlocks(Exception):
    """More blocks are needed than are free."""


class BlockManager:
    """Allocates the blocks of a cache.

    Args:
        num_blocks: number of blocks.
        block_size: tokens per block.
        reuse: find the contents of released blocks again.
    """

    def __init__(self, num_blocks: int, block_size: int, reuse: bool = True):
        self.num_blocks, self.block_size, self.reuse = num_blocks, block_size, reuse
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # the next to be used is first
        self._holders = [0] * num_blocks
        self._names: list[bytes | None] = [None] * num_blocks
        self._by_name: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Number of blocks that nobody holds."""
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Return the number of blocks that hold so many tokens."""
        return -(-tokens // self.block_size)

    def find(self, names: Iterable[bytes]) -> Iterator[int]:
        """Yield the blocks with these names, up to the first that is not there."""
        if not self.reuse:
            return
        for name in names:
            block = self._by_name.get(name)
            if block is None:
                return
            yield block

    def is_free(self, block: int) -> bool:
        """Whether nobody holds a block."""
        return self._holders[block] == 0

    def share(self, block: int) -> None:
        """Hold a block that was found."""
        self._holders[block] += 1
        self._free.pop(block, None)

    def allocate(self, count: int) -> list[int]:
        """Hold `count` blocks, without their old contents.

        Raises:
            OutOfBlocks: fewer are free. None is held then.
        """
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks are needed, and {len(self._free)} of {self.num_blocks} are free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
            self._remove_name(block)
        return blocks

    def set_name(self, block: int, name: bytes) -> None:
        """Make a full block, which someone holds, findable. Does nothing if another block has the same contents."""
        if self.reuse and self._names[block] is None and name not in self._by_name:
            self._names[block] = name
            self._by_name[name] = block

    def release(self, blocks: list[int]) -> None:
        """Stop holding blocks, in the order of their tokens."""
        for block in reversed(blocks):  # the end of a conversation is forgotten before its beginning
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            self._free[block] = None
            if self._names[block] is None:
                self._free.move_to_end(block, last=False)

    def forget(self, blocks: Iterable[int] | None = None) -> None:
        """Remove the names of blocks, or of all: their contents are not to be found again."""
        for block in list(self._by_name.values()) if blocks is None else blocks:
            if self._remove_name(block) and block in self._free:
                self._free.move_to_end(block, last=False)

    def _remove_name(self, block: int) -> bool:
        """Remove the name of a block; return whether it had one."""
        name = self._names[block]
        if name is None:
            return False
        del self._by_name[name]
        self._names[block] = None
        return True
