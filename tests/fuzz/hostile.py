"""Hostile artifacts: a small whole one to alter, and a reader that reads all of it under a watch on memory."""

from __future__ import annotations

import copy
import functools
import json
import math
import random
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import deltakeeper.artifact
import deltakeeper.manifest
from deltakeeper.artifact import open_artifact
from deltakeeper.compress import compress

CODECS = (
    "bitdelta:bits=2,zero=zero",
    "bitdelta:scale=row+svd:rank=2",
    "magnitude:keep=0.3",
    "magnitude:keep=0.01,values=float32",
    "dare:p=0.8",
    "dense",
    "rtn:bits=3,group=16,symmetric=false",
    "deltazip",
    "delta_come:bpw=2",
    "ultradelta:p=0.5",
    "compeft:keep=0.3",
)
NUMBERS = (0, 1, -1, 2, 3, 31, 2**15, 2**31, 2**32, 2**40, 2**63, 2**64, 10**4000, -(2**63), 0.5, 1e-300, 1e308)
TEXTS = ("", "a", "..", "../../etc/passwd", "x" * 20_000, "\x1b[2J", "\ud800", "é", "0" * 64, "1.999", "2.0")
WORDS = ("bits", "seed", "gaps", "value", "tied", "base", "unchanged", "terms", "float16", "F64", "BF16", "row", "sign")
SHAPES = ([], [0, 0], [2**20, 2**20], [2**40], [0, 2**62, 2**62], [1] * 9, [True, 1], [-1, -1])
HOSTILE = (None, True, False, *NUMBERS, *TEXTS, *WORDS, *SHAPES, {}, [[]], {"": {}}, {"a": {"b": []}})
SLACK = 8 << 20
"""Bytes of buffers whose size does not depend on the input."""
PER_BYTE = 48
"""Bytes of Python objects that one byte of JSON may become."""


def write_models(folder: Path) -> tuple[Path, Path]:
    """A base and a fine-tune of few tensors of every kind: grown, transposed, of experts, tied, unchanged, a vector."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    base = {
        "transformer.wte.weight": draw(40, 32),
        "transformer.h.0.attn.c_attn.weight": draw(33, 35),
        "transformer.h.0.mlp.experts.gate_up_proj": draw(2, 33, 31),
        "transformer.h.0.mlp.up.weight": draw(37, 33),
        "transformer.ln_f.weight": draw(32),
    }
    tuned = {name: tensor + (0.01 * draw(*tensor.shape)).bfloat16() for name, tensor in base.items()}
    tuned["transformer.h.0.mlp.up.weight"] = base["transformer.h.0.mlp.up.weight"]
    tuned["transformer.wte.weight"] = torch.cat([tuned["transformer.wte.weight"], draw(2, 32)])
    tuned["lm_head.weight"] = tuned["transformer.wte.weight"].clone()
    tuned["transformer.h.0.new.weight"] = draw(3)
    for name, tensors in (("base", base), ("tuned", tuned)):
        (folder / name).mkdir(parents=True)
        save_file(tensors, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return folder / "base", folder / "tuned"


def make_artifacts(folder: Path, codecs: tuple[str, ...] = CODECS) -> list[Path]:
    """Whole artifacts of the models of `write_models`, one for each codec."""
    base, tuned = write_models(folder)
    made = []
    for i, codec in enumerate(codecs):
        compress(base, tuned, folder / f"delta-{i}", codec)
        (folder / f"delta-{i}" / "delta_report.json").unlink()
        made.append(folder / f"delta-{i}")
    return made


def read_everything(folder: Path) -> None:
    """Open an artifact and read every term and every added row."""
    artifact = open_artifact(folder)
    for name in artifact.names:
        artifact.terms(name)
        artifact.added_rows(name)


def alter_json(value: Any, draw: random.Random) -> None:
    """Change one to four places: another value, gone, doubled under a new name, exchanged with another, nested deep."""
    for _ in range(draw.randint(1, 4)):
        places = _places(value)
        if not places:
            return
        (container, key), (other, spot) = draw.choice(places), draw.choice(places)
        how = draw.choice(["value", "value", "value", "near", "gone", "more", "swap", "nest"])
        if how == "gone":
            del container[key]
        elif how == "more" and isinstance(container, dict):
            container[draw.choice(["", "a::0.b", "\x1b", "new", key + "x"])] = container[key]
        elif how == "near" and type(container[key]) is int:
            container[key] += draw.choice([-1, 1, 32, -container[key], container[key]])
        elif how == "nest":
            container[key] = functools.reduce(lambda inner, _: [inner], range(draw.choice([10, 40, 900])), 1)
        elif how == "swap":
            container[key], other[spot] = copy.deepcopy(other[spot]), copy.deepcopy(container[key])  # no circles
        else:
            container[key] = copy.deepcopy(draw.choice(HOSTILE))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """All places in a JSON value, as container and key."""
    found, waiting = [], [value]
    while waiting:
        item = waiting.pop()
        for key in item if isinstance(item, dict) else range(len(item)):
            found.append((item, key))
            if isinstance(item[key], dict | list):
                waiting.append(item[key])
    return found


def split(raw: bytes) -> tuple[Any, bytes]:
    """Header and data of a safetensors file."""
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(header: bytes, data: bytes) -> bytes:
    """A safetensors file of a header and data."""
    return len(header).to_bytes(8, "little") + header + data


class AnyHash(str):
    """A text that passes for every hash."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


@contextmanager
def hashes_agree() -> Iterator[None]:
    """An attacker states hashes that fit; without this hardly any altered artifact would be read past them."""
    artifact, manifest = deltakeeper.artifact.hash_payload, deltakeeper.manifest.root_of
    deltakeeper.artifact.hash_payload = lambda parts: AnyHash()
    deltakeeper.manifest.root_of = lambda leaves: AnyHash()
    try:
        yield
    finally:
        deltakeeper.artifact.hash_payload, deltakeeper.manifest.root_of = artifact, manifest


class _LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation of torch gives."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.largest = max(self.largest, math.prod(found.shape) * found.element_size())
        return found


@contextmanager
def no_more_memory_than(nbytes: int) -> Iterator[None]:
    """Fail if the block allocates more than the input justifies: `nbytes` a tensor, a multiple of it for JSON.

    Python and NumPy report to tracemalloc; torch does not, so its operations are watched.
    """
    with _LargestTensor():
        torch.isfinite(torch.zeros(1)).all()  # the first time, torch imports much for this
    started = not tracemalloc.is_tracing()
    if started:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    watch = _LargestTensor()
    try:
        with watch:
            yield
    finally:
        peak = tracemalloc.get_traced_memory()[1] - before
        if started:
            tracemalloc.stop()
        if peak > PER_BYTE * nbytes + SLACK or watch.largest > nbytes + SLACK:
            raise AssertionError(f"{nbytes} bytes of input made {peak} bytes, and a tensor of {watch.largest}")


def size_of(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
