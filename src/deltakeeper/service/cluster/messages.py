"""What travels between the ingress and its replicas. Ray pickles it between their processes; clients send JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deltakeeper.engine import EngineSettings, EngineStats, Request, Token
from deltakeeper.engine.stream import FinishReason, Logprobs
from deltakeeper.engine.tenant_stats import StoreStats
from deltakeeper.service.admission_port import Decision


@dataclass(frozen=True)
class ReplicaPlan:
    """What a replica is made of; each path has to lead to the same files on every node.

    Attributes:
        base: the base model: a folder or a hub name.
        root: fingerprint that its checkpoint must have there.
        version: of this package, which must be the replica's too.
        delta_bytes: memory of all deltas of one replica.
        loaders: threads that load deltas.
        engine: sizes of its engine.
        policy: file that says what a delta must show; None lets in whatever fits the base.
        policy_sha256: hash that the file must have there.
        decisions: folder in which each replica logs its decisions, in a file of its own.
        with_defaults: whether deltas say how tokens are drawn where a request does not.
        settle_seconds: how long a load with its canary may take.
    """

    base: str
    root: str
    version: str
    delta_bytes: int
    loaders: int
    engine: EngineSettings
    policy: Path | None
    policy_sha256: str | None
    decisions: Path
    with_defaults: bool = True
    settle_seconds: float = 600.0


@dataclass(frozen=True)
class Place:
    """What a tenant's name stands for, as the ingress has it.

    Attributes:
        name: of the tenant.
        path: folder of its artifact.
        planes: sign planes to serve; None for all.
        generation: grows whenever the name is turned over, so that a replica that heard of it earlier loads anew.
    """

    name: str
    path: Path
    planes: int | None
    generation: int


@dataclass(frozen=True)
class Asked:
    """A request, and what its tenant's name stood for when it came; None for the base."""

    request: Request
    place: Place | None


@dataclass(frozen=True)
class Told:
    """Decisions that a replica has logged, oldest first, each with its number in that replica's log.

    Attributes:
        replica: its id.
        decisions: the latest ones.
    """

    replica: str
    decisions: tuple[tuple[int, Decision], ...] = ()


@dataclass(frozen=True)
class Ended:
    """How an answer ended; attributes as in `engine.stream.Stream`.

    Attributes:
        told: where the answer failed.
    """

    reason: FinishReason
    stop: str | int | None = None
    error: str | None = None
    told: Told | None = None


@dataclass(frozen=True)
class Piece:
    """What came of an answer since the last piece.

    Attributes:
        tokens: those that are new.
        version: of the tenant that answers; in the first piece with a token.
        admitted_seconds: how long ago the request left the waiting line; in the same piece.
        cached_tokens: prompt tokens that were found in the cache.
        prompt_logprobs: in the same piece, if asked for.
        ended: in the last piece.
    """

    tokens: tuple[Token, ...] = ()
    version: str | None = None
    admitted_seconds: float | None = None
    cached_tokens: int = 0
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None
    ended: Ended | None = None


@dataclass(frozen=True)
class Loaded:
    """A tenant that is in a replica's memory.

    Attributes:
        version: identity of its content.
        vocabulary: tokens that it knows.
        side_files: files of its artifact with words or templates of its own, each with its SHA-256.
        told: what policy said of it, and of others.
    """

    version: str
    vocabulary: int
    side_files: dict[str, str]
    told: Told


@dataclass(frozen=True)
class Failure:
    """Why a replica could not do what it was asked.

    Attributes:
        kind: name of the class of the error, which is raised again at the ingress.
        message: its sentence.
        told: what policy said.
        retry_after: seconds after which it may work, where the error says so.
    """

    kind: str
    message: str
    told: Told | None = None
    retry_after: float | None = None


@dataclass(frozen=True)
class Looked:
    """What policy says of files, and the log of the replica that looked at them."""

    decision: Decision
    told: Told


@dataclass(frozen=True)
class Report:
    """A replica at one moment.

    Attributes:
        told: its id, and the decisions that it logged.
        node: id of the node that it runs on.
        pid: its process there.
        context: most tokens of prompt and answer of one request.
        engine: counters of its engine, without the latest passes.
        store: counters of its store.
    """

    told: Told
    node: str
    pid: int
    context: int
    engine: EngineStats
    store: StoreStats

    @property
    def replica(self) -> str:
        """Its id."""
        return self.told.replica
