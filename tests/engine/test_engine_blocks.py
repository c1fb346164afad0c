"""The block pool against a model of it, and keys that never meet."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from deltakeeper.engine.blocks import BLOCK, BlockPool, extend_keys, next_key, seed_key

KEYS = [bytes([i]) * 16 for i in range(6)]


class PoolMachine(RuleBasedStateMachine):
    """Requests take, name, share and give back blocks; what each block holds is remembered beside the pool."""

    @initialize(blocks=st.integers(1, 8))
    def start(self, blocks):
        self.pool = BlockPool(blocks)
        self.held = []  # lists of blocks, one a request
        self.content = {}  # block -> key written there since it was taken

    @rule(count=st.integers(1, 4))
    def take(self, count):
        room = self.pool.available
        taken = self.pool.take(count)
        if count > room:
            assert taken is None
            return
        assert len(set(taken)) == count
        assert not set(taken) & {block for blocks in self.held for block in blocks}
        for block in taken:
            self.content.pop(block, None)
        self.held.append(taken)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def name(self, data):
        block = data.draw(st.sampled_from([b for blocks in self.held for b in blocks]))
        if block not in self.content:
            key = data.draw(st.sampled_from(KEYS))
            self.content[block] = key
            self.pool.name(block, key)

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=3))
    def find(self, keys):
        known, idle = self.pool.known(keys)
        before = self.pool.available
        found = self.pool.find(keys)
        assert len(found) == known
        assert before - self.pool.available == len({*found}) - sum(
            any(block in blocks for blocks in self.held) for block in {*found}
        )
        assert idle >= before - self.pool.available
        for block, key in zip(found, keys, strict=False):
            assert self.content[block] == key
        if found:
            self.held.append(found)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data):
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.pool.give_back(self.held.pop(index))

    @invariant()
    def counts(self):
        if hasattr(self, "pool"):
            assert self.pool.used == len({block for blocks in self.held for block in blocks})
            assert self.pool.cached <= self.pool.available


TestPool = PoolMachine.TestCase


def test_the_block_unused_longest_is_forgotten_first():
    pool = BlockPool(3)
    blocks = pool.take(3)
    for block, key in zip(blocks, KEYS, strict=False):
        pool.name(block, key)
    pool.give_back(blocks[:2])  # the end of a run goes before its beginning
    pool.give_back(blocks[2:])
    assert pool.take(1) == [blocks[1]]
    assert pool.known([KEYS[1]]) == (0, 0)
    assert pool.find([KEYS[0]]) == [blocks[0]]
    assert pool.take(1) == [blocks[2]]
    assert pool.take(1) is None


def test_keys_depend_on_all_that_came_before():
    tokens = list(range(4 * BLOCK))
    keys: list[bytes] = []
    extend_keys(keys, seed_key("v", "a", ""), tokens, 4)
    assert len(set(keys)) == 4
    assert all(len(key) * 8 >= 128 for key in keys)
    changed = [99, *tokens[1:]]
    other: list[bytes] = []
    extend_keys(other, seed_key("v", "a", ""), changed, 4)
    assert not set(keys) & set(other)
    assert keys[1] == next_key(keys[0], tokens[BLOCK : 2 * BLOCK])


@pytest.mark.parametrize(
    "other",
    [
        ("w", "a", ""),
        ("v", "b", ""),
        ("v", None, ""),
        ("v", "a", "salt"),
        ("va", "", ""),
        ("v", "", "a"),
        ("v\0", "a", ""),
    ],
)
def test_seeds_of_versions_tenants_and_salts_differ(other):
    assert seed_key("v", "a", "") != seed_key(*other)
