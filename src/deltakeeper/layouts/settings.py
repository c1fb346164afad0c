"""Strict reading of a layout's JSON settings and shape: a manifest is untrusted input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch

from deltakeeper.errors import LayoutError

MAX_ENTRIES = 1 << 40
FLOAT_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
VALUE_DTYPES = FLOAT_DTYPES | {
    "float64": torch.float64,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float16` -> `"float16"`."""
    return str(dtype).removeprefix("torch.")


class SettingsReader:
    """Reads settings of one layout; every method raises LayoutError naming the layout and the setting."""

    def __init__(self, layout: str, settings: Mapping[str, Any]) -> None:
        self._layout = layout
        self._settings = settings

    def integer(self, key: str, low: int, high: int) -> int:
        """A whole number in `[low, high]`; true and false are not numbers."""
        value = self._get(key)
        if type(value) is not int or not low <= value <= high:
            self._refuse(key, value, f"a whole number from {low} to {high}")
        return value

    def fraction(self, key: str) -> float:
        """A number in `(0, 1]`."""
        value = self._get(key)
        if type(value) not in (int, float) or not 0.0 < value <= 1.0:
            self._refuse(key, value, "a number above 0 and at most 1")
        return float(value)

    def choice(self, key: str, choices: Sequence[str]) -> str:
        """One of the listed words."""
        value = self._get(key)
        if type(value) is not str or value not in choices:
            self._refuse(key, value, "one of " + ", ".join(choices))
        return value

    def text(self, key: str) -> str:
        """A non-empty string."""
        value = self._get(key)
        if type(value) is not str or not value:
            self._refuse(key, value, "a non-empty string")
        return value

    def _get(self, key: str) -> Any:
        if key not in self._settings:
            raise LayoutError(f"setting '{key}' of layout '{self._layout}' is missing; the artifact is damaged.")
        return self._settings[key]

    def _refuse(self, key: str, value: object, wanted: str) -> NoReturn:
        raise LayoutError(
            f"setting '{key}' of layout '{self._layout}' is {value!r} but must be {wanted}; the artifact is damaged."
        )


def check_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Refuse dimensions that are not whole numbers or that multiply to more than `MAX_ENTRIES`."""
    entries = 1
    for size in shape:
        if type(size) is not int or size < 0:
            raise LayoutError(f"shape {shape} of layout '{layout}' is not a list of sizes; the artifact is damaged.")
        entries *= max(1, size)
    if entries > MAX_ENTRIES:
        raise LayoutError(f"shape {shape} of layout '{layout}' is absurdly large; the artifact is damaged.")
    return shape


def check_matrix_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Refuse anything but a non-empty matrix; returns `(out, in)`."""
    check_shape(layout, shape)
    if len(shape) != 2 or 0 in shape:
        raise LayoutError(f"layout '{layout}' packs non-empty matrices, not shape {shape}; the artifact is damaged.")
    return shape[0], shape[1]


def check_finite(layout: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse NaN and infinity in any floating-point payload."""
    for suffix, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        readable = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no isfinite kernel
        if not bool(torch.isfinite(readable).all()):
            raise LayoutError(f"payload '{suffix}' of layout '{layout}' holds NaN or infinity; do not use it.")
