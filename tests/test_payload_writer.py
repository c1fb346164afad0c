"""The payload on its way to disk: one file or shards, each byte once, the same bytes each time, failures told."""

from __future__ import annotations

import errno
import itertools
import json
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from deltakeeper.payload import INDEX_NAME, PAYLOAD_NAME, Payload
from deltakeeper.payload_writer import PayloadWriter
from deltakeeper.write_behind import WriteBehind


def tensors_of(index, sizes):
    generator = torch.Generator().manual_seed(index)
    return {f"t{index}::0.p{i}": torch.randn(size, generator=generator) for i, size in enumerate(sizes)}


def write(folder, groups, **settings):
    folder.mkdir()
    writer = PayloadWriter(folder, **settings)
    for group in groups:
        writer.add(group)
    writer.finish()
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def read_back(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return found


@settings(max_examples=30)
@given(
    sizes=st.lists(st.lists(st.integers(0, 90), min_size=1, max_size=3), max_size=8),
    limit=st.integers(1, 1200),
)
def test_any_tensors_come_back_and_a_tensor_stays_in_one_shard(tmp_path_factory, sizes, limit):
    folder = tmp_path_factory.mktemp("written")
    groups = [tensors_of(i, parts) for i, parts in enumerate(sizes)]
    whole = {key: tensor for group in groups for key, tensor in group.items()}
    files = write(folder / "out", groups, shard_bytes=limit)
    found = read_back(folder / "out")
    assert set(found) == set(whole)
    assert all(torch.equal(found[key], whole[key]) for key in whole)
    payload = Payload(folder / "out")
    for key, tensor in whole.items():
        assert bytes(payload.read(key)) == tensor.numpy().tobytes()
    total = sum(tensor.nbytes for tensor in whole.values())
    assert (set(files) == {PAYLOAD_NAME}) == (total <= limit or len(groups) == 1)
    if INDEX_NAME in files:
        index = json.loads(files[INDEX_NAME])
        assert index["metadata"] == {"total_size": total}
        for group in groups:
            assert len({index["weight_map"][key] for key in group}) == 1


def test_equal_tensors_give_equal_files(tmp_path):
    groups = [tensors_of(i, [100, 1]) for i in range(5)]
    assert write(tmp_path / "a", groups, shard_bytes=900) == write(tmp_path / "b", groups, shard_bytes=900)


def test_a_small_file_has_no_padding_and_a_large_one_little(tmp_path, monkeypatch):
    small = write(tmp_path / "small", [tensors_of(0, [10])])[PAYLOAD_NAME]
    length = int.from_bytes(small[:8], "little")
    assert len(small) == 8 + length + 40
    assert length - len(small[8 : 8 + length].rstrip()) < 8
    monkeypatch.setattr("deltakeeper.payload_writer.PADDING_SHARE", 1)
    monkeypatch.setattr("deltakeeper.payload_writer.HEADER_ROOM", 1 << 10)
    large = write(tmp_path / "large", [tensors_of(0, [1000])])[PAYLOAD_NAME]
    assert int.from_bytes(large[:8], "little") == 1 << 10  # in place: the room that was kept, filled with spaces
    assert torch.equal(read_back(tmp_path / "large")["t0::0.p0"], tensors_of(0, [1000])["t0::0.p0"])


def test_files_larger_than_a_block_are_moved_up_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("deltakeeper.payload_writer._BLOCK", 64)
    write(tmp_path / "out", [tensors_of(0, [1001, 7])])
    assert torch.equal(read_back(tmp_path / "out")["t0::0.p0"], tensors_of(0, [1001, 7])["t0::0.p0"])


def test_a_header_that_outgrows_its_room_begins_another_file(tmp_path, monkeypatch):
    monkeypatch.setattr("deltakeeper.payload_writer.HEADER_ROOM", 1 << 10)
    groups = [tensors_of(i, [3]) for i in range(40)] + [tensors_of(40, [1] * 40)]  # the last needs more room alone
    files = write(tmp_path / "out", groups)
    assert INDEX_NAME in files
    assert set(read_back(tmp_path / "out")) == {key for group in groups for key in group}


def test_large_payloads_are_flushed_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr("deltakeeper.payload_writer._FLUSHED", 1000)
    calls = []
    monkeypatch.setattr("os.fdatasync", calls.append)
    write(tmp_path / "out", [tensors_of(i, [200]) for i in range(5)])
    assert len(calls) == 2


class TestWriteBehind:
    def test_jobs_run_in_order_on_another_thread(self):
        seen = []
        disk = WriteBehind()
        for i in range(100):
            disk.submit(lambda i=i: seen.append((i, threading.get_ident())), 1)
        disk.finish()
        assert [i for i, _ in seen] == list(range(100))
        assert threading.get_ident() not in {ident for _, ident in seen}

    def test_no_more_bytes_wait_than_the_limit_but_a_larger_job_is_taken(self):
        disk, gate, counter = WriteBehind(limit=10), threading.Event(), itertools.count()
        handed = []

        def produce():
            for _ in range(5):
                disk.submit(lambda: (gate.wait(), next(counter)), 4)
                handed.append(1)
            disk.submit(lambda: next(counter), 1000)

        producer = threading.Thread(target=produce)
        producer.start()
        time.sleep(0.2)
        assert len(handed) == 2  # 8 of 10 bytes; a third job would be 12
        gate.set()
        producer.join()
        disk.finish()
        assert next(counter) == 6

    def test_the_first_failure_is_told_and_nothing_runs_after_it(self):
        disk, seen = WriteBehind(limit=1), []

        def fail(text):
            raise OSError(errno.ENOSPC, text)

        disk.submit(lambda: fail("first"), 1)
        with pytest.raises(OSError, match="first"):
            for _ in range(1000):
                disk.submit(lambda: seen.append(1), 1)
        with pytest.raises(OSError, match="first"):
            disk.finish()
        assert not seen
        disk.abandon()

    def test_what_has_not_begun_is_dropped_when_abandoned(self):
        disk, gate, seen = WriteBehind(), threading.Event(), []
        disk.submit(gate.wait)
        for _ in range(10):
            disk.submit(lambda: seen.append(1))
        threading.Timer(0.05, gate.set).start()
        disk.abandon()
        assert not seen
