"""Keys of vLLM's prefix cache that know which load of an artifact computed a block.

vLLM's own know name and path alone, so what was computed with the content that a path had before would be found again.
"""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

from deltakeeper.artifact import hash_manifest

_MOST_KEPT = 1 << 14


class Loads:
    """Which load of each adapter is current.

    vLLM gives every name that is loaded a new number and tells the engine of no unloading, so what was used least
    lately is forgotten.

    Args:
        most: adapters that are remembered.
    """

    def __init__(self, most: int = _MOST_KEPT) -> None:
        self._most, self._numbers, self._forgot = most, itertools.count(1), False
        self._current: dict[int, str] = {}
        self._lock = threading.Lock()  # requests may come on another thread than loads

    def note(self, request: Any) -> None:
        """A name is about to be loaded from this path: blocks computed from now on have keys of their own."""
        content = hash_manifest(Path(request.lora_path).expanduser())
        with self._lock:
            if content is None:  # an ordinary LoRA, whose keys are vLLM's
                self._current.pop(request.lora_int_id, None)
            elif request.load_inplace or request.lora_int_id not in self._current:
                self._keep(request.lora_int_id, f"{content}.{next(self._numbers)}")

    def of(self, request: Any) -> list[tuple[str, str, str]]:
        """What is added to the keys of a request's blocks: the load that was current when the request came.

        A request that runs while its name is loaded anew has some of its blocks from both, and nobody else may find
        those.
        """
        if not hasattr(request, "deltakeeper"):
            lora = request.lora_request
            found = None if lora is None else self._find(lora.lora_int_id)
            request.deltakeeper = [] if found is None else [("deltakeeper", str(lora.lora_int_id), found)]
        keys: list[tuple[str, str, str]] = request.deltakeeper
        return keys

    def _find(self, number: int) -> str | None:
        with self._lock:
            found = self._current.get(number)
            if found is None and self._forgot:  # it may be an artifact's, and a key that nobody had is never wrong
                found = f"again.{next(self._numbers)}"
            return None if found is None else self._keep(number, found)

    def _keep(self, number: int, load: str) -> str:
        self._current.pop(number, None)
        self._current[number] = load  # the latest at the end
        while len(self._current) > self._most:
            del self._current[next(iter(self._current))]
            self._forgot = True
        return load


_all = Loads()
note_load, load_of = _all.note, _all.of
