"""`deltakeeper lens` end to end on a tiny pair, and what it says to bad input."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from deltakeeper import cli
from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.compress import compress
from deltakeeper.errors import DataError
from deltakeeper.fingerprint import fingerprint
from deltakeeper.lens.layer_weights import read_layer_weights
from deltakeeper.lens.ranking import Origin
from deltakeeper.lens.trace_file import read_trace
from deltakeeper.lens.tuned import Translators
from deltakeeper.lens.tuned_file import write_translators
from deltakeeper.testing import write_pair
from deltakeeper.testing.models import write_tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    base, tuned = write_pair("llama", folder, dtype=torch.float32, scale=0.03)
    write_tokenizer(base)
    compress(base, tuned, folder / "one", "bitdelta")
    return base, tuned, folder / "one"


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["deltakeeper", "lens", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code or 0, *capsys.readouterr()

    return run


def test_traces_statistics_and_a_table(pair, run, tmp_path):
    base, tuned, one = pair
    asked = tmp_path / "asked.jsonl"
    lines = [{"prompt": "w1 w2 w3"}, {"prompt": "w4 w5"}]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "lens"
    status, said, _ = run(base, "--delta", f"one={one}", "--tuned", tuned, "--prompts", asked, "-o", out)
    assert status == 0 and "departs" in said and "2 prompts, 3 variants" in said
    names = sorted(path.name for path in (out / "traces").iterdir())
    assert names == [f"{name}-000{n}.json" for name in ("base", "one", "tuned") for n in (1, 2)]
    trace = read_trace(out / "traces" / "one-0002.json")
    assert trace.meta.codec == "bitdelta" and len(trace.meta.delta) == 64 and trace.meta.base == str(base)
    value = json.loads((out / "lens.json").read_text())
    assert set(value["variants"]) == {"base", "one", "tuned"}
    assert value["variants"]["tuned"]["kept"][0] == pytest.approx(1)
    assert value["variants"]["base"]["departs"] is None
    assert (out / "lens.html").is_file()
    assert {path.name for path in (out / "figures").iterdir()} >= {"heat_map.svg", "commitment.svg", "js_base.svg"}


def test_one_prompt_some_cells_as_json(pair, run, tmp_path):
    out = tmp_path / "lens"
    options = ("--layers", "1", "--positions", "-1-0,2", "--decode", "base", "--top", "2", "--produce", "2", "--json")
    status, said, _ = run(pair[0], "--prompt", "w1 w2 w3", "-o", out, *options)
    value = json.loads(said)
    assert status == 0 and value["layers"] == [1] and value["variants"]["base"]["kept"] is None
    assert {"read", "decode"} <= set(value["seconds"])
    trace = read_trace(out / "traces" / "base-0001.json")
    assert trace.positions.tolist() == [1, 2, 4] and trace.top_ids.shape == (1, 3, 2) and trace.meta.decode == "base"


def test_a_tuned_lens_of_this_base_decodes(pair, run, tmp_path):
    base, tuned, _ = pair
    for folder, name in ((base, "mine"), (tuned, "other")):
        with open_checkpoint(folder) as checkpoint:
            lens = Translators.identity(2, 48, fingerprint(checkpoint).root)
        write_translators(replace(lens, steps=1, text_sha256="0" * 64), tmp_path / f"{name}.safetensors")
    options = ("--prompt", "w1 w2", "-o", tmp_path / "lens", "--tuned-lens")
    status, _, _ = run(base, *options, tmp_path / "mine.safetensors")
    trace = read_trace(tmp_path / "lens" / "traces" / "base-0001.json")
    assert status == 0 and trace.meta.decoder.startswith("tuned lens ")
    for name in ("other", "nothing"):
        status, _, said = run(base, *options, tmp_path / f"{name}.safetensors")
        assert status == 2 and said.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "either --prompt or --prompts"),
        (("--prompt", "w1", "--layers", "a"), "no list of numbers for --layers"),
        (("--prompt", "w1", "--layers", "3-1"), "no list of numbers for --layers"),
        (("--prompt", "w1", "--layers", "0-99999"), "more than 8192"),
        (("--prompt", "w1", "--layers", "7"), "layers 0 to 1"),
        (("--prompt", "w1", "--positions", "9"), "position 9 lies outside"),
        (("--prompt", "w1", "--decode", "mine"), "no tail"),
        (("--prompt", "w1", "--delta", "base=x"), "another name"),
        (("--prompt", "w1", "--delta", "x"), "NAME=PATH"),
        (("--prompt", "w1", "--delta", "x=/nowhere"), "/nowhere"),
        (("--prompt", "w1", "--tuned", "/nowhere"), "/nowhere"),
        (("--prompts", "/nowhere"), "no prompt file"),
        (("--prompt", "w1", "--system", "be kind"), "no chat template"),
        (("--prompt", "w1", "--top", "0"), "top"),
        (("--prompt", "w1", "--memory", "10"), "memory"),
        (("--prompt", "w1", "--tokens", "x"), "spell it NAME=TEXT"),
        (("--prompt", "w1", "--tokens", "x=unheard"), "no first token"),
        (("--prompt", "w1", "--against", "/nowhere"), "no prompt file"),
    ],
)
def test_bad_input_is_one_sentence(pair, run, tmp_path, options, words):
    status, _, said = run(pair[0], "-o", tmp_path / "lens", *options)
    assert status == 2 and words in said and said.count("\n") == 1
    assert not (tmp_path / "lens").exists()


def test_a_prompt_that_names_a_tenant_is_refused(pair, run, tmp_path):
    (tmp_path / "asked.jsonl").write_text('{"prompt": "w1", "tenant": "one"}\n')
    status, _, said = run(pair[0], "-o", tmp_path / "lens", "--prompts", tmp_path / "asked.jsonl")
    assert status == 2 and "leave out 'tenant'" in said


def test_layers_are_exchanged_and_ranked(pair, run, tmp_path):
    base, tuned, one = pair
    words = [
        option for text in ("w1 w2 w3", "w4 w5", "w9 w8 w7", "w30", "w12 w13", "w21") for option in ("--prompt", text)
    ]
    given = (base, "--delta", f"one={one}", "--tuned", tuned, *words, "-o", tmp_path)
    status, said, _ = run(*given, "--patch", "base:tuned", "--patch", "one:tuned")
    assert status == 0 and "tuned with layers of one" in said and "share of the way" in said
    value = json.loads((tmp_path / "patch-base-tuned.json").read_text())
    assert value["prompts"] + value["left_out"] == 6 and value["rankings"]["layer"]["receiver"] == "tuned"
    assert (tmp_path / "figures" / "patch-one-tuned-deltas.svg").is_file() and "prefers neither" in said
    assert said.index("departs from the base") < said.index("tuned with layers of one")
    status, said, _ = run(*given, "--patch", "base:tuned", "--json")
    assert status == 0 and json.loads(said)["patched"][0]["donor"] == "base"
    status, _, told = run(base, "--tuned", tuned, "--prompt", "w1", "-o", tmp_path / "no", "--patch", "base:tuned")
    assert status and "give two prompts at least" in told and not (tmp_path / "no").exists()
    status, _, told = run(*given, "--patch", "base:tuned", "--patch-by", "refusal")
    assert status and "knows no tokens that open refusals" in told
    status, _, told = run(*given, "--patch", "base:other")
    assert status and "name two of base, one, tuned" in told
    status, _, told = run(*given, "--patch", "base:tuned", "--patch-by", "magic")
    assert status and "write choice or refusal" in told


def test_token_sets_of_ones_own_are_followed(pair, run, tmp_path):
    status, said, _ = run(pair[0], "--prompt", "w1 w2", "-o", tmp_path, "--tokens", "mine=w5", "--tokens", "two=w6 w7")
    assert status == 0 and "probability and rank of tokens in the last layer" in " ".join(said.split())
    trace = read_trace(tmp_path / "traces" / "base-0001.json")
    value = json.loads((tmp_path / "lens.json").read_text())
    assert set(trace.targets) >= {"mine", "two"} and value["targets"] == {"mine": ["w5"], "two": ["w6"]}
    bands = value["variants"]["base"]["bands"]
    assert bands["rank:mine"]["median"] == trace.targets["mine"].rank[:, 0].tolist()
    assert bands["prob:two"]["median"] == pytest.approx(
        torch.tensor(trace.targets["two"].log_prob[:, 0]).exp().tolist(), rel=1e-3
    )
    assert "rank of the best token of mine" in (tmp_path / "lens.html").read_text()


def write_prompts(path, count, last):
    lines = [{"prompt": f"w{3 + number} w{40 - number} {last}".strip()} for number in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_second_set_of_prompts_is_told_from_the_first(pair, run, tmp_path):
    base, tuned, one = pair
    first, second = write_prompts(tmp_path / "first", 8, "w50"), write_prompts(tmp_path / "second", 8, "w51")
    given = (base, "--delta", f"one={one}", "--tuned", tuned, "--prompts", first)
    status, said, _ = run(*given, "--against", second, "-o", tmp_path / "out")
    said = " ".join(said.split())
    assert status == 0 and "nearest control" in said and "layer from which pairs part" in said
    found = json.loads((tmp_path / "out" / "directions.json").read_text())
    assert set(found["variants"]) == {"base", "one", "tuned"} and found["variants"]["base"]["low"][0] > 1
    parted = json.loads((tmp_path / "out" / "divergence.json").read_text())
    assert parted["pairs"] == 8 and "distance to the base" not in parted["variants"]["base"]
    assert read_trace(tmp_path / "out" / "traces-against" / "one-0008.json").meta.variant == "one"
    page = (tmp_path / "out" / "lens.html").read_text()
    assert "Over all prompts" in page and (tmp_path / "out" / "figures" / "divergence.svg").is_file()
    fewer = write_prompts(tmp_path / "fewer", 5, "w51")
    status, said, _ = run(*given, "--against", fewer, "-o", tmp_path / "some", "--json")
    assert status == 0 and set(json.loads(said)["against"]) == {"directions"}
    assert not (tmp_path / "some" / "divergence.json").exists()
    three = write_prompts(tmp_path / "three", 3, "w51")
    status, _, told = run(*given, "--against", three, "-o", tmp_path / "none")
    assert status == 2 and "4 prompts a set are the least" in told and not (tmp_path / "none").exists()


def test_a_ranking_weighs_the_pair_that_it_was_made_of_and_no_other(pair, run, tmp_path):
    base, tuned, one = pair
    words = [option for text in ("w1 w2 w3", "w4 w5", "w9 w8 w7", "w30") for option in ("--prompt", text)]
    given = (base, "--delta", f"one={one}", "--tuned", tuned, *words, "-o", tmp_path)
    assert run(*given, "--patch", "base:tuned", "--patch", "base:one")[0] == 0
    with open_checkpoint(base) as first, open_checkpoint(tuned) as second:
        roots = {"base": fingerprint(first).root, "tuned": fingerprint(second).root}
        for name in ("tuned", "one"):
            weigh = read_layer_weights(tmp_path / f"patch-base-{name}.json", "starve")
            assert weigh.ranking.origin == Origin(roots["base"], roots["base"], roots["tuned"])
            weigh.check_pair(first, second)
            with pytest.raises(DataError, match="another base than"):
                weigh.check_pair(second, second)
            with pytest.raises(DataError, match="another fine-tune than"):
                weigh.check_pair(first, first)
