"""What a defence did to a fine-tune."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from deltakeeper.fidelity import Fidelity

REPORT_NAME = "defence.json"
Fate = Literal["defended", "unchanged", "base", "tuned", "tied"]


@dataclass(frozen=True)
class TensorReport:
    """One tensor of a defended fine-tune.

    Attributes:
        fate: `defended`, `unchanged` (covered, and left as the fine-tune has it), not covered and so the `base`'s or
            the fine-tune's (`tuned`), or `tied` to another tensor.
        detail: figures of the method, means over experts where a tensor has several.
    """

    fate: Fate
    detail: dict[str, float]


@dataclass(frozen=True)
class DefenceReport:
    """What a defence did.

    Attributes:
        path: the folder that was written.
        defence: its spelling.
        rows: SHA-256 of the rows that a model was run on, None for a defence that runs none.
        total: how near the defended delta is to the fine-tune's, over all weights that the base has, as written.
        tensors: what became of each tensor.
        seconds: wall time.
    """

    path: Path
    defence: str
    rows: str | None
    total: Fidelity
    tensors: dict[str, TensorReport]
    seconds: float

    def counts(self) -> dict[Fate, int]:
        """How many tensors had each fate; those that none had are left out."""
        found: dict[Fate, int] = {}
        for tensor in self.tensors.values():
            found[tensor.fate] = found.get(tensor.fate, 0) + 1
        return found

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object, but for the folder it lies in; an infinite figure becomes null."""
        value = asdict(self)
        del value["path"]
        return _finite(value)  # type: ignore[no-any-return]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
