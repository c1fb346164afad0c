"""Which kernels are active, and what is said where they are not."""

import pytest

from deltakeeper.errors import KernelError
from deltakeeper.kernels import library

choose = library.backend.__wrapped__


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setattr(library, "library_path", lambda: None)
    monkeypatch.delenv(library.VARIABLE, raising=False)


def test_without_the_library_plain_torch_works_with_a_warning(absent):
    with pytest.warns(UserWarning, match=r"not built.*plain torch does the work"):
        found = choose()
    assert found.name == "torch" and found.isa is None and "not built" in found.reason


def test_a_library_that_does_not_load_is_a_warning_too(monkeypatch, tmp_path):
    broken = tmp_path / "_kernels.abi3.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(library, "library_path", lambda: broken)
    monkeypatch.delenv(library.VARIABLE, raising=False)
    with pytest.warns(UserWarning, match="does not load"):
        assert choose().name == "torch"


def test_a_forced_instruction_set_is_not_given_up_quietly(absent, monkeypatch):
    monkeypatch.setenv(library.VARIABLE, "avx2")
    with pytest.raises(KernelError, match="build the package"):
        choose()


def test_an_unknown_choice_is_refused_with_the_known_ones(monkeypatch):
    monkeypatch.setenv(library.VARIABLE, "neon")
    with pytest.raises(KernelError, match="avx512bf16, avx512, avx2, scalar, torch"):
        choose()


def test_plain_torch_can_be_asked_for(monkeypatch):
    monkeypatch.setenv(library.VARIABLE, "torch")
    assert choose() == library.Backend("torch", None, "DELTAKEEPER_KERNELS=torch asks for plain torch")
