"""KV blocks: who holds which, and which free ones still hold something worth finding again.

A block is in exactly one of three places: *held* by one or more sequences (its reference count), *cached* (free, but
its content is in the prefix index and it can be revived), or *empty* (free, nothing in it). Cached blocks are evicted
least recently used first, and only when no empty one is left. Every operation is O(1) per block.

This file knows nothing of steps in flight: the scheduler frees a sequence's blocks only after the last step that used
them has retired.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

BlockId = int
DIGEST_BYTES = 16


class BlockHasher:
    """Names a full block by everything that its keys and values depend on: tenant salt, all tokens before it, its own.

    A chain of keyed BLAKE2b digests (128 bits). The key is random per engine, so that nobody can look for collisions.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def root(self, salt: bytes) -> bytes:
        """The chain's start for one tenant."""
        return hashlib.blake2b(salt, digest_size=DIGEST_BYTES, key=self._key, person=b"root").digest()

    def extend(self, parent: bytes, ids: np.ndarray) -> bytes:
        """The digest of the block that holds `ids` ([block_size] int32) and follows `parent`."""
        content = parent + ids.tobytes()
        return hashlib.blake2b(content, digest_size=DIGEST_BYTES, key=self._key, person=b"block").digest()


class BlockPool:
    """Reference counts, the free blocks, and the prefix index of one engine."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))  # a stack: low numbers first
        self._cached: OrderedDict[BlockId, None] = OrderedDict()  # least recently used first
        self._digest_of: dict[BlockId, bytes] = {}
        self._block_of: dict[bytes, BlockId] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could give now, cached ones included."""
        return len(self._empty) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_free

    def allocate(self, count: int) -> list[BlockId]:
        """Take `count` blocks, evicting cached ones where empty ones run out. The caller has looked at `num_free`."""
        if count > self.num_free:
            raise AssertionError(f"{count} blocks wanted, {self.num_free} free: the caller must check first")
        blocks = [self._empty.pop() if self._empty else self._evict() for _ in range(count)]
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def find(self, digests: Iterable[bytes]) -> list[BlockId]:
        """The blocks of the longest known prefix of a chain. They are not held: `hold` them before anything else."""
        blocks: list[BlockId] = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def count_cached(self, blocks: Sequence[BlockId]) -> int:
        """How many of these would leave the free ones if they were held."""
        return sum(block in self._cached for block in blocks)

    def hold(self, blocks: Sequence[BlockId]) -> None:
        """Add a holder to blocks that `find` returned."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1

    def release(self, blocks: Sequence[BlockId]) -> None:
        """Drop a holder. Of one sequence's blocks the last are evicted first: a prefix outlives its tail."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] < 0:
                raise AssertionError(f"block {block} released more often than held")
            if self._refs[block] == 0:
                if block in self._digest_of:
                    self._cached[block] = None
                else:
                    self._empty.append(block)

    def register(self, block: BlockId, digest: bytes) -> None:
        """Let a held, full and computed block be found. A second block of the same content stays unknown."""
        if digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def forget(self, blocks: Iterable[BlockId]) -> None:
        """Let held blocks not be found any more."""
        for block in blocks:
            digest = self._digest_of.pop(block, None)
            if digest is not None:
                del self._block_of[digest]

    def flush(self) -> int:
        """Forget all content; held blocks stay with their holders. Returns the number of blocks forgotten."""
        forgotten = len(self._digest_of)
        self._empty.extend(self._cached)
        self._cached.clear()
        self._digest_of.clear()
        self._block_of.clear()
        return forgotten

    def is_held(self, block: BlockId) -> bool:
        return self._refs[block] > 0

    def check(self, held: Iterable[BlockId]) -> None:
        """Raise unless every block is in exactly one place; `held` are all holders' blocks, repeated where shared."""
        refs = [0] * self.num_blocks
        for block in held:
            refs[block] += 1
        if refs != self._refs:
            wrong = [b for b in range(self.num_blocks) if refs[b] != self._refs[b]]
            raise AssertionError(f"reference counts do not match the holders of blocks {wrong[:10]}")
        places = [*self._empty, *self._cached, *(b for b in range(self.num_blocks) if self._refs[b])]
        if sorted(places) != list(range(self.num_blocks)):
            raise AssertionError("a block is lost, or in two places")
        if {digest: block for block, digest in self._digest_of.items()} != self._block_of:
            raise AssertionError("the prefix index disagrees with itself")
        if any(block not in self._digest_of for block in self._cached):
            raise AssertionError("a cached block has no content")

    def _evict(self) -> BlockId:
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._digest_of.pop(block)]
        return block
