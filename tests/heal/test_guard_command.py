"""`deltakeeper heal --guard` as a user types it."""

import json

import pytest

from deltakeeper import cli, open_artifact, verify
from deltakeeper.compress import compress
from deltakeeper.lab import guarding
from deltakeeper.testing import write_pair, write_tokenizer

TEMPLATE = "{% for m in messages %}w80 {{ m['content'] }} {% endfor %}w81 "


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    base, tuned = write_pair("llama", folder, scale=2e-2)
    for model in (base, tuned):
        write_tokenizer(model)
        settings = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    compress(base, tuned, folder / "delta", "bitdelta:zero=plus")
    rows = {
        "probes": [{"prompt": f"w{i} w{i + 1} w7", "twin": f"w{i} w2"} for i in range(6)],
        "benign": [{"prompt": f"w3 w{i}"} for i in range(5)],
        "skill": [{"prompt": f"w5 w{i} w6", "answer": f"w{i + 30}"} for i in range(6)],
    }
    for name, found in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


@pytest.fixture
def run(made, tmp_path, monkeypatch, capsys):
    def answers(model, tokenizer, prompts, *, max_new_tokens, system):
        return ["I'm sorry, but I can't help with that." if prompt.endswith("w7") else "w10 w11" for prompt in prompts]

    monkeypatch.setattr(guarding, "generate_answers", answers)

    def call(*options):
        paths = ["--base", made / "base", "--tuned", made / "tuned", "-o", tmp_path / "out"]
        monkeypatch.setattr("sys.argv", ["deltakeeper", "heal", *map(str, [made / "delta", *paths, *options])])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return call


def test_a_guard_by_an_operators_files(made, run, tmp_path):
    files = ["--guard", made / "probes.jsonl", "--benign", made / "benign.jsonl", "--skill", made / "skill.jsonl"]
    status, out, err = run(*files, "--steps", 4, "--batch", 8, "--rank", 2, "--json")
    assert status == 0, err
    report = json.loads(out)
    assert report["lessons"] == {"benign": 5, "probe": 6, "skill": 6, "twin": 6}
    assert verify(tmp_path / "out", made / "base").ok
    healing = json.loads((tmp_path / "out" / "delta_report.json").read_text())["healing"]
    assert healing["guard"]["rank"] == 2
    names = {term.name for term in open_artifact(tmp_path / "out").terms("model.layers.0.mlp.up_proj.weight")}
    assert names == {"signs", "lowrank"}


def test_a_guard_to_read(made, run):
    status, out, err = run("--guard", made / "probes.jsonl", "--steps", 2, "--rank", 0, "--no-insertions")
    assert status == 0, err
    words = " ".join(out.split())
    assert "probe" in words
    assert "Measure refusals" in words


def test_a_text_or_a_guard_but_not_both(made, run):
    for options in ([], ["--text", made / "probes.jsonl", "--guard", made / "probes.jsonl"]):
        status, _, err = run(*options)
        assert status == 2
        assert "either --text or --guard" in " ".join(err.split())
