"""What a compression did: sizes, time, memory, and how near the decoded delta is to the true one."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltakeeper.artifact import REPORT_NAME, open_artifact
from deltakeeper.errors import RunError
from deltakeeper.fidelity import Fidelity


@dataclass(frozen=True)
class TensorReport:
    """One tensor of a compression."""

    encoding: str
    stored_bytes: int
    fidelity: Fidelity | None


@dataclass(frozen=True)
class CompressionReport:
    """What a compression did.

    `nbytes` counts every file of the artifact but tokenizer files and model card; `full_bytes` is the fine-tune in its
    own dtypes; `total` is over all weights that the base has too, those taken from it and those stored whole among
    them; `seconds` is wall time; `peak_rss` is the most memory in bytes that the process had held by the end, None in
    reports of releases that did not record it.
    """

    codec: str
    nbytes: int
    full_bytes: int
    bits_per_weight: float
    seconds: float
    total: Fidelity
    tensors: dict[str, TensorReport]
    peak_rss: int | None = None

    @property
    def ratio(self) -> float:
        """How many times smaller the artifact is than the fine-tune."""
        return self.full_bytes / self.nbytes

    @classmethod
    def load(cls, folder: Path) -> CompressionReport:
        """Read the report that a compression left in its artifact; sizes are taken from the files."""
        try:
            value = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
            tensors = {name: _tensor_report(item) for name, item in value["tensors"].items()}
            total, codec, seconds = Fidelity(**value["total"]), str(value["codec"]), float(value["seconds"])
            peak = None if value.get("peak_rss") is None else int(value["peak_rss"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{folder / REPORT_NAME} cannot be read ({error}); compress again.") from error
        delta = open_artifact(folder)
        return cls(codec, delta.nbytes, delta.full_bytes, delta.bits_per_weight, seconds, total, tensors, peak)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {**asdict(self), "ratio": self.ratio}


def peak_memory() -> int:
    """Most bytes that this process has held at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB


def _tensor_report(value: dict[str, Any]) -> TensorReport:
    figures = value["fidelity"]
    return TensorReport(
        str(value["encoding"]), int(value["stored_bytes"]), None if figures is None else Fidelity(**figures)
    )
