"""Check an artifact against its base and, if it is at hand, against the fine-tune it stands for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deltakeeper.apply import check_base
from deltakeeper.artifact import DeltaArtifact, open_artifact
from deltakeeper.artifact_writer import as_bytes
from deltakeeper.checkpoint import Checkpoint, opened
from deltakeeper.delta import pair
from deltakeeper.errors import ArtifactError, BaseMismatchError, CheckpointError
from deltakeeper.fidelity import Fidelity, Sums, compare, summarise
from deltakeeper.fingerprint import leaf_hash
from deltakeeper.reconstruct import reconstruct
from deltakeeper.safetensors_header import DTYPES


@dataclass
class VerifyReport:
    """What a verification found.

    Attributes:
        problems: sentences, one a fault; empty if all is well.
        exact: whether every tensor decodes to the very bytes that the artifact promises; None if it promises none.
        total: how near the decoded fine-tune is to the true one, over all weights that changed; None without it.
        tensors: the same by tensor.
    """

    problems: list[str] = field(default_factory=list)
    exact: bool | None = None
    total: Fidelity | None = None
    tensors: dict[str, Fidelity] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {"ok": self.ok, **asdict(self)}


def verify(
    delta: DeltaArtifact | str | Path,
    base: Checkpoint | str | Path,
    tuned: Checkpoint | str | Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> VerifyReport:
    """Check payload hashes, the base's fingerprint, and that every tensor decodes to what the artifact promises.

    With `tuned`, also measure by tensor how near the decoded weights are to the true ones, as weights: after rounding.

    Raises:
        ArtifactError: the artifact cannot be opened at all.
        CheckpointError: a model cannot be opened, or `tuned` is not a fine-tune of `base`.
    """
    artifact = delta if isinstance(delta, DeltaArtifact) else open_artifact(delta)
    with ExitStack() as stack:
        origin = stack.enter_context(opened(base))
        target = None if tuned is None else stack.enter_context(opened(tuned, base=origin))
        return _verify(artifact, origin, target, progress)


def _verify(
    artifact: DeltaArtifact,
    origin: Checkpoint,
    target: Checkpoint | None,
    progress: Callable[[int, int, str], None] | None,
) -> VerifyReport:
    if target is not None:
        pair(origin, target)  # raises if the two do not belong together
    report = VerifyReport(exact=True if artifact.manifest.exact else None)
    sums: list[Sums] = []
    for i, name in enumerate(artifact.names):
        if progress:
            progress(i, len(artifact.names), name)
        record = artifact.record(name)
        if record.encoding == "tied":
            continue
        try:
            before = check_base(origin, artifact, name, record)
            terms = artifact.terms(name)
            decoded = reconstruct(record, terms, before, artifact.added_rows(name), DTYPES[record.dtype])
        except (ArtifactError, BaseMismatchError) as error:
            report.problems.append(str(error))
            continue
        promised = artifact.manifest.reconstruction.leaves.get(name)
        if artifact.manifest.exact and leaf_hash(name, record.dtype, record.shape, as_bytes(decoded)) != promised:
            report.exact = False
            report.problems.append(f"tensor '{name}' does not decode to the bytes that {artifact.path} promises.")
        if target is not None and before is not None and before.shape == decoded.shape:
            if name not in target.tensors or target.tensors[name].shape != record.shape:
                raise CheckpointError(
                    f"{target.name_or_path} has no tensor '{name}' {record.shape}; give its fine-tune."
                )
            found = compare(target.read(name).float() - before.float(), decoded.float() - before.float())
            sums.append(found)
            report.tensors[name] = summarise([found])
    if report.problems:
        report.exact = False
    report.total = summarise(sums) if sums else None
    return report
