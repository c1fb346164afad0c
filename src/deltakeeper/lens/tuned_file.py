"""A tuned lens as one safetensors file that says which base and which text it is of."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from deltakeeper.errors import BaseMismatchError, CheckpointError, DataError
from deltakeeper.lens.tuned import Translators
from deltakeeper.safetensors_header import Header, read_header
from deltakeeper.whole_files import replacing

FORMAT = "deltakeeper-tuned-lens"
VERSION = 1
_KEY = "tuned_lens"
"""All metadata is one JSON text under this key, since safetensors does not keep the order of several."""
_FIELDS = {"format", "version", "base_root", "layers", "width", "steps", "text_sha256"}
_HASH = re.compile(r"[0-9a-f]{64}")


def write_translators(translators: Translators, path: Path) -> None:
    """Write a tuned lens under a temporary name and put it in place whole; the same lens gives the same bytes.

    Raises:
        DataError: the file cannot be written, or the lens was never trained.
    """
    told = {
        "format": FORMAT,
        "version": VERSION,
        "base_root": translators.base_root,
        "layers": translators.layers,
        "width": translators.width,
        "steps": translators.steps,
        "text_sha256": translators.text_sha256,
    }
    _require_sound(told, str(path))
    tensors = {"weight": translators.weight.contiguous(), "bias": translators.bias.contiguous()}
    try:
        with replacing(path) as scratch:
            save_file(tensors, scratch, metadata={_KEY: json.dumps(told, sort_keys=True)})
    except OSError as error:
        raise DataError(f"the tuned lens cannot be written to {path} ({error}); give another folder.") from error


def read_translators(path: Path, *, base_root: str | None = None) -> Translators:
    """Read a tuned lens strictly: sizes and names are checked before any tensor is made.

    Args:
        path: of the file.
        base_root: fingerprint of the base at hand, or of that of the variants; None leaves it unchecked.

    Raises:
        DataError: there is no such file, or it is no sound tuned lens.
        BaseMismatchError: it is of another base.
    """
    try:
        header = read_header(path)
    except CheckpointError as error:
        raise DataError(f"no tuned lens can be read: {error}") from error
    told = _metadata(header, str(path))
    layers, width = told["layers"], told["width"]
    shapes = {name: (entry.dtype, entry.shape) for name, entry in header.entries.items()}
    expected = {
        "weight": (torch.float32, (layers - 1, width, width)),
        "bias": (torch.float32, (layers - 1, width)),
    }
    if shapes != expected:
        raise _unsound(str(path), "its tensors are not those of its layers and width")
    if base_root is not None and told["base_root"] != base_root:
        raise BaseMismatchError(
            f"the tuned lens {path} is of the base {told['base_root'][:12]}, not of {base_root[:12]}; train one on "
            "this base."
        )
    with safe_open(path, framework="pt") as file:
        weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
    if not (bool(torch.isfinite(weight).all()) and bool(torch.isfinite(bias).all())):
        raise _unsound(str(path), "it holds values that are not finite")
    return Translators(weight, bias, told["base_root"], told["steps"], told["text_sha256"])


def _metadata(header: Header, where: str) -> dict[str, Any]:
    try:
        told = json.loads(header.metadata.get(_KEY, ""))
    except (ValueError, RecursionError) as error:
        raise _unsound(where, "it does not say what it is of") from error
    _require_sound(told, where)
    return dict(told)


def _require_sound(told: Any, where: str) -> None:
    if not isinstance(told, dict) or set(told) != _FIELDS or told["format"] != FORMAT or told["version"] != VERSION:
        raise _unsound(where, "it does not have the fields of this version")
    for name, least in (("layers", 2), ("width", 1), ("steps", 1)):
        value = told[name]
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise _unsound(where, f"'{name}' is no count")
    for name in ("base_root", "text_sha256"):
        if not isinstance(told[name], str) or not _HASH.fullmatch(told[name]):
            raise _unsound(where, f"'{name}' is no SHA-256 in hex")


def _unsound(where: str, why: str) -> DataError:
    return DataError(f"{where} is no sound tuned lens: {why}; train it again.")
