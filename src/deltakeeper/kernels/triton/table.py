"""Which terms each slot has at one place of the model: the table of addresses that the kernels read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltakeeper.errors import KernelError
from deltakeeper.kernels.triton.pack import FIELDS, PackedTerm


class TermTable:
    """Terms of all slots for the projections that share an input, such as q, k and v.

    Terms that are taken out are freed when nothing else holds them: in stream order for kernels of the same stream;
    with other streams the caller waits for them first.

    Attributes:
        widths: outputs of each projection; they lie side by side in `y`.
        inputs: width of x.
        slots: slots 0 (the base, always empty) to `slots - 1`.
        depth: most terms of one layout that a slot may have at one projection.
        counts: by layout, int32 `(slots, projections)` on the device.
        fields: by layout, int64 `(slots, projections, depth, FIELDS)` on the device.
    """

    def __init__(
        self,
        widths: Sequence[int],
        inputs: int,
        slots: int,
        *,
        depth: int = 2,
        device: torch.device | str = "cuda",
    ) -> None:
        self.widths = tuple(widths)
        self.inputs = inputs
        self.slots = slots
        self.depth = depth
        self.device = torch.device(device)
        self.counts: dict[str, torch.Tensor] = {}
        self.fields: dict[str, torch.Tensor] = {}
        self.launches: tuple[tuple[str, int, bool], ...] = ()
        self._held: dict[tuple[int, int], tuple[PackedTerm, ...]] = {}
        self._tiles: dict[int, torch.Tensor] = {}

    def put(self, slot: int, projection: int, terms: Sequence[PackedTerm]) -> None:
        """Give a slot its terms at one projection, in the place of any that it had.

        `launches` (layout, ranks or bits, whether all are plain) may change; a captured launch is then out of date.

        Raises:
            KernelError: there is no such slot or projection, or a term's shape, device or number does not fit.
        """
        if not 1 <= slot < self.slots or not 0 <= projection < len(self.widths):
            raise KernelError(
                f"slot {slot} of projection {projection} is outside a table of {self.slots} slots (the first is the "
                f"base's) and {len(self.widths)} projections; make a larger table."
            )
        shape = (self.widths[projection], self.inputs)
        for term in terms:
            if term.shape != shape or term.device.type != self.device.type:
                raise KernelError(
                    f"a term of shape {term.shape} on '{term.device}' does not fit projection {projection} of shape "
                    f"{shape} on '{self.device}'; pack the terms of this tensor for this device."
                )
        kinds = {term.kind for term in terms}
        for kind in kinds:
            if sum(term.kind == kind for term in terms) > self.depth:
                raise KernelError(f"a slot has more than {self.depth} terms of layout '{kind}'; make a deeper table.")
        for kind in kinds - set(self.counts):
            self.counts[kind] = torch.zeros(self.slots, len(self.widths), dtype=torch.int32, device=self.device)
            fields = torch.zeros(
                self.slots, len(self.widths), self.depth, FIELDS, dtype=torch.int64, device=self.device
            )
            self.fields[kind] = fields
        for kind in self.counts:
            of_kind = [term.numbers() for term in terms if term.kind == kind]
            # first nothing, then the addresses, then how many: a kernel between them finds no stale address
            self.counts[kind][slot, projection] = 0
            if of_kind:
                self.fields[kind][slot, projection, : len(of_kind)] = torch.tensor(of_kind).to(self.device)
                self.counts[kind][slot, projection] = len(of_kind)
        self._held[slot, projection] = tuple(terms)
        self._count_launches()

    def clear(self, slot: int) -> None:
        """Take out all terms of a slot; one that has none is left as it is."""
        for counts in self.counts.values():
            counts[slot] = 0
        for projection in range(len(self.widths)):
            self._held.pop((slot, projection), None)
        self._count_launches()

    @property
    def nbytes(self) -> int:
        """Bytes of the terms and of the table on the device."""
        terms = {id(term): term.nbytes for held in self._held.values() for term in held}
        own = (*self.counts.values(), *self.fields.values(), *self._tiles.values())
        return sum(terms.values()) + sum(tensor.numel() * tensor.element_size() for tensor in own)

    def tiles(self, columns: int) -> torch.Tensor:
        """Tiles of `columns` outputs, of all projections in turn.

        Returns:
            int32 `(tiles, 4)`: projection, first output in it, its width, where it starts in y.
        """
        found = self._tiles.get(columns)
        if found is None:
            rows, start = [], 0
            for projection, width in enumerate(self.widths):
                rows += [(projection, first, width, start) for first in range(0, width, columns)]
                start += width
            found = self._tiles[columns] = torch.tensor(rows, dtype=torch.int32).to(self.device)
        return found

    def _count_launches(self) -> None:
        terms = [term for held in self._held.values() for term in held]
        launches: dict[tuple[str, int], list[PackedTerm]] = {}
        for term in terms:  # a kernel for each number of bits; one for all ranks
            launches.setdefault((term.kind, term.rank if term.kind == "grouped_int" else 0), []).append(term)
        self.launches = tuple(
            (kind, max(term.rank for term in of_kind), all(term.plain for term in of_kind))
            for (kind, _), of_kind in sorted(launches.items())
        )
