"""Keys of vLLM's prefix cache that know which load of an artifact computed a block.

vLLM's own know name and path alone, so what was computed with the content that a path had before would be found again.
"""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

from deltakeeper.artifact import MANIFEST_NAME

_loads = itertools.count(1)
_current: dict[int, str] = {}


def note_load(request: Any) -> None:
    """A name is about to be loaded from this path: blocks computed from now on have keys of their own."""
    try:
        content = hashlib.sha256((Path(request.lora_path).expanduser() / MANIFEST_NAME).read_bytes()).hexdigest()
    except OSError:  # an ordinary LoRA, whose keys are vLLM's
        _current.pop(request.lora_int_id, None)
        return
    if request.load_inplace or request.lora_int_id not in _current:
        _current[request.lora_int_id] = f"{content}.{next(_loads)}"


def load_of(request: Any) -> list[tuple[str, str, str]]:
    """What is added to the keys of a request's blocks: the load that was current when the request came.

    A request that runs while its name is loaded anew has some of its blocks from both, and nobody else may find those.
    """
    if not hasattr(request, "deltakeeper"):
        lora = request.lora_request
        found = None if lora is None else _current.get(lora.lora_int_id)
        request.deltakeeper = [] if found is None else [("deltakeeper", str(lora.lora_int_id), found)]
    keys: list[tuple[str, str, str]] = request.deltakeeper
    return keys
