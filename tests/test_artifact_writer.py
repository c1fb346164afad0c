"""Publishing a finished folder: all of it or nothing, and never the loss of what was there."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltakeeper.artifact_writer import publish, refuse_existing
from deltakeeper.errors import ArtifactError


def folder_with(path, text):
    path.mkdir()
    (path / "delta_config.json").write_text(text)
    return path


def test_a_finished_folder_takes_the_place_of_the_old_one(tmp_path):
    out = folder_with(tmp_path / "out", "old")
    publish(folder_with(tmp_path / "new", "new"), out)
    assert (out / "delta_config.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failing", [1, 2])
def test_an_interruption_between_the_renames_gives_the_old_one_back(tmp_path, monkeypatch, failing):
    out, new = folder_with(tmp_path / "out", "old"), folder_with(tmp_path / "new", "new")
    rename, calls = Path.rename, []

    def interrupted(self, target):
        calls.append(self)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish(new, out)
    assert (out / "delta_config.json").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "out"]  # `new` is the caller's scratch folder


@pytest.fixture
def places(tmp_path):
    """A model, an artifact, a folder of letters, and an empty folder, by name."""
    files = {"model": "config.json", "artifact": "delta_config.json", "letters": "dear.txt", "empty": None}
    for name, file in files.items():
        (tmp_path / name).mkdir()
        if file:
            (tmp_path / name / file).write_text("{}")
    (tmp_path / "artifact" / "config.json").write_text("{}")  # an artifact may carry the fine-tune's configuration
    return tmp_path


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("model", "artifact", "another kind"),
        ("artifact", "model", "another kind"),
        ("letters", "artifact", "neither an artifact nor a model"),
        ("letters", "model", "neither an artifact nor a model"),
        ("model", "model", None),
        ("artifact", "artifact", None),
        ("empty", "artifact", None),
        ("nowhere", "model", None),
    ],
)
def test_only_a_thing_of_the_same_kind_is_replaced(places, name, kind, said):
    if said is None:
        refuse_existing(places / name, True, kind)
    else:
        with pytest.raises(ArtifactError, match=said):
            refuse_existing(places / name, True, kind)


def test_what_the_work_reads_is_never_replaced(places):
    inner = places / "model" / "base"
    inner.mkdir()
    (places / "alias").symlink_to(places / "model", target_is_directory=True)
    for source in (places / "model", inner, places / "alias"):
        with pytest.raises(ArtifactError, match="is made from"):
            refuse_existing(places / "model", True, "model", (source,))
    refuse_existing(places / "model", True, "model", (places / "artifact",))
