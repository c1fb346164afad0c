"""An artifact as a PEFT LoRA adapter that PEFT and stock vLLM load.

Low-rank terms go over as they are; any other delta as its best approximation of a given rank (Eckart and Young), whose
error the report gives. LoRA holds deltas of linear layers only: everything else that the artifact changes is an error
unless the caller asks to drop it, and is then listed.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from deltakeeper.apply import check_base
from deltakeeper.artifact import COUNTED_SIDE_FILES, SIDE_FILES, DeltaArtifact, open_artifact
from deltakeeper.artifact_writer import publish
from deltakeeper.card import hub_name
from deltakeeper.checkpoint import Checkpoint, opened
from deltakeeper.errors import ArtifactError
from deltakeeper.export.factors import Factors, best_factors, own_factors, padded_factors, stored_factors, total_rank
from deltakeeper.export.plan import check_plan, plan_modules
from deltakeeper.layouts import Layout
from deltakeeper.layouts.settings import FLOAT_DTYPES
from deltakeeper.lora import PREFIX
from deltakeeper.manifest import Source
from deltakeeper.reconstruct import dense_delta

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for `--max-lora-rank`."""


@dataclass(frozen=True)
class ExportedModule:
    """One module of the adapter: its rank, whether the factors are the artifact's own, and `|D' - D| / |D|`."""

    rank: int
    exact: bool
    relative_error: float


@dataclass(frozen=True)
class LoraExport:
    """What an export wrote.

    Attributes:
        path: the adapter's folder.
        rank: the largest rank of a module, and the adapter's own.
        modules: the modules by name.
        dropped: tensors that the artifact changes and the adapter does not, with the reason.
        relative_error: error of the exported deltas together, against what the artifact decodes to.
    """

    path: Path
    rank: int
    modules: dict[str, ExportedModule]
    dropped: dict[str, str]
    relative_error: float

    @property
    def vllm_rank(self) -> int | None:
        """The least `--max-lora-rank` with which vLLM takes the adapter, or None where it takes none so large."""
        return next((rank for rank in VLLM_RANKS if rank >= self.rank), None)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {**asdict(self), "path": str(self.path), "vllm_rank": self.vllm_rank}


def export_lora(
    delta: DeltaArtifact | str | Path,
    base: Checkpoint | str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    uniform_rank: bool = False,
    drop_rest: bool = False,
    dtype: str = "float32",
    progress: Callable[[int, int, str], None] | None = None,
) -> LoraExport:
    """Write an artifact as a PEFT LoRA adapter: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        delta: the artifact.
        base: the base that it was made from.
        out: folder to write; it must not exist, or be empty.
        rank: largest rank of a module; needed unless every delta is low-rank already, which is then kept whole.
        uniform_rank: pad every module with zeros to one rank, for servers that read no `rank_pattern`.
        drop_rest: leave out what an adapter of linear layers cannot hold: embeddings, heads, norms, biases, experts.
        dtype: of the factors, `float32`, `bfloat16` or `float16`.
        progress: called before each module with (modules done, modules in all, tensor of the next).

    Raises:
        ArtifactError: something cannot be expressed and was not to be dropped, a rank is needed, or `out` is taken.
        BaseMismatchError: this is not the base that the delta was made from.
    """
    artifact = delta if isinstance(delta, DeltaArtifact) else open_artifact(delta)
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ArtifactError(f"{target} exists; give another folder for the adapter.")
    if dtype not in FLOAT_DTYPES:
        raise ArtifactError(f"factors cannot be stored as '{dtype}'; choose one of {', '.join(FLOAT_DTYPES)}.")
    if rank is not None and rank < 1:
        raise ArtifactError(f"a rank of {rank} holds nothing; give 1 or more.")
    with opened(base) as origin:
        names, rest = plan_modules(artifact, origin)
        check_plan(artifact, names, rest, rank, drop_rest)
        modules: dict[str, ExportedModule] = {}
        factors: dict[str, Factors] = {}
        squares = [0.0, 0.0]
        for i, (tensor, module) in enumerate(names.items()):
            if progress:
                progress(i, len(names), tensor)
            true, terms = _decode(artifact, origin, tensor)
            size = float(torch.linalg.vector_norm(true, dtype=torch.float64))
            if size == 0:
                continue
            found = own_factors(terms, rank)
            left, right = found or best_factors(true, rank or total_rank(terms), tensor)
            left, right = stored_factors(left, right, FLOAT_DTYPES[dtype])
            true -= left.float() @ right.float()
            error = float(torch.linalg.vector_norm(true, dtype=torch.float64))
            factors[module] = left, right
            modules[module] = ExportedModule(left.shape[1], found is not None, error / size)
            squares = [squares[0] + error**2, squares[1] + size**2]
        if not modules:
            raise ArtifactError(f"{artifact.path} changes no linear layer, so there is no adapter to write.")
        largest = max(module.rank for module in modules.values())
        if uniform_rank:
            factors = {module: padded_factors(*pair, largest) for module, pair in factors.items()}
        conv = any(artifact.record(tensor).transposed for tensor in names)
        _write(target, artifact, factors, _config(origin, factors, conv))
    return LoraExport(target, largest, modules, rest, math.sqrt(squares[0] / squares[1]))


def _decode(artifact: DeltaArtifact, base: Checkpoint, tensor: str) -> tuple[torch.Tensor, Sequence[Layout]]:
    """The delta that the artifact decodes to, float32 `(out, in)`, and its terms."""
    record = artifact.record(tensor)
    before = check_base(base, artifact, tensor, record)
    terms = artifact.terms(tensor)
    if before is not None and terms[0].replaces:
        delta = terms[0].to_dense().float() - before.float()
    else:
        delta = dense_delta(record, terms)
    return (delta.T if record.transposed else delta).contiguous(), terms


def _config(base: Checkpoint, factors: Mapping[str, Factors], conv: bool) -> dict[str, Any]:
    ranks = {module: left.shape[1] for module, (left, _) in sorted(factors.items())}
    largest = max(ranks.values())
    smaller = {module: rank for module, rank in ranks.items() if rank != largest}
    source = Source(base.name_or_path, base.revision, "")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": hub_name(source) or base.name_or_path,
        "revision": base.revision,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,  # as large as the rank, so that the scaling is 1 everywhere
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": list(ranks),
        "fan_in_fan_out": conv,
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }


def _write(out: Path, artifact: DeltaArtifact, factors: Mapping[str, Factors], config: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        tensors = {}
        for module, (left, right) in factors.items():
            tensors[f"{PREFIX}{module}.lora_A.weight"] = right
            tensors[f"{PREFIX}{module}.lora_B.weight"] = left
        save_file(tensors, scratch / "adapter_model.safetensors", metadata={"format": "pt"})
        (scratch / "adapter_model.safetensors").chmod(0o644)  # safetensors keeps its files to their owner
        (scratch / "adapter_config.json").write_text(
            json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        for name in SIDE_FILES:
            if name not in COUNTED_SIDE_FILES and (artifact.path / name).is_file():
                shutil.copyfile(artifact.path / name, scratch / name)
        publish(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
