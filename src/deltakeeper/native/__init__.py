"""Compiled versions of the passes over whole models, and their NumPy twins, which give the same bits.

The library is built with the package where a C++ compiler is found. `DELTAKEEPER_NATIVE=0` switches it off.
"""

from deltakeeper.native.library import load_library, native_status
from deltakeeper.native.sha256 import TwoHashes
from deltakeeper.native.signs import KINDS, SignRows, merge_signs, pack_signs

__all__ = ["KINDS", "SignRows", "TwoHashes", "load_library", "merge_signs", "native_status", "pack_signs"]
