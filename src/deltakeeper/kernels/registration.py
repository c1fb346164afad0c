"""Operators of the compiled library, or the same in plain torch where it is not active, with what tracing needs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deltakeeper.errors import KernelError
from deltakeeper.kernels.library import backend

_registering = threading.Lock()
_KEPT: list[torch.library.Library] = []  # a library that is collected takes its operators along


@dataclass(frozen=True)
class Operator:
    """One operator: its schema, as the compiled library has it, and what stands in for it.

    Attributes:
        schema: name, arguments and results.
        plain: the same in plain torch.
        fake: shapes and dtypes of the results, for tracing.
    """

    schema: str
    plain: Callable[..., Any]
    fake: Callable[..., Any]

    @property
    def name(self) -> str:
        """The name without its namespace."""
        return self.schema.split("(")[0]


def register(operators: Sequence[Operator]) -> tuple[Callable[..., Any], ...]:
    """Make operators callable, each in the order given; once in a process.

    Raises:
        KernelError: the environment forces a backend that is absent.
    """
    if backend().name == "torch":
        fragment = torch.library.Library("deltakeeper", "FRAGMENT")  # type: ignore[no-untyped-call]
        for operator in operators:
            fragment.define(operator.schema)  # type: ignore[no-untyped-call]
            fragment.impl(operator.name, operator.plain, "CPU")  # type: ignore[no-untyped-call]
        _KEPT.append(fragment)
    for operator in operators:
        torch.library.register_fake(f"deltakeeper::{operator.name}", operator.fake)
    return tuple(getattr(torch.ops.deltakeeper, operator.name).default for operator in operators)


class Operators:
    """Operators that are registered when the first of them is needed.

    A plain attribute holds them, not a cache of a function, which a traced model would look through and register again.
    A model that is compiled must have used them, or called `ready`, before.
    """

    def __init__(self, *operators: Operator) -> None:
        self._described = operators
        self._made: tuple[Callable[..., Any], ...] = ()

    def ready(self) -> tuple[Callable[..., Any], ...]:
        """The operators, in the order given.

        Raises:
            KernelError: as `register`.
        """
        if not self._made:
            with _registering:
                if not self._made:
                    self._made = register(self._described)
        return self._made


def refusal(name: str, error: Exception) -> KernelError:
    """What a caller is told when an operator refuses its tensors."""
    return KernelError(f"'{name}' was refused: {str(error).splitlines()[0]}; give tensors that fit each other.")


def nothing(*tensors: torch.Tensor) -> None:
    """The result of an operator that works in place."""
