"""Products of packed terms with rows of many tenants: compiled for CPUs, Triton for GPUs, plain torch anywhere."""

from deltakeeper.kernels.library import Backend, backend
from deltakeeper.kernels.products import add_rows_, add_terms_, linear, linears
from deltakeeper.kernels.rows import RowGroups
from deltakeeper.kernels.terms import HeldTerm, held_terms, hold

__all__ = [
    "Backend",
    "HeldTerm",
    "RowGroups",
    "add_rows_",
    "add_terms_",
    "backend",
    "held_terms",
    "hold",
    "linear",
    "linears",
]
