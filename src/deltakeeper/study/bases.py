"""The base of a study: the embedded models, the synthetic tier, a folder, or a hub id, as a local folder."""

from __future__ import annotations

import hashlib
from importlib.resources import as_file, files
from pathlib import Path

from deltakeeper.apply import apply_delta
from deltakeeper.artifact import open_artifact
from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.errors import DataError
from deltakeeper.lab.embedded import MODEL_NAME, cache_folder, prepare_embedded_model
from deltakeeper.study.progress import Progress

ALIGNMENT_DELTA = "smollm2-135m-aligned"
EMBEDDED = ("embedded-aligned", "embedded")
SYNTHETIC = ("synthetic", "synthetic-unaligned")


def prepare_base(name: str, progress: Progress) -> Path:
    """The folder of a base by its name in a study, made on first use where the package can make it.

    Raises:
        CheckpointError: the weights are not there, or cannot be had.
    """
    if name == "embedded-aligned":
        return prepare_aligned_base(progress)
    if name == "embedded":
        with progress.task("Unpack the embedded model (once)"):
            return prepare_embedded_model()
    if name in SYNTHETIC:
        from deltakeeper.study.synthetic import prepare_synthetic

        with progress.task("Train the synthetic policy (once)"):
            aligned, unaligned = prepare_synthetic(cache_folder())
        return aligned if name == "synthetic" else unaligned
    with open_checkpoint(name) as found:
        if not (found.path / "config.json").is_file():
            raise DataError(f"{name} holds no model that can be asked; give a whole model folder or a hub id.")
        return found.path


def prepare_aligned_base(progress: Progress) -> Path:
    """The aligned base: the embedded model plus the alignment delta that the package carries."""
    folder = cache_folder() / f"{ALIGNMENT_DELTA}-{alignment_tag()}"
    if (folder / "config.json").is_file():
        return folder
    with progress.task("Unpack the embedded model (once)"):
        embedded = prepare_embedded_model()
    with (
        progress.task("Apply the alignment delta"),
        as_file(files("deltakeeper") / "data" / ALIGNMENT_DELTA) as delta,
        open_checkpoint(embedded) as base,
    ):
        apply_delta(base, open_artifact(delta), folder)
    return folder


def alignment_tag() -> str:
    """Short hash of the alignment delta that the package carries."""
    config = (files("deltakeeper") / "data" / ALIGNMENT_DELTA / "delta_config.json").read_bytes()
    return hashlib.sha256(config).hexdigest()[:12]


def describe_base(name: str) -> str:
    """The base's name for reports."""
    return {
        "embedded-aligned": f"{MODEL_NAME}, aligned",
        "embedded": MODEL_NAME,
        "synthetic": "synthetic policy",
        "synthetic-unaligned": "synthetic policy before alignment",
    }.get(name, name)
