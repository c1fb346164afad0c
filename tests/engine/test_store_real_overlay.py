"""The tenant store on a real overlay: what is leased is what the model computes, and every held term comes back."""

from __future__ import annotations

import gc
import shutil
import threading
import time

import pytest
import torch
from store_overlay import corrupt, lease_of, poll_until

from deltakeeper.apply import apply_delta
from deltakeeper.artifact import open_artifact
from deltakeeper.compress import compress
from deltakeeper.engine.store import TenantStore
from deltakeeper.errors import BaseMismatchError
from deltakeeper.kernels.rows import RowGroups
from deltakeeper.kernels.terms import held_terms
from deltakeeper.overlay import attach
from deltakeeper.testing import write_pair

IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    base, tuned = write_pair("llama", folder, scale=0.05)
    compress(base, tuned, folder / "deltas" / "a", "bitdelta:scale=row")
    compress(base, tuned, folder / "deltas" / "b", "svd:rank=8")
    compress(base, tuned, folder / "deltas" / "c", "bitdelta:bits=2")
    for name in "abc":
        apply_delta(base, folder / "deltas" / name, folder / "merged" / name)
    other, its_tuned = write_pair("llama", folder / "other", seed=7)
    compress(other, its_tuned, folder / "foreign", "bitdelta")
    return folder


def load_model(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def references(made):
    with torch.no_grad():
        return {name: load_model(made / "merged" / name)(IDS).logits for name in "abc"}


@pytest.fixture
def overlay(made):
    gc.collect()
    before = held_terms()
    overlay = attach(load_model(made / "base"))
    yield overlay
    overlay.detach()
    assert held_terms() == before


@pytest.fixture
def deltas(made, tmp_path):
    return shutil.copytree(made / "deltas", tmp_path / "deltas")


def open_store(overlay, deltas, budget=1 << 20, **settings):
    root = open_artifact(deltas / "b").manifest.base.root
    store = TenantStore(overlay, deltas, **({"byte_budget": budget, "base_root": root} | settings))
    store.scan()
    return store


def logits(overlay, slot):
    with overlay.rows(RowGroups.of([slot] * IDS.numel())):
        return overlay.model(IDS).logits


def off(overlay, slot, reference):
    return float((logits(overlay, slot)[..., : reference.shape[-1]] - reference).abs().max())


def test_leases_compute_their_own_fine_tune_and_a_swap_keeps_the_old_one(overlay, deltas, references):
    with open_store(overlay, deltas) as store:
        base = logits(overlay, 0)
        old = lease_of(store, "a")
        assert off(overlay, old.slot, references["a"]) < 0.05 < float((base - references["a"]).abs().max())
        done = store.replace("a", deltas / "b")
        poll_until(store, done.done)
        new = store.acquire("a")
        assert done.result() == new.version == new.delta.version != old.version
        for lease, own, other in ((old, "a", "b"), (new, "b", "a")):
            assert off(overlay, lease.slot, references[own]) < 0.05 < off(overlay, lease.slot, references[other])
        old.release()
        poll_until(store, lambda: old.delta.closed)
        assert store.stats().resident_bytes == new.delta.nbytes and set(overlay.published) == {new.slot}
        assert off(overlay, new.slot, references["b"]) < 0.05 and torch.equal(logits(overlay, 0), base)
        new.release()
    assert not overlay.published


def test_what_cannot_be_loaded_holds_no_term(overlay, deltas, made):
    with open_store(overlay, deltas) as store:
        before = held_terms()
        corrupt(deltas / "a")
        store.register("foreign", made / "foreign")
        store.register("deep", deltas / "c", planes=9)
        for name, error in (("a", "was altered"), ("foreign", "not the base"), ("deep", "9 sign planes")):
            done = store.load(name)
            poll_until(store, done.done)
            assert error in str(done.exception()) and store.state(name) == "failed"
        assert isinstance(store.load("foreign").exception(10), BaseMismatchError)
        poll_until(store, lambda: store.stats().residents == 0)
        assert held_terms() == before and store.stats().failures["BaseMismatchError"] == 2
        assert not overlay.published and store.stats().reserved_bytes == store.stats().resident_bytes == 0


def test_tenants_come_and_go_under_running_passes(overlay, deltas, references):
    """Room for two of three: passes go on all the while, none of them sees a tenant that is not its own."""
    with open_store(overlay, deltas, grace_seconds=0) as probe:
        sizes = [lease_of(probe, name).delta.nbytes for name in "abc"]
    budget = max(sum(sizes) - min(sizes), 2 * max(sizes))
    with open_store(overlay, deltas, budget, loaders=2) as store:
        slowest, served = 0.0, dict.fromkeys("abc", 0)
        for turn in range(60):
            name = "abc"[turn // 2 % 3]
            began = time.perf_counter()
            store.poll()
            slowest = max(slowest, time.perf_counter() - began)
            stats = store.stats()
            held = sum(delta.nbytes for delta in overlay.published.values())
            assert held <= stats.resident_bytes and stats.resident_bytes + stats.reserved_bytes <= budget
            lease = store.acquire(name)
            if lease is None:
                lease = lease_of(store, name)
            with lease:
                assert off(overlay, lease.slot, references[name]) < 0.05
            served[name] += 1
        assert min(served.values()) >= 20 and store.stats().evictions["room"] >= 15 and slowest < 0.1
    assert not overlay.published


def test_closing_beside_a_load_holds_no_term(overlay, deltas):
    before = held_terms()
    for wait in (0.0, 0.001, 0.003, 0.01):
        store = open_store(overlay, deltas, loaders=2)
        pinned = lease_of(store, "b")
        for name in "ac":
            store.acquire(name)
        threading.Event().wait(wait)
        store.close()
        pinned.release()
        assert held_terms() == before and not overlay.published and pinned.delta.closed
