"""Rubrics: what a model is told to decide, as data files with a form of reply and a version."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from pydantic import Field, field_validator

from deltakeeper.errors import DataError
from deltakeeper.evals.judges.replies import FORMS, ReplyForm
from deltakeeper.evals.judges.settings import Settings, check, parse_mapping, read_bytes

PACKAGED = ("compliance", "policy_harm", "strongreject_triple", "three_classes")


class _File(Settings):
    name: str = Field(min_length=1, max_length=80)
    version: str = Field(min_length=1, max_length=40)
    source: str = Field(min_length=1, max_length=400)
    form: str
    instructions: str = Field(min_length=1, max_length=20_000)

    @field_validator("form")
    @classmethod
    def _known(cls, form: str) -> str:
        if form not in FORMS:
            raise ValueError(f"it must be one of {', '.join(FORMS)}")
        return form


@dataclass(frozen=True)
class Rubric:
    """Instructions for a judging model.

    Attributes:
        name: short name.
        version: version of the text.
        instructions: what the model is told before it sees prompt and answer.
        form: how it must reply.
        sha256: hash of the file.
    """

    name: str
    version: str
    instructions: str
    form: ReplyForm
    sha256: str


def load_rubric(source: str, folder: Path | None = None, sha256: str | None = None) -> Rubric:
    """Load a rubric: one of the package's own by name, or a YAML file of the same keys.

    Args:
        source: `compliance`, `policy_harm`, `strongreject_triple`, `three_classes`, or a path.
        folder: what a relative path is relative to.
        sha256: refuse a file of another hash.

    Raises:
        DataError: there is none, it is malformed, or its hash differs.
    """
    if source in PACKAGED:
        where = f"rubric '{source}'"
        raw = (files("deltakeeper") / "data" / "judges" / "rubrics" / f"{source}.yaml").read_bytes()
    else:
        path = (folder or Path()) / source
        if not path.is_file():
            raise DataError(f"there is no rubric '{source}'; name one of {', '.join(PACKAGED)}, or the path of a file.")
        where, raw = str(path), read_bytes(path, "rubric")
    found = hashlib.sha256(raw).hexdigest()
    if sha256 is not None and found != sha256.lower():
        raise DataError(f"{where} has sha256 {found}, not {sha256}; get the file that was asked for.")
    file = check(_File, parse_mapping(raw, where), where)
    return Rubric(file.name, file.version, file.instructions, FORMS[file.form], found)
