"""A real service that is killed and started again: keys, quotas and tenants are back as they were confirmed."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import httpx
import pytest

PROMPT = "w5 w6 w7 w8"


@contextmanager
def serving(folder):
    """`deltakeeper serve` in a process of its own, killed in the end as a machine would kill it."""
    command = [sys.executable, "-m", "deltakeeper", "serve", "--base", folder / "base", "--deltas", folder / "deltas"]
    sizes = ["--port", "0", "--kv-gib", "0.01", "--deltas-gib", "0.1", "--threads", "1"]
    process = subprocess.Popen([*map(str, command), *sizes], stderr=subprocess.PIPE, text=True)
    try:
        said = ""
        for line in process.stderr:
            said += line
            if found := re.search(r"(http://127\.0\.0\.1:\d+)", line):
                break
        else:
            pytest.fail(said)
        with httpx.Client(base_url=found[1], timeout=60, trust_env=False) as client:
            yield client
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()


def bearer(secret):
    return {"Authorization": f"Bearer {secret}"}


def test_a_killed_service_comes_back_with_all_that_it_had_confirmed(service_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(service_folder, folder)
    asked = {"model": "signs", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    with serving(folder) as client:
        assert client.get("/admin/keys").status_code == 200  # open until the first key
        admin = client.post("/admin/keys", json={"name": "me", "role": "admin"}).json()["secret"]
        team = client.post("/admin/keys", json={"name": "team", "models": ["signs"]}, headers=bearer(admin)).json()
        gone = client.post("/admin/keys", json={"name": "gone", "models": ["signs"]}, headers=bearer(admin)).json()
        limits = {"requests_per_minute": 2}
        client.put(f"/admin/quotas/key/{team['id']}", json=limits, headers=bearer(admin))
        client.delete(f"/admin/keys/{gone['id']}", headers=bearer(admin))
        before = client.post("/v1/completions", json=asked, headers=bearer(team["secret"])).json()["choices"]
    with serving(folder) as client:
        assert client.get("/admin/keys").status_code == 401
        assert client.post("/v1/completions", json=asked, headers=bearer(gone["secret"])).status_code == 401
        answers = [client.post("/v1/completions", json=asked, headers=bearer(team["secret"])) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert answers[0].json()["choices"] == before
        keys = client.get("/admin/keys", headers=bearer(admin)).json()["data"]
        assert sorted((key["name"], key["state"]) for key in keys) == [
            ("gone", "revoked"),
            ("me", "active"),
            ("team", "active"),
        ]
        assert client.get("/admin/quotas", headers=bearer(admin)).json()["data"][0]["subject"] == team["id"]
