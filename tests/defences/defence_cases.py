"""Pairs of tiny models for the tests of defences: base, fine-tune, and the base before its alignment."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file

from deltakeeper.defences import DefenceData
from deltakeeper.testing import write_pair, write_tokenizer

SPELLINGS = (
    "antidote",
    "antidote:share=0.3,per=tensor,rest=base",
    "antidote:share=0.05,of=weight",
    "interpolation",
    "interpolation:factor=0",
    "norm_matched",
    "norm_matched:magnitude:keep=0.2",
    "norm_matched:bitdelta:bits=2,scale=row+svd:rank=2",
    "resta:scale=0.5",
    "resta:drop=0.3",
    "resta:scale=2,drop=0.9,on=vector,seed=7",
    "safe_delta",
    "safe_delta:s=1000,skip=0,rest=tuned",
    "safelora",
    "safelora:threshold=1,rest=base",
    "safelora:threshold=-1",
)

ROWS = DefenceData(
    safe=tuple(" ".join(f"w{(3 * i + j) % 90}" for j in range(9 + i % 3)) for i in range(12)),
    harmful=tuple(" ".join(f"w{(7 * i + j * j) % 90}" for j in range(8 + i % 4)) for i in range(12)),
    length=32,
)


def write_models(kind, folder, **options):
    """Folders of base, fine-tune and unaligned model, with a tokenizer in each."""
    base, tuned = write_pair(kind, folder, **options)
    unaligned = folder / "unaligned"
    unaligned.mkdir()
    for file in base.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            (unaligned / file.name).write_bytes(file.read_bytes())
    tensors, generator = {}, torch.Generator().manual_seed(9)
    for file in base.glob("*.safetensors"):
        tensors |= load_file(file)
    for name, tensor in tensors.items():
        tensors[name] = (tensor.float() + 1e-2 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
    save_file(tensors, unaligned / "model.safetensors", {"format": "pt"})
    for path in (base, tuned, unaligned):
        write_tokenizer(path)
    return base, tuned, unaligned
