"""Opening model folders: any sharding, no pickle, nothing outside the folder."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from deltakeeper.checkpoint import open_checkpoint, opened
from deltakeeper.errors import CheckpointError
from deltakeeper.testing import write_pair


def write_index(folder, mapping):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))


@pytest.fixture
def shards(tmp_path):
    save_file({"a": torch.ones(2, 2), "empty": torch.zeros(0)}, tmp_path / "one.safetensors")
    save_file({"b": torch.arange(3, dtype=torch.bfloat16)}, tmp_path / "two.safetensors")
    return tmp_path


def test_tensors_come_from_headers_and_are_read_one_by_one(shards):
    with open_checkpoint(shards) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b", "empty"]
        info = checkpoint.tensors["b"]
        assert (info.dtype, info.shape, info.numel, info.nbytes, info.st_dtype) == (torch.bfloat16, (3,), 3, 6, "BF16")
        assert checkpoint.read("b").tolist() == [0, 1, 2]
        assert checkpoint.read("empty").shape == (0,)
        assert bytes(checkpoint.raw("a")) == torch.ones(2, 2).numpy().tobytes()
        assert checkpoint.config == {}


def test_a_tensor_outlives_its_checkpoint_and_may_be_written_to(shards):
    with open_checkpoint(shards) as checkpoint:
        tensor = checkpoint.read("a")
    tensor.zero_()
    with open_checkpoint(shards) as checkpoint:
        assert checkpoint.read("a").sum() == 4


def test_an_index_is_followed(shards):
    write_index(shards, {"a": "one.safetensors"})
    with open_checkpoint(shards) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "empty"]


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({"a": "../one.safetensors"}, "outside its folder"),
        ({"a": "/etc/passwd"}, "outside its folder"),
        ({"a": "x" * 300}, "outside its folder"),
        ({"a": "gone.safetensors"}, "missing"),
        ({"c": "one.safetensors"}, "does not"),
        ({"a": 3}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_a_hostile_index_is_refused(shards, mapping, said):
    write_index(shards, mapping)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(shards)


def test_a_tensor_in_two_shards_is_refused(shards):
    save_file({"a": torch.ones(1)}, shards / "three.safetensors")
    with pytest.raises(CheckpointError, match="holds tensor 'a' twice"):
        open_checkpoint(shards)


def test_the_same_weights_in_another_layout_are_passed_over(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"layers.a": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["a"]


def test_truncated_shards_are_refused(shards):
    path = shards / "one.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"one\.safetensors"):
        open_checkpoint(shards)


def test_a_file_that_shrinks_later_is_noticed(shards):
    with open_checkpoint(shards) as checkpoint:
        path = shards / "one.safetensors"
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(CheckpointError, match="became shorter"):
            checkpoint.read("a")


def test_pickle_is_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="never opened"):
        open_checkpoint(tmp_path)


def test_empty_folders_and_bad_configs_are_refused(tmp_path, shards):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CheckpointError, match="no safetensors"):
        open_checkpoint(tmp_path / "nothing")
    for text in ("{", "[]"):
        (shards / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            open_checkpoint(shards)
    (tmp_path / "void").mkdir()
    save_file({}, tmp_path / "void" / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        open_checkpoint(tmp_path / "void")


def test_paths_that_are_no_hub_names_fail_at_once(tmp_path):
    with pytest.raises(CheckpointError, match="local folder or a hub name"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match="local folder or a hub name"):
        open_checkpoint("just-a-name")


def test_hub_names_go_to_the_hub_client(monkeypatch, shards):
    asked = {}

    def snapshot_download(name, revision, allow_patterns):
        asked.update(name=name, revision=revision)
        assert "*.safetensors" in allow_patterns and not any(p.endswith("bin") for p in allow_patterns)
        if name == "org/none":
            raise RuntimeError("no such repository\nmore")
        return str(shards)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with open_checkpoint("org/model@main") as checkpoint:
        assert (asked["name"], checkpoint.revision) == ("org/model", "main")
    with pytest.raises(CheckpointError, match=r"\(no such repository\)"):
        open_checkpoint("org/none")


def test_opened_leaves_open_what_was_open(shards):
    with open_checkpoint(shards) as checkpoint:
        with opened(checkpoint) as same:
            assert same is checkpoint
        assert checkpoint.read("a").sum() == 4
    with opened(shards) as fresh:
        assert fresh.read("a").sum() == 4


def test_a_real_folder_brings_its_config(tmp_path):
    base, _ = write_pair("llama", tmp_path)
    with open_checkpoint(base) as checkpoint:
        assert checkpoint.config["model_type"] == "llama"
