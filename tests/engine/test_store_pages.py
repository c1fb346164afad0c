"""Memory of the kernels goes back to the system with its tenant: no other tenant's lies in the same pages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from store_overlay import FakeOverlay, poll_until

from deltakeeper.compress import compress
from deltakeeper.engine.store import TenantStore
from deltakeeper.kernels import library
from deltakeeper.kernels.terms import hold
from deltakeeper.layouts.signs import Signs
from deltakeeper.testing import write_pair

SIDE = 5120
"""A term of this many rows and columns takes 3 MiB, and the kernels ask the system for 16 MiB at a time."""
TENANTS, MIB = 12, 1 << 20

pytestmark = pytest.mark.skipif(
    not library.compiled() or not sys.platform.startswith("linux"), reason="pages are those of the compiled kernels"
)


class Holding(FakeOverlay):
    """Every delta is one large term."""

    def load(self, artifact, *, planes=None):
        delta = super().load(artifact, planes=planes)
        words = torch.randint(-(1 << 31), 1 << 31, (SIDE, SIDE // 32), dtype=torch.int32)
        term = hold(Signs((SIDE, SIDE), "tensor", "plus", (words,), (torch.ones(1),)))
        delta.nbytes, close = term.nbytes, delta.close

        def release():
            close()
            term.release()

        delta.close = release
        return delta


def anonymous():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024


def test_a_tenant_that_stays_keeps_no_memory_of_those_that_went(tmp_path):
    base, tuned = write_pair("llama", tmp_path)
    compress(base, tuned, tmp_path / "delta", "bitdelta")
    overlay = Holding()
    with TenantStore(overlay, byte_budget=1 << 30) as store:

        def load(name):
            loaded = store.load(name)
            poll_until(store, loaded.done)
            loaded.result()

        names = [f"t{i}" for i in range(TENANTS)]
        for name in names:
            store.register(name, tmp_path / "delta")
            load(name)
        full, counted = anonymous(), store.stats().resident_bytes
        stay = names[:: TENANTS // 3]
        for name in set(names) - set(stay):
            store.unload(name)
        poll_until(store, lambda: store.stats().residents == len(stay))
        freed = counted - store.stats().resident_bytes
        assert freed > 20 * MIB
        poll_until(store, lambda: full - anonymous() > 0.8 * freed)
