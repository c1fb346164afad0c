"""The model card: valid metadata, the figures of manifest and report, and the same text every time."""

from __future__ import annotations

import dataclasses
import json

import pytest
from huggingface_hub import ModelCard

from deltakeeper.artifact import open_artifact
from deltakeeper.card import card_text, write_card
from deltakeeper.compress import compress
from deltakeeper.errors import ArtifactError
from deltakeeper.testing import write_pair


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    base, tuned = write_pair("llama", folder)
    compress(base, tuned, folder / "delta", "bitdelta:bits=2+svd:rank=3")
    return base, tuned, folder / "delta"


def manifest_of(folder, **changes):
    manifest = open_artifact(folder).manifest
    return dataclasses.replace(
        manifest, **{k: dataclasses.replace(getattr(manifest, k), **v) for k, v in changes.items()}
    )


def test_the_metadata_is_what_the_hub_documents(folders):
    *_, delta = folders
    named = {"base": {"name_or_path": "org/base@main", "revision": "0" * 40}}
    data = ModelCard(card_text(manifest_of(delta, **named))).data
    assert data.library_name == "deltakeeper"
    assert data.base_model == "org/base"
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert {"deltakeeper", "bitdelta", "svd"} <= set(data.tags)


@pytest.mark.parametrize(
    "source", [{"name_or_path": "org/base", "revision": None}, {"name_or_path": "/a\nb: c", "revision": "x"}]
)
def test_a_local_folder_is_no_base_model_of_the_hub(folders, source):
    card = ModelCard(card_text(manifest_of(folders[2], base=source)))
    assert card.data.base_model is None and "b" not in card.data.to_dict()


def test_the_body_says_method_sizes_fidelity_use_and_warning(folders):
    base, tuned, delta = folders
    text = write_card(delta).read_text()
    artifact = open_artifact(delta)
    report = json.loads((delta / "delta_report.json").read_text())
    counted = sum(f.stat().st_size for f in delta.iterdir() if f.name != "README.md")
    assert counted == artifact.nbytes
    assert f"{counted:,} bytes, {artifact.full_bytes / counted:.1f} times smaller" in text
    assert f"{8 * counted / artifact.weights:.2f} bits a weight" in text
    assert f"{artifact.full_bytes:,}" in text
    assert "arxiv.org/abs/2402.10193" in text and "`bits=2`" in text and "`rank=3`" in text
    assert f"{report['total']['relative_error']:.4f}" in text and f"{report['total']['cosine']:.4f}" in text
    assert f"deltakeeper compress {base} {tuned} -o DELTA --codec bitdelta:bits=2+svd:rank=3" in text
    assert f"deltakeeper apply {base} DELTA" in text
    assert "not a safety guarantee unless it was\nmeasured" in text
    rows = [
        line for line in text.splitlines() if line.startswith(("| embeddings", "| output head", "| linear", "| norms"))
    ]
    stored = sum(int(row.split("|")[4].replace(",", "")) for row in rows)
    assert len(rows) == 4 and stored == sum(r.stored_bytes for r in artifact.manifest.tensors.values())


def test_the_same_artifact_has_the_same_card(folders):
    before = (folders[2] / "README.md").read_text()
    assert write_card(folders[2]).read_bytes() == write_card(folders[2]).read_bytes()
    assert write_card(folders[2]).read_text().partition("## Use")[0] == before.partition("## Use")[0]


def test_a_given_command_and_a_missing_report(folders, tmp_path):
    manifest = open_artifact(folders[2]).manifest
    text = card_text(manifest, None, command="deltakeeper import x --base y -o z")
    assert "deltakeeper import x --base y -o z" in text and "deltakeeper compress" not in text
    assert "was not measured" in text
    strange = card_text(dataclasses.replace(manifest, codec="from-elsewhere"))
    assert "unknown here" in strange and "deltakeeper compress" not in strange
    with pytest.raises(ArtifactError, match="give the folder of a delta artifact"):
        write_card(tmp_path)
