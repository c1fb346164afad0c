"""The compiled parts, both optional: without them NumPy and plain torch do the work, at a fraction of the speed.

Everything else about the package is in pyproject.toml.
"""

import warnings
from pathlib import Path

from setuptools import Extension, setup

PASSES = Path("src/deltakeeper/native/csrc")
KERNELS = Path("src/deltakeeper/kernels/csrc")


def passes() -> Extension:
    """Passes over checkpoints, which need a C++ compiler alone."""
    sources = [str(PASSES / name) for name in ("signs.cpp", "sha256.cpp")]
    flags = ["-O3", "-ffp-contract=off", "-std=c++17"]
    return Extension("deltakeeper.native._passes", sources, depends=sources, extra_compile_args=flags, optional=True)


def kernels() -> list[Extension]:
    """Products of the overlay, against the stable interface of torch 2.10 and later; none where torch is not there."""
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        warnings.warn("torch is not there to build against, so the kernels are left out", stacklevel=2)
        return []
    return [
        Extension(
            "deltakeeper.kernels._kernels",
            sorted(str(path) for path in KERNELS.glob("*.cpp")),
            depends=sorted(str(path) for path in KERNELS.glob("*.hpp")),
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["c10", "torch", "torch_cpu"],
            # one binary holds all instruction sets; which one runs is decided when it is loaded, so no -march here
            extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden", "-w", "-g0"],
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), ("Py_LIMITED_API", "0x030b0000")],
            py_limited_api=True,
            optional=True,
        )
    ]


setup(ext_modules=[passes(), *kernels()])
