"""Layouts: how one packed term of a delta lies in memory; importing this package registers all built-in ones."""

from deltakeeper.layouts.base import LAYOUTS, Layout, TensorSpec, register_layout
from deltakeeper.layouts.dense import Dense
from deltakeeper.layouts.lowrank import Lowrank
from deltakeeper.layouts.signs import Signs
from deltakeeper.layouts.sparse import SeedMask, Sparse

__all__ = [
    "LAYOUTS",
    "Dense",
    "Layout",
    "Lowrank",
    "SeedMask",
    "Signs",
    "Sparse",
    "TensorSpec",
    "register_layout",
]
