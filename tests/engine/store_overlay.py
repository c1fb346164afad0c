"""An overlay without a model, for tests of the tenant store: it reads real artifacts and can be held up."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar

from deltakeeper.errors import OverlayError


class FakeDelta:
    vocabulary = 96
    side_files: ClassVar[dict[str, str]] = {}

    def __init__(self, overlay, folder, version, nbytes):
        self.overlay, self.side_folder, self.version, self.nbytes = overlay, folder, version, nbytes
        self.closed = 0

    def close(self):
        self.closed += 1
        if self.overlay.close_fails:
            raise OSError("cannot close")


class FakeOverlay:
    """Counts loads by folder name; `gates` hold loads up, `growth` makes a delta larger than its payload."""

    def __init__(self, slots=64):
        self.slots: dict[int, FakeDelta] = {}
        self.deltas: list[FakeDelta] = []
        self.loads: Counter[str] = Counter()
        self.gates: dict[str, threading.Event] = {}
        self.begun: dict[str, threading.Event] = {}
        self.growth: dict[str, float] = {}
        self.publish_error: Exception | None = None
        self.while_publishing = None
        self.close_fails = False
        self.most_slots = slots
        self.owner: int | None = None

    def load(self, artifact, *, planes=None):
        name = artifact.path.name
        self.loads[name] += 1
        if name in self.begun:
            self.begun[name].set()
        if name in self.gates:
            assert self.gates[name].wait(20)
        terms = [term for tensor in artifact.names for term in artifact.terms(tensor)]
        raw = (artifact.path / "delta_config.json").read_bytes()
        nbytes = int(sum(term.nbytes for term in terms) * self.growth.get(name, 1))
        delta = FakeDelta(self, artifact.path, hashlib.sha256(raw + bytes([planes or 0])).hexdigest(), nbytes)
        self.deltas.append(delta)
        return delta

    def publish(self, delta):
        self._on_one_thread()
        if self.publish_error is not None:
            raise self.publish_error
        assert not delta.closed and delta not in self.slots.values()
        for slot in range(1, self.most_slots + 1):
            if slot not in self.slots:
                self.slots[slot] = delta
                if self.while_publishing is not None:
                    self.while_publishing()
                return slot
        raise OverlayError("All slots are in use; retire one.")

    def retire(self, slot):
        self._on_one_thread()
        return self.slots.pop(slot)

    @property
    def held(self):
        return [delta for delta in self.deltas if not delta.closed]

    def _on_one_thread(self):
        self.owner = self.owner or threading.get_ident()
        assert self.owner == threading.get_ident(), "the live model is changed on the engine's thread only"


def poll_until(store, reached, seconds=15):
    """Play the engine until something is so."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, store.stats()
        store.poll()
        time.sleep(0.0005)


def lease_of(store, name):
    """Play the engine until a tenant can be had."""
    got = []
    poll_until(store, lambda: bool(got) or (bool(lease := store.acquire(name)) and not got.append(lease)))
    return got[0]


def quiet(store, overlay):
    """Nothing is held, reserved, pinned, in a slot or in memory."""
    stats = store.stats()
    counts = (stats.resident_bytes, stats.reserved_bytes, stats.residents, stats.pins, stats.waiting)
    return counts == (0, 0, 0, 0, 0) and not overlay.slots and not overlay.held


def corrupt(folder: Path):
    """Flip one bit of the payload's last byte."""
    file = folder / "delta_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
