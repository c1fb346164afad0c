"""Who is computed in the next pass: tokens being decoded first, then chunks of prompts, within a budget of tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from deltakeeper.engine.blocks import BLOCK, BlockPool, extend_keys
from deltakeeper.engine.sequence import Chunk, Sequence
from deltakeeper.engine.settings import EngineSettings
from deltakeeper.engine.waiting import ANSWER_WEIGHT, WaitingLine

LOGPROB_ROWS = 128
"""Prompt tokens a pass whose logits are kept, for requests that want them: each row is as wide as the vocabulary."""


class Scheduler:
    """Requests that run and wait, and the blocks they hold.

    The oldest running request can always go on: it may take the blocks of any younger one that is not in the pass,
    which is then computed afresh later (what it had stays in the prefix cache as long as there is room).

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
        self.waiting = WaitingLine()
        widest = min(-(-context // BLOCK), pool.blocks)
        self.tables = np.zeros((settings.max_running, widest), np.int32)
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._settings = settings
        self._rows = list(range(settings.max_running - 1, -1, -1))
        self._planned: set[Sequence] = set()

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
        before = self.preemptions
        prompts: list[Sequence] = []
        for sequence in list(self.running):
            if only is not None and sequence.slot != only:
                continue
            if sequence.row < 0:  # lost its blocks to an older one just now
                continue
            if len(sequence.tokens) - sequence.computed > 1:
                prompts.append(sequence)
            elif budget and self._grow(sequence, sequence.computed + 1):
                chunks.append(Chunk(sequence, 1, 1))
                planned.add(sequence)
                budget -= 1
        for sequence in prompts:
            if not budget:
                break
            if sequence.row >= 0:
                budget -= self._plan_prompt(sequence, budget, chunks)
        if only is None and budget and self.preemptions == before:
            self._admit(ready, budget, chunks)
        chunks.sort(key=_slot)
        return chunks

    def commit(self, chunks: list[Chunk]) -> None:
        """Count a pass that succeeded: its tokens are in the cache now, and full blocks may be shared."""
        sharing = self._settings.prefix_sharing
        for sequence, count, _ in chunks:
            sequence.computed += count
            answering = sequence.computed > len(sequence.request.prompt)
            self.waiting.charge(sequence.request.tenant, count * ANSWER_WEIGHT if answering else count)
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
        """Give a request blocks for so many tokens, at the cost of the youngest that are not planned, if need be."""
        held = len(sequence.blocks)
        needed = -(-tokens // BLOCK) - held
        if needed <= 0:
            return True
        while (blocks := self.pool.take(needed)) is None:
            victim = next((s for s in reversed(self.running) if s is sequence or s not in self._planned), sequence)
            if victim is sequence:
                return False
            self._unseat(victim)
            self.waiting.push(victim, first=True)
            self.preemptions += 1
        sequence.blocks += blocks
        self.tables[sequence.row, held : held + needed] = blocks
        return True

    def _admit(self, ready: Callable[[Sequence], bool], budget: int, chunks: list[Chunk]) -> None:
        not_ready: set[str | None] = set()
        while budget and self._rows and (sequence := self.waiting.next(not_ready)) is not None:
            if not ready(sequence):
                if sequence.stream.finish_reason is None:
                    not_ready.add(sequence.request.tenant)
                continue
            if not self._seat(sequence):
                break
            budget -= self._plan_prompt(sequence, budget, chunks)

    def _seat(self, sequence: Sequence) -> bool:
        """Let a waiting request run if there is room for all that it has, and one more block for everybody who runs."""
        needed = sequence.blocks_needed
        request = sequence.request
        most = len(sequence.tokens) if request.prompt_logprobs is None else request.prompt_logprobs_from
        sharing = self._settings.prefix_sharing and (request.prompt_logprobs is None or most > 1)
        keys: list[bytes] = []
        if sharing:  # the last token is always computed, so that there are logits to go on from
            full = (most - 1) // BLOCK
            extend_keys(sequence.keys, sequence.cache_seed, sequence.tokens, full)
            keys = sequence.keys[:full]
        found, idle = self.pool.known(keys)
        if self.running and self.pool.available < needed - found + idle + len(self.running):
            return False
        self.waiting.remove(sequence)
        self.waiting.started(sequence.request.tenant)
        sequence.row = self._rows.pop()
        sequence.blocks = self.pool.find(keys)
        self.tables[sequence.row, :found] = sequence.blocks
        sequence.computed = found * BLOCK
        sequence.named = found
        self.running.append(sequence)
        if sharing and not sequence.answered:
            self.prefix_queries += len(sequence.tokens)
            self.prefix_hits += sequence.computed
            sequence.stream.cached_tokens = sequence.computed
        return True

    def _unseat(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.waiting.stopped(sequence.request.tenant)
        self.pool.give_back(sequence.blocks)
        self._rows.append(sequence.row)
        sequence.row, sequence.blocks, sequence.computed, sequence.named = -1, [], 0, 0


def _slot(chunk: Chunk) -> int:
    return chunk.sequence.slot
