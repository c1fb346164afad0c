"""`deltakeeper heal` as a user types it, on a text file."""

import json

import pytest

from deltakeeper import cli, open_artifact, verify
from deltakeeper.compress import compress
from deltakeeper.heal import heal
from deltakeeper.testing import write_pair, write_tokenizer

TEXT = [" ".join(f"w{(7 * i + j * j) % 90}" for j in range(24)) for i in range(40)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heal")
    base, tuned = write_pair("llama", folder)
    write_tokenizer(tuned)
    compress(base, tuned, folder / "delta", "bitdelta:bits=2,scale=row")
    (folder / "text.txt").write_text("\n\n".join(TEXT))
    return folder


@pytest.fixture
def run(made, tmp_path, monkeypatch, capsys):
    def call(*options, text="text.txt"):
        paths = ["--base", made / "base", "--tuned", made / "tuned", "--text", made / text, "-o", tmp_path / "healed"]
        words = ["heal", made / "delta", *paths, "--length", 16, *options]
        monkeypatch.setattr("sys.argv", ["deltakeeper", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return call


def test_a_report_as_json(made, run, tmp_path):
    status, out, _ = run("--steps", 20, "--lr", "0.05", "--json")
    assert status == 0
    report = json.loads(out)
    assert report["improved"]
    assert 0 < report["after"] < report["before"]
    assert verify(tmp_path / "healed", made / "base", made / "tuned").ok
    healing = json.loads((tmp_path / "healed" / "delta_report.json").read_text())["healing"]
    assert healing["after"] == report["after"]
    assert healing["text"].endswith("text.txt")
    assert (tmp_path / "healed" / "tokenizer.json").is_file()


def test_a_report_to_read(run):
    status, out, _ = run("--steps", 4, "--trainable", "scales+uncompressed")
    assert status == 0
    assert "before" in out
    assert "after 4 steps" in " ".join(out.split())


def test_values_that_stay_are_said_to_stay(run):
    status, out, _ = run("--steps", 1, "--lr", "1e4")
    assert status == 0
    assert "values are as they were" in " ".join(out.split())


@pytest.mark.parametrize(
    ("options", "text", "said"),
    [
        (("--trainable", "everything"), "text.txt", "choose scales or"),
        ((), "gone.txt", "no calibration text"),
        (("--steps", "0"), "text.txt", "steps = 0"),
    ],
)
def test_mistakes_get_a_sentence(run, tmp_path, options, text, said):
    status, _, err = run(*options, text=text)
    assert status == 2
    assert said in err
    assert not (tmp_path / "healed").exists()
    assert not list(tmp_path.glob(".healed*"))


def test_documents_do_as_well_as_a_file(made, tmp_path):
    settings = {"steps": 2, "length": 16}
    parts = made / "delta", made / "base", made / "tuned"
    heal(*parts, TEXT, tmp_path / "documents", **settings)
    heal(*parts, made / "text.txt", tmp_path / "file", **settings)
    roots = [open_artifact(tmp_path / name).manifest.reconstruction.root for name in ("documents", "file")]
    assert roots[0] == roots[1] != open_artifact(made / "delta").manifest.reconstruction.root
