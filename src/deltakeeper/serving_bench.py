"""How fast one base and many tenants are served offline, and what a tenant costs in memory."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from deltakeeper.artifact import DeltaArtifact
from deltakeeper.engine import Engine, EngineSettings, Request
from deltakeeper.errors import EngineError
from deltakeeper.kernels import backend
from deltakeeper.live_base import LiveBase
from deltakeeper.tenancy import Tenancy, published

MOST_RUNNING = 256


@dataclass(frozen=True)
class Workload:
    """What is served in a round, twice: by the base alone, and by the tenants in turn.

    Attributes:
        requests: requests at once.
        prompt_tokens: random tokens of each prompt; no two prompts share a beginning.
        new_tokens: tokens of each answer, none of which ends it.
        rounds: how often; base and tenants take turns in going first.

    Raises:
        EngineError: a number is not positive.
    """

    requests: int = 32
    prompt_tokens: int = 32
    new_tokens: int = 64
    rounds: int = 3

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise EngineError(f"{name} is {value}; give a positive number.")


@dataclass(frozen=True)
class ServingFigures:
    """What was measured.

    Attributes:
        workload: what was served.
        tenants: how many different ones.
        base_tokens_s: answer tokens a second of the base alone, by round; reading the prompts is part of the time.
        mixed_tokens_s: the same for the tenants.
        base_bytes: bytes of the base's weights.
        tenant_bytes: bytes that each tenant holds.
        resident_bytes: growth of the process by loading them, a tenant; None where the system does not tell.
        load_seconds: time to load and publish, a tenant.
        kernels: what computed the products.
        threads: CPU threads.
    """

    workload: Workload
    tenants: int
    base_tokens_s: tuple[float, ...]
    mixed_tokens_s: tuple[float, ...]
    base_bytes: int
    tenant_bytes: tuple[int, ...]
    resident_bytes: int | None
    load_seconds: float
    kernels: str
    threads: int

    @property
    def share(self) -> float:
        """Median over rounds of the tenants' speed as a share of the base's in the same round."""
        return statistics.median(m / b for m, b in zip(self.mixed_tokens_s, self.base_tokens_s, strict=True))

    def to_json(self) -> dict[str, Any]:
        """The figures as a JSON object."""
        return asdict(self) | {"share": self.share}


def measure_serving(
    base: LiveBase,
    artifacts: Mapping[str, DeltaArtifact],
    workload: Workload,
    *,
    tenants: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> ServingFigures:
    """Serve a workload by the base and by tenants in interleaved rounds, after a short one that is not counted.

    Args:
        base: the base in memory.
        artifacts: what tenants are made of, checked against the base.
        workload: what is served.
        tenants: how many; one an artifact by default. More of them take the artifacts in turn, each with memory of
            its own.
        progress: called with (rounds done, rounds in all, what comes next).

    Raises:
        EngineError: there is no tenant, or the model cannot serve the workload.
        OverlayError: an artifact does not fit the base.
    """
    count = len(artifacts) if tenants is None else tenants
    if count < 1 or not artifacts:
        raise EngineError("there is no tenant to measure; give at least one delta.")
    chosen = {f"{i}.{n}": a for i, (n, a) in zip(range(1, count + 1), cycle(artifacts.items()), strict=False)}
    before, started = _resident(), time.monotonic()
    with published(base.model, chosen) as tenancy:
        seconds, after = (time.monotonic() - started) / count, _resident()
        rates = _rounds(base, tenancy, list(chosen), workload, progress)
        sizes = tuple(delta.nbytes for delta in tenancy.deltas.values())
    active = backend()
    return ServingFigures(
        workload=workload,
        tenants=count,
        base_tokens_s=tuple(rates["base"]),
        mixed_tokens_s=tuple(rates["tenants"]),
        base_bytes=base.nbytes,
        tenant_bytes=sizes,
        resident_bytes=None if before is None or after is None else (after - before) // count,
        load_seconds=seconds,
        kernels=active.name if active.isa is None else f"{active.name}, {active.isa}",
        threads=torch.get_num_threads(),
    )


def _rounds(
    base: LiveBase,
    tenancy: Tenancy,
    names: list[str],
    workload: Workload,
    progress: Callable[[int, int, str], None] | None,
) -> dict[str, list[float]]:
    settings = EngineSettings(max_running=min(workload.requests, MOST_RUNNING), prefix_sharing=False)
    whose: dict[str, list[str | None]] = {"base": [None], "tenants": list(names)}
    rates: dict[str, list[float]] = {"base": [], "tenants": []}
    vocabulary = int(base.model.get_input_embeddings().weight.shape[0])
    draw = torch.Generator().manual_seed(0)
    with Engine(base.model, None, overlay=tenancy.overlay, store=tenancy.tenants, settings=settings) as engine:
        if workload.prompt_tokens + workload.new_tokens > engine.context:
            raise EngineError(
                f"prompt and answer have {workload.prompt_tokens + workload.new_tokens} tokens, but may have "
                f"{engine.context} together; ask for fewer."
            )
        for number in range(workload.rounds + 1):  # the first one warms up
            new = workload.new_tokens if number else min(4, workload.new_tokens)
            prompts = torch.randint(vocabulary, (workload.requests, workload.prompt_tokens), generator=draw).tolist()
            for kind in ("base", "tenants") if number % 2 else ("tenants", "base"):
                if progress is not None:
                    progress(max(0, number - 1), workload.rounds, kind)
                seconds = _serve(engine, prompts, whose[kind], new)
                if number:
                    rates[kind].append(workload.requests * new / seconds)
    return rates


def _serve(engine: Engine, prompts: list[list[int]], tenants: list[str | None], new_tokens: int) -> float:
    """Seconds that all prompts take together."""
    requests = [
        Request(tuple(prompt), tenant=tenant, max_new_tokens=new_tokens, ignore_eos=True)
        for prompt, tenant in zip(prompts, cycle(tenants), strict=False)
    ]
    started = time.monotonic()
    completions = engine.generate(requests)
    seconds = time.monotonic() - started
    for completion in completions:
        if len(completion.tokens) != new_tokens:
            raise EngineError(f"a request gave {len(completion.tokens)} of {new_tokens} tokens: {completion.error}")
    return seconds


def _resident() -> int | None:
    """Bytes of this process in memory, where the system says it."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
