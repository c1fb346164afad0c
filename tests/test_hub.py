"""The hub through its own client, faked at the client: what travels, what is verified, and what the errors say."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from deltakeeper import hub
from deltakeeper.artifact import open_artifact
from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.compress import compress
from deltakeeper.errors import ArtifactError
from deltakeeper.testing import write_pair

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    base, tuned = write_pair("llama", folder)
    (tuned / "tokenizer_config.json").write_text('{"a": 1}')
    compress(base, tuned, folder / "delta", "bitdelta")
    return base, folder / "delta"


@pytest.fixture
def delta(made, tmp_path):
    shutil.copytree(made[1], tmp_path / "delta")
    return tmp_path / "delta"


class FakeHub:
    """The part of the hub that the client would speak to: repositories as folders."""

    def __init__(self, folder):
        self.folder, self.calls = folder, []

    def api(self, token=None):
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id, *, private, exist_ok, repo_type):
        assert exist_ok and repo_type == "model"
        self.calls.append(("create", repo_id, private))

    def create_branch(self, repo_id, *, branch, exist_ok):
        self.calls.append(("branch", repo_id, branch))

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message, allow_patterns):
        self.calls.append(("upload", repo_id, revision, commit_message))
        into = self.snapshot(repo_id)
        into.mkdir(parents=True)
        for name in allow_patterns:
            shutil.copyfile(folder_path / name, into / name)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(self, name, revision=None, allow_patterns=None, token=None):
        self.calls.append(("download", name, revision, tuple(allow_patterns), token))
        if not self.snapshot(name).is_dir():
            raise RuntimeError("404: no such repository.\nmore")
        return str(self.snapshot(name))

    def snapshot(self, name):
        return self.folder / name / "snapshots" / COMMIT


@pytest.fixture
def fake(tmp_path, monkeypatch):
    hub_ = FakeHub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", hub_.api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub_.snapshot_download)
    return hub_


def test_what_is_pushed_comes_back_the_same_and_nothing_else_travels(delta, fake, tmp_path):
    (delta / "secret.txt").write_text("x")
    (delta / ".cache").mkdir()
    address = hub.push(delta, "org/delta", private=True, revision="v2", token="t", message="first")
    assert address == "https://hub/org/delta/commit/1"
    assert ("token", "t") in fake.calls and ("create", "org/delta", True) in fake.calls
    assert ("branch", "org/delta", "v2") in fake.calls and ("upload", "org/delta", "v2", "first") in fake.calls
    sent = fake.snapshot("org/delta")
    (sent / "evil.py").write_text("raise SystemExit")
    out = hub.pull("org/delta@v2", tmp_path / "pulled", token="t")
    kept = sorted(f.name for f in delta.iterdir() if f.is_file() and f.name != "secret.txt")
    assert sorted(f.name for f in out.iterdir()) == kept and "tokenizer_config.json" in kept
    assert all((out / n).read_bytes() == (delta / n).read_bytes() for n in kept)
    name, revision, patterns, token = fake.calls[-1][1:]
    assert (name, revision, token) == ("org/delta", "v2", "t")
    assert "delta_config.json" in patterns and not any(p in ("*", "*.py") for p in patterns)
    assert open_artifact(out).manifest.codec == "bitdelta"


def test_a_damaged_artifact_is_neither_pushed_nor_pulled(delta, fake, tmp_path):
    hub.push(delta, "org/delta")
    for folder in (delta, fake.snapshot("org/delta")):
        payload = folder / "delta_model.safetensors"
        raw = bytearray(payload.read_bytes())
        raw[-1] ^= 1
        payload.write_bytes(raw)
    before = len(fake.calls)
    with pytest.raises(ArtifactError, match="was altered"):
        hub.push(delta, "org/other")
    assert len(fake.calls) == before
    with pytest.raises(ArtifactError, match="was altered"):
        hub.pull("org/delta", tmp_path / "pulled")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["delta", "hub"]


def test_what_is_there_is_not_replaced_unasked(delta, fake, tmp_path):
    hub.push(delta, "org/delta")
    with pytest.raises(ArtifactError, match="--overwrite"):
        hub.pull("org/delta", delta)
    (delta / "delta_report.json").unlink()
    hub.pull("org/delta", delta, overwrite=True)
    assert (delta / "delta_report.json").is_file()


@pytest.mark.parametrize("name", ["delta", "org/name@main", "../delta", "a/b/c", ""])
def test_only_repository_names_are_pushed_to(delta, fake, name):
    with pytest.raises(ArtifactError, match="no name of a hub repository"):
        hub.push(delta, name)
    assert fake.calls == []


def test_the_hub_says_no_in_one_sentence(delta, fake, tmp_path, monkeypatch):
    with pytest.raises(ArtifactError, match=r"did not give org/none \(404: no such repository\); check") as error:
        hub.pull("org/none", tmp_path / "pulled")
    assert "\n" not in str(error.value)

    def refuse(*_args, **_kwargs):
        raise PermissionError

    monkeypatch.setattr(fake, "create_repo", refuse)
    with pytest.raises(ArtifactError, match=r"did not take .* \(PermissionError\)"):
        hub.push(delta, "org/delta")


def test_a_model_on_the_hub_is_no_artifact(fake, made, tmp_path):
    shutil.copytree(made[0], fake.snapshot("org/model"))
    with pytest.raises(ArtifactError, match="holds no delta_config"):
        hub.pull("org/model", tmp_path / "pulled")


def test_sources_are_folders_first_and_hub_names_otherwise(delta, fake, tmp_path, monkeypatch):
    hub.push(delta, "org/delta")
    assert hub.resolve_artifact(delta) == delta
    assert hub.resolve_artifact("org/delta@v1") == fake.snapshot("org/delta")
    calls = len(fake.calls)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(delta, tmp_path / "org" / "delta")
    assert hub.resolve_artifact("org/delta").resolve() == tmp_path / "org" / "delta"
    for name in ("./org/none", "../org", "none", "/a/b"):
        assert str(hub.resolve_artifact(name)) in name
    assert len(fake.calls) == calls


def test_the_commit_of_a_base_from_the_hub_is_recorded(made, fake, tmp_path):
    shutil.copytree(made[0], fake.snapshot("org/base"))
    with open_checkpoint("org/base@main") as base:
        assert (base.name_or_path, base.revision) == ("org/base@main", COMMIT)
    with open_checkpoint("org/base") as base:
        assert base.revision == COMMIT
    compress("org/base", made[0].parent / "tuned", tmp_path / "delta", "bitdelta")
    assert open_artifact(tmp_path / "delta").manifest.base.revision == COMMIT
