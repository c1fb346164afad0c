"""From logits to answers: the next token of each request, its text, and whether it was the last one."""

from __future__ import annotations

import time
from collections.abc import Sequence as Many
from typing import NamedTuple

import torch

from deltakeeper.engine.sampling import choose, greedy, logprobs_of
from deltakeeper.engine.sequence import Chunk, Sequence
from deltakeeper.engine.stream import FinishReason, Logprobs, Token

NOT_NUMBERS = -1
"""Stands for the token of a request whose logits are not numbers."""


class Answers(NamedTuple):
    """What a pass gives.

    Attributes:
        sequences: requests that get a token.
        tokens: a token each, or `NOT_NUMBERS`.
        logprobs: of those tokens, None where not asked for; None if nobody asked.
        prompts: prompt log-probabilities, (request, position of the first, entries).
    """

    sequences: list[Sequence]
    tokens: list[int]
    logprobs: list[Logprobs | None] | None
    prompts: list[tuple[Sequence, int, list[Logprobs]]]


class End(NamedTuple):
    """How an answer ended, and the string or token that stopped it."""

    reason: FinishReason
    stop: str | int | None


def answer(chunks: Many[Chunk], logits: torch.Tensor) -> Answers:
    """Choose the next token of each request whose tokens are all computed by this pass.

    Args:
        chunks: the pass, not yet counted as computed.
        logits: `(answered rows, vocabulary)`, those of each chunk adjacent.
    """
    sequences: list[Sequence] = []
    rows: list[int] = []
    prompts: list[tuple[Sequence, int, list[Logprobs]]] = []
    row = 0
    plain = True
    for chunk in chunks:
        sequence = chunk.sequence
        first = sequence.computed + chunk.size - chunk.answers + 1
        if sequence.request.prompt_logprobs is not None and first >= sequence.request.prompt_logprobs_from:
            found = _prompt_logprobs(sequence, first, logits[row : row + chunk.answers])
            if found:
                prompts.append((sequence, first, found))
        row += chunk.answers
        if sequence.computed + chunk.size == len(sequence.tokens):
            sequences.append(sequence)
            rows.append(row - 1)
            plain = plain and sequence.plain
    if not sequences:
        return Answers([], [], None, prompts)
    if len(rows) != len(logits):
        logits = logits[rows]
    if plain:
        return Answers(sequences, greedy(logits), None, prompts)
    keep = any(sequence.request.sampling.logprobs is not None for sequence in sequences)
    tokens = choose(logits, [sequence.chooser() for sequence in sequences], keep=keep)
    return Answers(sequences, tokens, _logprobs(sequences, tokens, logits), prompts)


def deliver(sequence: Sequence, token: int, logprobs: Logprobs | None) -> End | None:
    """Append a token to an answer and send it on; says so if it was the last."""
    request, stream = sequence.request, sequence.stream
    sequence.tokens.append(token)
    if sequence.penalties is not None:
        sequence.penalties.add(token)
    end: End | None = None
    text = ""
    if token in sequence.stop_ids:
        end = End("stop", token if token in request.stop_tokens else None)
    elif sequence.detokenizer is not None:
        text, met = sequence.stops.add(sequence.detokenizer.add(token))
        if met is not None:
            end = End("stop", met)
    if end is None and len(sequence.tokens) >= sequence.limit:
        end = End("length", None)
    if end is not None and not isinstance(end.stop, str):
        rest, met = _rest(sequence)
        text += rest
        end = end if met is None else End("stop", met)
    if not stream.times.first_token:
        stream.times.first_token = time.perf_counter()
    stream.put(Token(token, text, logprobs))
    return end


def _rest(sequence: Sequence) -> tuple[str, str | None]:
    """Text held back until the end, and a stop string if one is in it."""
    if sequence.detokenizer is None:
        return "", None
    text, met = sequence.stops.add(sequence.detokenizer.flush())
    return (text, met) if met is not None else (text + sequence.stops.flush(), None)


def _logprobs(sequences: list[Sequence], tokens: list[int], logits: torch.Tensor) -> list[Logprobs | None] | None:
    wanted = [i for i, s in enumerate(sequences) if s.request.sampling.logprobs is not None and tokens[i] >= 0]
    if not wanted:
        return None
    counts = [sequences[i].request.sampling.logprobs or 0 for i in wanted]
    found = logprobs_of(logits[wanted], [tokens[i] for i in wanted], counts)
    out: list[Logprobs | None] = [None] * len(sequences)
    for i, entry in zip(wanted, found, strict=True):
        out[i] = entry
    return out


def _prompt_logprobs(sequence: Sequence, first: int, logits: torch.Tensor) -> list[Logprobs]:
    """Log-probabilities of the prompt tokens from `first` on; the row of the last prompt token speaks of none."""
    chosen = list(sequence.request.prompt[first : first + len(logits)])
    if not chosen:
        return []
    return logprobs_of(logits[: len(chosen)], chosen, [sequence.request.prompt_logprobs or 0] * len(chosen))
