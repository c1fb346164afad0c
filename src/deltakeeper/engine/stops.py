"""Stop strings in a text that grows: what may be shown, what must wait, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Finds the first stop string in a growing text, also where it spans tokens.

    Text that could be the beginning of a stop string is held back until it is decided.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def add(self, text: str) -> tuple[str, str | None]:
        """Take more text; give what is certain now, and the stop string if one was met (nothing follows it)."""
        if not self._stops:
            return text, None
        held = self._held + text
        met = min(
            ((at, stop) for stop in self._stops if (at := held.find(stop)) >= 0), default=None, key=lambda m: m[0]
        )
        if met is not None:
            self._held = ""
            return held[: met[0]], met[1]
        waiting = max(_overlap(held, stop) for stop in self._stops)
        certain = len(held) - waiting
        self._held = held[certain:]
        return held[:certain], None

    def flush(self) -> str:
        """The text held back, when no more will come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
