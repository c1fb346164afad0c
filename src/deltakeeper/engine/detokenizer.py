"""Text out of tokens, one at a time: a character is shown when all its bytes are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CONTEXT = 6  # prompt tokens given as context: whether a word starts with a space depends on what is before
_BROKEN = "\ufffd"


class Detokenizer:
    """Turns the tokens of one answer into text as they come.

    Uses the incremental decoder of the `tokenizers` library where the tokenizer is one of its own (a few microseconds a
    token), else decodes a short window twice. Special tokens have no text.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        """Start behind a prompt.

        Args:
            tokenizer: a transformers tokenizer, or None: then no token has text.
            prompt: token ids of the prompt.
        """
        self._tokenizer = tokenizer
        self._before: list[int] = [] if tokenizer is None else self._context(prompt)
        self._pending: list[int] = []
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._stream = None if self._backend is None else _decode_stream(self._before)

    def add(self, token: int) -> str:
        """Take one token; give the text that became complete."""
        if self._tokenizer is None:
            return ""
        self._pending.append(token)
        text = self._window() if self._stream is None else self._step(token)
        if text:
            self._before, self._pending = (self._before + self._pending)[-_CONTEXT:], []
        return text

    def flush(self) -> str:
        """What is left when no more tokens come; bytes that never became a character are replaced by U+FFFD."""
        if not self._pending:
            return ""
        text = self._text(self._before + self._pending)[len(self._text(self._before)) :]
        self._before, self._pending = (self._before + self._pending)[-_CONTEXT:], []
        return text

    def _step(self, token: int) -> str:
        assert self._stream is not None
        try:
            return self._stream.step(self._backend, token) or ""
        except Exception:  # some decoders rewrite what they gave before, and the stream refuses to go on
            text = self._text(self._before + self._pending)[len(self._text(self._before)) :]
            self._stream = _decode_stream((self._before + self._pending)[-_CONTEXT:])
            return text

    def _window(self) -> str:
        text = self._text(self._before + self._pending)
        return "" if text.endswith(_BROKEN) else text[len(self._text(self._before)) :]

    def _context(self, prompt: Sequence[int]) -> list[int]:
        tail = list(prompt[-_CONTEXT:])
        return [] if self._text(tail).endswith(_BROKEN) else tail

    def _text(self, ids: list[int]) -> str:
        if not ids:
            return ""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _decode_stream(ids: list[int]) -> Any:
    from tokenizers.decoders import DecodeStream

    return DecodeStream(ids=ids, skip_special_tokens=True)
