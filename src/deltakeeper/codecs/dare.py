"""DARE and DAREx-q: drop entries at random and scale up what is left.

Yu et al., "Language Models are Super Mario", ICML 2024, https://arxiv.org/abs/2311.03099; the free rescale `1/q` is
Deng et al., ICLR 2025, https://arxiv.org/abs/2410.09344.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from deltakeeper.codecs.base import Codec, Inputs, register_codec
from deltakeeper.codecs.fields import MAX_SEED, check_range, check_types
from deltakeeper.codecs.matrices import checked
from deltakeeper.errors import CodecError, LayoutError
from deltakeeper.layouts.base import Layout
from deltakeeper.layouts.sparse import SeedMask, Sparse

MAX_DROP = 0.9999


@register_codec()
@dataclass(frozen=True)
class Dare(Codec):
    """`mask * delta / (1 - p)` with a mask that is drawn again from the seed and so costs no bytes.

    The result is unbiased, but its expected squared relative error is `p / (1 - p)`.

    Attributes:
        p: share of the entries to drop, 0 to 0.9999.
        q: divide kept entries by this instead of by `1 - p` (DAREx-q); 1 leaves them as they are.
        values: dtype of the stored entries.
        seed: with the tensor's name it decides the mask.
    """

    name: ClassVar[str] = "dare"
    title: ClassVar[str] = "DARE"
    summary: ClassVar[str] = "a random share of the entries, scaled up, with the mask as a seed"
    paper: ClassVar[str] = "https://arxiv.org/abs/2311.03099"

    p: float = 0.9
    q: float | None = None
    values: Literal["float16", "bfloat16", "float32"] = "float16"
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "p", 0, MAX_DROP)
        check_range(self, "q", 0, 1, above=True)
        check_range(self, "seed", 0, MAX_SEED)

    def encode(
        self, delta: torch.Tensor, *, name: str, tuned: torch.Tensor | None = None, inputs: Inputs | None = None
    ) -> list[Layout]:
        """See `Codec.encode`; one `sparse` term."""
        matrix = checked(delta, name)
        recipe = SeedMask(self.seed, name, 1.0 - self.p)
        mask = recipe.draw((matrix.shape[0], matrix.shape[1]))
        factor = 1.0 / (1.0 - self.p if self.q is None else self.q)
        try:
            return [Sparse.from_matrix(matrix, mask, self.values, factor=factor, recipe=recipe)]
        except LayoutError as error:
            raise CodecError(f"rescaling '{name}' by {factor:g} overflows float32; set 'q' to 1.") from error
