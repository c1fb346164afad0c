"""The dry run: what headers tell is what compressing writes, and it is shown with its doubts."""

from __future__ import annotations

import json

import pytest
import torch

from deltakeeper.artifact import open_artifact
from deltakeeper.budget import forecast
from deltakeeper.checkpoint import Checkpoint, open_checkpoint
from deltakeeper.commands.plan_table import show_plan
from deltakeeper.compress import compress
from deltakeeper.delta import pair
from deltakeeper.errors import CodecError
from deltakeeper.plan import Rules, choose_codec, group_of
from deltakeeper.testing import write_pair

PRECISE = "bitdelta:bits=2,zero=plus"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize(
    ("codec", "embeddings", "norms"),
    [(PRECISE, "codec", "dense"), ("svd:rank=4", "dense", "base"), ("rtn:bits=3", PRECISE, "dense")],
)
def test_precise_settings_foretell_the_bytes_of_every_group(tmp_path, kind, codec, embeddings, norms):
    base, tuned = write_pair(kind, tmp_path, dtype=torch.float32)  # bfloat16 rounds changes of the norms away
    with open_checkpoint(base) as origin, open_checkpoint(tuned) as target:
        models = pair(origin, target)
        found = forecast(models, Rules(choose_codec(codec), embeddings, norms))
        compress(models.base, models.tuned, tmp_path / "delta", codec, embeddings=embeddings, norms=norms)
        artifact = open_artifact(tmp_path / "delta")
        written = dict.fromkeys(found.groups, 0)
        for name in artifact.names:
            if name not in models.tied:
                written[group_of(models, name)] += artifact.record(name).stored_bytes
    groups = {name: group.bytes for name, group in found.groups.items()}
    unchanged = [n for n in artifact.names if artifact.record(n).encoding == "unchanged"]  # headers do not tell
    for name, size in groups.items():
        kept = [n for n in unchanged if group_of(models, n) == name]
        if not kept:
            assert size == written[name]
        elif name == "norms":
            saved = sum(models.tuned.tensors[n].nbytes for n in kept) if norms == "dense" else 0
            assert size == written[name] + saved
        else:
            assert size > written[name]
    assert found.certain and found.full_bytes == artifact.full_bytes
    assert found.total_bytes == pytest.approx(artifact.nbytes, rel=0.06)


def test_nothing_is_read_for_it(tmp_path, monkeypatch):
    base, tuned = write_pair("llama", tmp_path)
    with open_checkpoint(base) as origin, open_checkpoint(tuned) as target:
        models = pair(origin, target)
        monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("the plan read a tensor"))
        assert forecast(models, Rules(choose_codec("bitdelta"))).total_bytes > 0


def test_an_added_row_is_counted(tmp_path):
    sizes = []
    for extra in (0, 5):
        folders = write_pair("llama", tmp_path / str(extra), vocab_extra=extra)
        with open_checkpoint(folders[0]) as origin, open_checkpoint(folders[1]) as target:
            sizes.append(forecast(pair(origin, target), Rules(choose_codec(PRECISE))).groups["embedding"].bytes)
    assert sizes[1] - sizes[0] == 5 * 48 * 2  # bfloat16 rows of the tiny model


def test_doubts_are_marked(tmp_path, capsys):
    base, tuned = write_pair("llama", tmp_path)
    show_plan(base, tuned, "bitdelta")
    text = capsys.readouterr().out
    assert "~" in text and "depend on the data" in text and "embedding" in text and "files" in text
    show_plan(base, tuned, PRECISE)
    assert "~" not in capsys.readouterr().out
    show_plan(base, tuned, "svd:energy=0.5")
    text = capsys.readouterr().out
    assert ">" in text and "not counted" in text


def test_a_budget_is_shown_with_its_errors(tmp_path, capsys):
    base, tuned = write_pair("mixtral", tmp_path)
    show_plan(base, tuned, "auto", target_size="75kB", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["target_bytes"] == 75_000 and 0.99 * 75_000 <= found["bytes"] <= 75_000
    assert found["groups"]["norms"]["error"] == 0.0 and 0 < found["groups"]["linear"]["error"] < 1
    assert found["bytes"] == found["file_bytes"] + sum(group["bytes"] for group in found["groups"].values())
    show_plan(base, tuned, "bitdelta", target_ratio="3")
    text = capsys.readouterr().out
    assert "error" in text and "is left" in text


def test_auto_without_a_budget_is_refused(tmp_path):
    base, tuned = write_pair("llama", tmp_path)
    with pytest.raises(CodecError, match="--target-size"):
        show_plan(base, tuned, "auto")
