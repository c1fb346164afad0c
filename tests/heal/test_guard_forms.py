"""What guarding does to artifacts of every layout, on models too small to say anything."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from deltakeeper import open_artifact, verify
from deltakeeper.compress import compress
from deltakeeper.errors import ArtifactError, BaseMismatchError, DataError, DeltakeeperError
from deltakeeper.heal import GuardSettings, Lesson, guard
from deltakeeper.heal.adversary import perturb
from deltakeeper.heal.guard_fit import GuardFit, share_out
from deltakeeper.heal.guard_terms import GuardedTerms, scaled
from deltakeeper.heal.hearing import Heard, choose_pack, hear, say
from deltakeeper.heal.lessons import common_beginning, pack, stack
from deltakeeper.heal.student import build_student
from deltakeeper.testing import write_pair

CODECS = (
    "bitdelta:zero=plus",
    "bitdelta:scale=column,zero=zero",
    "magnitude:keep=0.2",
    "rtn:bits=2",
    "dqrelo:rank=2",
    "shrink:factor=1.0",
)
MORE = (*CODECS, "bitdelta:bits=2,scale=row", "svd:rank=2", "compeft")
QUICK = GuardSettings(steps=8, rows=8, rank=2, lr=0.1)


def made(n, seed=0):
    draw = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        own = torch.randint(3, 96, (int(torch.randint(5, 9, (1,), generator=draw)),), generator=draw).tolist()
        teacher = "base" if i % 2 else "tuned"
        found.append(Lesson((1, 7, 9, *own), 2 + i % 2, teacher, kind="probe" if i % 4 == 1 else ""))
    return found


LESSONS = made(24)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_pair("llama", tmp_path_factory.mktemp("pair"), scale=2e-2)


@pytest.fixture(scope="module")
def deltas(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("deltas")

    def of(codec):
        path = folder / codec.replace(":", "-").replace(",", "-")
        if not path.exists():
            compress(*models, path, codec)
        return path

    return of


def live(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def digest(folder):
    return hashlib.sha256((folder / "delta_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("codec", CODECS)
def test_every_layout_comes_nearer_to_its_teachers(models, deltas, tmp_path, codec):
    report = guard(deltas(codec), *models, LESSONS, tmp_path / "out", settings=QUICK)
    before, after = sum(report.before.values()), sum(report.after.values())
    assert after < 0.98 * before
    assert set(report.after) == {"base", "tuned", "probe"}
    assert verify(tmp_path / "out", models[0]).ok
    artifact = open_artifact(tmp_path / "out")
    assert not artifact.manifest.exact
    inside = "model.layers.1.mlp.up_proj.weight"
    assert artifact.terms(inside)[-1].name == "lowrank"
    assert len(artifact.terms("model.embed_tokens.weight")) == len(
        open_artifact(deltas(codec)).terms("model.embed_tokens.weight")
    )


@pytest.mark.parametrize("codec", MORE)
def test_what_is_trained_is_what_is_stored(models, deltas, codec):
    model = live(models[0])
    student = build_student(
        model, open_artifact(deltas(codec)), "scales", GuardedTerms(open_artifact(deltas(codec)), QUICK).prepare
    )
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for step in student.parameters():
            step += 0.1 * torch.randn(step.shape, generator=draw)
        batch = stack(LESSONS[:4], 0)
        trained = say(model, batch)
        with student.as_stored():
            stored = say(model, batch)
    assert float((trained - stored).norm() / stored.norm()) < 2e-3


def test_a_guard_begins_with_the_delta_itself(models, deltas):
    artifact = open_artifact(deltas("bitdelta:zero=plus"))
    model = live(models[0])
    student = build_student(model, artifact, "scales", GuardedTerms(artifact, QUICK).prepare)
    plain = live(models[0])
    build_student(plain, artifact, "scales")
    with torch.no_grad():
        batch = stack(LESSONS[:4], 0)
        assert torch.allclose(say(model, batch), say(plain, batch), atol=1e-4)
    scales = student.trained["model.layers.0.mlp.up_proj.weight"].terms[0]
    assert scales.scale == "row"


def test_the_same_seed_gives_the_same_bytes(models, deltas, tmp_path):
    delta = deltas("bitdelta:zero=plus")
    found = []
    for i, seed in enumerate((0, 0, 1)):
        settings = GuardSettings(steps=2, rows=6, rank=2, radius=0.5, ascents=1, seed=seed)
        guard(delta, *models, LESSONS, tmp_path / f"{i}", settings=settings)
        found.append(digest(tmp_path / f"{i}"))
    assert found[0] == found[1] != found[2]


def test_own_values_can_be_left_alone(models, deltas, tmp_path):
    delta = deltas("bitdelta:zero=plus")
    settings = GuardSettings(steps=4, rows=6, rank=2, own=False, widen=False)
    guard(delta, *models, LESSONS, tmp_path / "out", settings=settings)
    before, after = (load_file(f / "delta_model.safetensors") for f in (delta, tmp_path / "out"))
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert after.keys() - before.keys()


def test_a_smaller_start_shrinks_every_term(models, deltas):
    artifact = open_artifact(deltas("dqrelo:rank=2"))
    for term in artifact.terms("model.layers.0.mlp.up_proj.weight"):
        assert torch.allclose(scaled(term, 0.25).to_dense(), 0.25 * term.to_dense(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2", "gemma3"])
def test_packed_and_stacked_exchanges_say_the_same(tmp_path, kind):
    base, _ = write_pair(kind, tmp_path)
    model = live(base)
    shared = common_beginning(LESSONS)
    assert shared == 3
    with torch.no_grad():
        chosen = choose_pack(model, LESSONS, shared)
        alone = torch.cat([say(model, stack([lesson], shared)) for lesson in LESSONS[:6]])
        for way in (chosen, stack):
            assert torch.allclose(say(model, way(LESSONS[:6], shared)), alone, atol=1e-4)
    if kind.startswith("llama"):
        assert chosen is pack


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_teachers_are_heard_without_being_kept(tmp_path, kind):
    base, _ = write_pair(kind, tmp_path)
    heard = hear(base, LESSONS, "base", 3, rows=4)
    assert set(heard.said) == {n for n, lesson in enumerate(LESSONS) if lesson.teacher == "base"}
    model = live(base).to(torch.bfloat16)
    for number in sorted(heard.said)[:3]:
        with torch.no_grad():
            wanted = say(model, stack([LESSONS[number]], 3)).float()
        assert torch.allclose(heard.logits(number), wanted, rtol=0.02, atol=0.02)


def test_an_adversary_goes_where_the_loss_is_large_and_no_further_than_it_may(models):
    model = live(models[0])
    batch = pack(LESSONS[:6], 3)
    with torch.no_grad():
        clean = model.get_input_embeddings()(batch.ids)
        wanted = say(model, batch).log_softmax(-1)

    def loss(embeddings):
        said = say(model, batch, embeddings).log_softmax(-1)
        return (wanted.exp() * (wanted - said)).sum(-1).mean()

    def at(ascents, radius):
        draw = torch.Generator().manual_seed(0)
        return perturb(model, batch, loss, radius=radius, ascents=ascents, generator=draw)

    moved = at(4, 0.5)
    size = float(clean.square().mean().sqrt()) * clean.shape[-1] ** 0.5
    lengths = (moved - clean)[0].norm(dim=1)
    assert float(lengths.max()) <= 0.5 * size * 1.001
    untouched = sorted(set(range(len(lengths))) - set(batch.prompts.tolist()))
    assert float(lengths[untouched].max()) == 0.0
    drawn = clean.flatten(0, 1).index_add(
        0,
        batch.prompts,
        torch.nn.functional.normalize(
            torch.randn(len(batch.prompts), clean.shape[-1], generator=torch.Generator().manual_seed(0)), dim=1
        )
        * 0.25
        * size,
    )
    with torch.no_grad():
        assert float(loss(moved)) > 1.5 * float(loss(drawn.view_as(clean)))


@given(st.integers(1, 40), st.dictionaries(st.sampled_from("abcdef"), st.floats(0.01, 5), min_size=1))
def test_rows_are_shared_out_in_full(rows, shares):
    found = share_out(rows, sorted(shares), shares)
    assert sum(found.values()) == max(rows, len(shares))
    whole = sum(shares.values())
    if rows >= 2 * len(shares):
        assert all(n >= 1 and abs(n - rows * shares[kind] / whole) < len(shares) + 1 for kind, n in found.items())


@pytest.mark.parametrize(
    ("lesson", "message"),
    [
        (Lesson((1, 2), 2, "base"), "a prompt and an answer"),
        (Lesson((1, 2), 0, "base"), "a prompt and an answer"),
        (Lesson((1, 2), 1, "sage"), "choose base or tuned"),
        (Lesson((1, 2), 1, "base", weight=-1.0), "weight of -1"),
    ],
)
def test_lessons_that_cannot_be_learned_are_refused(models, deltas, tmp_path, lesson, message):
    with pytest.raises(DataError, match=message):
        guard(deltas("bitdelta:zero=plus"), *models, [lesson], tmp_path / "out")
    with pytest.raises(DataError, match="no lessons"):
        guard(deltas("bitdelta:zero=plus"), *models, [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"rank": -1}, {"lr": float("nan")}, {"radius": -0.1}, {"shares": {"probe": -1.0}}]
)
def test_settings_that_make_no_sense_for_a_guard_are_refused(change):
    with pytest.raises(DataError):
        GuardSettings(**change)


def test_nothing_is_left_behind_where_a_guard_fails(models, deltas, tmp_path):
    delta = deltas("bitdelta:zero=plus")
    with pytest.raises(DeltakeeperError, match="not finite"):
        guard(delta, *models, LESSONS, tmp_path / "out", settings=GuardSettings(steps=8, rows=6, lr=1e30))
    with pytest.raises(BaseMismatchError):
        guard(delta, models[1], models[1], LESSONS, tmp_path / "out", settings=QUICK)
    with pytest.raises(DeltakeeperError, match="no values to train"):
        own = GuardSettings(steps=1, rank=0, own=False)
        guard(delta, *models, LESSONS, tmp_path / "out", settings=own)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ArtifactError, match="exists"):
        guard(delta, *models, LESSONS, delta, settings=QUICK)


def test_a_teacher_can_be_sharpened_and_kept_from_some_first_words(models):
    draw = torch.Generator().manual_seed(2)
    said = torch.randn(2, 96, generator=draw)
    lesson = Lesson((1, 7, 9, 4, 5, 6), 2, "base", never=(5, 8))
    heard = {"base": Heard({0: said.clone()}, None)}
    fit = GuardFit(live(models[0]), [lesson], heard, 3, GuardSettings(sharpen=2.0))
    wanted = fit._wanted(0).softmax(-1)
    assert float(wanted[0, [5, 8]].sum()) == 0.0
    assert torch.allclose(wanted[1], (2 * said[1]).softmax(-1))
    assert torch.equal(heard["base"].said[0], said)
    assert isinstance(fit._step([0]), float)
    assert 0 < fit.history[0]["base"] < 1e3
