"""Which tensors of an artifact a LoRA adapter can hold, and why not the others."""

from __future__ import annotations

from collections.abc import Mapping

from deltakeeper.artifact import DeltaArtifact
from deltakeeper.checkpoint import Checkpoint
from deltakeeper.errors import ArtifactError
from deltakeeper.export.modules import linear_modules, module_of
from deltakeeper.layouts import Lowrank
from deltakeeper.manifest import TensorRecord


def plan_modules(artifact: DeltaArtifact, base: Checkpoint) -> tuple[dict[str, str], dict[str, str]]:
    """Modules by tensor of what an adapter can hold, and reasons by tensor of what it cannot; from headers alone."""
    known = linear_modules(base)
    names, rest = {}, {}
    for tensor in artifact.names:
        record = artifact.record(tensor)
        if record.encoding != "terms":
            continue
        module = module_of(tensor, known)
        reason = _reason(record, module)
        if reason is None and module is not None:
            names[tensor] = module
        else:
            rest[tensor] = reason or "no linear layer"
    return names, rest


def _reason(record: TensorRecord, module: str | None) -> str | None:
    """Why a tensor cannot be in an adapter, or None if it can."""
    if record.role in ("embedding", "head", "norm", "bias"):
        return {"embedding": "an embedding", "head": "an output head"}.get(record.role, f"a {record.role}")
    if len(record.shape) == 3:
        return "a stack of experts"
    if len(record.shape) != 2:
        return "no matrix"
    if record.base_shape is None:
        return "new in the fine-tune"
    if record.base_shape != record.shape:
        return "of another shape than the base's"
    return "no linear layer of the model that transformers builds" if module is None else None


def check_plan(
    artifact: DeltaArtifact, names: Mapping[str, str], rest: Mapping[str, str], rank: int | None, drop_rest: bool
) -> None:
    """Raise ArtifactError if something would be left out unasked, or needs a rank and has none."""
    if rest and not drop_rest:
        shown = ", ".join(f"'{name}' ({reason})" for name, reason in list(rest.items())[:5])
        more = f" and {len(rest) - 5} more" if len(rest) > 5 else ""
        raise ArtifactError(
            f"a LoRA adapter cannot hold {len(rest)} of the tensors that {artifact.path} changes: {shown}{more}; give "
            "--drop-rest to leave them out, or compress with `--norms base --embeddings base`."
        )
    full = [name for name in names if any(t.layout != Lowrank.name for t in artifact.record(name).terms)]
    if full and rank is None:
        raise ArtifactError(
            f"{artifact.path} holds {len(full)} deltas that are not low-rank, such as '{full[0]}'; give --rank for "
            "their best approximation."
        )
