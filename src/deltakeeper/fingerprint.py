"""Fingerprints of checkpoints: one SHA-256 a tensor and one root over them, whatever the sharding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from deltakeeper.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from deltakeeper.delta import tied_aliases
from deltakeeper.native import TwoHashes

ALGORITHM = "sha256-leaves-v1"
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Fingerprint:
    """Root and leaves, as lower-case hex; a leaf per tensor name."""

    root: str
    leaves: dict[str, str]


def begin_leaf(name: str, st_dtype: str, shape: Iterable[int]) -> hashlib._Hash:
    """The leaf of one tensor before its bytes: feed them in order, in pieces of any size."""
    return hashlib.sha256(leaf_header(name, st_dtype, shape))


def begin_leaves(first: TensorInfo, second: TensorInfo) -> TwoHashes:
    """The leaves of two tensors whose bytes come side by side."""
    return TwoHashes(*(leaf_header(info.name, info.st_dtype, info.shape) for info in (first, second)))


def leaf_header(name: str, st_dtype: str, shape: Iterable[int]) -> bytes:
    """What is hashed of a tensor before its bytes: name, dtype and dims (joined by commas), a NUL behind each."""
    dims = ",".join(map(str, shape))
    return f"{name}\0{st_dtype}\0{dims}\0".encode()


def leaf_hash(name: str, st_dtype: str, shape: Iterable[int], data: bytes | memoryview) -> str:
    """Leaf of one tensor: SHA-256 of name, dtype, dims (joined by commas) and bytes, NUL between them."""
    digest = begin_leaf(name, st_dtype, shape)
    digest.update(data)
    return digest.hexdigest()


def hash_tensor(checkpoint: Checkpoint, name: str) -> str:
    """Leaf of one tensor of a checkpoint, read in blocks."""
    info = checkpoint.tensors[name]
    digest = begin_leaf(name, info.st_dtype, info.shape)
    for _, block in checkpoint.blocks(name, _BLOCK_BYTES):
        digest.update(block.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def root_of(leaves: Mapping[str, str]) -> str:
    """Root over leaves: SHA-256 of the leaves' bytes, in the order of the names' bytes."""
    digest = hashlib.sha256()
    for name in sorted(leaves, key=str.encode):
        digest.update(bytes.fromhex(leaves[name]))
    return digest.hexdigest()


def fingerprint(checkpoint: Checkpoint, names: Iterable[str] | None = None, threads: int = 2) -> Fingerprint:
    """Hash all tensors of a checkpoint (or those named); hashing releases the interpreter, so threads help.

    A head that only repeats the input embedding is left out: files of the same model may hold it or not.
    """
    if names is None:
        aliases = tied_aliases(checkpoint)
        names = [name for name in checkpoint.tensors if name not in aliases]
    chosen = list(names)

    with ThreadPoolExecutor(threads) as pool:
        leaves = dict(zip(chosen, pool.map(lambda name: hash_tensor(checkpoint, name), chosen), strict=True))
    return Fingerprint(root_of(leaves), leaves)


def read_root(source: str | Path) -> str:
    """Root of the fingerprint of a checkpoint by its folder or hub name; reads all of it once, and keeps nothing.

    Raises:
        CheckpointError: there is no such model, or it cannot be read.
    """
    with open_checkpoint(source) as checkpoint:
        return fingerprint(checkpoint).root
