"""Peak memory of compression grows with the largest tensor, not with the model; measured in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

ROWS, COLUMNS = 2048, 1024
LARGEST = 4 * ROWS * COLUMNS
"""Bytes of the largest tensor as float32, which is what a codec works on."""

MEASURE = """
import json
import sys
from deltakeeper.compress import compress

def memory(field):
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))

warm, base, tuned, out = sys.argv[1:]
compress(f"{warm}/base", f"{warm}/tuned", f"{out}/first", "bitdelta")  # lazy imports and thread pools
before = memory("VmRSS")
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
compress(base, tuned, f"{out}/delta", "bitdelta")
print(json.dumps(memory("VmHWM") - before))
"""


def write_models(folder, tensors):
    for name, shift in (("base", 0.0), ("tuned", 1e-3)):
        (folder / name).mkdir(parents=True)
        generator = torch.Generator().manual_seed(0)
        weights = {
            f"layers.{i}.weight": (torch.randn(ROWS, COLUMNS, generator=generator) + shift).bfloat16()
            for i in range(tensors)
        }
        save_file(weights, folder / name / "model.safetensors")
    return folder


# The C library keeps freed heap for itself, tens of megabytes that differ from run to run. Here each tensor gets a
# mapping of its own, so that what is measured is what the code holds.
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_peak_memory_is_a_small_multiple_of_the_largest_tensor(tmp_path):
    warm, large = write_models(tmp_path / "warm", 1), write_models(tmp_path / "large", 40)
    assert sum(f.stat().st_size for f in large.rglob("*.safetensors")) > 300 << 20
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, warm, large / "base", large / "tuned", tmp_path],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert json.loads(done.stdout) < 2 * LARGEST + (100 << 20)
