"""What admission remembers of the versions that were loaded, refused or decided; nothing of it outlives the process."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from deltakeeper.service.admission.inspection import Finding
from deltakeeper.service.admission_port import Decision

Key = tuple[str, str]
"""A tenant's name and a version of its content."""


@dataclass(frozen=True)
class Load:
    """A version that was loaded after its files were let in.

    Attributes:
        whole: the version that it would be without any limit of planes.
        path: folder of the artifact.
        asked: sign planes that were asked for; None for all.
        served: sign planes that are served, 0 where there are none.
        dimmable: whether fewer planes would make every matrix coarser.
        manifest_sha256: of the artifact.
        finding: what policy says of its files.
    """

    whole: str
    path: Path
    asked: int | None
    served: int
    dimmable: bool
    manifest_sha256: str
    finding: Finding


@dataclass(frozen=True)
class Limit:
    """Sign planes that a failed canary leaves a version, and why."""

    planes: int
    reasons: tuple[str, ...]


@dataclass
class Standing:
    """The memory of admission; `lock` guards all of it.

    Attributes:
        loads: by version.
        limits: by the version without limits.
        refused: decisions after a canary, by version, which is not loaded again.
        decided: final decisions.
        asked: the version of each tenant that was last asked for.
        passed_over: by tenant, the refusal of what was to take the place of what it stands for.
        giving_way: versions that failed and serve nobody, while they are loaded anew at fewer planes.
        on_trial: versions whose canary is under way.
        retries: why a canary could not be run, and the monotonic second after which it is tried again.
    """

    lock: threading.RLock = field(default_factory=threading.RLock)
    loads: dict[str, Load] = field(default_factory=dict)
    limits: dict[str, Limit] = field(default_factory=dict)
    refused: dict[str, Decision] = field(default_factory=dict)
    decided: dict[Key, Decision] = field(default_factory=dict)
    asked: dict[str, str] = field(default_factory=dict)
    passed_over: dict[str, Decision] = field(default_factory=dict)
    giving_way: set[Key] = field(default_factory=set)
    on_trial: set[Key] = field(default_factory=set)
    retries: dict[Key, tuple[float, str]] = field(default_factory=dict)
