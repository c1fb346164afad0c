"""Products of packed terms on a GPU, in Triton: `y += x · Δᵀ` for the rows of many tenants, in one launch a layout.

    table = TermTable((4096, 1024, 1024), inputs=4096, slots=33, device="cuda")   # q, k and v of one layer
    table.put(slot, 0, [pack(term, "cuda")])                                      # a tenant's delta of q
    pieces = RowPieces.of(groups, device="cuda")                                  # once a pass, for all layers
    add_terms_(y, x, table, pieces)                                               # y is q, k and v side by side

Every tenant keeps memory of its own; a table of addresses by slot, which a tenant enters by writing one row, leads the
kernels to it (the pointer tables of vLLM's LoRA kernels). Grids depend on shapes only, never on which tenants a pass
has, so that a launch can be captured in a CUDA graph; programs without work return at once.

Signs and codes are laid out so that a thread of the matrix units loads just the words of its own operand and expands
two signs with two instructions; docs/results.md has times. The kernels of `sparse` and `dense` are not tuned. All are
tested with Triton's interpreter (`TRITON_INTERPRET=1`, float16 and float32; its bfloat16 products are wrong, so they
are refused there), compiled in the tests for compute capability 9.0, and run there by hand. Importing this package does
not import Triton; `available` says whether the kernels can be used.
"""

from deltakeeper.kernels.triton.availability import available, interpreted
from deltakeeper.kernels.triton.blocks import Blocks
from deltakeeper.kernels.triton.pack import PackedTerm, pack
from deltakeeper.kernels.triton.pieces import RowPieces
from deltakeeper.kernels.triton.products import add_terms_
from deltakeeper.kernels.triton.table import TermTable

__all__ = ["Blocks", "PackedTerm", "RowPieces", "TermTable", "add_terms_", "available", "interpreted", "pack"]
