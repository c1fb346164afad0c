"""A second signature, as OpenSSF model-signing makes and checks it: over the files alone, with the same keys.

It says nothing of what was measured. It is for those whose pipelines already ask for one:
`model_signing verify key FOLDER --signature FILE --public-key KEY.pub`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltakeeper.attestation.keys import PASSPHRASE, passphrase_of, read_private_key, read_public_key
from deltakeeper.errors import AttestationError


def sign_folder(artifact: Path | str, key: Path | str, out: Path | str, passphrase: str | None = None) -> Path:
    """Sign all files of an artifact's folder; returns the path of the signature.

    Raises:
        AttestationError: model-signing is absent, or key or folder cannot be used.
    """
    read_private_key(key, passphrase)
    folder, target = Path(artifact), Path(out)
    if target.resolve().is_relative_to(folder.resolve()):
        raise AttestationError(f"{target} lies in the artifact's folder, which would change it; write it elsewhere.")
    signing = _model_signing("signing")
    config = signing.Config().use_elliptic_key_signer(private_key=key, password=passphrase_of(passphrase))
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.tmp")
    try:
        config.set_hashing_config(_every_file()).sign(folder, scratch)
        scratch.replace(target)
    except ValueError as error:
        raise AttestationError(
            f"model-signing did not sign {folder} ({error}); check the folder and {PASSPHRASE}."
        ) from error
    finally:
        scratch.unlink(missing_ok=True)
    return target


def verify_folder(artifact: Path | str, signature: Path | str, public_key: Path | str) -> None:
    """Check such a signature; raises AttestationError if it does not hold or model-signing is absent."""
    read_public_key(public_key)
    verifying = _model_signing("verifying")
    config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    try:
        # of its own accord it would overlook files of git, added or altered
        config.set_hashing_config(_every_file()).verify(Path(artifact), Path(signature))
    except Exception as error:  # it raises ValueError, KeyError and what its parsers raise
        raise AttestationError(f"{signature} does not hold for {artifact} ({error}); get both again.") from error


def _every_file() -> Any:
    return _model_signing("hashing").Config().set_ignored_paths(paths=[], ignore_git_paths=False)


def _model_signing(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"model_signing.{module}")
    except ImportError as error:  # model-signing 1.1.1 needs pyOpenSSL and does not say so
        raise AttestationError(
            f"model-signing cannot be used ({error}); run `pip install 'deltakeeper[attest]' pyopenssl`."
        ) from error
