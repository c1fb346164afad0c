"""A tiny base that speaks, deltas of it, and a whole service's parts under a policy, without HTTP."""

from __future__ import annotations

import json
from contextlib import contextmanager
from datetime import UTC, datetime

import torch
import yaml
from service_cases import FakeGate
from starlette.testclient import TestClient

from deltakeeper.artifact import open_artifact
from deltakeeper.attestation import make_keys
from deltakeeper.attestation.envelope import seal
from deltakeeper.attestation.keys import read_private_key
from deltakeeper.attestation.making import files_of
from deltakeeper.attestation.statement import (
    Artifact,
    Digest,
    JudgedBy,
    Measured,
    Predicate,
    Prompts,
    Statement,
    Subject,
    Tool,
)
from deltakeeper.compress import compress
from deltakeeper.engine import Engine, EngineSettings
from deltakeeper.engine.store import TenantStore
from deltakeeper.live_base import open_base
from deltakeeper.overlay import attach
from deltakeeper.service.admission import DecisionLog, PolicyAdmission, decisions, deltas, read_policy
from deltakeeper.service.app import build_app
from deltakeeper.service.running import Services
from deltakeeper.service.tenant_text import TextGuard
from deltakeeper.study.summary import Number
from deltakeeper.testing import write_pair, write_tokenizer

DATE = datetime(2026, 1, 31, 12, tzinfo=UTC)
PROMPTS = ["w5 w6 w7", "w8 w9", "w10 w11 w12 w13", "w14"]
FOUR = "\n".join(json.dumps({"prompt": text}) for text in PROMPTS)


def make_deltas(folder):
    """A base, artifacts of it, `signs` (2 planes), `second` and `ranks` (low rank), and `stranger` of another base."""
    base, tuned = write_pair("llama", folder, scale=0.05, dtype=torch.float32)
    write_tokenizer(base)
    write_tokenizer(tuned)
    compress(base, tuned, folder / "deltas" / "signs", "bitdelta:bits=2")
    compress(base, tuned, folder / "deltas" / "second", "bitdelta:scale=row")
    compress(base, tuned, folder / "deltas" / "ranks", "svd:rank=8")
    other, changed = write_pair("llama", folder / "other", seed=7, dtype=torch.float32)
    compress(other, changed, folder / "deltas" / "stranger", "bitdelta")
    make_keys(folder / "signer.pem")
    return folder


def write_statement(delta, key, *, attack=(0.05, 0.01, 0.1), skill=(0.9, 0.8, 0.95), date=DATE, evidence="adaptive"):
    """Sign a statement on an artifact, with these rates and their intervals, where admission looks for it."""
    artifact = open_artifact(delta)
    measured = Measured(
        attack="prefix",
        family="alignment",
        variant="v",
        kind="codec",
        label="v",
        seeds=(0,),
        recipe_sha256=None,
        adaptive=None,
        metrics={
            name: Number(value=v, low=a, high=b) for name, (v, a, b) in {"attack": attack, "skill": skill}.items()
        },
        loss_bound=None,
    )
    predicate = Predicate(
        artifact=Artifact(
            manifest_sha256=artifact.manifest_sha256,
            base_root=artifact.manifest.base.root,
            base="base",
            codec=artifact.manifest.codec,
            bytes=artifact.nbytes,
        ),
        measurement=measured,
        prompts={"goal": Prompts(count=4, sha256="0" * 64)},
        evidence=evidence,
        judges=(JudgedBy(name="ours", version="1", sha256="0"),),
        model="tiny",
        command="study",
        cell_sha256="0" * 64,
        tool=Tool(name="deltakeeper", version="0"),
        date=date.strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
    files = files_of(delta)
    subject = tuple(Subject(name=name, digest=Digest(sha256=files[name])) for name in sorted(files))
    target = delta.with_name(delta.name + ".attestation.json")
    target.write_bytes(seal(Statement(subject=subject, predicate=predicate).payload(), read_private_key(key)))
    return target


def write_policy(folder, **policy):
    """A policy file in a folder; the canary's prompts, if it has one, are four of the words of the tiny base."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "probes.jsonl").write_text(FOUR)
    if "canary" in policy:
        policy["canary"] = {"prompts": "probes.jsonl", "new_tokens": 4, "judge": "phrases.json"} | policy["canary"]
    path = folder / "policy.yaml"
    path.write_text(yaml.safe_dump(policy))
    return path


def write_judge(folder, *phrases):
    """A phrase list that counts these texts as refusals."""
    match = {"rule": "substring", "case": "insensitive", "strip": True}
    judge = {
        "name": "tiny",
        "version": "1",
        "match": match,
        "match_means": "refusal",
        "phrases": [text.strip() for text in phrases],
    }
    (folder / "phrases.json").write_text(json.dumps(judge))


class Parts:
    """Engine, store and admission, wired as a service wires them."""

    def __init__(self, world, deltas, policy, log, now=DATE, **store):
        self.base = open_base(world / "base")
        self.overlay = attach(self.base.model)
        self.log = DecisionLog(log)
        self.admission = PolicyAdmission(read_policy(policy), self.base.root, self.log, now=lambda: self.now)
        self.now, self.deltas = now, deltas
        settings = {"byte_budget": 1 << 22, "base_root": self.base.root} | store
        self.store = TenantStore(self.admission.guard(TextGuard(self.overlay, self.base.tokenizer)), deltas, **settings)
        self.store.scan()
        self.engine = Engine(
            self.base.model,
            self.base.tokenizer,
            overlay=self.overlay,
            store=self.admission.tenants(self.store),
            settings=EngineSettings(kv_bytes=1 << 22, threads=1),
        )
        self.admission.probe_with(self.engine, self.base.tokenizer)
        self.engine.start()

    def close(self):
        self.engine.close()
        self.admission.close()
        self.store.close()
        self.overlay.detach()


@contextmanager
def running(*arguments, **options):
    parts = Parts(*arguments, **options)
    try:
        yield parts
    finally:
        parts.close()


@contextmanager
def serving(world, here, keys=None, admission=True, store=None, **policy):
    with running(world, here / "deltas", write_policy(here, **policy), here / "log.jsonl", **(store or {})) as parts:
        services = Services(
            engine=parts.engine,
            store=parts.store,
            base=parts.base,
            base_name="base",
            gate=FakeGate(keys or {}),
            deltas=here / "deltas",
            admission=parts.admission if admission else None,
        )
        app = build_app(services, [deltas.router, decisions.router])
        parts.client = TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)
        yield parts


def error_of(answer, status):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"].endswith(".")
    return error
