"""A whole service for end-to-end tests: a base, fine-tunes, their artifacts, a store, and what answers must be."""

from __future__ import annotations

import functools
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from engine_cases import settings_of

from deltakeeper.apply import apply_delta
from deltakeeper.artifact import open_artifact
from deltakeeper.compress import compress
from deltakeeper.engine import Engine, Request
from deltakeeper.engine.store import TenantStore
from deltakeeper.layouts.signs import Signs
from deltakeeper.overlay import attach
from deltakeeper.reconstruct import reconstruct
from deltakeeper.testing.models import build_model

NEAR = 1e-3
"""Logits nearer than this may change places between two ways of summing in float32; those here spread over 0.5."""


def load_model(folder, dtype="auto"):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.inference_mode()
def generated(model, prompt, new_tokens):
    """The greedy answer of transformers' own `generate`; by how much each token won, and its log-probability."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logs = torch.cat(out.logits).float().log_softmax(-1)  # (tokens, vocabulary)
    best = logs.topk(2).values
    return out.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist(), best[:, 0].tolist()


def same_until_a_tie(found, expected, near=NEAR):
    """Compare an answer with `generated` up to the first token that won by less than `near`; gives their number."""
    tokens, margins, _ = expected
    for at, margin in enumerate(margins):
        if margin < near:
            return at
        assert list(found[: at + 1]) == tokens[: at + 1]
    assert len(found) == len(tokens)
    return len(tokens)


@dataclass
class Tenant:
    """An artifact under a name, at some number of planes."""

    path: Path
    planes: int | None = None


@dataclass
class Service:
    """One base on disk and tenants of it.

    Attributes:
        folder: where everything is written.
        base: folder of the base.
        tenants: by name.
    """

    folder: Path
    base: Path
    tenants: dict[str, Tenant] = field(default_factory=dict)

    @property
    def root(self):
        return open_artifact(next(iter(self.tenants.values())).path).manifest.base.root

    def tune(self, name, codec, *, seed, scale=0.05, planes=()):
        """Add a fine-tune of the base (Gaussian noise on every tensor), and views of fewer planes as `name-planes`."""
        model = load_model(self.base)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)
        tuned, path = self.folder / "tuned" / name, self.folder / "deltas" / name
        model.save_pretrained(tuned)
        compress(self.base, tuned, path, codec)
        self.tenants[name] = Tenant(path)
        for count in planes:
            self.tenants[f"{name}-{count}"] = Tenant(path, count)

    def merged(self, name, dtype="auto"):
        """The model that a tenant stands for; None is the base."""
        if name is None:
            return load_model(self.base, dtype)
        tenant = self.tenants[name]
        if tenant.planes is None:
            out = self.folder / "merged" / name
            return load_model(out if out.exists() else apply_delta(self.base, tenant.path, out), dtype)
        model, artifact = load_model(self.base), open_artifact(tenant.path)
        live = model.state_dict()
        for tensor in artifact.names:
            terms = [t.with_planes(tenant.planes) if isinstance(t, Signs) else t for t in artifact.terms(tensor)]
            own = reconstruct(artifact.record(tensor), terms, live[tensor], None, live[tensor].dtype)
            live[tensor].copy_(own)
        return model

    @functools.cache  # noqa: B019 - lives as long as the module's tests
    def merged_answer(self, name, prompt, new_tokens):
        """What `generate` says with the merged model."""
        return generated(self._merged_once(name), prompt, new_tokens)

    @functools.cache  # noqa: B019
    def _merged_once(self, name):
        return self.merged(name)

    def __hash__(self):
        return id(self)

    def register(self, store):
        for name, tenant in self.tenants.items():
            store.register(name, tenant.path, planes=tenant.planes)


def service_of(kind, folder, *, dtype=torch.float32, seed=3, layers=None):
    """A service without tenants over a tiny base, with all of its layers or (a Llama's) first ones."""
    base = folder / "base"
    model = build_model(kind, seed=seed)
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    model.to(dtype).save_pretrained(base)
    return Service(folder, base)


@contextmanager
def opened_store(service, *, budget=1 << 26, live=None, **settings):
    """An overlay on a live base, and a store of the service's tenants, all of them cold."""
    overlay = attach(live if live is not None else load_model(service.base))
    settings = {"base_root": service.root} | settings
    try:
        with TenantStore(overlay, byte_budget=budget, **settings) as store:
            service.register(store)
            yield overlay, store
    finally:
        overlay.detach()


def engine_of(overlay, store, **settings):
    return Engine(overlay.model, None, overlay=overlay, store=store, settings=settings_of(**settings))


def run_dry(engine, most=20_000):
    """Step until nothing is left."""
    for _ in range(most):
        if not engine.step():
            return
    raise AssertionError(f"still at work after {most} steps: {engine.stats()}")


def step_until(engine, reached, seconds=30):
    """Step until something is so, leaving the interpreter to the loaders where there is nothing to compute."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        if not engine.step():
            time.sleep(0.0005)


def answer_alone(overlay, store, tenant, prompt, new_tokens):
    """The tokens of a request in a fresh engine that serves nothing else."""
    with engine_of(overlay, store) as engine:
        (answer,) = engine.generate([Request(prompt, tenant=tenant, max_new_tokens=new_tokens)])
        assert answer.error is None and answer.cached_tokens == 0
    return list(answer.tokens)


def at_rest(engine, store):
    """Nothing runs, waits, is pinned or holds blocks."""
    stats, tenants = engine.stats(), store.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    assert (tenants.pins, tenants.waiting) == (0, 0)
    rows = min(engine.settings.max_running, engine.settings.max_step_tokens)
    assert not engine._unfinished and len(engine._core.scheduler._rows) == rows
