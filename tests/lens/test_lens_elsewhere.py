"""Other lenses say the same, where they are installed; neither is needed, nor among what `make setup` installs.

`pip install --no-deps tuned-lens==0.2.0` is enough for the first. TransformerLens 4.3 with the versions of torch and
transformers that are here needs einops, fancy-einsum, jaxtyping, beartype, typeguard < 5 and wandb beside it. They do
not bear one another: tuned-lens asks TransformerLens, where it is there, for a class that version 4 no longer has.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from lens_families import build_family, sample_ids
from lens_planted import BOTH, MARGIN, disturb

from deltakeeper.lens import Models, capture, decode
from deltakeeper.lens.patching import Patching, sweep_streams
from deltakeeper.lens.tuned import Translators
from deltakeeper.testing import write_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")


def whole(model, streams):
    return torch.cat([chunk.values for chunk in decode(model, streams)])


@pytest.mark.skipif(find_spec("transformer_lens") is not None, reason="tuned-lens fails beside TransformerLens 4")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gpt_neo", "gptj", "bloom"])
def test_tuned_lens_decodes_alike(kind):
    package = pytest.importorskip("tuned_lens.nn.lenses", reason="tuned-lens is not installed")
    model, ids = build_family(kind), sample_ids(3)
    generator = torch.Generator().manual_seed(0)
    ours = Translators(
        0.1 * torch.randn(1, 32, 32, generator=generator), torch.randn(1, 32, generator=generator), "", 1, ""
    )
    plain, tuned = package.LogitLens.from_model(model), package.TunedLens.from_model(model)
    with torch.no_grad():
        tuned[1].weight.copy_(ours.weight[0])  # theirs begin with the embeddings
        tuned[1].bias.copy_(ours.bias[0])
        hidden = model(ids, output_hidden_states=True).hidden_states
        expected = [lens(hidden[1], 1).log_softmax(-1) for lens in (plain, tuned)]
    streams = capture(model, ids)
    for theirs, chosen in zip(expected, (streams, ours.translate(streams)), strict=True):
        assert torch.allclose(whole(model, chosen)[0], theirs, atol=1e-5)
    assert not torch.allclose(*expected, atol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_transformer_lens_reads_and_patches_alike(kind, tmp_path):
    bridges = pytest.importorskip("transformer_lens.model_bridge", reason="TransformerLens is not installed")
    from transformers import AutoTokenizer

    ids, models, theirs = sample_ids(4), {"base": build_family(kind)}, {}
    models["tuned"] = disturb(models["base"], [0])
    for name, model in models.items():
        folder = tmp_path / name
        model.save_pretrained(folder)
        write_tokenizer(folder, 50)
        settings = {"hf_model": copy.deepcopy(model), "tokenizer": AutoTokenizer.from_pretrained(folder)}
        theirs[name] = bridges.TransformerBridge.boot_transformers(str(folder), device="cpu", **settings)
    _, cache = theirs["base"].run_with_cache(ids)
    streams = capture(models["base"], ids)
    for layer in range(2):
        assert torch.allclose(cache[f"blocks.{layer}.hook_out"], streams.block[layer], atol=1e-6)
    for positions in (None, [-1], [2]):
        found = sweep_streams(Models(models), ids, **BOTH, how=Patching(positions=positions))
        chosen = slice(None) if positions is None else positions
        for layer in range(2):

            def put(value, hook, chosen=chosen):
                new = value.clone()
                new[:, chosen] = cache[hook.name][:, chosen]
                return new

            logits = theirs["tuned"].run_with_hooks(ids, fwd_hooks=[(f"blocks.{layer}.hook_out", put)])
            expected = MARGIN(logits[:, [-1]].float()).detach().numpy()
            assert found.patched[:, layer] == pytest.approx(expected, abs=1e-6)
    assert np.abs(found.clean - found.corrupted).min() > 1e-3
