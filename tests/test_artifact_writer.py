"""Publishing a finished folder: all of it or nothing, and never the loss of what was there."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltakeeper.artifact_writer import publish


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
