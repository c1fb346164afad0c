"""Unmodified vLLM with the plugin, over HTTP; `make test-vllm` runs it in an environment that has vLLM."""

from __future__ import annotations

import importlib.util
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_references import answer, gap, merged, open_model
from vllm_server import Answer, VllmServer

from deltakeeper.artifact import open_artifact
from deltakeeper.compress import compress
from deltakeeper.export import export_lora
from deltakeeper.testing import write_pair, write_tokenizer

if importlib.util.find_spec("vllm") is None:
    pytest.skip(
        "vLLM is not installed here; `make test-vllm` makes an environment that has it", allow_module_level=True
    )

CODECS = {
    "bit": "bitdelta",
    "rows": "bitdelta:bits=3,scale=row",
    "ranks": "svd:rank=4",
    "both": "dqrelo:rank=4",
    "kept": "magnitude:keep=0.3",
    "drawn": "dare:p=0.5",
    "codes": "rtn:bits=4,group=16",
    "whole": "dense",
}
"""An artifact for each layout, and sums of them."""
PROMPT = [1, 5, 9, 13, 21, 34, 55, 60, 7, 30]
LONG = [4 + (7 * i) % 90 for i in range(80)]
"""More than two blocks of the cache."""
NEAR = 2e-5
"""How far float32 log-probabilities of vLLM and transformers may be apart; deltas move them a thousand times that."""
OPTIONS = (
    "--dtype",
    "float32",
    "--max-model-len",
    "128",
    "--block-size",
    "32",
    "--max-loras",
    "6",
    "--max-cpu-loras",
    "6",
)
SIZES = {"hidden_size": 128, "max_position_embeddings": 128}  # heads of 32, the least that vLLM has on CPUs


@dataclass(frozen=True)
class World:
    """A server, the folders that it serves from, and what the base says."""

    server: VllmServer
    folder: Path
    base: Answer

    def reference(self, name: str, prompt: list[int] = PROMPT) -> Answer:
        return answer(merged(self.folder / "base", self.folder / name), prompt)


def write_world(kind: str, folder: Path) -> None:
    base, tuned = write_pair(kind, folder, scale=2e-2, settings=SIZES)
    write_tokenizer(base)
    for name, codec in CODECS.items():
        compress(base, tuned, folder / name, codec)
    compress(base, tuned, folder / "linear", "svd:rank=4", embeddings="base", norms="base")
    export_lora(folder / "linear", base, folder / "lora")


@pytest.fixture(scope="module", params=["qwen2", "llama_tied"])
def world(request, tmp_path_factory):
    """Biases in one family, a tied head in the other."""
    folder = tmp_path_factory.mktemp(request.param)
    write_world(request.param, folder)
    with VllmServer(folder / "base", folder / "vllm.log", *OPTIONS) as server:
        yield World(server, folder, answer(open_model(folder / "base"), PROMPT))


def loaded(world: World, name: str) -> None:
    """Load an artifact under its own name, unless it is there."""
    cards = world.server.client.get("/v1/models").json()["data"]
    if name not in [card["id"] for card in cards]:
        world.server.load(name, world.folder / name).raise_for_status()


def test_the_base_is_what_transformers_computes(world):
    assert gap(world.server.ask("base", PROMPT), world.base) < NEAR


@pytest.mark.parametrize("name", list(CODECS))
def test_every_layout_answers_as_its_merged_model(world, name):
    loaded(world, name)
    expected = world.reference(name)
    assert gap(world.server.ask(name, PROMPT), expected) < NEAR
    moved = [abs(a - b) for a, b in zip(expected.prompt, world.base.prompt, strict=True)]
    assert max(moved) > 1000 * NEAR, "the delta has to matter"
    assert world.server.ask("base", PROMPT) == world.server.ask("base", PROMPT)
    assert gap(world.server.ask("base", PROMPT), world.base) < NEAR


def test_tenants_mixed_in_one_batch_answer_as_alone(world):
    """Base, three artifacts and an ordinary LoRA, twice each, prompts rated in the same passes."""
    names = ["base", "bit", "ranks", "rows", "lora"]
    for name in names[1:]:
        loaded(world, name)
    prompts = [PROMPT, LONG[:43]]
    asked = [(name, prompt) for prompt in prompts for name in names]
    alone = [world.server.ask(name, prompt, 40) for name, prompt in asked]
    assert len({one.prompt for one in alone}) == len(asked), "the tenants have to differ"
    before = world.server.metric("vllm:iteration_tokens_total_count")
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda one: world.server.ask(*one, 40), asked))
    passes = world.server.metric("vllm:iteration_tokens_total_count") - before
    assert passes < len(asked) * 40 / 2, "most passes have to hold rows of several tenants"
    for one, other in zip(alone, together, strict=True):
        assert gap(one, other) < NEAR


def test_rows_of_the_base_stay_its_own_whichever_slot_an_adapter_has(world):
    """Six names of one LoRA fill the six slots; vLLM 0.32 on CPUs gives rows of the base what is in the last one."""
    names = [f"lora-{i}" for i in range(6)]
    for name in names:
        world.server.load(name, world.folder / "lora").raise_for_status()
    alone = world.server.ask("base", PROMPT, 40)
    with ThreadPoolExecutor(6) as pool:
        found = list(
            pool.map(lambda name: world.server.ask(name, PROMPT, 40), ["base", *names[:2], "base", *names[4:]])
        )
    assert gap(found[0], alone) < NEAR and gap(found[3], alone) < NEAR
    assert gap(found[1], found[5]) < NEAR


def test_an_ordinary_lora_is_what_the_applied_delta_is(world):
    loaded(world, "lora")
    assert (
        gap(world.server.ask("lora", PROMPT), world.reference("linear")) < 100 * NEAR
    )  # vLLM keeps it in its own dtype


def test_another_version_in_place_finds_nothing_of_the_old_one(world):
    """From the same path, which vLLM's own keys of cached prefixes would not tell apart."""
    live = world.folder / "live"
    shutil.copytree(world.folder / "bit", live)
    world.server.load("live", live).raise_for_status()
    old = world.server.ask("live", LONG, rated=False)
    hits = world.server.metric("vllm:prefix_cache_hits_total")
    assert world.server.ask("live", LONG, rated=False).tokens == old.tokens
    assert world.server.metric("vllm:prefix_cache_hits_total") > hits, "the cache has to be in use"
    shutil.rmtree(live)
    shutil.copytree(world.folder / "whole", live)
    world.server.load("live", live, in_place=True).raise_for_status()
    new, expected = world.server.ask("live", LONG, rated=False), world.reference("whole", LONG)
    assert new.tokens == expected.tokens
    assert max(abs(a - b) for a, b in zip(new.chances, expected.chances, strict=True)) < NEAR
    assert world.server.log.read_text().count(f"{live} read in") == 2, "a pass must not read it again"


def test_an_unloaded_name_is_gone_and_can_come_again(world):
    loaded(world, "bit")
    assert world.server.unload("bit").status_code == 200
    asked = {"model": "bit", "prompt": PROMPT, "max_tokens": 1}
    assert world.server.client.post("/v1/completions", json=asked).status_code == 404
    loaded(world, "bit")
    assert gap(world.server.ask("bit", PROMPT), world.reference("bit")) < NEAR


def test_a_slot_holds_signs_packed(world):
    """One bit a weight and little more, where bfloat16 has sixteen: for matrices; vectors are held in float32."""
    loaded(world, "bit")
    records = open_artifact(world.folder / "bit").manifest.tensors.values()
    weights = sum(record.shape[0] * record.shape[1] for record in records if len(record.shape) == 2 and record.terms)
    vectors = sum(record.shape[0] for record in records if len(record.shape) == 1)
    held = world.server.held_bytes(world.folder / "bit")
    assert weights / 8 <= held < weights / 8 * 1.25 + 4 * vectors


def refusal(world: World, path: Path) -> str:
    """What a load is refused with; the server goes on."""
    found = world.server.load("refused", path)
    assert found.status_code >= 400
    assert gap(world.server.ask("base", PROMPT), world.base) < NEAR
    return found.json()["error"]["message"]


def test_an_artifact_of_another_base_is_refused(world, tmp_path):
    base, tuned = write_pair("llama", tmp_path, seed=7, settings=SIZES)
    compress(base, tuned, tmp_path / "delta", "bitdelta")
    assert "is not the base that is served" in refusal(world, tmp_path / "delta")


def test_an_altered_artifact_is_refused(world, tmp_path):
    shutil.copytree(world.folder / "bit", tmp_path / "delta")
    file = tmp_path / "delta" / "delta_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    assert "was altered" in refusal(world, tmp_path / "delta")


def test_added_tokens_are_refused_by_the_name_of_the_tensor(world, tmp_path):
    tuned = tmp_path / "tuned"
    shutil.copytree(world.folder / "tuned", tuned)
    weights = load_file(tuned / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = torch.cat([weights[name], weights[name][:2]])
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 2}))
    compress(world.folder / "base", tuned, tmp_path / "delta", "bitdelta")
    said = refusal(world, tmp_path / "delta")
    assert "of shape (98, 128) where the served model has (96, 128)" in said and "export-lora" in said


def test_a_fine_tune_that_computes_otherwise_is_refused(world, tmp_path):
    shutil.copytree(world.folder / "bit", tmp_path / "delta")
    config = json.loads((world.folder / "base" / "config.json").read_text())
    (tmp_path / "delta" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert "rms_norm_eps" in refusal(world, tmp_path / "delta")


def test_a_path_that_holds_nothing_is_left_to_vllm(world, tmp_path):
    assert world.server.load("nothing", tmp_path).status_code == 404
