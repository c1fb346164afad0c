"""The one operator that vLLM's compiled model sees: what it does depends on the rows of the pass, not on the graph."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Applied(Protocol):
    """A site that changes the result of its module in place."""

    def apply_(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Change `y`, the module's result, for rows of slots that hold something; `x` is what it came from."""


_sites: list[Applied] = []
_kept: list[torch.library.Library] = []  # a library that is collected takes its operators along


def number_of(site: Applied) -> int:
    """A number by which `apply_` knows the site, as long as this process lives."""
    _sites.append(site)
    return len(_sites) - 1


def operator() -> Any:
    """`apply_(y, x, number)`, made at the first call; in place, and nothing at all while a graph is traced."""
    if not _kept:
        library = torch.library.Library("deltakeeper_vllm", "DEF")  # type: ignore[no-untyped-call]
        library.define("apply_(Tensor(a!) y, Tensor x, int number) -> ()")  # type: ignore[no-untyped-call]
        library.impl("apply_", _apply, "CPU")  # type: ignore[no-untyped-call]
        torch.library.register_fake("deltakeeper_vllm::apply_", _trace)
        _kept.append(library)
    return torch.ops.deltakeeper_vllm.apply_.default


def _apply(y: torch.Tensor, x: torch.Tensor, number: int) -> None:
    _sites[number].apply_(y, x)


def _trace(y: torch.Tensor, x: torch.Tensor, number: int) -> None:
    return None
