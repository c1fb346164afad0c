"""Bad input, end to end: each gets one sentence that says what is wrong, where, and what to do, and leaves nothing."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltakeeper.apply import apply_delta
from deltakeeper.artifact import open_artifact
from deltakeeper.artifact_writer import ArtifactWriter
from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.compress import compress
from deltakeeper.errors import ArtifactError, CheckpointError, DeltakeeperError
from deltakeeper.layouts import Dense
from deltakeeper.testing import write_pair

MATRIX = "model.layers.1.mlp.up_proj.weight"
CODECS = ("bitdelta", "svd:rank=4", "bitdelta:bits=2,scale=column")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_pair("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture
def model_pair(models, tmp_path):
    return tuple(shutil.copytree(path, tmp_path / path.name) for path in models)


def alter(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@contextmanager
def refused(folder, *said, kind=DeltakeeperError):
    """The block raises one sentence with all of `said`, and leaves `folder` with what it held."""
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(kind) as caught:
        yield
    text = str(caught.value)
    for part in said:
        assert part in text, text
    assert text.endswith(".") and "\n" not in text and text.count("; ") >= 1, text
    assert sorted(path.name for path in folder.iterdir()) == before


@contextmanager
def file_size_limit(nbytes):
    """No file of this process may grow past `nbytes`, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestShapes:
    @pytest.mark.parametrize(
        "shape",
        [(80, 47), (81, 48), (79, 48), (48, 80), (80, 48, 1), (3840,)],
        ids=lambda shape: "x".join(map(str, shape)),
    )
    def test_another_shape_that_is_no_vocabulary_growth(self, model_pair, tmp_path, shape):
        base, tuned = model_pair
        alter(tuned, lambda tensors: tensors.update({MATRIX: torch.ones(shape, dtype=torch.bfloat16)}))
        with refused(
            tmp_path, f"'{MATRIX}' is {list(shape)}", "[80, 48]", "only embeddings and heads", kind=CheckpointError
        ):
            compress(base, tuned, tmp_path / "delta", "bitdelta")

    def test_an_embedding_of_another_width(self, model_pair, tmp_path):
        base, tuned = model_pair
        name = "model.embed_tokens.weight"
        alter(tuned, lambda tensors: tensors.update({name: torch.ones(100, 40, dtype=torch.bfloat16)}))
        with refused(tmp_path, f"'{name}' is [100, 40]", "number of rows", kind=CheckpointError):
            compress(base, tuned, tmp_path / "delta", "bitdelta")

    def test_models_that_have_nothing_in_common(self, models, tmp_path):
        other, _ = write_pair("gpt2", tmp_path)
        with refused(tmp_path, "no matrix in common", "give the base", kind=CheckpointError):
            compress(models[0], other, tmp_path / "delta", "bitdelta")

    def test_a_model_that_only_has_a_head_in_common(self, models, tmp_path):
        tensors = {"lm_head.weight": load_file(models[0] / "model.safetensors")["lm_head.weight"]}
        tensors["h.weight"] = torch.ones(100, 100, dtype=torch.bfloat16)
        (tmp_path / "other").mkdir()
        save_file(tensors, tmp_path / "other" / "model.safetensors")
        with refused(tmp_path, "only 10 % of the weights", "give the base", kind=CheckpointError):
            compress(tmp_path / "other", models[1], tmp_path / "delta", "bitdelta")


class TestNotFinite:
    @pytest.mark.parametrize("codec", CODECS)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("side", [0, 1], ids=["base", "tuned"])
    def test_the_tensor_and_the_number_of_entries_are_named(self, model_pair, tmp_path, codec, value, side):
        def spoil(tensors):
            tensors[MATRIX].view(-1)[[0, 48, 3839]] = value

        alter(model_pair[side], spoil)
        with refused(tmp_path, f"'{MATRIX}'", "NaN or infinity", "3 entries"):
            compress(*model_pair, tmp_path / "delta", codec)

    def test_infinities_on_both_sides(self, model_pair, tmp_path):
        for folder in model_pair:  # inf - inf is NaN
            alter(folder, lambda tensors: tensors[MATRIX].view(-1)[:2].fill_(float("inf")))
        with refused(tmp_path, f"'{MATRIX}'", "NaN or infinity", "2 entries"):
            compress(*model_pair, tmp_path / "delta", "bitdelta")

    def test_a_norm_that_is_stored_as_it_is(self, model_pair, tmp_path):
        alter(model_pair[1], lambda tensors: tensors["model.norm.weight"][:5].fill_(float("nan")))
        with refused(tmp_path, "'model.norm.weight'", "NaN or infinity", "5 entries"):
            compress(*model_pair, tmp_path / "delta", "bitdelta")

    def test_a_vocabulary_row_that_was_added(self, tmp_path):
        base, tuned = write_pair("llama", tmp_path, vocab_extra=2)
        alter(tuned, lambda tensors: tensors["lm_head.weight"][-1, :4].fill_(float("nan")))
        with refused(tmp_path, "'lm_head.weight'", "NaN or infinity", "4 entries"):
            compress(base, tuned, tmp_path / "delta", "bitdelta")


class TestFullDisk:
    @pytest.mark.parametrize("limit", [0, 1000, 6000, 60_000])
    def test_compress_leaves_nothing(self, models, tmp_path, limit):
        (tmp_path / "bystander").write_text("x")
        said = ("disk is full", str(tmp_path / "delta"), "free some space")
        with refused(tmp_path, *said, kind=ArtifactError), file_size_limit(limit):
            compress(*models, tmp_path / "delta", "bitdelta:bits=8")

    def test_an_artifact_that_was_to_be_replaced_survives(self, models, tmp_path):
        compress(*models, tmp_path / "delta", "bitdelta")
        before = {file.name: file.read_bytes() for file in (tmp_path / "delta").iterdir()}
        with refused(tmp_path, "disk is full"), file_size_limit(10_000):
            compress(*models, tmp_path / "delta", "bitdelta:bits=4", overwrite=True)
        assert {file.name: file.read_bytes() for file in (tmp_path / "delta").iterdir()} == before

    def test_apply_leaves_nothing(self, models, tmp_path):
        compress(*models, tmp_path / "delta", "bitdelta")
        said = ("disk is full", str(tmp_path / "again"))
        with refused(tmp_path, *said, kind=ArtifactError), file_size_limit(20_000):
            apply_delta(models[0], tmp_path / "delta", tmp_path / "again")

    def test_a_disk_that_fills_while_the_encoder_works_is_told_before_the_end(self, tmp_path, monkeypatch):
        added = []

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("deltakeeper.payload_writer._Shard.write", full)
        with refused(tmp_path, "disk is full", "No space left on device"), ArtifactWriter(tmp_path / "delta") as writer:
            for i in range(10_000):
                writer.add(f"t{i}", [(None, Dense((1 << 16,), "value", torch.zeros(1 << 16)))], None)
                added.append(i)
        assert len(added) < 5_000  # 64 MiB may wait: 256 of these

    @pytest.mark.parametrize("call", ["copy", "write_text"])
    def test_other_files_of_the_artifact_are_told_too(self, tmp_path, call):
        (tmp_path / "config.json").write_text("x" * 1000)
        with refused(tmp_path, "disk is full"), ArtifactWriter(tmp_path / "delta") as writer, file_size_limit(10):
            writer.copy(tmp_path / "config.json") if call == "copy" else writer.write_text("a", "x" * 1000)

    def test_a_place_that_cannot_be_written_is_told(self, tmp_path):
        (tmp_path / "file").write_text("")
        with refused(tmp_path, "could not be written", "check the disk"), ArtifactWriter(tmp_path / "file" / "delta"):
            pass


class TestSameModels:
    def test_one_folder_twice(self, models, tmp_path):
        with refused(tmp_path, "nothing differs", str(models[0])):
            compress(models[0], models[0], tmp_path / "delta", "bitdelta")

    @pytest.mark.parametrize("codec", CODECS)
    def test_a_copy_in_another_folder(self, models, tmp_path, codec):
        shutil.copytree(models[0], tmp_path / "copy")
        with refused(tmp_path, "nothing differs", str(tmp_path / "copy"), str(models[0])):
            compress(models[0], tmp_path / "copy", tmp_path / "delta", codec)

    def test_base_and_fine_tune_the_wrong_way_round_are_no_error(self, models, tmp_path):
        compress(models[1], models[0], tmp_path / "delta", "bitdelta")
        assert open_artifact(tmp_path / "delta").manifest.tensors


class TestFiles:
    def test_a_dtype_that_is_not_known(self, model_pair, tmp_path):
        base, tuned = model_pair
        raw = (tuned / "model.safetensors").read_bytes()
        (tuned / "model.safetensors").write_bytes(raw.replace(b'"BF16"', b'"BF17"', 1))
        with refused(tmp_path, "'BF17'", "tensor '", "not supported", kind=CheckpointError):
            compress(base, tuned, tmp_path / "delta", "bitdelta")

    def test_a_tensor_of_whole_numbers_where_the_base_has_floats(self, model_pair, tmp_path):
        base, tuned = model_pair
        alter(tuned, lambda tensors: tensors.update({MATRIX: torch.ones(80, 48, dtype=torch.int32)}))
        with refused(tmp_path, f"'{MATRIX}' is I32", "BF16", "none is quantised", kind=CheckpointError):
            compress(base, tuned, tmp_path / "delta", "bitdelta")

    @pytest.mark.parametrize("name", ["../base/model.safetensors", "/etc/passwd", "a/../model.safetensors"])
    def test_shards_outside_the_folder_of_a_model(self, model_pair, tmp_path, name):
        base, tuned = model_pair
        (tuned / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {MATRIX: name}}))
        with refused(tmp_path, name, "outside its folder", "do not trust", kind=CheckpointError):
            compress(base, tuned, tmp_path / "delta", "bitdelta")

    def test_shards_outside_the_folder_of_an_artifact(self, models, tmp_path):
        compress(*models, tmp_path / "delta", "bitdelta")
        index = {"weight_map": {"x": "../delta/delta_model.safetensors"}}
        (tmp_path / "delta" / "delta_model.safetensors.index.json").write_text(json.dumps(index))
        with refused(tmp_path, "no shard in its folder", "do not trust", kind=ArtifactError):
            apply_delta(models[0], tmp_path / "delta", tmp_path / "again")

    def test_offsets_past_the_end_of_a_model_file(self, model_pair, tmp_path):
        with (model_pair[1] / "model.safetensors").open("r+b") as file:
            file.truncate((model_pair[1] / "model.safetensors").stat().st_size - 100)
        with refused(tmp_path, "truncated or altered", kind=CheckpointError):
            compress(*model_pair, tmp_path / "delta", "bitdelta")

    def test_a_model_file_that_becomes_shorter_while_it_is_read(self, model_pair, tmp_path):
        file = model_pair[1] / "model.safetensors"
        with refused(tmp_path, "became shorter", kind=CheckpointError), open_checkpoint(model_pair[1]) as tuned:
            os.truncate(file, file.stat().st_size // 2)
            compress(model_pair[0], tuned, tmp_path / "delta", "bitdelta")

    def test_a_promise_of_a_huge_tensor_takes_no_room(self, models, tmp_path):
        compress(*models, tmp_path / "delta", "bitdelta")
        path = tmp_path / "delta" / "delta_config.json"
        manifest = json.loads(path.read_text())
        record = next(r for r in manifest["tensors"].values() if r["encoding"] == "unchanged")
        record["shape"] = record["base_shape"] = [1 << 20, 1 << 19]
        path.write_text(json.dumps(manifest))
        with refused(tmp_path, "base shape", "get the artifact again", kind=ArtifactError), file_size_limit(1 << 30):
            apply_delta(models[0], tmp_path / "delta", tmp_path / "again")
