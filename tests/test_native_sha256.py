"""Two hashes at a time are the two hashes that hashlib gives."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltakeeper.native import TwoHashes, load_library, native_status, sha256

pieces = st.lists(st.integers(0, 400), max_size=6)


def stream(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in sizes]


def plain(start, tensors):
    return hashlib.sha256(start + b"".join(bytes(t.numpy()) for t in tensors)).hexdigest()


def together(first, second, starts):
    hashes = TwoHashes(*starts)
    for a, b in zip(first, second, strict=True):
        hashes.update(a, b)
    return hashes.hexdigests()


@pytest.fixture(params=["compiled", "hashlib"], scope="module")
def version(request):
    if request.param == "compiled" and (load_library() is None or not load_library().deltakeeper_has_sha()):
        pytest.skip(native_status())
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "hashlib":
            patch.setattr(sha256, "load_library", lambda: None)
        yield


@given(pieces, pieces, st.binary(max_size=130), st.binary(max_size=130))
def test_any_pieces(version, first, second, start, other):
    count = min(len(first), len(second))
    one, two = stream(first[:count], 0), stream(second[:count], 1)
    assert together(one, two, (start, other)) == (plain(start, one), plain(other, two))


@pytest.mark.parametrize("size", [0, 1, 54, 55, 56, 57, 63, 64, 65, 119, 120, 127, 128, 129, 1 << 16])
def test_every_way_to_end(version, size):
    one, two = stream([size], 0), stream([1000 - size if size < 1000 else 3], 1)
    assert together(one, two, (b"", b"")) == (plain(b"", one), plain(b"", two))


def test_the_vectors_of_the_standard(version):
    empty = torch.empty(0, dtype=torch.uint8)
    found = together([empty], [empty], (b"abc", b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"))
    assert found == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
    )


def test_tensors_of_other_dtypes(version):
    one, two = torch.arange(77, dtype=torch.float32), torch.arange(60).view(6, 10).bfloat16()
    found = together([one], [two], (b"", b""))
    raw = [bytes(t.flatten().view(torch.uint8).numpy()) for t in (one, two)]
    assert found == tuple(hashlib.sha256(part).hexdigest() for part in raw)
