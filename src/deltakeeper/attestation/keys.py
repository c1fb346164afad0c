"""Keys: ECDSA on P-256 in PEM, the private one readable by its owner alone.

The same files serve OpenSSF model-signing (`model_signing sign key --private-key …`).
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from deltakeeper.errors import AttestationError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

PASSPHRASE = "DELTAKEEPER_KEY_PASSPHRASE"
"""Environment variable of the passphrase of a private key; never an argument, which other users could read."""
MAX_KEY_BYTES = 16 << 10


def make_keys(private: Path | str, passphrase: str | None = None) -> tuple[Path, Path]:
    """Make a pair of keys: `private` (mode 0600) and, beside it, its name with `.pub`; returns both paths.

    Args:
        private: file to write; neither it nor the public one may be there.
        passphrase: encrypts the private key; what the environment says by default, none if it says nothing.

    Raises:
        AttestationError: a file is there already.
    """
    _need_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    secret = Path(private)
    public = secret.with_name(secret.name + ".pub")
    for path in (secret, public):
        if path.exists():
            raise AttestationError(f"{path} is there already; keys are never overwritten, give another name.")
    key = ec.generate_private_key(ec.SECP256R1())
    word = passphrase_of(passphrase)
    guard: serialization.KeySerializationEncryption = (
        serialization.BestAvailableEncryption(word) if word else serialization.NoEncryption()
    )
    secret.parent.mkdir(parents=True, exist_ok=True)
    pem = serialization.Encoding.PEM
    _write_new(secret, key.private_bytes(pem, serialization.PrivateFormat.PKCS8, guard), 0o600)
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    _write_new(public, key.public_key().public_bytes(pem, spki), 0o644)
    return secret, public


def read_private_key(path: Path | str, passphrase: str | None = None) -> EllipticCurvePrivateKey:
    """Read a private key.

    Raises:
        AttestationError: it is none on P-256, others may read it, or the passphrase does not open it.
    """
    _need_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    file = Path(path)
    raw = _read(file)
    if os.name == "posix" and stat.S_IMODE(file.stat().st_mode) & 0o077:
        raise AttestationError(f"{file} can be read by others; run `chmod 600 {file}` and consider making a new key.")
    word = passphrase_of(passphrase)
    try:
        key = serialization.load_pem_private_key(raw, word if b"ENCRYPTED" in raw else None)
    except TypeError as error:
        raise AttestationError(f"{file} is locked; set {PASSPHRASE} to its passphrase.") from error
    except Exception as error:  # the library raises ValueError, and others for keys of unknown kinds
        locked = "ENCRYPTED" in raw.decode("ascii", "replace")
        why = f"the passphrase in {PASSPHRASE} does not open it" if locked else "it is no private key in PEM"
        raise AttestationError(f"{file} cannot be used: {why}; give the file that `attest keygen` wrote.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise AttestationError(f"{file} is no key on the curve P-256; make one with `attest keygen`.")
    return key


def read_public_key(path: Path | str) -> EllipticCurvePublicKey:
    """Read a public key; raises AttestationError if it is none on P-256."""
    _need_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    file = Path(path)
    raw = _read(file)
    if b"PRIVATE KEY" in raw:
        raise AttestationError(
            f"{file} is a private key; give the public one, which ends in .pub, and keep this secret."
        )
    try:
        key = serialization.load_pem_public_key(raw)
    except Exception as error:  # as above
        raise AttestationError(f"{file} is no public key in PEM; give the .pub file of the signer.") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise AttestationError(f"{file} is no key on the curve P-256; ask the signer for one made by `attest keygen`.")
    return key


def key_id(key: EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key (DER, SubjectPublicKeyInfo): a hint which key signed, and never a proof."""
    from cryptography.hazmat.primitives import serialization

    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.DER, spki)).hexdigest()


def _need_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise AttestationError("attestations need more packages; run `pip install 'deltakeeper[attest]'`.") from error


def passphrase_of(given: str | None) -> bytes | None:
    """The passphrase given, or what the environment says; None if there is none."""
    word = os.environ.get(PASSPHRASE) if given is None else given
    return word.encode() if word else None


def _read(file: Path) -> bytes:
    if not file.is_file():
        raise AttestationError(f"{file} is no key file; make a pair with `deltakeeper attest keygen`.")
    if file.stat().st_size > MAX_KEY_BYTES:
        raise AttestationError(f"{file} is larger than {MAX_KEY_BYTES} bytes, which no key is; give a key file.")
    return file.read_bytes()


def _write_new(path: Path, raw: bytes, mode: int) -> None:
    """Write a file that is not there yet, whole or not at all, and never readable by more than `mode` says."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")  # 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
        Path(temporary).chmod(mode)
        os.link(temporary, path)  # fails where the name is taken, unlike a rename
    except FileExistsError as error:
        raise AttestationError(f"{path} is there already; keys are never overwritten, give another name.") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
