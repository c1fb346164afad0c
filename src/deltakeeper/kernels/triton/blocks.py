"""Block sizes of a launch, tuned on an H100 for `signs` and `grouped_int`; the other layouts take what suits these."""

from __future__ import annotations

from dataclasses import dataclass

SELECT_ROWS = 4
PROGRAMS = 256  # about two for each multiprocessor of a large GPU; below it the inputs are split
MAX_SPLITS = 8


@dataclass(frozen=True)
class Blocks:
    """Sizes of the tiles that one program works on.

    Attributes:
        rows: rows of x, a power of two; longer groups are cut into pieces of as many. At least 16 with `dot`. Signs and
            codes always use the matrix units, eight rows or more at a time.
        columns: outputs, a power of two.
        words: words of 32 inputs at a time, a power of two; signs and codes take 128 inputs.
        ranks: ranks of a low-rank term at a time, a power of two; at least 16 with `dot`.
        dot: matrix units (`tl.dot`); else sums on the ordinary cores, which suits at most a few rows.
        splits: programs that share the inputs of one tile; None chooses by how many tiles there are.
    """

    rows: int
    columns: int
    words: int = 2
    ranks: int = 16
    dot: bool = True
    splits: int | None = None

    @classmethod
    def choose(cls, longest: int) -> Blocks:
        """Sizes for a pass whose longest group of a tenant has that many rows.

        With 128 columns and the 128 threads of four warps a thread owns a column, and the sums of the path without
        `dot` stay inside a thread. A tile of `dot` has at least 16 rows, so that up to 4 are cheaper without.
        """
        if longest <= SELECT_ROWS:
            return cls(rows=1 << max(0, longest - 1).bit_length(), columns=128, words=1, dot=False)
        return cls(rows=16 if longest <= 64 else 64, columns=64)

    def splits_for(self, programs: int, inputs: int) -> int:
        """How many programs share one tile, from shapes alone, so that a captured launch stays right."""
        if self.splits is not None:
            return self.splits
        most = min(MAX_SPLITS, max(1, inputs // (8 * 32 * self.words)))  # at least eight steps for each
        return max(1, min(most, PROGRAMS // max(1, programs)))
