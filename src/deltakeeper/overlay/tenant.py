"""What an overlay holds of one tenant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from deltakeeper.errors import OverlayError
from deltakeeper.kernels.terms import HeldTerm
from deltakeeper.overlay.site import Part, Site


class TenantDelta:
    """A fine-tune made ready for one overlay: packed terms held for products, and values where no term can be added.

    Attributes:
        version: SHA-256, as hex, over base root, manifest, planes and files beside the weights: equal for equals,
            whatever its name or path.
        vocabulary: tokens that it knows.
        nbytes: bytes that it holds, kernel forms and rows in the overlay's stacks included.
        side_folder: the artifact's folder.
        side_files: files in it that differ from the base's (configuration, tokenizer, chat template, generation
            settings), each with the SHA-256 that it had; read them through `side_files.checked_copy`.
        slot: where it is published, None if it is not.
        closed: whether its memory was given back.
    """

    def __init__(
        self,
        *,
        version: str,
        vocabulary: int,
        terms: Sequence[HeldTerm],
        numbers: torch.Tensor,
        parts: Mapping[Site, Part],
        side_folder: Path,
        side_files: Mapping[str, str],
    ) -> None:
        self.version, self.vocabulary = version, vocabulary
        self.side_folder, self.side_files = side_folder, dict(side_files)
        self.numbers = numbers  # (lanes, depth)
        self.parts = dict(parts)
        self.slot: int | None = None
        self.closed = False
        self._terms = list(terms)
        self.nbytes = sum(term.nbytes for term in terms) + _value_bytes(self.parts)

    def close(self) -> None:
        """Give all its memory back; more than once does no harm.

        Raises:
            OverlayError: it is published.
        """
        if self.slot is not None:
            raise OverlayError(f"the delta in slot {self.slot} is published; retire it before it is closed.")
        for term in self._terms:
            term.release()
        self._terms.clear()
        self.parts.clear()
        self.closed = True


def _value_bytes(parts: Mapping[Site, Part]) -> int:
    """Bytes of values, each tensor once; a vector is held once more in the stack that rows are gathered from."""
    tensors = [value for part in parts.values() for value in part.values.values()]
    tensors += [part.added for part in parts.values() if part.added is not None]
    by_place = {(value.data_ptr(), value.numel()): value for value in tensors}
    return sum(value.numel() * value.element_size() * (2 if value.ndim == 1 else 1) for value in by_place.values())
