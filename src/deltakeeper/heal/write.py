"""Write an artifact again with other values in some of its terms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from deltakeeper.apply import check_base
from deltakeeper.artifact import CARD_NAME, REPORT_NAME, DeltaArtifact
from deltakeeper.artifact_writer import ArtifactWriter, as_bytes
from deltakeeper.card import write_card
from deltakeeper.checkpoint import Checkpoint
from deltakeeper.compression_report import peak_memory
from deltakeeper.delta import pair
from deltakeeper.fidelity import Sums, compare, compare_rows, summarise
from deltakeeper.fingerprint import leaf_hash, root_of
from deltakeeper.layouts import Layout
from deltakeeper.manifest import INEXACT, TensorRecord
from deltakeeper.plan import in_order
from deltakeeper.reconstruct import dense_delta, reconstruct
from deltakeeper.safetensors_header import DTYPES


def write_healed(
    writer: ArtifactWriter,
    artifact: DeltaArtifact,
    base: Checkpoint,
    tuned: Checkpoint,
    healed: Mapping[str, Sequence[Layout]],
    how: Mapping[str, Any],
) -> None:
    """Write `artifact` again, with the terms of `healed` in the place of its own.

    Args:
        writer: what writes the new artifact, entered.
        artifact: what was healed.
        base: its base.
        tuned: its fine-tune, for the figures of the report.
        healed: new terms by tensor, those of the artifact and perhaps more behind them; every other tensor is copied.
        how: settings and figures of the healing, for the report.

    Raises:
        ArtifactError: it cannot be written.
    """
    models = pair(base, tuned)
    records: dict[str, TensorRecord] = {}
    leaves = dict(artifact.manifest.reconstruction.leaves)
    reports: dict[str, Any] = {}
    sums: list[Sums] = []
    for name in in_order(artifact.names):
        record = artifact.record(name)
        terms, added = artifact.terms(name), artifact.added_rows(name)
        figures = None
        decoded: torch.Tensor | None = None
        before = None if record.encoding == "tied" else check_base(base, artifact, name, record)
        if record.encoding == "terms":
            new = list(healed.get(name, terms))
            # Terms that healing added come last; they belong to whole matrices.
            slices = [part.slice for part in record.terms] + [None] * (len(new) - len(record.terms))
            parts = list(zip(slices, new, strict=True))
            term_records, nbytes, digest = writer.add(name, parts, added)
            record = replace(record, terms=term_records, stored_bytes=nbytes, sha256=digest)
            if name in healed:
                decoded = reconstruct(record, new, before, added, DTYPES[record.dtype])
                leaves[name] = leaf_hash(name, record.dtype, record.shape, as_bytes(decoded))
            if not new[0].replaces:
                delta = dense_delta(record, new)
                oriented = delta.T.contiguous() if record.transposed else delta
                found = compare(models.tensor(name).matrix(), oriented)
                sums.append(found)
                figures = asdict(summarise([found]))
            elif before is not None:
                decoded = new[0].to_dense().view(record.shape)
        elif record.encoding != "tied":
            decoded = before
        if before is not None and decoded is not None and figures is None:
            sums.append(compare_rows(before, tuned.read(name), decoded))
        records[name] = record
        reports[name] = {"encoding": record.encoding, "stored_bytes": record.stored_bytes, "fidelity": figures}
    manifest = artifact.manifest
    source = replace(manifest.reconstruction, root=root_of(leaves), leaves=dict(sorted(leaves.items())))
    for file in sorted(artifact.path.iterdir()):
        if file.is_file() and not file.name.startswith("delta_") and file.name != CARD_NAME:
            writer.copy(file)
    report = {
        "codec": manifest.codec,
        "seconds": round(float(how["seconds"]), 3),
        "peak_rss": peak_memory(),
        "total": asdict(summarise(sums)),
        "tensors": reports,
        "healing": dict(how),
    }
    writer.write_text(REPORT_NAME, json.dumps(report, indent=1, sort_keys=True) + "\n")
    exact = not any(term.layout == INEXACT for record in records.values() for term in record.terms)
    healed_manifest = replace(manifest, tensors=dict(sorted(records.items())), reconstruction=source, exact=exact)
    writer.finish(healed_manifest, write_card)
