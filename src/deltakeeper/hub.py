"""Artifacts on the Hugging Face hub: push a folder, pull one, and use a hub name where a folder is asked for.

Everything goes through huggingface_hub's own client. Only files of an artifact travel, and none of them is executed.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from deltakeeper.artifact import CARD_NAME, MANIFEST_NAME, REPORT_NAME, SIDE_FILES, DeltaArtifact, open_artifact
from deltakeeper.artifact_writer import publish, refuse_existing
from deltakeeper.checkpoint import HUB_NAME
from deltakeeper.errors import ArtifactError, first_line

PATTERNS = (
    MANIFEST_NAME,
    "delta_model*.safetensors",
    "delta_model.safetensors.index.json",
    REPORT_NAME,
    CARD_NAME,
    *SIDE_FILES,
)
"""The files that an artifact consists of; no other file is uploaded or downloaded."""


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Upload an artifact to a model repository, which is created where it does not exist.

    The artifact is verified first, payload hashes included; files that are none of an artifact stay here.

    Args:
        folder: an artifact.
        repo_id: `organisation/name`.
        private: whether a repository that is created is private.
        revision: branch, created where it does not exist; the default branch otherwise.
        token: access token; what `hf auth login` stored by default.
        message: commit message.

    Returns:
        Address of the commit.

    Raises:
        ArtifactError: the artifact is damaged, the name is no hub name, or the hub refused.
    """
    artifact = open_artifact(folder)
    check_payload(artifact)
    if not is_hub_name(repo_id) or "@" in repo_id:
        raise ArtifactError(f"'{repo_id}' is no name of a hub repository; give it as organisation/name.")
    files = artifact_files(artifact.path)
    from huggingface_hub import HfApi

    with _hub_errors(f"the hub did not take {artifact.path} as {repo_id}"):
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=artifact.path,
            revision=revision,
            commit_message=message or f"Upload a delta of {artifact.manifest.target.name_or_path}",
            allow_patterns=files,
        )
    return str(commit.commit_url)


def pull(source: str, out: str | Path, *, token: str | None = None, overwrite: bool = False) -> Path:
    """Download an artifact from the hub into a folder of its own, and verify it before it gets its name.

    Args:
        source: `organisation/name` or `organisation/name@revision`.
        out: folder to write; nothing is left there if anything fails.
        token: access token; what `hf auth login` stored by default.
        overwrite: replace an artifact that is there.

    Raises:
        ArtifactError: there is none by that name, it is damaged, or `out` may not be replaced.
    """
    target = Path(out)
    refuse_existing(target, overwrite, "artifact")
    cached = _download(source, token)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for name in artifact_files(cached):
            shutil.copyfile(cached / name, scratch / name)
        check_payload(open_artifact(scratch))
        publish(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def resolve_artifact(source: str | Path, *, token: str | None = None) -> Path:
    """The folder of an artifact that is named by a local folder or by `organisation/name[@revision]` on the hub.

    A local folder wins over a hub name that is spelled alike. What is no hub name is given back as it is, and
    `open_artifact` then says what is wrong with it.

    Raises:
        ArtifactError: the hub has no artifact by that name.
    """
    path, text = Path(source), str(source)
    if path.exists() or not is_hub_name(text):
        return path
    return _download(text, token)


def is_hub_name(text: str) -> bool:
    """Whether a text can be `organisation/name[@revision]`, and is no relative path."""
    return HUB_NAME.fullmatch(text) is not None and not text.startswith(("./", "../"))


def artifact_files(folder: Path) -> list[str]:
    """Names of the files in a folder that are an artifact's, sorted."""
    return sorted(f.name for f in folder.iterdir() if f.is_file() and any(fnmatch(f.name, p) for p in PATTERNS))


def check_payload(artifact: DeltaArtifact) -> None:
    """Read every packed term, which checks its hash and its layout's rules; raises ArtifactError."""
    for name in artifact.names:
        artifact.terms(name)


def _download(source: str, token: str | None) -> Path:
    if not is_hub_name(source):
        raise ArtifactError(f"'{source}' is no name on the hub; give it as organisation/name or organisation/name@rev.")
    name, _, revision = source.partition("@")
    from huggingface_hub import snapshot_download

    with _hub_errors(f"the hub did not give {source}"):
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(PATTERNS), token=token))
    open_artifact(folder)
    return folder


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the client raises many kinds; each means that nothing was exchanged
        told = f"{what} ({first_line(error)}); check the name, the network and your rights there."
        raise ArtifactError(told) from error
