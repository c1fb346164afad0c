"""The rows of defences, from requests and from files, and the command that reads them."""

import json

import pytest
import torch
from defence_cases import write_models
from typer.testing import CliRunner

from deltakeeper.defences import DefenceData
from deltakeeper.errors import DataError
from deltakeeper.evals.prompts import load_packaged
from deltakeeper.testing import write_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models("llama_odd", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    write_tokenizer(folder := tmp_path_factory.mktemp("tokenizer"))
    found = AutoTokenizer.from_pretrained(folder)
    found.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return found


def test_requests_are_answered_both_ways_and_harmlessly():
    data = DefenceData.from_requests(["a", "b", "c"], refusals=["no", "never"], system="be good")
    assert [row[-1]["content"] for row in data.safe] == ["no", "never", "no"]
    assert [row[1]["content"] for row in data.harmful] == ["a", "b", "c"]
    assert {row[-1]["content"] for row in data.harmful} == {"Sure, here is what you asked for."}
    assert data.safe[0][0] == {"role": "system", "content": "be good"}
    assert DefenceData.from_requests(["a"]).safe[0][0]["role"] == "user"


def test_rows_are_one_a_document_cut_and_in_order_of_length(tokenizer):
    data = DefenceData.from_requests(["w1 w2 w3", "w1", "w1 w2"], refusals=["w9"], samples=2, length=4)
    rows = data.rows("safe", tokenizer)
    assert [row.tolist() for row in rows] == [[5, 13, 2], [5, 6, 7, 13]]
    assert rows[0].dtype == torch.int64
    with pytest.raises(DataError, match="no harmful rows"):
        DefenceData(safe=("w1",)).rows("harmful", tokenizer)
    with pytest.raises(DataError, match="0 rows"):
        DefenceData(samples=0)


def test_the_hash_is_of_the_rows_that_are_used():
    data = DefenceData.from_requests(["w1", "w2"], samples=2)
    same = DefenceData(data.safe, (), 2)
    assert same.sha256("safe") == data.sha256("safe") != data.sha256("harmful")
    assert DefenceData(data.safe[:1], (), 1).sha256("safe") == DefenceData(data.safe, (), 1).sha256("safe")
    assert DefenceData(data.safe, (), 2, 7).sha256("safe") != data.sha256("safe")


def test_files_of_conversations_texts_and_requests(tmp_path):
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    talks, requests, texts = (tmp_path / name for name in ("talks.jsonl", "requests.jsonl", "texts.txt"))
    talks.write_text(json.dumps({"messages": turns}) + "\n")
    texts.write_text("w1 w2\n\nw3")
    splits = [{"prompt": "w1", "split": "train"}, {"prompt": "w2", "split": "heldout"}]
    requests.write_text("".join(json.dumps(row) + "\n" for row in splits))
    found = DefenceData.from_files(talks)
    assert (found.harmful, found.safe) == ((turns,), ())
    assert DefenceData.from_files(texts).harmful == ("w1 w2", "w3")
    found = DefenceData.from_files(requests, talks, samples=3, length=7)
    assert [row[0]["content"] for row in found.harmful] == ["w1"]
    assert (found.safe, found.samples, found.length) == ((turns,), 3, 7)
    (tmp_path / "bare.csv").write_text("goal\nw1\nw2\n")
    assert len(DefenceData.from_files(tmp_path / "bare.csv").safe) == 2
    with pytest.raises(DataError, match="no prompt file"):
        DefenceData.from_files(tmp_path / "absent.jsonl")


def test_the_package_s_requests_are_those_for_training():
    train = {row.prompt for row in load_packaged("harmful", "train")}
    found = DefenceData.from_files("harmful")
    assert {row[0]["content"] for row in found.safe} == train
    assert len(train) < len(load_packaged("harmful"))


def call(*words):
    import typer

    from deltakeeper.commands.defend import defend

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(defend)
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    return result.exit_code, result.output


def test_the_command_writes_a_model_and_says_what_it_did(models, tmp_path):
    base, tuned, unaligned = models
    (tmp_path / "rows.txt").write_text("w1 w2 w3 w4\n\nw5 w6 w7")
    status, out = call(
        base, tuned, "-o", tmp_path / "a", "--defence", "safe_delta:s=0.1", "--safe", tmp_path / "rows.txt", "--json"
    )
    assert status == 0
    report = json.loads(out)
    assert report["defence"] == "safe_delta"
    assert report["rows"] == DefenceData.from_files(safe=tmp_path / "rows.txt").sha256("safe")
    assert report["tensors"]["model.norm.weight"]["fate"] == "base"
    assert (tmp_path / "a" / "tokenizer.json").is_file()
    status, out = call(base, tuned, "-o", tmp_path / "b", "--defence", "resta", "--unaligned", unaligned)
    assert status == 0
    assert "times as long" in " ".join(out.split())
    assert "defended" in out
    with pytest.raises(DataError, match="did you mean 'resta'"):
        call(base, tuned, "-o", tmp_path / "c", "--defence", "rest")
