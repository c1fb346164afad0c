"""docs/policy.md: the policy in it is one, and its code runs on a log that a policy has written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deltakeeper.attestation.keys import make_keys
from deltakeeper.errors import DataError
from deltakeeper.service.admission.decisions import DecisionLog
from deltakeeper.service.admission.policy import read_policy
from deltakeeper.service.admission_port import Decision

PAGE = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()


def test_the_policy_of_the_page_is_one(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(DataError, match=r"signer\.pem\.pub"):
        read_policy(tmp_path / "policy.yaml")
    make_keys(tmp_path / "signer.pem")
    policy = read_policy(tmp_path / "policy.yaml").policy
    assert policy.attestation.at_most == {"attack": 0.1} and policy.unattested.planes == 1
    assert policy.canary.failing == "quarantine"


def test_the_code_of_the_page_reads_a_log_and_finds_a_broken_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "deltas" / ".deltakeeper" / "decisions.jsonl"
    log = DecisionLog(file)
    for name in ("one", "two"):
        log.write(Decision(name, "admitted"), "0" * 64)
    log.close()
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "policy.md", "exec"), {})
    assert capsys.readouterr().out.startswith("2 decisions, the last of 20")
    file.write_text(file.read_text().replace('"one"', '"won"'))
    with pytest.raises(DataError):
        exec(compile(code, "policy.md", "exec"), {})
