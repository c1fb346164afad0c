"""A base model in memory, and the artifacts that may be served from it: each is checked against the base's hashes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from deltakeeper.artifact import DeltaArtifact
from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.engine.tenant_files import check_name, open_checked
from deltakeeper.errors import CheckpointError, DataError, TenantError, first_line
from deltakeeper.fingerprint import read_root
from deltakeeper.hub import resolve_artifact
from deltakeeper.quiet_loading import quiet_loading


@dataclass(frozen=True)
class LiveBase:
    """A base model in memory.

    Attributes:
        model: a Hugging Face decoder in evaluation mode on the CPU, in the dtype that it is stored in.
        tokenizer: its tokenizer, None if it was not asked for.
        path: its folder.
    """

    model: Any
    tokenizer: Any
    path: Path

    @cached_property
    def root(self) -> str:
        """Fingerprint of its checkpoint; reads all of it once."""
        return read_root(self.path)

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def artifacts(self, sources: Mapping[str, str]) -> dict[str, DeltaArtifact]:
        """Open what tenants are made of, by name; each a folder or a hub name.

        Raises:
            BaseMismatchError: one was made from another base.
            ArtifactError: one is no artifact.
        """
        return {name: open_checked(resolve_artifact(source), self.root) for name, source in sources.items()}


def open_base(source: str | Path, *, tokenizer: bool = True) -> LiveBase:
    """Load a base: a local folder or a hub name.

    Args:
        source: folder, or `organisation/name[@revision]`.
        tokenizer: whether its tokenizer is wanted.

    Raises:
        CheckpointError: there is no such model, or transformers cannot load it.
        DataError: transformers is not installed, or a tokenizer is wanted and there is none.
    """
    with open_checkpoint(source) as checkpoint:
        path = checkpoint.path
    try:
        import transformers
    except ImportError as error:
        raise DataError("models are run with transformers; install deltakeeper[demo].") from error
    safe = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet_loading():
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(str(path), dtype="auto", **safe)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} cannot be run ({first_line(error)}); give a model that transformers loads."
        ) from error
    words = read_tokenizer(path) if tokenizer else None
    return LiveBase(model.eval(), words, path)


def read_tokenizer(path: Path) -> Any:
    """The tokenizer in a model's folder.

    Raises:
        DataError: transformers is not installed, or there is no tokenizer that can be read.
    """
    try:
        import transformers
    except ImportError as error:
        raise DataError("tokenizers are read with transformers; install deltakeeper[demo].") from error
    try:
        return transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # from files of many formats, read by a library that raises all kinds of errors
        raise DataError(f"{path} has no tokenizer that can be read ({first_line(error)}); add its files.") from error


def named_sources(given: Iterable[str]) -> dict[str, str]:
    """What `NAME=PATH` arguments say, in their order.

    Raises:
        TenantError: one is spelled otherwise, or a name is malformed or given twice.
    """
    found: dict[str, str] = {}
    for text in given:
        name, equals, source = text.partition("=")
        if not equals or not source:
            raise TenantError(f"'{text}' does not say which delta has which name; spell it NAME=PATH.")
        if check_name(name) in found:
            raise TenantError(f"two deltas are called '{name}'; give each a name of its own.")
        found[name] = source
    return found
