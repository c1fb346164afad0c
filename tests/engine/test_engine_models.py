"""The engine against `generate` of transformers, for every architecture."""

from __future__ import annotations

import pytest
import torch
from engine_cases import decode, prompts_of, reference

from deltakeeper.engine import Engine, EngineSettings, Request
from deltakeeper.engine.forward import ATTENTION
from deltakeeper.errors import EngineError
from deltakeeper.testing.models import KINDS, build_model


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_generate(kind):
    model = build_model(kind)
    prompts = prompts_of(1, 2, 5, 17, 33, 40)
    expected = [reference(model, prompt, 20) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) > 2
    # 24 tokens a step cut the longer prompts into chunks, which run beside the decoding of the shorter ones
    for step in (24, 512):
        assert decode(model, prompts, 20, max_step_tokens=step) == expected


@pytest.mark.parametrize("kind", ["gemma2", "mistral_window"])
def test_a_window_is_honoured(kind):
    model = build_model(kind)
    prompt = prompts_of(50)[0]
    expected = reference(model, prompt, 10)
    assert decode(model, [prompt], 10) == [expected]
    for layer in model.modules():  # the same model without its window answers otherwise, so the window matters here
        config = getattr(layer, "config", None)
        if config is not None:
            config.sliding_window = 64
    assert decode(model, [prompt], 10) != [expected]


def test_bfloat16_is_served():
    model = build_model("llama").to(torch.bfloat16)
    prompts = prompts_of(3, 20)
    answers = decode(model, prompts, 8)
    assert [len(answer) for answer in answers] == [8, 8]
    assert decode(model, prompts, 8, max_step_tokens=4)[0][:1] == answers[0][:1]


def test_the_model_gets_its_own_attention_back():
    model = build_model("qwen2")
    before = model.config._attn_implementation
    expected = model(torch.tensor([[5, 6, 7]])).logits
    engine = Engine(model, None)
    assert model.config._attn_implementation == ATTENTION
    with pytest.raises(EngineError, match="held by an engine"):
        model(torch.tensor([[5, 6, 7]]))
    with pytest.raises(EngineError, match="held by another engine"):
        Engine(model, None)
    engine.close()
    engine.close()
    assert model.config._attn_implementation == before
    assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, expected)


def test_a_model_whose_state_is_more_than_keys_and_values_is_refused():
    import transformers

    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(EngineError, match="0 of its 2 layers attend"):
        Engine(model, None)


def test_what_is_no_decoder_or_still_trains_is_refused():
    import transformers

    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(EngineError, match="cannot compute one token"):
        Engine(transformers.T5ForConditionalGeneration(config).eval(), None)
    with pytest.raises(EngineError, match="training mode"):
        Engine(build_model("llama").train(), None)


def test_attention_sinks_are_refused():
    import transformers

    config = transformers.GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        attn_implementation="eager",
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(EngineError, match="s_aux"):
        Engine(model, None)
    assert model.config._attn_implementation == "eager"


def test_chunked_attention_is_refused():
    import transformers

    config = transformers.Llama4TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        intermediate_size_mlp=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        attention_chunk_size=8,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = transformers.Llama4ForCausalLM(config).eval()
    with pytest.raises(EngineError, match="neither to all earlier tokens nor to a sliding window"):
        Engine(model, None)


def test_a_context_ends_where_rotary_angles_would_depend_on_the_batch():
    import transformers

    half = 6
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * half,
        "long_factor": [2.0] * half,
        "factor": 2.0,
    }
    config = transformers.Phi3Config(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=32,
        rope_parameters=rope,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with Engine(model, None, settings=EngineSettings(kv_bytes=1 << 20)) as engine:
        assert engine.context == 32
        (answer,) = engine.generate([Request((5, 6, 7), max_new_tokens=60, ignore_eos=True)])
    assert len(answer.tokens) == 29
    assert answer.finish_reason == "length"
