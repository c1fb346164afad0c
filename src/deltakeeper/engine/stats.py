"""What an engine has done and holds, for metrics and tests."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from deltakeeper.engine.stream import FinishReason


@dataclass(frozen=True)
class EngineStats:
    """A reading of the engine's counters; seconds are of wall-clock time.

    Attributes:
        running: requests that are computed.
        waiting: requests that wait, for room or for their tenant.
        kv_blocks: blocks of the KV cache.
        kv_blocks_used: of those, held by requests.
        kv_blocks_cached: of those, held by none but still known by their content.
        kv_bytes: bytes of the KV cache when all blocks have been used.
        prefix_queries: prompt tokens looked up in the prefix cache.
        prefix_hits: prompt tokens found there.
        prompt_tokens: prompt tokens of admitted requests.
        computed_tokens: tokens that went through the model, recomputed ones included.
        answer_tokens: tokens of answers.
        preemptions: how often a request lost its blocks to another one, for memory or for a place.
        failed_steps: passes that raised.
        finished: answers by how they ended.
        steps: passes.
        step_seconds: all passes together.
        model_seconds: of those, inside the model.
        recent_steps: the latest passes, (seconds, seconds inside the model, tokens) each, oldest first.
    """

    running: int
    waiting: int
    kv_blocks: int
    kv_blocks_used: int
    kv_blocks_cached: int
    kv_bytes: int
    prefix_queries: int
    prefix_hits: int
    prompt_tokens: int
    computed_tokens: int
    answer_tokens: int
    preemptions: int
    failed_steps: int
    finished: dict[FinishReason, int]
    steps: int
    step_seconds: float
    model_seconds: float
    recent_steps: tuple[tuple[float, float, int], ...]

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache that requests hold."""
        return self.kv_blocks_used / self.kv_blocks


@dataclass
class Counters:
    """What the engine counts as it goes."""

    prompt_tokens: int = 0
    computed_tokens: int = 0
    answer_tokens: int = 0
    failed_steps: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    model_seconds: float = 0.0
    finished: dict[FinishReason, int] = field(default_factory=dict)
    recent: deque[tuple[float, float, int]] = field(default_factory=lambda: deque(maxlen=256))

    def step(self, seconds: float, model_seconds: float, tokens: int) -> None:
        """Count a pass."""
        self.steps += 1
        self.step_seconds += seconds
        self.model_seconds += model_seconds
        self.computed_tokens += tokens
        self.recent.append((seconds, model_seconds, tokens))

    def finish(self, reason: FinishReason) -> None:
        """Count an answer that ended."""
        self.finished[reason] = self.finished.get(reason, 0) + 1
