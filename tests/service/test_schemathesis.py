"""The OpenAPI document as a contract: schemathesis asks a live service all that it allows, and what it does not.

Opt-in, `make test-contract`: it takes minutes and brings a plugin of pytest along, so it lives in an environment of its
own, whose command the variable SCHEMATHESIS names.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from service_cases import served

from deltakeeper.engine import EngineSettings
from deltakeeper.live_base import open_base
from deltakeeper.service.assembly import Plan, assembled
from deltakeeper.service.tenancy.database import open_state
from deltakeeper.service.tenancy.keys import KeyRing

pytestmark = pytest.mark.skipif("SCHEMATHESIS" not in os.environ, reason="run `make test-contract`")

COPIES = [f"copy{number}" for number in range(8)]
"""Further artifacts, since what was deleted is gone for the rest of the run."""
CONFIG = f"""
[dictionaries]
models = {{values = {["base", "signs", "ranks", *COPIES]}}}
names = {{values = {["signs", "ranks", "new", *COPIES]}}}
scopes = {{values = ["key", "model"]}}
texts = {{values = ["w1 w2 w3", "w5"]}}
[parameters]
"body.model" = {{dictionary = "models", probability = 0.8}}
"body.prompt" = {{dictionary = "texts", probability = 0.5}}
"body.path" = {{dictionary = "names", probability = 0.5}}
"body.lora_name" = {{dictionary = "names", probability = 0.5}}
"body.lora_path" = {{dictionary = "names", probability = 0.5}}
"path.model" = {{dictionary = "models", probability = 0.5}}
"path.name" = {{dictionary = "names", probability = 0.5}}
"""
EXCLUDED = "positive_data_acceptance"
"""No document says which tokens a tokenizer knows, which names are taken, or how long a context is."""
EXAMPLES, SECONDS = 40, 1200


class Answers(logging.Handler):
    """Counts the answers that the service logs: by status, and those that were no error by path."""

    def __init__(self):
        super().__init__()
        self.statuses, self.good = Counter(), Counter()

    def emit(self, record):
        if found := re.search(r"(/\S*) -> (\d{3}) in ", record.getMessage()):
            path, status = found.groups()
            self.statuses[status] += 1
            self.good[path] += status == "200"


@pytest.fixture
def answers():
    log, handler = logging.getLogger("deltakeeper.service"), Answers()
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    log.propagate = False  # or pytest keeps thousands of lines to show
    yield handler
    log.removeHandler(handler)
    log.setLevel(level)
    log.propagate = True


@pytest.mark.parametrize("keys", [False, True], ids=["open", "keys"])
def test_nothing_that_the_document_allows_or_forbids_breaks_the_service(keys, service_folder, tmp_path, answers):
    shutil.copytree(service_folder / "deltas", tmp_path / "deltas")
    for name in COPIES:
        shutil.copytree(tmp_path / "deltas" / "ranks", tmp_path / "deltas" / name)
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    state = open_state(tmp_path / "state.db")
    secret = KeyRing(state).create("fuzzer", "admin", None).secret if keys else None
    state.close()
    plan = Plan(
        deltas=tmp_path / "deltas",
        state=tmp_path / "state.db",
        decisions=tmp_path / "decisions.jsonl",
        base_name="base",
        delta_bytes=1 << 26,
        engine=EngineSettings(kv_bytes=1 << 22),
    )
    with (
        assembled(open_base(service_folder / "base"), plan) as service,
        served(service.services, app=service.app) as live,
        live.client(secret) as client,
    ):
        document = client.get("/openapi.json").json()
        if not keys:  # until the first key is made, which would shut out whoever has none
            for path in [path for path in document["paths"] if path.startswith("/admin/keys")]:
                del document["paths"][path]
            for methods in document["paths"].values():
                for operation in methods.values():
                    operation.pop("security", None)
        text = json.dumps(document).replace('["support"]', '["base"]').replace("Where is my order?", "w1 w2 w3")
        (tmp_path / "openapi.json").write_text(text)
        found = subprocess.run(words(live.url, secret, tmp_path), capture_output=True, text=True, timeout=SECONDS)
        assert client.get("/health").status_code == 200
        assert client.get("/admin/status").status_code == 200  # the fuzzer was let in to the end
    report = json.loads((tmp_path / "report.json").read_text())
    wanted = ("/v1/completions", "/v1/chat/completions", "/admin/deltas/")
    good = [sum(count for path, count in answers.good.items() if path.startswith(start)) for start in wanted]
    sys.stdout.write(f"{report['test_cases']['generated']} cases, {dict(answers.statuses)}, good {good}\n")
    assert found.returncode == 0, found.stdout[-20_000:]
    assert report["complete"] and min(good) >= 3 and not answers.statuses["500"]


def words(url, secret, folder):
    """The command line of schemathesis."""
    command = [
        os.environ["SCHEMATHESIS"],
        "--config-file",
        folder / "schemathesis.toml",
        "run",
        folder / "openapi.json",
    ]
    command += ["--url", url, "-n", EXAMPLES, "--seed", 1, "-c", "all", "--exclude-checks", EXCLUDED]
    command += ["--continue-on-failure", "--report", "json", "--report-json-path", folder / "report.json"]
    command += [] if secret is None else ["-H", f"Authorization: Bearer {secret}"]
    return [str(word) for word in command]
