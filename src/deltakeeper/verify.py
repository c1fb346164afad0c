"""Check an artifact against its base and, if it is at hand, against the fine-tune it stands for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from deltakeeper.agreement import Agreement, Precision, measure_agreement, read_windows
from deltakeeper.apply import apply_delta, check_base
from deltakeeper.artifact import DeltaArtifact, open_artifact
from deltakeeper.artifact_writer import as_bytes
from deltakeeper.checkpoint import Checkpoint, opened
from deltakeeper.delta import pair
from deltakeeper.errors import ArtifactError, BaseMismatchError, CheckpointError, DataError
from deltakeeper.fidelity import Fidelity, Sums, compare_rows, summarise
from deltakeeper.fingerprint import fingerprint, leaf_hash
from deltakeeper.model_folder import tuned_folder
from deltakeeper.reconstruct import reconstruct
from deltakeeper.safetensors_header import DTYPES


@dataclass
class VerifyReport:
    """What a verification found.

    Attributes:
        problems: sentences, one a fault; empty if all is well.
        exact: whether every tensor decodes to the very bytes that the artifact promises; None if it promises none.
        total: how near the decoded fine-tune is to the true one, over all weights that changed; None without it.
        tensors: the same by tensor, over the rows that the base has.
        text: agreement with the fine-tune on a text, of the decoded model (`decoded`) and, for reference, of the base
            (`base`, None where the text has tokens that the base lacks); empty where no text was given.
    """

    problems: list[str] = field(default_factory=list)
    exact: bool | None = None
    total: Fidelity | None = None
    tensors: dict[str, Fidelity] = field(default_factory=dict)
    text: dict[str, Agreement | None] = field(default_factory=dict)

    @property
    def worst(self) -> list[tuple[str, Fidelity]]:
        """Tensors that do not decode to the fine-tune's, those of the largest relative error first."""
        found = [item for item in self.tensors.items() if item[1].relative_error > 0]
        return sorted(found, key=lambda item: (-item[1].relative_error, item[0]))

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
    *,
    text: str | Path | None = None,
    tokens: int = 4096,
    precision: Precision = "float32",
) -> VerifyReport:
    """Check payload hashes, the base's fingerprint, and that every tensor decodes to what the artifact promises.

    Args:
        delta: the artifact.
        base: its base.
        tuned: the fine-tune, to measure by tensor how near the decoded weights are, as weights: after rounding.
        progress: called before each tensor with (tensors done, tensors in all, name of the next).
        text: `.txt` or `.jsonl` file, to measure by token how near the predictions of the decoded model are to those of
            `tuned`. One model is in memory at a time; the temporary folder takes a decoded checkpoint and the logits.
        tokens: number of tokens of the text to look at.
        precision: of the models on the text, `float32` or `stored`.

    Raises:
        ArtifactError: the artifact cannot be opened at all.
        DataError: the text cannot be used, or was given without the fine-tune.
        CheckpointError: a model cannot be opened, or `tuned` is not the fine-tune that the artifact was made from.
    """
    artifact = delta if isinstance(delta, DeltaArtifact) else open_artifact(delta)
    if text is not None and tuned is None:
        raise DataError("a text measures agreement with the fine-tune; give that as well.")
    if tokens < 1:
        raise DataError(f"{tokens} tokens measure nothing; give 1 or more.")
    with ExitStack() as stack:
        origin = stack.enter_context(opened(base))
        target = None if tuned is None else stack.enter_context(opened(tuned, base=origin))
        windows = None
        if text is not None and target is not None:
            windows = read_windows(Path(text), (target.path, artifact.path, origin.path), tokens)
        report = _verify(artifact, origin, target, progress)
        if windows is not None and target is not None and report.ok:
            tell = (lambda name: progress(1, 1, name)) if progress else (lambda _: None)
            report.text = _agreement(artifact, origin, target, windows, precision, tell)
        return report


def _agreement(
    artifact: DeltaArtifact,
    origin: Checkpoint,
    target: Checkpoint,
    windows: Sequence[torch.Tensor],
    precision: Precision,
    tell: Callable[[str], None],
) -> dict[str, Agreement | None]:
    """Agreement on a text, through checkpoints on disk: what `apply` writes is what is measured."""
    with tempfile.TemporaryDirectory(prefix="deltakeeper-") as folder:
        scratch = Path(folder)
        tell("the fine-tune on the text")
        tuned = tuned_folder(target, origin, scratch)

        def decoded() -> Path:
            tell("the decoded model on the text")
            return apply_delta(origin, artifact, scratch / "decoded")

        def base() -> Path:
            tell("the base on the text")
            return origin.path

        others = {"decoded": decoded, "base": base}
        return measure_agreement(tuned, others, windows, scratch, precision=precision)


def _verify(
    artifact: DeltaArtifact,
    origin: Checkpoint,
    target: Checkpoint | None,
    progress: Callable[[int, int, str], None] | None,
) -> VerifyReport:
    if target is not None:
        pair(origin, target)  # raises if the two do not belong together
        check_tuned(artifact, target)
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
        if target is not None and before is not None and before.shape[1:] == decoded.shape[1:]:
            if name not in target.tensors or target.tensors[name].shape != record.shape:
                raise CheckpointError(
                    f"{target.name_or_path} has no tensor '{name}' {record.shape}; give its fine-tune."
                )
            found = compare_rows(before, target.read(name), decoded)
            sums.append(found)
            report.tensors[name] = summarise([found])
    if report.problems:
        report.exact = False
    report.total = summarise(sums) if sums else None
    return report


def check_tuned(artifact: DeltaArtifact, tuned: Checkpoint) -> None:
    """Refuse a fine-tune that the artifact was not made from, where the artifact says which it was.

    Raises:
        CheckpointError: it has another root.
    """
    made_from = artifact.manifest.target
    imported = made_from.root == artifact.manifest.reconstruction.root  # no fine-tune was known, or nothing was lost
    if not imported and fingerprint(tuned).root != made_from.root:
        raise CheckpointError(
            f"{tuned.name_or_path} is not the fine-tune that {artifact.path} was made from ({made_from.name_or_path}); "
            "give that one, or compress this one."
        )
