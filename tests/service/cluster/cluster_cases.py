"""A tiny base with tenants for a service over a cluster, and replicas that run in this process in place of one."""

from __future__ import annotations

import asyncio
import json
import shutil
from contextlib import contextmanager

import torch
from service_cases import TEMPLATE, opened_services, served

from deltakeeper.compress import compress
from deltakeeper.engine import EngineSettings
from deltakeeper.service.assembly import Plan
from deltakeeper.service.cluster.assembly import clustered, open_distant_base
from deltakeeper.service.cluster.failures import ReplicaLostError
from deltakeeper.service.cluster.preference import ranked
from deltakeeper.service.cluster.replica import Replica
from deltakeeper.service.cluster.scaling import Scaling
from deltakeeper.testing import write_pair, write_tokenizer

CONTEXT = 2048
"""Long enough for answers that take seconds."""
TENANTS = ("signs", "ranks", "t0", "t1", "t2", "t3")


def write_cluster_folder(folder):
    """A base, `signs` and `ranks`, and four more names for copies of them."""
    base, tuned = write_pair("llama", folder, scale=0.05, dtype=torch.float32)
    for path in (base, tuned):
        write_tokenizer(path)
        (path / "chat_template.jinja").write_text(TEMPLATE)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    compress(base, tuned, folder / "deltas" / "signs", "bitdelta:bits=2")
    compress(base, tuned, folder / "deltas" / "ranks", "svd:rank=8")
    for at in range(4):
        shutil.copytree(folder / "deltas" / ("signs", "ranks")[at % 2], folder / "deltas" / f"t{at}")


def make_plan(folder, state, *, engine=None, **settings):
    """What to serve, with its state in a folder of the test's own."""
    sizes = EngineSettings(**{"kv_bytes": 1 << 25, "threads": 1} | (engine or {}))
    given = {"delta_bytes": 1 << 24, "engine": sizes} | settings
    return Plan(folder / "deltas", state / "state.db", state / "decisions.jsonl", "base", **given)


def answers_of_one(folder, *asked):
    """The choices of a service on one machine, by model and by which of these requests."""
    with opened_services(folder, engine={"threads": 1}) as services, served(services) as live, live.client() as c:
        return {
            (model, at): c.post("/v1/completions", json=one | {"model": model}).json()["choices"]
            for model in ("base", *TENANTS)
            for at, one in enumerate(asked)
        }


class ReplicasHere:
    """Replicas of this process; one can be lost in the middle of what it does."""

    def __init__(self, plan, count):
        self.alive = {f"r{at}": Replica(plan, f"r{at}", f"node{at}") for at in range(count)}
        self.dead = {}
        self.asked = []

    def lose(self, name):
        self.dead[name] = self.alive.pop(name)

    def _of(self, tenant):
        if not self.alive:
            raise ReplicaLostError("there is none.")
        return ranked(tenant, self.alive)[0]

    async def answer(self, asked):
        name = self._of("" if asked.place is None else asked.place.name)
        self.asked.append((asked, name))
        async for piece in self.alive[name].answer(asked):
            if name in self.dead:
                raise ReplicaLostError(f"{name} is dead.")
            yield piece
            await asyncio.sleep(0)

    async def load(self, place):
        return await self.alive[self._of(place.name)].load(place)

    async def decide(self, name, folder):
        return await self.alive[self._of(name)].decide(name, folder)

    async def unload(self, name):
        for replica in self.alive.values():
            replica.unload(name)

    async def remove(self, name):
        for replica in self.alive.values():
            replica.remove(name)

    async def reports(self):
        return [replica.report() for replica in self.alive.values()]

    def close(self):
        for replica in (*self.alive.values(), *self.dead.values()):
            replica.close()


@contextmanager
def clustered_here(plan, folder, count=2, **scaling):
    """A service over replicas of this process; gives it and them."""
    started = []

    @contextmanager
    def start(name, made):
        started.append(ReplicasHere(made, count))
        try:
            yield started[0]
        finally:
            started[0].close()

    with clustered(open_distant_base(str(folder / "base")), plan, Scaling(**scaling), start) as service:
        yield service, started[0]
