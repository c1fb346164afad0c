"""Time and memory of compression, ours and theirs in turns in one process, memory each in a fresh one."""

from __future__ import annotations

import gc
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import record
import references
import synthetic
import torch

from deltakeeper import apply_delta, compress, parse_codec
from deltakeeper.codecs import Codec, Inputs
from deltakeeper.safetensors_header import read_header

SIDE, SMALL_SIDE = 4096, 2048
BANDS = {8: 2, 3: 32, 2: 480}
"""Vectors by their bits: Delta-CoMe's own shares for a matrix of this size."""
BLOCK_ROWS = 128


def run_peers(root: Path, rounds: int) -> None:
    """One 4096 x 4096 (or, for exact decompositions, 2048 x 2048) bfloat16 matrix from memory to packed buffers."""
    rows = []
    for label, ours, theirs, side in _contests(root):
        rows.append({"contest": label, "side": side, **_race(ours, theirs, rounds, side * side)})
        for side in ("ours", "theirs"):
            rows[-1][f"{side}_peak_mib"] = _peak_alone(root, label, side)
        print(json.dumps(rows[-1]))
        record.save("compress-peers", rows)


Contest = tuple[str, Callable[[], object], Callable[[], object], int]


def _contests(root: Path) -> list[Contest]:
    pairs = {side: _matrix_pair(side) for side in (SIDE, SMALL_SIDE)}
    gram = _gram()

    def ours(text: str, side: int, inputs: Inputs | None) -> Callable[[], object]:
        codec = parse_codec(text)
        return lambda: encode_pair(codec, *pairs[side], inputs)

    their = {
        "BitDelta: sign, scale, pack": ("bitdelta:zero=plus", references.bitdelta(root)),
        "deltatensors: 1 bit per row": ("bitdelta:scale=row,zero=plus", references.deltatensors("quantized")),
        "deltatensors: int4": ("rtn:bits=4", references.deltatensors("int4")),
        "deltatensors: sparse 90 %": ("magnitude:keep=0.1", references.deltatensors("sparse")),
        "DARE (MergeLM): random 90 %": ("dare:p=0.9", references.mergelm(root, "random", 0.9)),
        "Magnitude (MergeLM): 90 %": ("magnitude:keep=0.1", references.mergelm(root, "magnitude", 0.9)),
        "ComPEFT: top 10 %": ("compeft:keep=0.1", references.compeft(root, 0.1)),
        "UltraDelta: 4 bits, 97 %": ("ultradelta:p=0.97,bits=4", references.ultradelta(root, 4, 0.97)),
        "DeltaZip: 2:4, calibrated": ("deltazip", references.deltazip(root, gram)),
    }
    small = {
        "Delta-CoMe: data-free": ("delta_come:rank2=480,refine=false,search=false", references.delta_come(root, BANDS)),
        "ImPart: 32 times smaller": ("impart:cr=32", references.impart(root, 32)),
    }
    found: list[Contest] = []
    for label, (text, run) in (their | small).items():
        side = SMALL_SIDE if label in small else SIDE
        inputs = Inputs(gram, torch.zeros(SIDE), SIDE) if "2:4, calibrated" in label else None
        found.append((label, ours(text, side, inputs), lambda run=run, side=side: run(pairs[side]), side))
    return found


def encode_pair(codec: Codec, base: torch.Tensor, tuned: torch.Tensor, inputs: Inputs | None = None) -> object:
    """From two matrices in memory to packed terms, as `compress` does it."""
    encoder = codec.encode_rows((tuned.shape[0], tuned.shape[1]), name="w")
    if encoder is None:
        return codec.encode(tuned.float().sub_(base), name="w", inputs=inputs)
    for at in range(0, len(tuned), BLOCK_ROWS):
        encoder.add(base[at : at + BLOCK_ROWS], tuned[at : at + BLOCK_ROWS])
    return encoder.finish()


def _race(ours: Callable[[], object], theirs: Callable[[], object], rounds: int, entries: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in range(rounds + 1):
        for side, run in (("ours", ours), ("theirs", theirs)):
            started = time.perf_counter()
            run()
            took = time.perf_counter() - started
            gc.collect()
            if turn:  # the first is a warm-up
                times[side].append(took)
    ratios = [b / a for a, b in zip(times["ours"], times["theirs"], strict=True)]
    row: dict[str, Any] = {"rounds": rounds, "ratio": statistics.median(ratios)}
    row |= {"ratio_min": min(ratios), "ratio_max": max(ratios)}
    for side, values in times.items():
        row[f"{side}_mparam_s"] = entries / 1e6 / statistics.median(values)
    return row


def _matrix_pair(side: int) -> references.Pair:
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(side, side, generator=generator) * synthetic.WEIGHT_STD).bfloat16()
    step = torch.randn(side, side, generator=generator) * synthetic.DELTA_STD
    return base, (base.float() + step).bfloat16()


def _gram() -> torch.Tensor:
    x = torch.randn(2 * SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return x.T @ x / len(x)


MEASURE = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import speed
print(speed.growth(Path(sys.argv[2]), sys.argv[3], sys.argv[4]))
"""


def _peak_alone(root: Path, label: str, side: str) -> float:
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, here, str(root), label, side], capture_output=True, text=True, check=True
    )
    return float(done.stdout.strip().splitlines()[-1])


def growth(root: Path, label: str, side: str) -> float:
    """Peak memory in MiB above what the inputs take, in this process."""
    _, ours, theirs, _ = next(c for c in _contests(root) if c[0] == label)
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    (ours if side == "ours" else theirs)()
    return (status("VmHWM") - before) / 2**20


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def read_and_subtract(folder: Path) -> None:
    """What any compressor has to do: read both files and take the difference in float32, in torch."""
    from safetensors import safe_open

    file = "model.safetensors"
    shards = sorted(p.name for p in (folder / "base").glob("*.safetensors")) or [file]
    for shard in shards:
        with safe_open(folder / "base" / shard, "pt") as base, safe_open(folder / "tuned" / shard, "pt") as tuned:
            for name in list(base.keys()):
                tuned.get_tensor(name).float() - base.get_tensor(name).float()


def run_scale(scratch: Path, billions: list[float], rounds: int) -> None:
    """Files to files at growing size: compress, apply, and the read-and-subtract of the same files, in turns."""
    rows = record.load("compress-scale").get("rows", [])
    for size in billions:
        if any(row["billions"] == size for row in rows):
            continue
        folder = scratch / f"scale-{size}"
        shapes = synthetic.decoder_of(size * 1e9)
        synthetic.write_pair(folder, shapes)
        try:
            rows.append({"billions": size, "parameters": synthetic.count(shapes), **_scale_one(folder, shapes, rounds)})
        finally:
            shutil.rmtree(folder)
        print(json.dumps(rows[-1]))
        record.save("compress-scale", rows)


@contextmanager
def unhashed() -> Iterator[None]:
    """Compression without any hashing, to tell its time apart; what it writes is good for nothing else."""
    encode, writer = "deltakeeper.encode", "deltakeeper.artifact_writer"
    nothing = {
        f"{encode}.begin_leaf": lambda *_: _NoHash(),
        f"{encode}.begin_leaves": lambda *_: _NoHash(),
        f"{encode}.hash_tensor": lambda *_: "0" * 64,
        f"{encode}.leaf_hash": lambda *_: "0" * 64,
        f"{writer}.hash_payload": lambda *_: "0" * 64,
    }
    with ExitStack() as stack:
        for place, stand_in in nothing.items():
            stack.enter_context(mock.patch(place, stand_in))
        yield


class _NoHash:
    def update(self, *_: object) -> None: ...

    def hexdigest(self) -> str:
        return "0" * 64

    def hexdigests(self) -> tuple[str, str]:
        return "0" * 64, "0" * 64


def _compress_unhashed(folder: Path) -> None:
    with unhashed():
        compress(folder / "base", folder / "tuned", folder / "unhashed", "bitdelta:zero=plus")
    shutil.rmtree(folder / "unhashed")


def _scale_one(folder: Path, shapes: dict[str, tuple[int, ...]], rounds: int) -> dict[str, Any]:
    work: dict[str, Callable[[], object]] = {
        "compress": lambda: compress(folder / "base", folder / "tuned", folder / "delta", "bitdelta:zero=plus"),
        "unhashed": lambda: _compress_unhashed(folder),
        "read_and_subtract": lambda: read_and_subtract(folder),
        "apply": lambda: apply_delta(folder / "base", folder / "delta", folder / "applied"),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
            if name == "apply":
                shutil.rmtree(folder / "applied")
                nbytes = sum(f.stat().st_size for f in (folder / "delta").iterdir())
                shutil.rmtree(folder / "delta")
    millions = synthetic.count(shapes) / 1e6
    row: dict[str, Any] = {f"{name}_mparam_s": millions / statistics.median(t) for name, t in times.items()}
    row |= {f"{name}_best_mparam_s": millions / min(t) for name, t in times.items()}
    row["artifact_bytes"] = nbytes
    row["largest_tensor_mib"] = max(2 * _entries(shape) for shape in shapes.values()) / 2**20
    row["peak_mib"] = _peak_of_compress(folder)
    return row


def _entries(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


PEAK = """
import sys
from deltakeeper import compress
compress(sys.argv[1] + "/base", sys.argv[1] + "/tuned", sys.argv[1] + "/peak", sys.argv[2])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def _peak_of_compress(folder: Path, codec: str = "bitdelta:zero=plus") -> float:
    """Peak memory of a fresh process that does nothing else, in MiB, Python and torch included."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(folder), codec], capture_output=True, text=True, check=True)
    shutil.rmtree(folder / "peak")
    return int(done.stdout.strip()) / 1024


def run_shapes(scratch: Path) -> None:
    """Bytes on disk at the shapes of real models, everything in one bit, and with the embeddings left dense."""
    rows = record.load("compress-shapes").get("rows", [])
    for name, config in synthetic.SHAPES.items():
        if any(row["model"] == name for row in rows):
            continue
        folder = scratch / name
        shapes = synthetic.decoder(*config)
        synthetic.write_pair(folder, shapes)
        try:
            row: dict[str, Any] = {"model": name, "parameters": synthetic.count(shapes)}
            row["model_bytes"] = sum(f.stat().st_size for f in (folder / "tuned").glob("*.safetensors"))
            for label, embeddings in (("all", "codec"), ("dense_embeddings", "dense")):
                started = time.perf_counter()
                report = compress(
                    folder / "base", folder / "tuned", folder / label, "bitdelta:zero=plus", embeddings=embeddings
                )
                row[f"{label}_seconds"] = time.perf_counter() - started
                row[f"{label}_bytes"] = sum(f.stat().st_size for f in (folder / label).iterdir())
                row[f"{label}_ratio"] = row["model_bytes"] / row[f"{label}_bytes"]
                row[f"{label}_bits_per_weight"] = report.bits_per_weight
                _check_header(folder / label)
                shutil.rmtree(folder / label)
            row["peak_mib"] = _peak_of_compress(folder)
            rows.append(row)
        finally:
            shutil.rmtree(folder)
        print(json.dumps(rows[-1]))
        record.save("compress-shapes", rows)


def _check_header(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        read_header(file)


def run_svd(rounds: int = 5) -> None:
    """Rank 128 of a 4096 x 4096 delta: our randomised decomposition against torch's exact one."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    decaying = torch.linalg.qr(torch.randn(SIDE, SIDE, generator=generator)).Q
    decaying = (decaying * (torch.arange(1, SIDE + 1).float() ** -0.5)) @ torch.linalg.qr(
        torch.randn(SIDE, SIDE, generator=generator)
    ).Q
    for label, delta in (("gaussian", torch.randn(SIDE, SIDE, generator=generator)), ("power law", decaying)):
        delta = delta * synthetic.DELTA_STD
        codec = parse_codec("svd:rank=128,factors=float32")
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            (term,) = codec.encode(delta, name="w")
            times.append(time.perf_counter() - started)
        started = time.perf_counter()
        values = torch.linalg.svdvals(delta)
        exact_seconds = time.perf_counter() - started
        exact = float(values[128:].double().square().sum().sqrt())
        ours = float((term.to_dense() - delta).double().norm())
        row = {"spectrum": label, "seconds": statistics.median(times), "excess_error": ours / exact - 1}
        rows.append(row | {"exact_values_seconds": exact_seconds})
        print(json.dumps(rows[-1]))
    record.save("compress-svd", rows)
