"""Who is computed in the next pass: tokens being decoded first, then chunks of prompts, within a budget of tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from deltakeeper.engine.blocks import BLOCK, BlockPool, extend_keys
from deltakeeper.engine.line_room import LineRoom
from deltakeeper.engine.sequence import Chunk, Sequence
from deltakeeper.engine.settings import EngineSettings
from deltakeeper.engine.waiting import ANSWER_WEIGHT, WaitingLine

LOGPROB_ROWS = 128
"""Prompt tokens a pass whose logits are kept, for requests that want them: each row is as wide as the vocabulary."""


class Scheduler:
    """Requests that run and wait, and the blocks they hold.

    Places are shared. A new one goes to whoever has the fewest, and has had least among those. Who finds none takes the
    newest of whoever has most (`WaitingLine.claims`), one in a pass; where nobody waits for a place nobody loses one.
    What is left of a pass after decoding goes to the prompts of whoever has had least.

    Some running request can always go on: it may take the blocks of one that is not in the pass, the newest of whoever
    has the most places. Who lost its blocks is computed afresh later, and gives the same tokens (what it had stays in
    the prefix cache as long as there is room).

    Attributes:
        running: requests that have blocks, oldest first.
        waiting: requests that have none.
        tables: int32 `(max_running, most blocks of a request)`, block tables by `Sequence.row`.
        preemptions: how often a request lost its blocks.
        prefix_queries: prompt tokens looked up in the prefix cache.
        prefix_hits: prompt tokens found there.
    """

    def __init__(self, settings: EngineSettings, pool: BlockPool, context: int) -> None:
        self.pool = pool
        self.running: list[Sequence] = []
        self.waiting = WaitingLine(LineRoom(settings.max_waiting, settings.max_waiting_tokens))
        widest = min(-(-context // BLOCK), pool.blocks)
        self.tables = np.zeros((settings.max_running, widest), np.int32)
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._settings = settings
        self._rows = list(range(min(settings.max_running, settings.max_step_tokens) - 1, -1, -1))
        self._planned: set[Sequence] = set()
        self._held_up: Sequence | None = None

    @property
    def most_tokens(self) -> int:
        """Tokens of one request that could be held if it were alone."""
        return int(self.tables.shape[1]) * BLOCK

    def plan(self, ready: Callable[[Sequence], bool], only: int | None = None) -> list[Chunk]:
        """Choose the next pass and give its requests their blocks; chunks of one slot are adjacent.

        Args:
            ready: whether a waiting request's tenant is in memory (it is admitted then); asked once a tenant.
            only: plan this slot alone, to find out whose rows make a pass fail; nothing is admitted then.
        """
        budget = self._settings.max_step_tokens
        chunks: list[Chunk] = []
        planned = self._planned
        planned.clear()
        if only is None:
            self.waiting.passes += 1
            self._share(ready)
        before = self.preemptions
        prompts: list[Sequence] = []
        for sequence in list(self.running):
            if only is not None and sequence.slot != only:
                continue
            if sequence.row < 0:  # lost its blocks to another one just now
                continue
            if len(sequence.tokens) - sequence.computed > 1:
                prompts.append(sequence)
            elif budget and self._grow(sequence, sequence.computed + 1):
                chunks.append(Chunk(sequence, 1, 1))
                planned.add(sequence)
                budget -= 1
        self._fill(prompts, budget, chunks, ready if only is None and self.preemptions == before else None)
        chunks.sort(key=_slot)
        return chunks

    def commit(self, chunks: list[Chunk]) -> None:
        """Count a pass that succeeded: its tokens are in the cache now, and full blocks may be shared."""
        sharing = self._settings.prefix_sharing
        for sequence, count, _ in chunks:
            sequence.computed += count
            if (new := sequence.computed - sequence.paid) > 0:
                answered = min(new, max(0, sequence.computed - len(sequence.request.prompt)))
                self.waiting.charge(sequence, new + answered * (ANSWER_WEIGHT - 1))
                sequence.paid = sequence.computed
            full = sequence.computed // BLOCK
            if sharing and full > sequence.named:
                extend_keys(sequence.keys, sequence.cache_seed, sequence.tokens, full)
                for index in range(sequence.named, full):
                    self.pool.name(sequence.blocks[index], sequence.keys[index])
                sequence.named = full

    def drop(self, sequence: Sequence) -> None:
        """Take a request out, wherever it is; its blocks and its row are free afterwards."""
        if sequence.row >= 0:
            self._unseat(sequence)
            self.waiting.stop(sequence)
        else:
            self.waiting.remove(sequence)

    def _plan_prompt(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        missing = len(sequence.tokens) - sequence.computed
        count = min(missing, budget)
        answers = int(count == missing)
        request = sequence.request
        if request.prompt_logprobs is not None and sequence.computed < len(request.prompt):
            before = max(0, request.prompt_logprobs_from - 1 - sequence.computed)  # rows of which nothing is reported
            count = min(count, before + LOGPROB_ROWS)
            answers = max(0, count - before)
        if not self._grow(sequence, sequence.computed + count):
            return 0
        chunks.append(Chunk(sequence, count, answers))
        self._planned.add(sequence)
        return count

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give a request blocks for so many tokens, at the cost of others that are not planned, if need be."""
        held = len(sequence.blocks)
        needed = -(-tokens // BLOCK) - held
        if needed <= 0:
            return True
        while (blocks := self.pool.take(needed)) is None:
            movable = (s for s in reversed(self.running) if s is sequence or s not in self._planned)
            if (victim := max(movable, key=self.waiting.places)) is sequence:
                return False
            self._preempt(victim)
        sequence.blocks += blocks
        self.tables[sequence.row, held : held + needed] = blocks
        return True

    def _share(self, ready: Callable[[Sequence], bool]) -> None:
        """Take a place back for a request to which it is due, if there was no room in the pass before."""
        held_up, self._held_up = self._held_up, None
        if held_up is None or held_up.stream.finish_reason is not None or self._find_room(held_up) is not None:
            return
        for sequence, tenant in self.waiting.claims():
            if ready(sequence):
                self._preempt(next(s for s in reversed(self.running) if self.waiting.is_of(s, tenant)))
                self._seat(sequence)
                return

    def _fill(
        self,
        prompts: list[Sequence],
        budget: int,
        chunks: list[Chunk],
        ready: Callable[[Sequence], bool] | None,
    ) -> None:
        """Give the rest of a pass to prompts, those of whoever has had least first; admit nobody without `ready`."""
        not_ready: set[str | None] = set()
        before = self.preemptions
        left = deque(sorted(prompts, key=self.waiting.served))
        turn = None if ready is None else self._next(ready, not_ready)
        if turn is not None and not self._rows:
            self._held_up, turn = turn, None
        while budget:
            if turn is not None and (not left or self.waiting.served(turn) < self.waiting.served(left[0])):
                assert ready is not None
                if self._seat(turn):
                    budget -= self._plan_prompt(turn, budget, chunks)
                    turn = self._next(ready, not_ready)
                else:
                    self._held_up, turn = turn, None
            elif left:
                sequence = left.popleft()
                if sequence.row >= 0:  # else it lost its blocks just now
                    budget -= self._plan_prompt(sequence, budget, chunks)
            else:
                return
            if self.preemptions != before:
                turn = None

    def _next(self, ready: Callable[[Sequence], bool], not_ready: set[str | None]) -> Sequence | None:
        """Whose turn it is among the waiting requests whose tenants are there."""
        while (sequence := self.waiting.next(not_ready)) is not None:
            if ready(sequence):
                return sequence
            if sequence.stream.finish_reason is None:
                not_ready.add(sequence.request.tenant)
        return None

    def _find_room(self, sequence: Sequence) -> list[bytes] | None:
        """Keys of the blocks that a waiting request may share, if there is room for it to run; None if not.

        Room is for all that it has, for what is missing of those that run, and one more block for each of them.
        """
        if not self._rows:
            return None
        keys: list[bytes] = []
        if most := self._shareable(sequence):
            full = (most - 1) // BLOCK  # the last token is always computed, so that there are logits to go on from
            extend_keys(sequence.keys, sequence.cache_seed, sequence.tokens, full)
            keys = sequence.keys[:full]
        found, idle = self.pool.known(keys)
        promised = sum(s.blocks_needed - len(s.blocks) + 1 for s in self.running)
        if self.running and self.pool.available < sequence.blocks_needed - found + idle + promised:
            return None
        return keys

    def _seat(self, sequence: Sequence) -> bool:
        """Let a waiting request run if there is room."""
        keys = self._find_room(sequence)
        if keys is None:
            return False
        self.waiting.start(sequence)
        sequence.row = self._rows.pop()
        sequence.blocks = self.pool.find(keys)
        found = len(sequence.blocks)
        self.tables[sequence.row, :found] = sequence.blocks
        sequence.computed = found * BLOCK
        sequence.named = found
        self.running.append(sequence)
        if not sequence.paid and self._shareable(sequence):
            self.prefix_queries += len(sequence.tokens)
            self.prefix_hits += sequence.computed
            sequence.stream.cached_tokens = sequence.computed
        sequence.paid = max(sequence.paid, sequence.computed)
        return True

    def _shareable(self, sequence: Sequence) -> int:
        """Tokens at its beginning that may come from the prefix cache, but for the last one."""
        request = sequence.request
        most = len(sequence.tokens) if request.prompt_logprobs is None else request.prompt_logprobs_from
        return most if self._settings.prefix_sharing and (request.prompt_logprobs is None or most > 1) else 0

    def _preempt(self, sequence: Sequence) -> None:
        self._unseat(sequence)
        self.waiting.put_back(sequence)
        self.preemptions += 1

    def _unseat(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.give_back(sequence.blocks)
        self._rows.append(sequence.row)
        sequence.row, sequence.blocks, sequence.computed, sequence.named = -1, [], 0, 0


def _slot(chunk: Chunk) -> int:
    return chunk.sequence.slot
