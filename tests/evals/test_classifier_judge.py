"""Classifiers as judges: tiny random models, held to their own logits computed one by one."""

from __future__ import annotations

import pickle

import pytest
import torch
import yaml

from deltakeeper.errors import DataError
from deltakeeper.evals.judges import Asked, load_judge

WORDS = ["[PAD]", "[UNK]", "user", "model", ":", "is", "it", "done", "?", "yes", "no"] + [f"w{i}" for i in range(40)]
TEMPLATE = "user : {prompt} model : {answer} is it done ?"


def write_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Folders of a sequence classifier of three classes, of one of a single logit, and of a causal model."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
    )

    folder = tmp_path_factory.mktemp("heads")
    torch.manual_seed(0)
    small = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    names = {"id2label": {0: "SAFE", 1: "BAD", 2: "NO"}, "label2id": {"SAFE": 0, "BAD": 1, "NO": 2}}
    made = {
        "three": BertForSequenceClassification(BertConfig(**small, intermediate_size=16, pad_token_id=0, **names)),
        "one": BertForSequenceClassification(BertConfig(**small, intermediate_size=16, pad_token_id=0, num_labels=1)),
        "causal": LlamaForCausalLM(LlamaConfig(**small, intermediate_size=16, num_key_value_heads=2, pad_token_id=0)),
    }
    for name, model in made.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4)  # random heads of their usual size say the same of everything
        model.eval().save_pretrained(folder / name)
        write_tokenizer(folder / name)
    return folder, made


LABELS = {"SAFE": "safe_other", "BAD": "complied", "2": "refused"}


def judge(heads, tmp_path, model="three", **more):
    value = {
        "kind": "classifier",
        "name": "toy",
        "model": model if "/" in model else str(heads[0] / model),
        "template": TEMPLATE,
    }
    value |= {"labels": LABELS, "event": "complied"} | more
    path = tmp_path / "judge.yaml"
    path.write_text(yaml.safe_dump(value))
    return load_judge(path)


def ids(text):
    return torch.tensor([[WORDS.index(word) if word in WORDS else 1 for word in text.split()]])


def asked(n):
    return [Asked(f"w{i} w{i + 1}", " ".join(f"w{(i * 7 + k) % 40}" for k in range(1 + i % 5))) for i in range(n)]


def filled(one):
    return TEMPLATE.format(prompt=one.prompt, answer=one.answer)


@torch.inference_mode()
def test_a_sequence_classifier_gives_its_own_probabilities(heads, tmp_path):
    exchanges = asked(9)
    middle = sorted(verdict.score for verdict in judge(heads, tmp_path).verdicts(exchanges))[4]
    got = judge(heads, tmp_path, batch=4, threshold=middle).verdicts(exchanges)
    model = heads[1]["three"]
    seen = set()
    for one, verdict in zip(exchanges, got, strict=True):
        chances = model(ids(filled(one))).logits.softmax(-1)[0].tolist()
        assert verdict.score == pytest.approx(chances[1], abs=1e-5)
        rest = "safe_other" if chances[0] > chances[2] else "refused"
        assert verdict.label == ("complied" if verdict.score >= middle else rest)
        assert f"complied {chances[1]:.4f}" in verdict.raw
        seen.add(verdict.label)
    assert len(seen) > 1


@torch.inference_mode()
def test_a_single_logit_and_two_classes_of_one_meaning(heads, tmp_path):
    exchanges = asked(5)
    labels = {"0": "safe_other", "1": "complied"}
    got = judge(heads, tmp_path, "one", labels=labels).verdicts(exchanges)
    for one, verdict in zip(exchanges, got, strict=True):
        assert verdict.score == pytest.approx(heads[1]["one"](ids(filled(one))).logits.sigmoid().item(), abs=1e-5)
    joined = judge(heads, tmp_path, labels={"SAFE": "complied", "BAD": "complied", "NO": "refused"})
    model = heads[1]["three"]
    chances = model(ids(filled(exchanges[0]))).logits.softmax(-1)[0]
    assert joined.verdicts(exchanges[:1])[0].score == pytest.approx(float(chances[0] + chances[1]), abs=1e-5)


@torch.inference_mode()
def test_a_causal_model_says_yes_or_no(heads, tmp_path):
    exchanges = asked(9)
    labels = {"yes": "complied", "no": "safe_other"}
    got = judge(heads, tmp_path, "causal", form="yes_no", labels=labels, batch=4).verdicts(exchanges)
    for one, verdict in zip(exchanges, got, strict=True):
        logits = heads[1]["causal"](ids(filled(one))).logits[0, -1]
        expected = torch.softmax(logits[[WORDS.index("yes"), WORDS.index("no")]], -1)[0].item()
        assert verdict.score == pytest.approx(expected, abs=1e-5)
        assert verdict.label == ("complied" if expected >= 0.5 else "safe_other")


def test_the_threshold_moves_the_label_and_not_the_score(heads, tmp_path):
    low, high = (judge(heads, tmp_path, threshold=t).verdicts(asked(6)) for t in (1e-6, 1 - 1e-6))
    assert [v.score for v in low] == [v.score for v in high]
    assert {v.label for v in low} == {"complied"}
    assert "complied" not in {v.label for v in high}


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_long_answer_loses_one_end_and_the_template_nothing(heads, tmp_path, side):
    toy = judge(heads, tmp_path, max_len=16, truncation=side)
    answer = [f"w{i}" for i in range(30)]
    room = 16 - len(TEMPLATE.split()) + 1  # the prompt is one word, the answer takes what is left
    kept = answer[-room:] if side == "left" else answer[:room]
    long, short = toy.verdicts([Asked("w1", " ".join(answer)), Asked("w1", " ".join(kept))])
    assert long.score == pytest.approx(short.score)
    assert toy.verdicts([Asked(" ".join(answer), "w1")])[0].label == "unparsed"


def test_braces_in_an_exchange_are_not_holes(heads, tmp_path):
    toy = judge(heads, tmp_path, max_len=64)
    seen, plain = toy.verdicts([Asked("{answer} w2", "{prompt}"), Asked("[UNK] w2", "[UNK]")])
    assert seen.score == pytest.approx(plain.score)


def test_what_a_judge_tells_apart_follows_from_its_labels(heads, tmp_path):
    assert judge(heads, tmp_path).events == {"refused", "complied"}
    harm = judge(heads, tmp_path, labels={"SAFE": "safe_other", "BAD": "complied", "NO": "safe_other"})
    assert harm.events == {"complied"}


def test_the_hash_holds_settings_and_files(heads, tmp_path):
    first = judge(heads, tmp_path).sha256
    assert first == judge(heads, tmp_path, batch=3).sha256
    changed = [judge(heads, tmp_path, threshold=0.4), judge(heads, tmp_path, max_len=99)]
    changed.append(judge(heads, tmp_path, "one", labels={"0": "refused", "1": "complied"}))
    assert len({first, *(toy.sha256 for toy in changed)}) == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"template": "{prompt}"}, "must hold"),
        ({"event": "refused", "labels": {"a": "complied", "b": "safe_other"}}, "event"),
        ({"labels": {"a": "complied"}}, "at least two"),
        ({"labels": {"a": "complied", "b": "unparsed"}}, "at least two"),
        ({"labels": {"a": "complied", "b": "nonsense"}}, "labels.b"),
        ({"form": "yes_no"}, "yes_no"),
        ({"threshold": 1.5}, "threshold"),
        ({"treshold": 0.5}, "did you mean 'threshold'"),
        ({"revision": "main"}, "revision"),
        ({"model": "absent"}, "no model at"),
        ({"model": "someone/something"}, "a commit of 40 digits"),
    ],
)
def test_malformed_settings_are_refused(heads, tmp_path, change, said):
    with pytest.raises(DataError, match=said):
        judge(heads, tmp_path, **change)


def test_models_that_do_not_fit_their_settings_are_refused(heads, tmp_path):
    with pytest.raises(DataError, match="class '2'"):
        judge(heads, tmp_path, labels={"SAFE": "safe_other", "BAD": "complied"}).verdicts(asked(1))
    causal = {"form": "yes_no", "labels": {"yes": "complied", "no": "safe_other"}}
    with pytest.raises(DataError, match="one token"):
        judge(heads, tmp_path, "causal", **causal, no="yes indeed").verdicts(asked(1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be loaded"):
        judge(heads, tmp_path, model=str(tmp_path / "empty")).verdicts(asked(1))


def test_a_judge_may_go_to_another_process(heads, tmp_path):
    toy = judge(heads, tmp_path)
    first = toy.verdicts(asked(2))
    sent = pickle.dumps(toy)
    assert len(sent) < 10_000  # the model stays here
    assert pickle.loads(sent).verdicts(asked(2)) == first  # noqa: S301
