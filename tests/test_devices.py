"""Work that goes to a GPU where there is one, without one: torch's fake tensors refuse to mix devices as CUDA does."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from deltakeeper.attach import Change, attached
from deltakeeper.codecs import gptq, svd
from deltakeeper.devices import working_device
from deltakeeper.errors import DeltakeeperError
from deltakeeper.heal import terms as terms_module
from deltakeeper.heal.terms import TrainedTerms
from deltakeeper.lab.sft import Tokens, answer_loss
from deltakeeper.layouts import Dense, Lowrank, Signs, Sparse
from deltakeeper.layouts.bits import pack_bits
from deltakeeper.study import arms


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


class Policy(torch.nn.Module):
    """Embedding and head, called as a decoder of transformers is."""

    def __init__(self, device):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4, device=device)
        self.head = torch.nn.Linear(4, 7, bias=False, device=device)

    def forward(self, input_ids, attention_mask, position_ids, logits_to_keep, use_cache):
        assert attention_mask.device == position_ids.device == input_ids.device
        logits = self.head(self.embed(input_ids[:, -logits_to_keep:]))
        return type("Output", (), {"logits": logits})


def test_rows_follow_the_model_that_learns_them():
    loss = answer_loss(Policy("meta"), [Tokens((1, 2, 3), 2), Tokens((4, 5), 1)], pad=0)  # mixes with the CPU as little
    assert loss.device.type == "meta"


def test_changes_follow_the_model_that_they_are_attached_to():
    model = Policy("meta")
    changes = [Change("head.weight", "delta", torch.zeros(7, 4)), Change("embed.weight", "delta", torch.zeros(7, 4))]
    with attached(model, changes):
        assert model.head(model.embed(torch.zeros(1, 2, dtype=torch.long, device="meta"))).device.type == "meta"
    with attached(model, [Change("head.weight", "value", torch.zeros(7, 4))]):
        assert model.head.weight.device.type == "meta"


@pytest.mark.parametrize("unpacked", [True, False])
def test_values_are_trained_beside_the_model_unless_they_meet_packed_codes(monkeypatch, unpacked):
    monkeypatch.setattr(terms_module, "working_device", lambda: torch.device("meta"))
    shape, mask = (6, 8), pack_bits(torch.ones(6, 8, dtype=torch.bool))
    signs = Signs(shape, "row", "plus", (mask,), (torch.ones(6, 1),))
    kinds = {
        "signs": signs,
        "sparse": Sparse.from_matrix(torch.ones(shape), mask, "float16"),
        "dense": Dense(shape, "delta", torch.ones(shape)),
        "lowrank": Lowrank.from_factors(torch.ones(6, 2), torch.ones(2, 8), "float16"),
    }
    beside = {"dense", "lowrank", *(("signs",) if unpacked else ())}
    for name, term in kinds.items():
        trained = TrainedTerms([term], True, unpacked=unpacked)
        assert {step.device.type for step in trained.steps.values()} == {"meta" if name in beside else "cpu"}
        assert trained.product(torch.ones(3, 8, device="meta")).shape == (3, 6)
        assert trained.rows(torch.zeros(3, dtype=torch.long, device="meta")).shape == (3, 8)


def test_a_study_is_answered_by_transformers_where_there_is_a_gpu(monkeypatch):
    monkeypatch.delenv(arms.VARIABLE, raising=False)
    for device, source in (("cpu", "engine"), ("cuda", "transformers")):
        monkeypatch.setattr(arms, "working_device", lambda device=device: torch.device(device))
        assert arms.chosen_source() == source
    monkeypatch.setenv(arms.VARIABLE, "engine")
    assert arms.chosen_source() == "engine"
