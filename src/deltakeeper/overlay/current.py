"""The pass that is under way: which rows belong to which slot. One object that every module of the overlay reads."""

from __future__ import annotations

import threading
from collections.abc import Container

from deltakeeper.errors import OverlayError
from deltakeeper.kernels.rows import RowGroups

Span = tuple[int, int, int]
"""Slot, first row, row after the last."""


class CurrentPass:
    """What modules need of the pass under way, as plain attributes: nothing is looked up by name in a pass.

    Attributes:
        groups: of the rows of hidden states, None outside a pass.
        rows: their number.
        spans: the groups as tuples.
        head: of the rows at the head, None if they are those of the body.
        head_spans: the same as tuples.
        merge_from: groups of so many rows or more may use merged tiles, None for none.
    """

    __slots__ = ("_taken", "groups", "head", "head_spans", "merge_from", "rows", "spans")

    def __init__(self, merge_from: int | None = None) -> None:
        self._taken = threading.Lock()  # by a pass, from its beginning to its end
        self.merge_from = merge_from
        self.groups: RowGroups | None = None
        self.head: RowGroups | None = None
        self.rows = 0
        self.spans: list[Span] = []
        self.head_spans: list[Span] = []

    def begin(self, groups: RowGroups, head: RowGroups | None, resident: Container[int]) -> None:
        """Start a pass.

        Raises:
            OverlayError: another one is under way, or a group has a slot that holds no tenant.
        """
        if not self._taken.acquire(blocking=False):
            raise OverlayError("a pass of this overlay is under way already; end it before the next one begins.")
        spans = spans_of(groups)
        head_spans = spans if head is None else spans_of(head)
        for slot, _, _ in spans if head is None else spans + head_spans:
            if slot and slot not in resident:
                self._taken.release()
                raise OverlayError(f"slot {slot} holds no tenant; publish one first and use the slot that it gives.")
        self.rows, self.spans, self.head, self.head_spans = groups.rows, spans, head, head_spans
        self.groups = groups

    def end(self) -> None:
        """Back to the base alone."""
        self.groups = self.head = None
        self.spans, self.head_spans, self.rows = [], [], 0
        self._taken.release()

    def at_head(self, rows: int) -> tuple[RowGroups, list[Span]]:
        """Groups of the rows that the head is given.

        Raises:
            OverlayError: it is given other rows than the pass was told of.
        """
        groups = self.groups if self.head is None else self.head
        if groups is None or groups.rows != rows:
            told = 0 if groups is None else groups.rows
            raise OverlayError(
                f"the head is given {rows} rows but the pass was told of {told}; say which rows reach it with "
                "rows(groups, head=...)."
            )
        return groups, self.head_spans


def spans_of(groups: RowGroups) -> list[Span]:
    """Groups as `(slot, start, end)`."""
    starts = groups.starts.tolist()
    return list(zip(groups.slots.tolist(), starts[:-1], starts[1:], strict=True))
