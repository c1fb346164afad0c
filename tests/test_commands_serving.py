"""The verbs that serve: generate, kernels and bench, as a user types them."""

from __future__ import annotations

import json

import pytest
import torch

from deltakeeper import cli, kernels
from deltakeeper.apply import apply_delta
from deltakeeper.compress import compress
from deltakeeper.errors import EngineError
from deltakeeper.kernels import library
from deltakeeper.live_base import open_base
from deltakeeper.serving_bench import Workload, measure_serving
from deltakeeper.testing import write_pair
from deltakeeper.testing.models import write_tokenizer

TEMPLATE = "{% for m in messages %}w0 {{ m['content'] }} w1 {% endfor %}{% if add_generation_prompt %}w2{% endif %}"
OTHER_TEMPLATE = "{% for m in messages %}w7 {{ m['content'] }} {% endfor %}"
PROMPT = "w5 w6 w7 w8"


def speak(folder, template=None):
    """Give a tiny model its words, and a chat template."""
    write_tokenizer(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base that speaks, two artifacts of it, what they merge to, and an artifact of another base."""
    folder = tmp_path_factory.mktemp("made")
    base, tuned = write_pair("llama", folder, scale=0.05, dtype=torch.float32)
    speak(base, TEMPLATE)
    speak(tuned, OTHER_TEMPLATE)
    compress(base, tuned, folder / "signs", "bitdelta:bits=2")
    speak(tuned, TEMPLATE)
    compress(base, tuned, folder / "ranks", "svd:rank=8")
    for name in ("signs", "ranks"):
        apply_delta(base, folder / name, folder / "merged" / name)
    other, changed = write_pair("llama", folder / "other", seed=7)
    compress(other, changed, folder / "stranger", "bitdelta")
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        capsys.readouterr()  # what a test itself has loaded shows bars
        monkeypatch.setattr("sys.argv", ["deltakeeper", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return call


def greedy(folder, text, new_tokens=8):
    """The answer of transformers alone to a text that is given to the model as it is."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    return " " + tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)  # it goes on behind a prompt


def ask(run, made, *arguments, new_tokens=8):
    return run("generate", "--base", made / "base", "--max-new-tokens", new_tokens, *arguments)


def answers(run, made, *arguments):
    code, out, err = ask(run, made, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)["answers"]


def test_the_base_answers_raw_and_in_its_template(run, made):
    (raw,) = answers(run, made, "--prompt", PROMPT, "--raw")
    assert raw["text"] == greedy(made / "base", PROMPT)
    assert (raw["tenant"], raw["prompt"], raw["prompt_tokens"]) == (None, PROMPT, 4)
    (chat,) = answers(run, made, "--prompt", PROMPT)
    assert chat["text"] == greedy(made / "base", f"w0 {PROMPT} w1 w2") != raw["text"]
    assert answers(run, made, "--prompt", PROMPT, "--chat") == [chat]


def test_tenants_of_a_file_answer_in_one_batch_as_their_merged_models_do(run, made, tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": PROMPT, "tenant": "a"},
        {"prompt": PROMPT},
        {"prompt": PROMPT, "tenant": "b"},
        {"messages": [{"role": "user", "content": "w9"}, {"role": "user", "content": "w3"}], "tenant": "b"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    deltas = ("--delta", f"a={made / 'signs'}", "--delta", f"b={made / 'ranks'}")
    found = answers(run, made, *deltas, "--prompts", file)
    expected = [
        greedy(made / "merged" / "signs", f"w7 {PROMPT}"),  # this fine-tune has a template of its own
        greedy(made / "base", f"w0 {PROMPT} w1 w2"),
        greedy(made / "merged" / "ranks", f"w0 {PROMPT} w1 w2"),
        greedy(made / "merged" / "ranks", "w0 w9 w1 w0 w3 w1 w2"),
    ]
    assert [a["text"] for a in found] == expected
    assert len(set(expected)) == 4
    assert [a["tenant"] for a in found] == ["a", None, "b", "b"]
    code, out, err = ask(run, made, *deltas, "--prompts", file)
    assert (code, err) == (0, "")
    assert [line for line in out.splitlines() if "─" not in line] == expected
    assert "1: a " in out and "2: base " in out
    rest = answers(run, made, *deltas, "--prompts", file, "--tenant", "b")
    assert rest[1]["text"] == expected[2]


def test_a_single_answer_streams_to_the_same_text(run, made):
    arguments = ("--delta", f"a={made / 'ranks'}", "--tenant", "a", "--prompt", PROMPT)
    code, streamed, _ = ask(run, made, *arguments)
    assert code == 0
    assert streamed == ask(run, made, *arguments, "--no-stream")[1]
    assert streamed == greedy(made / "merged" / "ranks", f"w0 {PROMPT} w1 w2") + "\n"


def test_planes_and_seeds_are_passed_on(run, made):
    arguments = ("--delta", f"a={made / 'signs'}", "--tenant", "a", "--prompt", PROMPT)
    whole, coarse = answers(run, made, *arguments), answers(run, made, *arguments, "--planes", 1)
    assert whole[0]["text"] != coarse[0]["text"]
    warm = ("--prompt", PROMPT, "--temperature", 1.5)
    first, again, other = (answers(run, made, *warm, "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other


def test_what_is_not_answered_is_status_1(run, made, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made / "base")
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    speak(tmp_path / "broken")
    code, out, err = run("generate", "--base", tmp_path / "broken", "--prompt", PROMPT)
    assert (code, out) == (1, "\n")
    assert err.startswith("deltakeeper: prompt 1 was not answered: the logits of the base are not numbers")
    code, out, _ = run("generate", "--base", tmp_path / "broken", "--prompt", PROMPT, "--json")
    assert code == 1 and json.loads(out)["answers"][0]["finish_reason"] == "error"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give either --prompt or --prompts"),
        (("--prompt", "w1", "--prompts", "{file}"), "give either --prompt or --prompts"),
        (("--prompts", "{made}/none.jsonl"), "there is no prompt file"),
        (("--prompts", "{file}"), "needs either a 'prompt' or 'messages'"),
        (("--prompt", "w1", "--tenant", "a"), "a prompt is for tenant 'a', but no delta is given"),
        (("--prompt", "w1", "--tenant", "b", "--delta", "a={made}/signs"), "the deltas given are called a;"),
        (("--prompt", "w1", "--delta", "a={made}/signs"), "the base would answer alone; give --tenant a"),
        (("--prompt", "w1", "--tenant", "a", "--delta", "{made}/signs"), "spell it NAME=PATH"),
        (("--prompt", "w1", "--tenant", "a", "--delta", "a=x", "--delta", "a=y"), "two deltas are called 'a'"),
        (("--prompt", "w1", "--tenant", "a", "--delta", "a={made}/stranger"), "not the base that is served"),
        (("--prompt", "w1", "--tenant", "a", "--delta", "a={made}/base"), "give the folder of a delta artifact"),
        (("--prompt", "w1", "--tenant", "a", "--delta", "a={made}/signs", "--planes", "3"), "planes"),
        (("--prompt", "", "--raw"), "a prompt for the base is empty"),
        (("--prompt", "w1 " * 70), "shorten the prompt"),
        (("--prompt", "w1", "--temperature", "-1"), "temperature is -1.0"),
        (("--prompt", "w1", "--max-new-tokens", "0"), "ask for at least one"),
    ],
)
def test_errors_are_one_sentence_and_status_2(run, made, tmp_path, arguments, said):
    (tmp_path / "p.jsonl").write_text('{"text": "w1"}\n')
    code, out, err = ask(run, made, *(a.format(made=made, file=tmp_path / "p.jsonl") for a in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("deltakeeper: ") and said in err and err.count("\n") == 1


def test_a_base_that_cannot_be_used_is_told(run, made, tmp_path):
    code, _, err = run("generate", "--base", "/nowhere", "--prompt", "w1")
    assert code == 2 and "there is no model folder /nowhere" in err
    base, _ = write_pair("llama", tmp_path)
    code, _, err = run("generate", "--base", base, "--prompt", "w1")
    assert code == 2 and "no tokenizer that can be read" in err
    speak(base)
    code, _, err = run("generate", "--base", base, "--prompt", "w1", "--chat")
    assert code == 2 and "the base has no chat template; ask with --raw" in err
    assert run("generate", "--base", base, "--prompt", "w1", "--max-new-tokens", 2)[0] == 0
    (base / "config.json").write_text('{"model_type": "none"}')
    code, _, err = run("generate", "--base", base, "--prompt", "w1")
    assert code == 2 and "cannot be run" in err and err.count("\n") == 1


def test_kernels_are_told(run):
    found = json.loads(run("kernels", "--json")[1])
    assert found["products"]["name"] in ("compiled", "torch") and found["products"]["reason"]
    assert (found["triton"]["reason"] is None) == found["triton"]["available"]
    code, out, _ = run("kernels")
    assert code == 0 and len(out.splitlines()) == 4
    assert found["products"]["reason"] in out and found["passes"] in out


def test_kernels_that_were_not_built_are_told_without_a_warning(run, monkeypatch):
    def absent():
        import warnings

        warnings.warn("not used", stacklevel=2)
        return kernels.Backend("torch", None, "they were not built")

    monkeypatch.setattr(kernels, "backend", absent)
    code, out, err = run("kernels")
    assert (
        (code, err) == (0, "") and "torch (they were not built)" in out and "Attention on the CPU: plain torch" in out
    )


def test_a_kernel_that_does_not_exist_is_status_2(run, monkeypatch):
    monkeypatch.setenv("DELTAKEEPER_KERNELS", "sse")
    library.backend.cache_clear()
    code, out, err = run("kernels")
    monkeypatch.undo()
    library.backend.cache_clear()
    assert (code, out) == (2, "") and "DELTAKEEPER_KERNELS is 'sse'; set it to one of" in err


def bench(run, made, *arguments):
    small = ("--requests", 3, "--prompt-tokens", 5, "--new-tokens", 4, "--rounds", 2)
    return run("bench", "serve-offline", "--base", made / "base", *small, *arguments)


def test_serving_is_measured(run, made):
    deltas = ("--delta", made / "signs", "--delta", f"r={made / 'ranks'}")
    code, out, err = bench(run, made, *deltas, "--tenants", 3, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["tenants"] == 3 and found["workload"]["requests"] == 3
    assert len(found["base_tokens_s"]) == len(found["mixed_tokens_s"]) == 2 and min(found["mixed_tokens_s"]) > 0
    first, second, third = found["tenant_bytes"]
    assert first == third != second and min(first, second) > 0
    assert found["base_bytes"] == sum(p.numel() * 4 for p in open_base(made / "base").model.parameters())
    code, out, _ = bench(run, made, *deltas)
    assert code == 0 and "tenants mixed (2): " in out and "base alone: " in out and "A tenant holds" in out


def test_each_round_serves_the_base_and_all_tenants_in_turns(made, monkeypatch):
    from deltakeeper import serving_bench

    served = []
    true = serving_bench._serve
    monkeypatch.setattr(
        serving_bench, "_serve", lambda e, p, tenants, new: served.append((tenants, new)) or true(e, p, tenants, new)
    )
    base = open_base(made / "base", tokenizer=False)
    artifacts = base.artifacts({"a": str(made / "signs"), "b": str(made / "ranks")})
    workload = Workload(requests=2, prompt_tokens=3, new_tokens=5, rounds=2)
    found = measure_serving(base, artifacts, workload)
    mixed = ["1.a", "2.b"]
    assert served[:2] == [(mixed, 4), ([None], 4)]  # the warm-up
    assert served[2:] == [([None], 5), (mixed, 5), (mixed, 5), ([None], 5)]
    assert found.share > 0
    with pytest.raises(EngineError, match="there is no tenant"):
        measure_serving(base, {}, workload)
    with pytest.raises(EngineError, match="there is no tenant"):
        measure_serving(base, artifacts, workload, tenants=0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rounds", 0), "rounds is 0; give a positive number"),
        (("--new-tokens", 100), "may have 64 together"),
        (("--tenants", 0), "there is no tenant to measure"),
    ],
)
def test_a_workload_that_makes_no_sense_is_status_2(run, made, arguments, said):
    code, out, err = bench(run, made, "--delta", made / "signs", *arguments)
    assert (code, out) == (2, "") and said in err


def test_a_bench_needs_a_delta(run, made):
    code, _, err = run("bench", "serve-offline", "--base", made / "base")
    assert code == 2 and "--delta" in err and "deltakeeper bench serve-offline --help" in err


@pytest.mark.parametrize("verb", [("generate",), ("kernels",), ("bench", "serve-offline")])
def test_every_verb_has_help_with_an_example(run, verb):
    code, out, _ = run(*verb, "--help")
    assert code == 0 and f"Example: deltakeeper {' '.join(verb)}" in out
