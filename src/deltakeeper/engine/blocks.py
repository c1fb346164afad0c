"""Blocks of the KV cache: who holds which, and which full ones can be shared because their past is the same."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

BLOCK = 16  # tokens
DIGEST_BYTES = 16


def seed_key(version: str, tenant: str | None, salt: str) -> bytes:
    """Start of a chain of block keys: blocks of different versions, tenants or salts have nothing in common.

    The version is the digest of a delta's content, so a delta that is replaced under its name starts afresh.
    """
    text = "\0".join(f"{len(part)}:{part}" for part in (version, "" if tenant is None else f"t{tenant}", salt))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def next_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """Key of a full block: a 128-bit digest of the key before it and its token ids."""
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=DIGEST_BYTES).digest()


def extend_keys(keys: list[bytes], seed: bytes, tokens: Sequence[int], blocks: int) -> None:
    """Append keys until there is one for each of the first `blocks` full blocks of `tokens`."""
    for index in range(len(keys), blocks):
        keys.append(next_key(keys[-1] if keys else seed, tokens[index * BLOCK : (index + 1) * BLOCK]))


class BlockPool:
    """Hands out block numbers, counts who uses them, and remembers full blocks by key until memory is needed.

    A block is in one of three states: used (by one or more requests), cached (by none, but its key is known; the one
    unused longest goes first) or free. Only full blocks have keys, and full blocks are never written again, so sharing
    needs no copies.
    """

    def __init__(self, blocks: int) -> None:
        """Make a pool of `blocks` free blocks, numbered from 0."""
        self.blocks = blocks
        self._free = list(range(blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._users = [0] * blocks
        self._keys: list[bytes | None] = [None] * blocks
        self._by_key: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Blocks that could be handed out now."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        """Blocks held by requests."""
        return self.blocks - self.available

    @property
    def cached(self) -> int:
        """Blocks held by none whose content is still known."""
        return len(self._cached)

    def take(self, count: int) -> list[int] | None:
        """Hand out `count` blocks, or None (and nothing) if there are not as many."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
            self._users[block] = 1
            taken.append(block)
        return taken

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known run of keys, now used once more each."""
        found = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            if self._users[block] == 0:
                del self._cached[block]
            self._users[block] += 1
            found.append(block)
        return found

    def known(self, keys: Iterable[bytes]) -> tuple[int, int]:
        """How many keys from the first on are known, and how many of those blocks nobody uses now."""
        count = idle = 0
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            count += 1
            idle += self._users[block] == 0
        return count, idle

    def name(self, block: int, key: bytes) -> None:
        """Make a full, used block known; a second block of the same key stays unknown."""
        if key not in self._by_key and self._keys[block] is None:
            self._by_key[key] = block
            self._keys[block] = key

    def give_back(self, blocks: Sequence[int]) -> None:
        """Use blocks once less; known ones stay cached, the end of the run to be forgotten before its beginning."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block] == 0:
                if self._keys[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._by_key[key]
            self._keys[block] = None
