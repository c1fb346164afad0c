"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from deltakeeper.engine.stream import Logprobs, Token
from deltakeeper.service.texts import Words

_LEAST = -9999.0
"""What stands for minus infinity, which JSON does not know; vLLM's number."""


def chat_logprobs(words: Words, tokens: Iterable[Token]) -> dict[str, Any]:
    """`choices[].logprobs` of a chat: one entry a token, each with its alternatives."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = words.show(token)
        return {"token": text, "logprob": max(logprob, _LEAST), "bytes": list(text.encode("utf-8", "replace"))}

    return {
        "content": [
            entry(token.id, token.logprobs.chosen) | {"top_logprobs": [entry(*top) for top in token.logprobs.top]}
            for token in tokens
            if token.logprobs is not None
        ],
        "refusal": None,
    }


class CompletionLogprobs:
    """`choices[].logprobs` of a completion: four lists side by side, which go on from chunk to chunk.

    Args:
        words: the model's tokenizer.
        count: likeliest tokens that were asked for at each place; the chosen one stands among them in any case.
    """

    def __init__(self, words: Words, count: int) -> None:
        self._words, self._count, self._offset = words, count, 0

    def take(self, entries: Iterable[tuple[int, Logprobs | None]]) -> dict[str, list[Any]]:
        """The lists for further tokens, given as ids with their log-probabilities (None for a prompt's first)."""
        shown: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, logprobs in entries:
            text = self._words.show(token)
            shown["tokens"].append(text)
            shown["text_offset"].append(self._offset)
            shown["token_logprobs"].append(None if logprobs is None else max(logprobs.chosen, _LEAST))
            shown["top_logprobs"].append(None if logprobs is None else self._top(text, logprobs))
            self._offset += len(text)
        return shown

    def _top(self, text: str, logprobs: Logprobs) -> dict[str, float]:
        """Texts and log-probabilities; where two tokens look alike the likelier one stands, as lm-eval needs."""
        found = {text: max(logprobs.chosen, _LEAST)}
        for token, logprob in logprobs.top[: self._count]:
            shown = self._words.show(token)
            found[shown] = max(found.get(shown, _LEAST), logprob)
        return found
