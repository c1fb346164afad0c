"""The envelope: a statement and one signature over it, as DSSE says.

https://github.com/secure-systems-lab/dsse/blob/v1.0.0/protocol.md: what is signed is
`DSSEv1 <length of the type> <type> <length of the payload> <payload>`, here with ECDSA on P-256 and SHA-256, the
signature DER-encoded. Any DSSE library reads it; tests hold it to securesystemslib and sigstore.

model-signing signs the same envelope over the same curve, but of a predicate that it fixes itself (the hashes of a
folder) and that cannot carry measurements; sigstore keeps its signing with local keys private. So these few lines use
`cryptography`, which both of them use as well.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import TYPE_CHECKING

from deltakeeper.attestation.keys import key_id
from deltakeeper.attestation.strict_json import canonical, parse_canonical
from deltakeeper.errors import AttestationError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAX_BYTES = 8 << 20


def pre_authentication(payload: bytes) -> bytes:
    """The bytes that a signature covers."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def seal(payload: bytes, key: EllipticCurvePrivateKey) -> bytes:
    """An envelope around a payload, as the bytes of its file."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    signature = key.sign(pre_authentication(payload), ec.ECDSA(hashes.SHA256()))
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"keyid": key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}],
    }
    return canonical(envelope) + b"\n"


def read_envelope(path: Path) -> bytes:
    """The bytes of an envelope's file; raises AttestationError if there is none or it is too large to be one."""
    if not path.is_file():
        raise AttestationError(f"{path} is no statement; give the file that `attest sign` wrote.")
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise AttestationError(f"{path} is larger than {MAX_BYTES} bytes, which no statement is; get it again.")
    return raw


def unseal(raw: bytes, key: EllipticCurvePublicKey, where: str) -> bytes:
    """The payload of an envelope, once its signature is known to be of this key.

    Raises:
        AttestationError: it is no such envelope, was signed with another key, or was altered.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    value = parse_canonical(raw.removesuffix(b"\n"), where)
    if not isinstance(value, dict) or set(value) != {"payload", "payloadType", "signatures"}:
        raise AttestationError(f"{where} is no DSSE envelope; give the file that `attest sign` wrote.")
    if value["payloadType"] != PAYLOAD_TYPE:
        raise AttestationError(f"{where} holds {str(value['payloadType'])[:80]!r} and no in-toto statement.")
    signatures = value["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise AttestationError(f"{where} does not have exactly one signature; have it signed again.")
    [signature] = signatures
    if not isinstance(signature, dict) or set(signature) != {"keyid", "sig"}:
        raise AttestationError(f"{where} has a signature that is malformed; have it signed again.")
    if signature["keyid"] != key_id(key):
        raise AttestationError(f"{where} was signed with another key than the one given; ask the signer for theirs.")
    payload, proof = (_decoded(text, where) for text in (value["payload"], signature["sig"]))
    try:
        key.verify(proof, pre_authentication(payload), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        raise AttestationError(
            f"{where} was altered, or another key signed it: its signature does not hold."
        ) from error
    return payload


def _decoded(text: object, where: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError) as error:
        raise AttestationError(f"{where} is not whole: a part of it is no base64; get it again.") from error
    if not raw or base64.b64encode(raw).decode() != text:  # base64 has several spellings of the same bytes
        raise AttestationError(f"{where} is not whole: a part of it is not base64 as it was written; get it again.")
    return raw
