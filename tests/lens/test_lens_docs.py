"""The page on the lens: its code runs, its links lead somewhere, its figures and counts are those of the repository."""

from __future__ import annotations

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
