"""A trace as plain JSON values and back, with everything checked that comes back.

Numbers keep five significant digits, probabilities of trajectories five decimals. Tokens are text that a model or a
stranger chose: whoever shows them escapes them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltakeeper.errors import DataError
from deltakeeper.lens.json_arrays import MOST_TEXT, ArrayReader
from deltakeeper.lens.trace import (
    MOST_CELLS,
    MOST_LAYERS,
    MOST_POSITIONS,
    MOST_TOKENS,
    MOST_TOP,
    MOST_WIDE,
    LensTrace,
    Numbers,
    Target,
    TraceMeta,
)

FORMAT = "deltakeeper.lens"
VERSION = 1
_DIGITS = 5


def round_numbers(values: NDArray[Any]) -> Numbers:
    """Five significant digits of numbers, float32 of the same shape; what is not finite becomes NaN."""
    found = values.astype(np.float64)
    found[~np.isfinite(found)] = np.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        # Divided by powers from 1 upwards only, which are exact: what is printed is then the number that was meant.
        digits = _DIGITS - 1 - np.floor(np.log10(np.abs(found)))
        up, down = 10.0 ** np.clip(digits, 0, 300), 10.0 ** np.clip(-digits, 0, 300)
        found = np.where(found == 0, 0, np.round(found * up / down) / up * down)
    return found.astype(np.float32)


def plain_number(value: float) -> float | None:
    """A number as it is stored, five significant digits; None for what is not finite."""
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


def to_json(trace: LensTrace) -> dict[str, Any]:
    """A trace as plain JSON values, with `null` for NaN."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "meta": asdict(trace.meta),
        "layers": trace.layers.tolist(),
        "positions": trace.positions.tolist(),
        "tokens": [_sound(token) for token in trace.tokens],
        "top_ids": trace.top_ids.tolist(),
        "top_probs": _plain(trace.top_probs.tolist()),
        "entropy": _plain(trace.entropy.tolist()),
        "kl_final": _plain(trace.kl_final.tolist()),
        "kl": {name: _plain(array.tolist()) for name, array in trace.kl.items()},
        "js": {name: _plain(array.tolist()) for name, array in trace.js.items()},
        "shift": {name: _plain(array.tolist()) for name, array in trace.shift.items()},
        "targets": {
            name: {"ids": list(t.ids), "rank": t.rank.tolist(), "log_prob": _plain(t.log_prob.tolist())}
            for name, t in trace.targets.items()
        },
        "trajectories": [{str(i): _plain(c.tolist()) for i, c in curves.items()} for curves in trace.trajectories],
        "words": {str(token): _sound(word) for token, word in trace.words.items()},
    }


def from_json(value: Any, where: str) -> LensTrace:
    """A trace from JSON values that nobody has checked.

    Args:
        value: what `to_json` gives, or anything.
        where: what to call it in an error.

    Raises:
        DataError: it is not a trace of this version.
    """
    read = ArrayReader(where)
    names = {"format", "version", *(field.name for field in fields(LensTrace))}
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise DataError(f"{where} is not a lens trace; give a file that a lens run wrote.")
    if value.get("version") != VERSION or isinstance(value["version"], bool):
        raise DataError(f"{where} is a lens trace of another version than {VERSION}; trace it again.")
    if set(value) != names:
        raise read.refusal(f"it lacks or adds the field {str(min(set(value) ^ names))[:80]!r}")
    layers, positions, top_ids = value["layers"], value["positions"], value["top_ids"]
    cells = read.length(layers, "layers", MOST_LAYERS), read.length(positions, "positions", MOST_POSITIONS)
    if cells[0] * cells[1] > MOST_CELLS:
        raise read.refusal(f"it has more than {MOST_CELLS} cells")
    read.length(top_ids, "top_ids", cells[0])
    read.length(top_ids[0], "top_ids", cells[1])
    top = (*cells, read.length(top_ids[0][0], "top_ids", MOST_TOP))
    curves = value["trajectories"]
    if not isinstance(curves, list) or len(curves) not in (0, cells[1]):
        raise read.refusal("'trajectories' is not a list of one object a position")
    most = cells[0] * top[2] + MOST_WIDE  # each layer can bring its top k, and other variants their last layer's
    stacks = {
        part: {name: read.numbers(array, name, cells) for name, array in read.named(value[part], part).items()}
        for part in ("kl", "js", "shift")
    }
    return LensTrace(
        meta=_meta(read, value["meta"]),
        layers=read.whole(layers, "layers", cells[:1]),
        positions=read.whole(positions, "positions", cells[1:]),
        tokens=read.texts(value["tokens"], "tokens", MOST_TOKENS),
        top_ids=read.whole(top_ids, "top_ids", top),
        top_probs=read.numbers(value["top_probs"], "top_probs", top),
        entropy=read.numbers(value["entropy"], "entropy", cells),
        kl_final=read.numbers(value["kl_final"], "kl_final", cells),
        kl=stacks["kl"],
        js=stacks["js"],
        shift=stacks["shift"],
        targets={
            name: _target(read, name, item, cells) for name, item in read.named(value["targets"], "targets").items()
        },
        trajectories=tuple(
            {
                i: read.numbers(c, "trajectories", cells[:1])
                for i, c in read.by_token(item, "trajectories", most).items()
            }
            for item in curves
        ),
        words={i: read.text(word, "words") for i, word in read.by_token(value["words"], "words", MOST_TOKENS).items()},
    )


def _target(read: ArrayReader, name: str, value: Any, cells: tuple[int, int]) -> Target:
    if not isinstance(value, dict) or set(value) != {"ids", "rank", "log_prob"}:
        raise read.refusal(f"the target {name[:80]!r} is not ids, rank and log_prob")
    ids = read.whole(value["ids"], name, (read.length(value["ids"], name, MOST_POSITIONS),))
    rank, log_prob = read.whole(value["rank"], name, cells), read.numbers(value["log_prob"], name, cells)
    return Target(tuple(ids.tolist()), rank, log_prob)


def _meta(read: ArrayReader, value: Any) -> TraceMeta:
    """Texts, of which those without a default must be there; a count and a number, which may be null."""
    if not isinstance(value, dict) or set(value) != {field.name for field in fields(TraceMeta)}:
        raise read.refusal("'meta' does not have the fields of this version")
    found: dict[str, Any] = {}
    for field in fields(TraceMeta):
        item = value[field.name]
        if item is None and field.default is None:
            found[field.name] = None
        elif field.name == "planes":
            found["planes"] = int(read.whole([item], "planes", (1,))[0])
        elif field.name == "identity_error":
            found["identity_error"] = read.number(item, "identity_error")
        else:
            found[field.name] = read.text(item, field.name)
    return TraceMeta(**found)


def _plain(value: Any) -> Any:
    """Nested lists of float32 as the shortest numbers of five digits; None for NaN."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{_DIGITS}g}")
    return int(short) if short == int(short) and abs(short) < 1e5 else short


def _sound(text: str) -> str:
    """A text that UTF-8 can hold: half of a pair becomes a question mark."""
    return text.encode("utf-8", "replace").decode()[:MOST_TEXT]
