"""Write what the serving benchmark needs, once: random tenants and adapters, a model of 1 B parameters, a GGUF.

    benchmarks/peers/install.sh /tmp/peers
    python benchmarks/serving_setup.py --peers /tmp/peers --tenants 128 --adapters 32

Tenants are the base with Gaussian noise of 2 % of each tensor's deviation, norms too, compressed to one bit. What
they say means nothing; the work and the bytes are those of a real fine-tune.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from deltakeeper import compress
from deltakeeper.lab.embedded import prepare_embedded_model

NOISE = 0.02
POOL = 1 << 24
RANK = 64
LARGE = "llama-1b"
LARGE_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
}
"""The proportions of Llama-3.2-1B with the vocabulary of SmolLM2, whose tokenizer it borrows: 1.07 B parameters."""
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def main() -> None:
    """Write what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path("/tmp/peers"))
    parser.add_argument("--tenants", type=int, default=128, help="tenants of SmolLM2")
    parser.add_argument("--adapters", type=int, default=32, help="LoRA adapters of each model")
    parser.add_argument("--large-tenants", type=int, default=8, help="tenants and adapters of the large model")
    arguments = parser.parse_args()
    peers: Path = arguments.peers
    small = prepare_embedded_model()
    large = peers / LARGE
    write_large(large, small)
    for model, tenants, adapters in (
        (small, arguments.tenants, arguments.adapters),
        (large, arguments.large_tenants, arguments.large_tenants),
    ):
        write_adapters(model, peers / "adapters" / model.name, adapters)
        write_tenants(model, peers / "tenants" / model.name, tenants)
        write_gguf(model, peers)


def write_large(folder: Path, tokenizer: Path) -> None:
    """Random weights of the large shape."""
    if folder.is_dir():
        return
    scratch = _scratch(folder)
    (scratch / "config.json").write_text(json.dumps(LARGE_CONFIG))
    for name in SIDE_FILES:
        shutil.copyfile(tokenizer / name, scratch / name)
    import transformers

    with torch.device("meta"):
        shapes = {
            name: tensor.shape
            for name, tensor in transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.from_pretrained(scratch)
            )
            .state_dict()
            .items()
            if name != "lm_head.weight"
        }
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        norm = len(shape) == 1
        weights[name] = torch.ones(shape) if norm else torch.empty(shape).normal_(std=0.02, generator=generator)
        weights[name] = weights[name].bfloat16()
    save_file(weights, scratch / "model.safetensors", metadata={"format": "pt"})
    scratch.rename(folder)
    print(f"{folder}: {sum(w.numel() for w in weights.values()):,} parameters")


def write_tenants(model: Path, folder: Path, count: int) -> None:
    """One-bit artifacts of the base with noise."""
    base = load_file(model / "model.safetensors")
    for i in range(count):
        if (folder / f"t{i}").is_dir():
            continue
        scratch = _scratch(folder / "tuned")
        pool = torch.randn(POOL, generator=torch.Generator().manual_seed(i))
        tuned = {}
        for at, (name, weight) in enumerate(base.items()):
            start = 7919 * at % POOL
            noise = torch.cat([pool[start:], pool.repeat(weight.numel() // POOL + 1)])[: weight.numel()]
            scale = NOISE * (weight.float().std() if weight.ndim > 1 else weight.float().abs().mean())
            tuned[name] = (weight.float() + scale * noise.view_as(weight)).bfloat16()
        save_file(tuned, scratch / "model.safetensors", metadata={"format": "pt"})
        shutil.copyfile(model / "config.json", scratch / "config.json")
        report = compress(model, scratch, folder / f"t{i}", "bitdelta")
        shutil.rmtree(scratch)
        print(f"{folder / f't{i}'}: {_nbytes(folder / f't{i}'):,} bytes, {report.bits_per_weight:.3f} bits a weight")


def write_adapters(model: Path, folder: Path, count: int) -> None:
    """Random LoRA adapters of all linears, in PEFT's format, bfloat16."""
    base = load_file(model / "model.safetensors")
    linears = [
        name.removesuffix(".weight") for name, w in base.items() if name.endswith("_proj.weight") and w.ndim == 2
    ]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in linears}),
    }
    for i in range(count):
        target = folder / f"t{i}"
        if target.is_dir():
            continue
        scratch = _scratch(target)
        generator = torch.Generator().manual_seed(i)
        weights = {}
        for name in linears:
            rows, columns = base[f"{name}.weight"].shape
            for letter, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
                values = torch.empty(shape).normal_(std=0.01, generator=generator)
                weights[f"base_model.model.{name}.lora_{letter}.weight"] = values.bfloat16()
        save_file(weights, scratch / "adapter_model.safetensors", metadata={"format": "pt"})
        (scratch / "adapter_config.json").write_text(json.dumps(config))
        scratch.rename(target)
        print(f"{target}: {_nbytes(target):,} bytes")


def write_gguf(model: Path, peers: Path) -> None:
    """A bfloat16 GGUF by llama.cpp's own script, where install.sh has brought it."""
    target = peers / f"{model.name}-bf16.gguf"
    script = peers / "llama-src" / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
    if target.is_file() or not script.is_file():
        return
    command = [sys.executable, str(script), str(model), "--outtype", "bf16", "--outfile", str(target)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(peers / "py")})


def _scratch(target: Path) -> Path:
    """An empty folder beside the target, so that a target which exists is whole."""
    scratch = target.with_name(target.name + ".part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    return scratch


def _nbytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


if __name__ == "__main__":
    main()
