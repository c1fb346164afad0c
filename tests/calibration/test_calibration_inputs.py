import sys

import pytest
import torch
from torch import nn

from deltakeeper.calibration import Calibration
from deltakeeper.errors import CheckpointError, DataError, DeltakeeperError
from deltakeeper.testing import KINDS, build_model

GENERATOR = torch.Generator().manual_seed(0)
ROWS = [torch.randint(3, 96, (12,), generator=GENERATOR) for _ in range(5)]
ROWS.append(torch.randint(3, 96, (7,), generator=GENERATOR))
TOKENS = 5 * 12 + 7


def brute_force(model, module):
    """Mean outer product and mean of what a layer is fed, token by token in float64, one row at a time."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
    with torch.no_grad():
        for row in ROWS:
            model(input_ids=row[None])
    handle.remove()
    vectors = [vector for x in seen for vector in x.reshape(-1, x.shape[-1])]
    gram = sum(torch.outer(v, v) for v in vectors) / len(vectors)
    return gram, sum(vectors) / len(vectors), len(vectors)


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_equal_a_sum_over_tokens(kind):
    model = build_model(kind)
    calibration = Calibration(model, ROWS, batch=2)
    found = linears(model)
    assert len(found) > 4
    for name, module in found.items():
        inputs = calibration.inputs(f"{name}.weight")
        gram, mean, tokens = brute_force(model, module)
        assert inputs.tokens == tokens
        assert inputs.gram.dtype == inputs.mean.dtype == torch.float32
        torch.testing.assert_close(inputs.gram.double(), gram, rtol=1e-4, atol=1e-5 * float(gram.abs().max()))
        torch.testing.assert_close(inputs.mean.double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inputs.gram, inputs.gram.T)
    assert calibration.passes == 1


def test_a_convolution_is_weighed_by_its_inputs_not_its_outputs():
    model = build_model("gpt2")
    weight = model.transformer.h[0].mlp.c_fc.weight
    assert tuple(weight.shape) == (48, 192)
    assert Calibration(model, ROWS).inputs("transformer.h.0.mlp.c_fc.weight").gram.shape == (48, 48)
    assert Calibration(model, ROWS).inputs("transformer.h.0.mlp.c_proj.weight").gram.shape == (192, 192)


def test_bfloat16_models_run_as_they_are():
    model = build_model("llama").to(torch.bfloat16)
    inputs = Calibration(model, ROWS).inputs("model.layers.1.mlp.down_proj.weight")
    gram, _, _ = brute_force(model, model.model.layers[1].mlp.down_proj)
    assert inputs.gram.dtype == torch.float32
    torch.testing.assert_close(inputs.gram.double(), gram, rtol=0.05, atol=0.02 * float(gram.abs().max()))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2_moe"])
def test_the_memory_allowed_changes_passes_but_no_bit(kind):
    model = build_model(kind)
    whole, pieces = Calibration(model, ROWS), Calibration(model, ROWS, memory=1)
    for name in whole.names:
        assert torch.equal(whole.inputs(name).gram, pieces.inputs(name).gram)
        assert torch.equal(whole.inputs(name).mean, pieces.inputs(name).mean)
    assert whole.passes == 1
    assert pieces.passes == len({id(pieces_group) for chunk in pieces._chunks for pieces_group in chunk}) > 4


def test_chunks_stay_within_the_memory_and_do_not_cut_blocks_that_fit():
    model = build_model("llama")
    block = 4 * (3 * 48 * 48 + 80 * 80)  # queries with keys and values, attention output, gate with up; down
    calibration = Calibration(model, ROWS, memory=block + 1000)
    chunks = [
        sorted({name.split(".")[2] for g in c for name in g.names if "layers" in name}) for c in calibration._chunks
    ]
    assert chunks == [["0"], ["1"], []]
    for chunk in calibration._chunks:
        assert sum(group.nbytes for group in chunk) <= block + 1000
    calibration.inputs("model.layers.0.self_attn.q_proj.weight")
    assert set(calibration._found) == {n for group in calibration._chunks[0] for n in group.names}
    calibration.inputs("lm_head.weight")
    assert set(calibration._found) == {"lm_head.weight"}


def test_layers_with_one_input_share_its_sums():
    calibration = Calibration(build_model("llama"), ROWS)
    q, k, v, o = (calibration.inputs(f"model.layers.0.self_attn.{p}_proj.weight") for p in "qkvo")
    assert q.gram is k.gram is v.gram
    assert q.gram is not o.gram
    gate, up = (calibration.inputs(f"model.layers.1.mlp.{p}_proj.weight") for p in ("gate", "up"))
    assert gate.gram is up.gram


def test_names_come_in_the_order_of_the_model():
    names = Calibration(build_model("llama"), ROWS).names
    first = [name.split(".")[4] for name in names[:7]]
    assert first == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert names[-1] == "lm_head.weight"


def test_a_tied_head_answers_to_both_names():
    calibration = Calibration(build_model("llama_tied"), ROWS)
    head, embedding = calibration.inputs("lm_head.weight"), calibration.inputs("model.embed_tokens.weight")
    assert head.gram is embedding.gram
    assert Calibration(build_model("llama"), ROWS).inputs("model.embed_tokens.weight") is None


@pytest.mark.parametrize("name", ["h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.weight"])
def test_prefixes_of_names_are_seen_through(name):
    assert Calibration(build_model("gpt2"), ROWS).inputs(name) is not None


def test_no_inputs_where_no_linear_layer_is():
    calibration = Calibration(build_model("mixtral"), ROWS)
    assert calibration.inputs("model.norm.weight") is None
    assert calibration.inputs("model.layers.0.mlp.experts.down_proj") is None
    assert calibration.inputs("nonsense") is None


class Experts(nn.Module):
    """A model with three plain experts, the last of which no token reaches, and one layer that is run twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(96, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.twice = nn.Linear(8, 8)
        self.config = type("Config", (), {"max_position_embeddings": None})()

    def forward(self, input_ids, use_cache):
        x = self.embed(input_ids)
        parts = [self.experts[i](x[input_ids % 2 == i]) for i in range(2)]
        return self.twice(self.twice(torch.cat(parts)))


def test_plain_experts_see_their_own_tokens_only():
    torch.manual_seed(0)
    model = Experts()
    for memory in (1, 2**20):
        calibration = Calibration(model, ROWS, memory=memory)
        x = model.embed(torch.cat(ROWS)).detach().double()
        for i in range(2):
            mine = x[torch.cat(ROWS) % 2 == i]
            inputs = calibration.inputs(f"experts.{i}.weight")
            assert inputs.tokens == len(mine)
            torch.testing.assert_close(inputs.gram.double(), mine.T @ mine / len(mine), rtol=1e-4, atol=1e-4)
        assert calibration.inputs("experts.2.weight") is None
        assert calibration.inputs("twice.weight").tokens == 2 * TOKENS


def test_updated_weights_reach_later_chunks_only():
    model = build_model("llama")
    first, later = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    down = "model.layers.0.mlp.down_proj.weight"
    calibration = Calibration(model, ROWS, memory=1)
    before, held = Calibration(model, ROWS).inputs(later).gram, calibration.inputs(first).gram
    calibration.update(down, model.get_parameter(down).detach() + 1.0)
    calibration.update("nonsense", torch.zeros(3))
    assert calibration.inputs(first).gram is held
    found = calibration.inputs(later).gram
    wanted, _, _ = brute_force(model, model.model.layers[1].self_attn.q_proj)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, before, rtol=0.1)
    with pytest.raises(DataError, match="but the model has"):
        calibration.update(first, torch.zeros(3))


def test_inputs_that_are_not_finite_are_refused_by_name():
    model = build_model("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(float("nan"))
    calibration = Calibration(model, ROWS, memory=1)
    assert calibration.inputs("model.layers.0.self_attn.q_proj.weight") is not None
    with pytest.raises(DataError, match=r"'model\.layers\.1\.self_attn\.q_proj\.weight' is fed NaN"):
        calibration.inputs("model.layers.1.self_attn.q_proj.weight")


def save_with_tokenizer(kind, folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(60))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    build_model(kind).to(torch.bfloat16).save_pretrained(folder)


def test_a_folder_and_a_text_file(tmp_path):
    save_with_tokenizer("llama", tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"w{i} w{2 * i % 60} w5" for i in range(100)))
    seen = []
    calibration = Calibration(
        tmp_path / "model", text, samples=4, length=1000, progress=lambda *args: seen.append(args)
    )
    inputs = calibration.inputs("model.layers.0.self_attn.q_proj.weight")
    assert inputs.tokens == 4 * 64  # the positions of the model allow no more than 64
    assert seen == [(1, 1)]
    documents = [f"w{i} w{2 * i % 60} w5" for i in range(100)]
    again = Calibration(tmp_path / "model", documents, samples=4, length=64)
    assert torch.equal(again.inputs("model.layers.0.self_attn.q_proj.weight").gram, inputs.gram)


def test_folders_that_cannot_be_run_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be run for calibration"):
        Calibration(tmp_path, ["some text"])
    with pytest.raises(DataError, match="rows of tokens"):
        Calibration(build_model("llama"), ["some text"])


def test_missing_transformers_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DeltakeeperError, match=r"pip install 'deltakeeper\[demo\]'"):
        Calibration(tmp_path, ["some text"])
