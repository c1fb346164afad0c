"""Penalties on tokens seen before: what each request has said so far, kept up to date token by token."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from deltakeeper.engine.request import Sampling


class Penalties:
    """Tokens that a request has seen, and what they cost.

    Repetition as in transformers and vLLM (prompt and answer; a positive logit is divided, another one multiplied);
    presence and frequency as in OpenAI's interface and vLLM (the answer alone).
    """

    def __init__(self, sampling: Sampling, prompt: Iterable[int]) -> None:
        self._sampling = sampling
        self._place: dict[int, int] = {}
        self._ids = torch.zeros(256, dtype=torch.int64)
        self._counts = torch.zeros(256)  # occurrences in the answer
        if sampling.repetition_penalty != 1.0:
            for token in prompt:
                self._find(token)

    def add(self, token: int) -> None:
        """Count a token of the answer."""
        self._counts[self._find(token)] += 1

    def apply_(self, logits: torch.Tensor) -> None:
        """Change one row of float32 logits, `(vocabulary,)`, in place."""
        size = len(self._place)
        if not size:
            return
        sampling = self._sampling
        ids, counts = self._ids[:size].to(logits.device), self._counts[:size].to(logits.device)
        seen = logits[ids]  # (tokens seen,)
        if (repetition := sampling.repetition_penalty) != 1.0:
            seen = torch.where(seen > 0, seen / repetition, seen * repetition)
        if sampling.frequency_penalty:
            seen = seen - sampling.frequency_penalty * counts
        if sampling.presence_penalty:
            seen = seen - sampling.presence_penalty * (counts > 0)
        logits[ids] = seen

    def _find(self, token: int) -> int:
        place = self._place.get(token)
        if place is None:
            place = self._place[token] = len(self._place)
            if place == len(self._ids):
                self._ids = torch.cat([self._ids, torch.zeros_like(self._ids)])
                self._counts = torch.cat([self._counts, torch.zeros_like(self._counts)])
            self._ids[place] = token
        return place
