"""What clients without an admin key are told of deltas that cannot be served: never where they lie on the server."""

from __future__ import annotations

import shutil

import pytest
from admission_parts import serving, write_statement

from deltakeeper.service.access import Principal

KEYS = {"admin": Principal("a", "admin"), "tenant": Principal("t", "tenant")}
TENANT, ADMIN = ({"Authorization": f"Bearer {key}"} for key in ("tenant", "admin"))
ATTESTED = {"public_keys": ["signer.pem.pub"], "at_most": {"attack": 0.1}}


def spoil(deltas):
    """Deltas that fail in many ways; gives their names."""
    for name in ("unreadable", "cut", "gone", "odd-words", "odd-draws", "misstated"):
        shutil.copytree(deltas / "signs", deltas / name)
    (deltas / "unreadable" / "delta_config.json").write_text("{")
    payload = deltas / "cut" / "delta_model.safetensors"
    payload.write_bytes(payload.read_bytes()[:-8])
    (deltas / "odd-words" / "tokenizer.json").write_text("{}")
    (deltas / "odd-draws" / "generation_config.json").write_text('{"temperature": "warm"}')
    (deltas / "misstated.attestation.json").write_text("{")
    return ["unreadable", "cut", "gone", "odd-words", "odd-draws", "misstated", "stranger", "ranks"]


@pytest.mark.parametrize("policy", [None, {}, {"attestation": ATTESTED}], ids=["open", "policy", "attested"])
def test_no_answer_to_a_client_holds_a_path_and_an_administrator_finds_the_reason(world, here, policy):
    write_statement(here / "deltas" / "signs", here / "signer.pem").rename(here / "deltas" / "ranks.attestation.json")
    names = spoil(here / "deltas")
    with serving(world, here, KEYS, admission=policy is not None, **(policy or {})) as parts:
        shutil.rmtree(here / "deltas" / "gone")
        said, client = [], parts.client
        for name in names:
            chat = {"model": name, "messages": [{"role": "user", "content": "w5"}]}
            for stream in (False, True):
                asked = {"model": name, "prompt": "w5", "max_tokens": 2, "stream": stream}
                said.append(client.post("/v1/completions", json=asked, headers=TENANT))
            said.append(client.post("/v1/chat/completions", json=chat, headers=TENANT))
            said.append(client.post("/tokenize", json={"model": name, "prompt": "w5"}, headers=TENANT))
            said.append(client.get(f"/v1/models/{name}", headers=TENANT))
            said.append(client.get(f"/admin/deltas/{name}", headers=TENANT))
        said.append(client.get("/v1/models", headers=TENANT))
        assert sum(answer.status_code >= 400 for answer in said) >= 4 * (len(names) - 3)
        for answer in said:
            assert str(here) not in answer.text and "delta_config" not in answer.text, answer.text
        found = [client.get(path, headers=ADMIN).text for path in ("/admin/deltas", "/admin/decisions")]
        assert any(str(here / "deltas" / "unreadable") in text for text in found)
