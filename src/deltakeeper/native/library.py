"""Find and load the compiled library; say in words why not where it is not there."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

NAME = "_passes"


@cache
def load_library() -> ctypes.CDLL | None:
    """The library, or None; `native_status` says why."""
    if os.environ.get("DELTAKEEPER_NATIVE", "1") == "0":
        return None
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).parent / (NAME + suffix)
        if path.is_file():
            try:
                return _declare(ctypes.CDLL(str(path)))
            except (OSError, AttributeError):
                return None
    return None


def native_status() -> str:
    """One sentence: which version of the passes runs, and why."""
    library = load_library()
    if library is not None:
        kind = "AVX-512" if library.deltakeeper_has_avx512() else "scalar"
        hashing = "two hashes at a time" if library.deltakeeper_has_sha() else "hashlib"
        return f"compiled passes are active ({kind}, {hashing})."
    if os.environ.get("DELTAKEEPER_NATIVE", "1") == "0":
        return "compiled passes are switched off by DELTAKEEPER_NATIVE=0; NumPy does the work."
    return "compiled passes were not built (no C++ compiler at installation); NumPy does the work."


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.deltakeeper_has_avx512.argtypes = ()
    library.deltakeeper_pack_signs.argtypes = (
        *(pointer, integer, pointer, integer, long, long, integer),
        *(pointer, pointer, pointer, pointer, pointer, integer),
    )
    library.deltakeeper_pack_signs.restype = None
    library.deltakeeper_merge_signs.argtypes = (
        *(integer, pointer, pointer, pointer, integer),
        *(pointer, integer, long, long, pointer, integer, integer),
    )
    library.deltakeeper_merge_signs.restype = None
    library.deltakeeper_has_sha.argtypes = ()
    library.deltakeeper_sha256_state_bytes.restype = long
    library.deltakeeper_sha256_begin.argtypes = (pointer,)
    library.deltakeeper_sha256_begin.restype = None
    library.deltakeeper_sha256_update_two.argtypes = (pointer, pointer, long, pointer, pointer, long)
    library.deltakeeper_sha256_update_two.restype = None
    library.deltakeeper_sha256_finish.argtypes = (pointer, pointer)
    library.deltakeeper_sha256_finish.restype = None
    return library
