"""The Triton kernels: in their interpreter, compiled for a GPU that is not there, and without Triton at all.

Triton reads at its first import whether it interprets, so that each way has a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def run(*arguments, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | variables,
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


@needs_triton
def test_products_in_the_interpreter():
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:cov")
    out = run("-m", "pytest", *options, "tests/kernels/triton_products.py", TRITON_INTERPRET="1")
    assert " passed" in out and "skipped" not in out


@needs_triton
def test_every_kernel_compiles_for_a_gpu(tmp_path):
    out = run("tests/kernels/triton_compiled.py", "bf16", "90", TRITON_CACHE_DIR=str(tmp_path))
    lines = [line for line in out.splitlines() if " bf16 90 " in line]
    assert len(lines) == 18
    for line in lines:
        woven = line.startswith(("add_signs", "add_codes"))
        assert ("no mma" in line) == (("select" in line and not woven) or line.startswith("add_partials")), line


def test_the_package_imports_and_says_why_it_cannot_be_used_without_triton():
    code = """
import sys
sys.modules["triton"] = None
from unittest import mock
import torch
from deltakeeper.errors import KernelError
from deltakeeper.kernels import triton
from deltakeeper.kernels.triton import availability
with mock.patch.object(availability, "find_spec", lambda name: None):
    print(triton.available())
    table = triton.TermTable((4,), 8, 2, device="cpu")
    try:
        triton.add_terms_(torch.zeros(1, 4), torch.zeros(1, 8), table, None)
    except KernelError as error:
        print(error)
"""
    first, second = run("-c", code).splitlines()
    assert first == "the package triton is not installed; install it, or use the kernels for the CPU."
    assert second == f"the Triton kernels cannot run: {first}"


@needs_triton
def test_without_a_gpu_the_reason_is_given():
    code = """
import sys
from deltakeeper.kernels.triton import available
print(available())
print("triton" in sys.modules)
"""
    assert run("-c", code).splitlines() == [
        "there is no GPU that torch can use; use the kernels for the CPU.",
        "False",
    ]
