import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from deltakeeper.model_writer import ModelWriter, Planned, names_in_order


def planned(tensors):
    return {name: Planned("F32", tuple(t.shape), t.nbytes) for name, t in tensors.items()}


def data(tensor):
    return memoryview(tensor.contiguous().numpy().tobytes())


@pytest.mark.parametrize("shard_bytes", [40, 200, 10**6])
def test_blocks_written_out_of_order_by_threads_make_a_model(tmp_path, shard_bytes):
    tensors = {f"layer.{i}": torch.randn(4, 5, generator=torch.Generator().manual_seed(i)) for i in range(6)}
    with ModelWriter(tmp_path, planned(tensors), shard_bytes) as writer, ThreadPoolExecutor(3) as pool:
        pieces = [(n, at, data(t)[at : at + 8]) for n, t in tensors.items() for at in range(0, t.nbytes, 8)]
        list(pool.map(lambda piece: writer.write(*piece), reversed(pieces)))
    files = sorted(tmp_path.glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if len(files) > 1:
        mapping = json.loads(index.read_text())["weight_map"]
        assert all(name in load_file(tmp_path / file) for name, file in mapping.items())
    assert len(files) == {40: 6, 200: 3, 10**6: 1}[shard_bytes]


def test_a_full_disk_shows_before_the_work(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space"), ModelWriter(tmp_path, planned({"a": torch.zeros(3)})):
        raise AssertionError("entered")


def test_file_systems_that_cannot_reserve_are_written_all_the_same(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.posix_fallocate", unsupported)
    tensor = torch.arange(3.0)
    with ModelWriter(tmp_path, planned({"a": tensor})) as writer:
        writer.write("a", 0, data(tensor))
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], tensor)


def test_aliases_follow_what_they_are_aliases_of():
    assert names_in_order(["a", "b", "c", "d"], {"a": "c"}) == ["b", "c", "a", "d"]
