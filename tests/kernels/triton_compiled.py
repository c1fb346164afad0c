"""Compile every kernel for NVIDIA GPUs, bfloat16 too, without having one; run by test_triton.py, in its own process."""

from __future__ import annotations

import inspect
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltakeeper.kernels.triton import codes_kernel, floats_kernel, partials_kernel, signs_kernel, sparse_kernel
from deltakeeper.kernels.triton.pack import FIELDS

POINTERS = {"pieces": "*i64", "tiles": "*i32", "counts": "*i32", "fields": "*i64", "partial": "*fp32", "lanes": "*i32"}
DOT = {"ROWS": 16, "COLUMNS": 64, "WORDS": 2, "STEP": 64, "RANKS": 16, "DOT": True, "SPLITS": 1}
SELECT = {"ROWS": 1, "COLUMNS": 128, "WORDS": 1, "STEP": 32, "RANKS": 16, "DOT": False, "SPLITS": 4}
KERNELS = {
    "add_signs": (signs_kernel, {"EVEN": True, "SCALED": False}),
    "add_signs scaled": (signs_kernel, {"EVEN": False, "SCALED": True}),
    "add_partials": (partials_kernel, {}),
    "add_codes": (codes_kernel, {"BITS": 4, "EVEN": True, "PLAIN": True}),
    "add_codes unaligned": (codes_kernel, {"BITS": 7, "EVEN": False, "PLAIN": False}),
    "add_sparse": (sparse_kernel, {}),
    "add_floats": (floats_kernel, {}),
    "shrink": (floats_kernel, {}),
    "expand_ranks": (floats_kernel, {}),
}


def compile_kernel(name: str, blocks: dict, dtype: str, capability: int) -> str:
    """The PTX of one kernel; ptxas has assembled it too."""
    module, more = KERNELS[name]
    kernel = getattr(module, name.split()[0])
    exact = dtype == "fp32" or name.startswith("add_signs") or more.get("PLAIN", False)
    constants = {**blocks, **more, "FIELDS": FIELDS, "PRECISION": "ieee" if exact else "tf32"}
    names = list(inspect.signature(kernel.fn).parameters)
    constants = {one: constants[one] for one in names if one.isupper()}
    signature = {
        one: "constexpr" if one in constants else f"*{dtype}" if one in "xy" else POINTERS.get(one, "i32")
        for one in names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]


def main() -> None:
    """Compile what the arguments name: a data type and a compute capability."""
    dtype, capability = sys.argv[1], int(sys.argv[2])
    for name in KERNELS:
        for blocks in (DOT, SELECT):
            ptx = compile_kernel(name, blocks, dtype, capability)
            way, units = "dot" if blocks["DOT"] else "select", "mma" if "mma" in ptx else "no mma"
            sys.stdout.write(f"{name} {dtype} {capability} {way} {units}\n")


if __name__ == "__main__":
    main()
