"""Terms inside a term: settings `{"layout": name, "settings": {...}}` and payload suffixes behind a prefix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from deltakeeper.errors import LayoutError
from deltakeeper.layouts.base import LAYOUTS, Layout, Settings, TensorSpec

NESTABLE = ("dense", "grouped_int", "sparse")


def nested_settings(term: Layout) -> Settings:
    """Layout and settings of a term, to be put under a key of the settings of the one that holds it."""
    return {"layout": term.name, "settings": term.settings()}


def expect_nested(outer: str, key: str, settings: Mapping[str, Any], shape: tuple[int, int]) -> dict[str, TensorSpec]:
    """Payload that the term under `key` of the settings of layout `outer` demands, by its own suffixes.

    Raises:
        LayoutError: there is none, its layout cannot be nested, or its settings are wrong.
    """
    found = settings.get(key)
    name, inner = (found.get("layout"), found.get("settings")) if isinstance(found, dict) else (None, None)
    if type(name) is not str or name not in NESTABLE or not isinstance(inner, dict):
        raise LayoutError(
            f"setting '{key}' of layout '{outer}' is {found!r} but must name one of the layouts "
            f"{', '.join(NESTABLE)} with its settings; the artifact is damaged."
        )
    if inner.get("encoding") == "value":
        raise LayoutError(f"setting '{key}' of layout '{outer}' is a value, not a factor; the artifact is damaged.")
    return LAYOUTS[name].expect(shape, inner)


def nested_from_tensors(
    key: str, settings: Mapping[str, Any], shape: tuple[int, int], prefix: str, tensors: Mapping[str, torch.Tensor]
) -> Layout:
    """The term under `key`, from the payload whose suffixes start with `prefix` (settings as `expect_nested` takes)."""
    return LAYOUTS[settings[key]["layout"]].from_tensors(shape, settings[key]["settings"], under(prefix, tensors))


def put_under(prefix: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    """The same entries with `prefix` before their suffixes."""
    return {prefix + suffix: entry for suffix, entry in payload.items()}


def under(prefix: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    """The entries whose suffixes start with `prefix`, without it."""
    return {suffix.removeprefix(prefix): entry for suffix, entry in payload.items() if suffix.startswith(prefix)}
