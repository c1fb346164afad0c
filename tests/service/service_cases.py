"""A live service over a tiny model, on a free port of this machine, with a gate that tests can hold."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import httpx
import torch

from deltakeeper.compress import compress
from deltakeeper.engine import Engine, EngineSettings
from deltakeeper.engine.store import TenantStore
from deltakeeper.live_base import open_base
from deltakeeper.overlay import attach
from deltakeeper.service.access import Principal
from deltakeeper.service.app import build_app
from deltakeeper.service.errors import TooManyRequests, Unauthorized
from deltakeeper.service.running import Services
from deltakeeper.service.server import Server
from deltakeeper.service.settings import ServiceSettings
from deltakeeper.service.tenant_text import TextGuard
from deltakeeper.testing import write_pair
from deltakeeper.testing.models import write_tokenizer

TEMPLATE = "{% for m in messages %}w0 {{ m['content'] }} w1 {% endfor %}{% if add_generation_prompt %}w2{% endif %}"
OTHER_TEMPLATE = "{% for m in messages %}w7 {{ m['content'] }} {% endfor %}"
PROMPT = "w5 w6 w7 w8"
LONG = {"model": "base", "prompt": PROMPT, "max_tokens": 50, "ignore_eos": True, "temperature": 0}


@dataclass
class Spent:
    """A request that was let in."""

    model: str
    prompt_tokens: int
    answers: int = 1
    tokens: int = 0
    closed: bool = False

    def spend(self, tokens):
        self.tokens += tokens

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True


@dataclass
class FakeGate:
    """Keys are what they open: no keys at all lets everybody in."""

    keys: dict[str, Principal] = field(default_factory=dict)
    admitted: list[Spent] = field(default_factory=list)
    most: int | None = None
    counted: list[Principal] = field(default_factory=list)

    knows = True

    @property
    def is_open(self):
        return not self.keys

    def identify(self, authorization):
        if not self.keys:
            return Principal(None, "open")
        found = self.keys.get((authorization or "").removeprefix("Bearer "))
        if found is None:
            raise Unauthorized("There is no such key; give one.")
        return found

    def count(self, principal):
        self.counted.append(principal)

    def check(self, principal, model, answers):
        if self.most is not None and sum(one.answers for one in self.admitted if not one.closed) + answers > self.most:
            raise TooManyRequests("Too many at once; wait.", retry_after=2.5)

    def withdraw(self, principal, model):
        pass

    def admit(self, principal, model, prompt_tokens, answers=1):
        self.check(principal, model, answers)
        self.admitted.append(Spent(model, prompt_tokens, answers))
        return self.admitted[-1]


class SilentObserver:
    """Metrics that note nothing; a test overrides what it wants to know."""

    def answered(self, model, stream, tokens): ...

    def first_token(self, model, seconds): ...

    def prompt_done(self, tokens, allowed): ...

    def token_after(self, model, seconds): ...

    def rejected(self, reason): ...


def write_service(folder):
    """A base that speaks, and two tenants of it: `signs` with a template of its own, and `ranks`."""
    base, tuned = write_pair("llama", folder, scale=0.05, dtype=torch.float32)
    for path, template in ((base, TEMPLATE), (tuned, OTHER_TEMPLATE)):
        write_tokenizer(path)
        (path / "chat_template.jinja").write_text(template)
    (folder / "deltas").mkdir()
    compress(base, tuned, folder / "deltas" / "signs", "bitdelta:bits=2")
    (tuned / "chat_template.jinja").write_text(TEMPLATE)
    compress(base, tuned, folder / "deltas" / "ranks", "svd:rank=8")
    return base


@contextmanager
def opened_services(folder, *, gate=None, engine=None, settings=None, budget=1 << 26, **parts):
    """A service over what `write_service` wrote, its engine running."""
    base = open_base(folder / "base")
    overlay = attach(base.model)
    sizes = EngineSettings(**({"kv_bytes": 1 << 22} | (engine or {})))
    try:
        settings = settings or ServiceSettings()
        guarded = TextGuard(overlay, base.tokenizer, with_defaults=settings.with_defaults)
        with TenantStore(guarded, folder / "deltas", byte_budget=budget, base_root=base.root) as store:
            store.scan()
            with Engine(base.model, base.tokenizer, overlay=overlay, store=store, settings=sizes) as running:
                running.start()
                yield Services(
                    engine=running,
                    store=store,
                    base=base,
                    base_name="base",
                    gate=gate or FakeGate(),
                    deltas=folder / "deltas",
                    settings=settings,
                    **parts,
                )
    finally:
        overlay.detach()


@contextmanager
def served(services, more=(), app=None):
    """A live server of a service, or of an application that was made of it already."""
    server = Server(app or build_app(services, more), services, "127.0.0.1", 0)
    server.capture_signals = nullcontext  # signals belong to the main thread
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Live(server, services, server.address)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def held(services):
    """The engine waits before its next pass, so that what happens meanwhile can be looked at."""
    go, core = threading.Event(), services.engine._core
    step = core.step

    def wait_and_step():
        go.wait(30)
        return step()

    core.step = wait_and_step
    try:
        yield go
    finally:
        go.set()
        core.step = step


@contextmanager
def own(service_folder, **settings):
    """A service of one test's own."""
    gate = settings.pop("gate", None)
    engine = settings.pop("engine", None)
    limits = ServiceSettings(**settings)
    with (
        opened_services(service_folder, gate=gate, engine=engine, settings=limits) as services,
        served(services) as live,
    ):
        yield live


@dataclass
class Live:
    """A server that runs."""

    server: Server
    services: Services
    url: str

    def client(self, key=None, **settings):
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False, **settings)


def wait_until(reached, seconds=30):
    """Wait for something to be so."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.005)
