"""Work that goes to a GPU where there is one, without one: torch's fake tensors refuse to mix devices as CUDA does."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from deltakeeper.codecs import gptq, svd
from deltakeeper.devices import working_device
from deltakeeper.errors import DeltakeeperError


def test_the_cpu_is_taken_where_there_is_nothing_else(monkeypatch):
    monkeypatch.delenv("DELTAKEEPER_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert working_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert working_device() == torch.device("cuda")


def test_the_device_may_be_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DELTAKEEPER_DEVICE", "cpu")
    assert working_device() == torch.device("cpu")
    for name in ("abacus", "cpu:x"):
        monkeypatch.setenv("DELTAKEEPER_DEVICE", name)
        with pytest.raises(DeltakeeperError, match=f"'{name}', which is no device here"):
            working_device()


@pytest.fixture
def fake_gpu(monkeypatch):
    seen = []

    def device():
        seen.append(True)
        return torch.device("cuda:0")

    for module in (gptq, svd):
        monkeypatch.setattr(module, "working_device", device)
    with FakeTensorMode():
        yield seen


def test_decompositions_run_there_and_come_back(fake_gpu):
    found = [*svd.exact_svd(torch.empty(40, 24)), *svd.randomised_svd(torch.empty(40, 24), 6, name="w")]
    assert len(fake_gpu) == 2
    assert all(tensor.device.type == "cpu" for tensor in found)
    assert [tuple(tensor.shape) for tensor in found] == [(40, 24), (24,), (24, 24), (40, 6), (6,), (6, 24)]


def test_a_tensor_that_stayed_behind_would_be_noticed(fake_gpu):
    with pytest.raises(Exception, match="device"):
        torch.empty(3, 3, device="cuda") @ torch.empty(3, 3)
