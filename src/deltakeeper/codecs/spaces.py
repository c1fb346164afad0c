"""Boxes of directions: changes of a delta that a decomposition does not look at."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from deltakeeper.codecs.box import Box


@dataclass(frozen=True, eq=False)
class Unseen(Box):
    """What a decomposition does not look at: changes orthogonal to some directions and below some size.

    Attributes:
        delta: the centre, float32 `(out, in)`.
        left: orthonormal columns, float32 `(out, k)`, that no change may have a part in.
        right: orthonormal columns, float32 `(in, l)`, likewise.
        limit: largest singular value that what is not seen may have, the centre's own part of it included.
    """

    delta: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    limit: float

    def project(self, candidate: torch.Tensor) -> torch.Tensor:
        """See `Box.project`."""
        change = self.rest(candidate - self.delta)
        own = self.rest(self.delta)
        total = own + change
        if not bool(change.any()) or 1.05 * estimate_norm(total) <= self.limit:
            return self.delta + change
        return self.delta + self.rest(clip_spectrum(total, self.limit) - own)

    def share_inside(self, candidate: torch.Tensor) -> float:
        """See `Box.share_inside`: the share of the squared change that is not seen."""
        change = candidate - self.delta
        size = float(torch.linalg.vector_norm(change, dtype=torch.float64))
        if size == 0.0:
            return 1.0
        return (float(torch.linalg.vector_norm(self.rest(change), dtype=torch.float64)) / size) ** 2

    def rest(self, matrix: torch.Tensor) -> torch.Tensor:
        """What is left of a matrix without the directions that are seen."""
        for _ in range(2):  # a second time for what rounding leaves of large changes
            matrix = matrix - self.left @ (self.left.T @ matrix)
            matrix = matrix - (matrix @ self.right) @ self.right.T
        return matrix


class Seen:
    """Collects the directions along which a randomised decomposition looks at a matrix.

    Attributes:
        exact: whether a step looked at the whole matrix, so that no change is hidden from it.
        limit: least singular value that was used, of the matrix as the decomposition saw it.
    """

    def __init__(self) -> None:
        self.exact = False
        self.limit = float("inf")
        self._left: list[torch.Tensor] = []
        self._right: list[torch.Tensor] = []

    def add(self, *, left: torch.Tensor | None = None, right: torch.Tensor | None = None) -> None:
        """Directions as columns: `(out, k)` by which the matrix is multiplied from the left, `(in, k)` likewise."""
        if left is not None:
            self._left.append(left.cpu())
        if right is not None:
            self._right.append(right.cpu())

    def box(self, delta: torch.Tensor, scale: float = 1.0) -> Unseen | None:
        """The changes of `delta` that it does not see; None where it sees all. `scale` is what it was divided by."""
        if self.exact:
            return None
        left, right = orthonormal(torch.cat(self._left, 1)), orthonormal(torch.cat(self._right, 1))
        if left.shape[1] == left.shape[0] or right.shape[1] == right.shape[0]:
            return None
        box = Unseen(delta, left, right, self.limit * scale)
        return replace(box, limit=max(box.limit, 1.06 * estimate_norm(box.rest(delta))))


def orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of what float32 columns `(n, k)` span, `(n, r)`; nearly dependent ones are left out."""
    lengths = columns.norm(dim=0)
    u, s, _ = torch.linalg.svd(columns / torch.where(lengths > 0, lengths, 1.0), full_matrices=False)
    basis: torch.Tensor = u[:, s > 1e-5 * float(s[0])].contiguous()
    return basis


def estimate_norm(matrix: torch.Tensor) -> float:
    """Largest singular value of a float32 matrix, from below by a few per cent at most: block power iteration."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(matrix.shape[1], min(8, *matrix.shape), generator=generator)
    scale = float(matrix.abs().max()) or 1.0
    unit = matrix / scale
    for _ in range(6):
        x = torch.linalg.qr(unit.T @ (unit @ x)).Q
    return scale * float(torch.linalg.matrix_norm(unit @ x, 2))


def clip_spectrum(matrix: torch.Tensor, limit: float) -> torch.Tensor:
    """The nearest matrix without singular values above `limit`, float32 `(out, in)`, by the gram of its small side."""
    thin = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    scale = float(matrix.abs().max()) or 1.0
    unit = thin.double() / scale
    values, vectors = torch.linalg.eigh(unit.T @ unit)
    sizes = values.clamp_(min=0).sqrt_()
    share = torch.where(sizes * scale > limit, limit / (sizes * scale).clamp(min=1e-300), 1.0)
    clipped: torch.Tensor = (unit @ (vectors * share) @ vectors.T * scale).float()
    return clipped if thin is matrix else clipped.T.contiguous()
