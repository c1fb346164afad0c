"""What is done with each tensor: above all, that no tensor is put through arithmetic that would alter it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from deltakeeper.apply import apply_delta
from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.compress import compress
from deltakeeper.delta import pair
from deltakeeper.plan import TINY, treat
from deltakeeper.verify import verify


def write(folder, **tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("dtype", "other", "treatment"),
    [
        (torch.bfloat16, torch.bfloat16, "terms"),
        (torch.float16, torch.float32, "terms"),
        (torch.float64, torch.float64, "value"),
        (torch.float32, torch.float64, "value"),
        (torch.int32, torch.int32, "value"),
        (torch.uint8, torch.uint8, "value"),
        (torch.bool, torch.bool, "value"),
    ],
)
def test_only_dtypes_that_float32_holds_are_encoded(tmp_path, dtype, other, treatment):
    base = write(tmp_path / "base", w=torch.zeros(TINY // 32, 32, dtype=other))
    tuned = write(tmp_path / "tuned", w=torch.ones(TINY // 32, 32, dtype=dtype))
    with open_checkpoint(base) as origin, open_checkpoint(tuned) as target:
        models = pair(origin, target)
        assert treat(models, models.tensor("w")) == treatment


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float64])
def test_packed_integers_and_doubles_come_back_bit_by_bit(tmp_path, dtype):
    def qweight(seed):
        raw = torch.randint(0, 256, (64 * 64 * dtype.itemsize,), generator=torch.Generator().manual_seed(seed))
        if dtype.is_floating_point:
            return torch.randn(64, 64, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        return raw.to(torch.uint8).view(dtype).view(64, 64)

    matrix = torch.randn(64, 64)
    base = write(tmp_path / "base", q=qweight(0), w=matrix)
    tuned = write(tmp_path / "tuned", q=qweight(1), w=matrix + 0.01)
    compress(base, tuned, tmp_path / "delta", "bitdelta")
    apply_delta(base, tmp_path / "delta", tmp_path / "again")
    with open_checkpoint(tmp_path / "again") as again:
        assert torch.equal(again.read("q"), qweight(1))
    assert verify(tmp_path / "delta", base, tuned).problems == []
