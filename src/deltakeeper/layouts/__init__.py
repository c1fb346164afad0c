"""Layouts: how one packed term of a delta lies in memory; importing this package registers all built-in ones."""

from deltakeeper.layouts.base import LAYOUTS, Layout, TensorSpec, register_layout
from deltakeeper.layouts.dense import Dense
from deltakeeper.layouts.grouped_int import GroupedInt
from deltakeeper.layouts.lowrank import Lowrank
from deltakeeper.layouts.masks import BitMask, GapMask, Mask, SeedMask, TwoFourMask, best_mask
from deltakeeper.layouts.signs import Signs
from deltakeeper.layouts.sparse import Sparse

__all__ = [
    "LAYOUTS",
    "BitMask",
    "Dense",
    "GapMask",
    "GroupedInt",
    "Layout",
    "Lowrank",
    "Mask",
    "SeedMask",
    "Signs",
    "Sparse",
    "TensorSpec",
    "TwoFourMask",
    "best_mask",
    "register_layout",
]
