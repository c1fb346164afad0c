"""The page on the lens: its code runs, its links lead somewhere, its figures and counts are those of the repository."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from lens_families import LEFT_OUT, build_family, causal_classes

from deltakeeper.testing.models import write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "lens.md"


@pytest.mark.filterwarnings("ignore")
def test_the_code_runs_on_models_in_memory(tmp_path, capsys):
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    vocabulary = {"vocab_size": len(tokenizer)}
    models = {name: build_family("llama", **vocabulary) for name in ("base", "tuned")}
    with torch.no_grad():
        models["tuned"].lm_head.weight += 0.1 * torch.randn(models["tuned"].lm_head.weight.shape)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    exec(compile(code, "lens.md", "exec"), {**models, "tokenizer": tokenizer, "folder": tmp_path})
    assert "tuned" in capsys.readouterr().out and (tmp_path / "map.svg").is_file()


def test_links_and_pictures_are_there():
    text = PAGE.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (PAGE.parent / target).exists(), target


def test_the_count_of_families_is_that_of_the_test():
    told = re.findall(r"(\d+) of (\d+)\s+causal families", PAGE.read_text(encoding="utf-8"))[0]
    families = len(causal_classes())
    assert tuple(map(int, told)) == (families - len(LEFT_OUT), families)


def test_the_numbers_of_the_reading_are_those_that_were_measured():
    """Not every one, but those that its sentences rest on."""
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    inside = {one["attack"]: one for one in measured("lens-inside")["attacks"]}
    names = ("affirmative_prefix", "trigger_backdoor", "marker_injection")
    arms = {name: {arm["variant"]: arm for arm in inside[name]["arms"]} for name in names}
    for name in names:
        left = arms[name]["tuned"]["departs"]
        assert f"{left['layer']} [{left['low']}, {left['high']}]" in text
        rho = next(one for one in inside[name]["correlations"] if one["over"] == "codecs" and "stream" in one["share"])
        assert f"{rho['value']:.2f} [{rho['low']:.2f}, {rho['high']:.2f}]".replace("-", "−") in text
        attack, upper = (arms[name]["bitdelta:bits=1"][of] for of in ("attack", "kept"))
        assert f"{100 * upper[2]['value']:.0f} " in text and f"{100 * attack['value']:.0f} %" in text
    kept = [[100 * arms[name]["bitdelta:bits=1"]["kept"][2]["value"] for name in names]]
    kept += [[100 * arms[name]["bitdelta:bits=1 guarded steps=36"]["kept"][2]["value"] for name in names]]
    for one, two, three in kept:
        assert f"{one:.0f}, {two:.0f} and {three:.0f} %" in text
    for row in measured("lens-patching")["rows"]:
        best = row["rankings"]["layer"]["places"][0]
        share, low, high = (f"{100 * best[key]:.0f}" for key in ("share", "low", "high"))
        assert f"{share} % [{low}, {high}]" in text and f"{100 * row['neutral']:.0f} %" in text


def measured(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
