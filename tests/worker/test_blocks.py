"""The block pool against a naive model of it, and what the names of blocks depend on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from worker.blocks import BlockHasher, BlockPool

DIGESTS = [bytes([number]) * 16 for number in range(12)]


class BlockPoolMachine(RuleBasedStateMachine):
    """Drives a pool and says, from lists that are searched from end to end, what it must answer."""

    @initialize(num_blocks=st.integers(1, 9))
    def build(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.holders: list[list[int]] = []
        self.cached: list[int] = []  # least recently used first
        self.content: dict[int, bytes] = {}

    @property
    def held(self) -> set[int]:
        return {block for holder in self.holders for block in holder}

    @property
    def empty(self) -> set[int]:
        return set(range(self.pool.num_blocks)) - self.held - set(self.cached)

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.pool.num_free))
        empty = self.empty
        blocks = self.pool.allocate(count)
        evicted, self.cached = self.cached[: max(0, count - len(empty))], self.cached[max(0, count - len(empty)) :]
        for block in evicted:
            del self.content[block]
        assert len(blocks) == len(set(blocks)) == count
        assert set(blocks) <= empty | set(evicted)
        assert set(evicted) <= set(blocks)
        self.holders.append(blocks)

    @rule()
    def allocate_too_many(self) -> None:
        with pytest.raises(AssertionError, match="free"):
            self.pool.allocate(self.pool.num_free + 1)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.release(holder)
        # The tail becomes the older one, so that it is evicted before the head.
        self.cached += [block for block in reversed(holder) if block not in self.held and block in self.content]

    @precondition(lambda self: self.held)
    @rule(data=st.data(), digest=st.sampled_from(DIGESTS))
    def register(self, data: st.DataObject, digest: bytes) -> None:
        block = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.register(block, digest)
        if digest not in self.content.values() and block not in self.content:
            self.content[block] = digest

    @rule(digests=st.lists(st.sampled_from(DIGESTS), max_size=5, unique=True))
    def find_and_hold(self, digests: list[bytes]) -> None:
        block_of = {digest: block for block, digest in self.content.items()}
        expected = []
        for digest in digests:
            if digest not in block_of:
                break
            expected.append(block_of[digest])
        found = self.pool.find(digests)
        assert found == expected
        assert self.pool.count_cached(found) == sum(block in self.cached for block in found)
        self.pool.hold(found)
        self.cached = [block for block in self.cached if block not in found]
        self.holders.append(found)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.sampled_from(sorted(self.held))))
        self.pool.forget(blocks)
        for block in blocks:
            self.content.pop(block, None)

    @rule()
    def flush(self) -> None:
        assert self.pool.flush() == len(self.content)
        self.cached.clear()
        self.content.clear()

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check(block for holder in self.holders for block in holder)
        assert self.pool.num_held == len(self.held)
        assert self.pool.num_cached == len(self.cached)
        assert self.pool.num_free == len(self.empty) + len(self.cached)
        assert {block for block in range(self.pool.num_blocks) if self.pool.is_held(block)} == self.held


BlockPoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBlockPool = BlockPoolMachine.TestCase


def test_the_least_recently_used_is_evicted_first_and_tails_before_heads() -> None:
    pool = BlockPool(6)
    older, newer = pool.allocate(3), pool.allocate(3)
    for block, digest in zip(older + newer, DIGESTS, strict=False):
        pool.register(block, digest)
    pool.release(older)
    pool.release(newer)
    assert [pool.allocate(1)[0] for _ in range(6)] == [*reversed(older), *reversed(newer)]


def test_a_block_that_is_found_again_is_evicted_last() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.register(first, DIGESTS[0])
    pool.register(second, DIGESTS[1])
    pool.release([first])
    pool.release([second])
    found = pool.find([DIGESTS[0]])
    pool.hold(found)
    pool.release(found)
    assert pool.allocate(1) == [second]


def test_empty_blocks_go_before_cached_ones() -> None:
    pool = BlockPool(2)
    kept, dropped = pool.allocate(2)
    pool.register(kept, DIGESTS[0])
    pool.release([kept, dropped])
    assert pool.allocate(1) == [dropped]
    assert pool.find([DIGESTS[0]]) == [kept]


def test_releasing_twice_is_noticed() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="more often than held"):
        pool.release(blocks)


@pytest.mark.parametrize("held", [[], [0, 0], [1]], ids=["lost", "twice", "another"])
def test_check_notices_holders_that_do_not_match(held: list[int]) -> None:
    pool = BlockPool(2)
    assert pool.allocate(1) == [0]
    pool.check([0])
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check(held)


ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8)


@given(salt=st.binary(max_size=200), parent_ids=ids, own_ids=ids, key=st.binary(min_size=1, max_size=64))
@settings(max_examples=50, deadline=None)
def test_a_digest_depends_on_salt_parents_tokens_and_key(
    salt: bytes, parent_ids: list[int], own_ids: list[int], key: bytes
) -> None:
    def chain(salt: bytes, *blocks: list[int], key: bytes = key) -> bytes:
        hasher = BlockHasher(key)
        digest = hasher.root(salt)
        for block in blocks:
            digest = hasher.extend(digest, np.array(block, np.int32))
        return digest

    digest = chain(salt, parent_ids, own_ids)
    assert digest == chain(salt, parent_ids, own_ids)
    assert len(digest) == 16
    others = {
        chain(salt + b"x", parent_ids, own_ids),
        chain(salt, own_ids),
        chain(salt, [*parent_ids[:-1], parent_ids[-1] ^ 1], own_ids),
        chain(salt, parent_ids, [*own_ids[:-1], own_ids[-1] ^ 1]),
        chain(salt, parent_ids, own_ids, own_ids),
        chain(salt, parent_ids, own_ids, key=bytes([key[0] ^ 1]) + key[1:]),
    }
    assert digest not in others
    assert len(others) == 6
