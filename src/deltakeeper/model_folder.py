"""Model folders that transformers can load, where those at hand are not: adapters, and the base as it will be served.

They lie in a scratch folder and go with it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from deltakeeper.artifact import SIDE_FILES, DeltaArtifact
from deltakeeper.checkpoint import Checkpoint
from deltakeeper.model_writer import ModelWriter, Planned

CONFIG = "config.json"


def tuned_folder(tuned: Checkpoint, base: Checkpoint, scratch: Path) -> Path:
    """Folder of a fine-tune; one that is an adapter is merged into the base that was given, tensor by tensor.

    Left to itself, transformers would load an adapter onto whatever base its settings name.

    Raises:
        OSError: the scratch folder is full.
    """
    if type(tuned) is Checkpoint:
        return tuned.path
    folder = scratch / "tuned"
    folder.mkdir()
    plan = {
        name: Planned(info.st_dtype, info.shape, info.numel * info.dtype.itemsize)
        for name, info in tuned.tensors.items()
    }
    with ModelWriter(folder, plan) as writer:
        for name in plan:
            writer.write(name, 0, tuned.raw(name))
    for file in SIDE_FILES:
        source = next((path / file for path in (tuned.path, base.path) if (path / file).is_file()), None)
        if source is not None:
            shutil.copyfile(source, folder / file)
    return folder


def student_folder(base: Checkpoint, artifact: DeltaArtifact, scratch: Path) -> Path:
    """Folder of the base's weights (links, no copies) with the fine-tune's configuration, under which they are served.

    A fine-tune may have changed what is no weight, such as the base of its rotary positions.
    """
    folder = scratch / "student"
    folder.mkdir()
    for file in base.path.iterdir():
        if file.is_file() and file.name != CONFIG:
            (folder / file.name).symlink_to(file.resolve())
    owner = artifact.path if (artifact.path / CONFIG).is_file() else base.path
    if (owner / CONFIG).is_file():
        (folder / CONFIG).symlink_to((owner / CONFIG).resolve())
    return folder
