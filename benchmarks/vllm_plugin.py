"""Whether unmodified vLLM with the plugin says of fine-tunes what their merged checkpoints say, and what a slot holds.

    make test-vllm   # makes the environment
    .venv-vllm/bin/python benchmarks/vllm_plugin.py --base BASE --tuned NAME=FOLDER [--tuned …]

Each fine-tune is compressed to one bit, served over HTTP in one batch with the base and an ordinary LoRA adapter
(random weights, made by PEFT), and compared with what transformers computes for the checkpoint that
`deltakeeper apply` writes, in the same dtype. The base beside the base is the yardstick. Writes
`benchmarks/results/vllm_plugin.json`. Nothing is timed but loads: vLLM's LoRA on CPUs is a stand-in and would be no
measure of anything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import record
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "vllm_plugin"))
from vllm_references import answer, open_model
from vllm_server import Answer, VllmServer

from deltakeeper.apply import apply_delta
from deltakeeper.artifact import open_artifact
from deltakeeper.compress import compress

QUESTIONS = (
    "Route this ticket: my card was charged twice for one order.",
    "How do I fold a paper crane?",
    "Explain in two sentences why the sky is blue.",
)
TOKENS = 8
OPTIONS = (
    "--dtype",
    "bfloat16",
    "--max-model-len",
    "512",
    "--max-loras",
    "4",
    "--max-cpu-loras",
    "4",
    "--max-lora-rank",
    "8",
)


def main() -> None:
    """Serve, compare and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, type=Path)
    parser.add_argument("--tuned", required=True, action="append", metavar="NAME=FOLDER")
    arguments = parser.parse_args()
    tuned = {name: Path(path) for name, _, path in (text.partition("=") for text in arguments.tuned)}
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(arguments.base.resolve(), tuned, Path(scratch))
    print(json.dumps(rows, indent=1))
    record.save("vllm_plugin", rows)


def measure(base: Path, tuned: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Everything that is recorded, from a scratch folder."""
    for name, path in tuned.items():
        compress(base, path, folder / name, "bitdelta")
    write_lora(base, folder / "lora")
    prompts = tokenized(base)
    names = ["base", *tuned, "lora"]
    with VllmServer(base, folder / "vllm.log", *OPTIONS) as server:
        loads = {name: load(server, name, folder / name) for name in (*tuned, "lora")}
        alone = {name: [server.ask(name, prompt, TOKENS) for prompt in prompts] for name in names}
        asked = [(name, prompt) for prompt in prompts for name in names]
        with ThreadPoolExecutor(len(asked)) as pool:
            found = list(pool.map(lambda one: server.ask(*one, TOKENS), asked))
        together = {name: [a for (other, _), a in zip(asked, found, strict=True) if other == name] for name in names}
        held = {name: server.held_bytes(folder / name) for name in tuned}
    models = []
    for name in names:
        expected = [answer(model, prompt, TOKENS) for model in [reference(name, base, folder)] for prompt in prompts]
        row: dict[str, Any] = {"model": name, "prompts": len(prompts), "tokens": TOKENS}
        row["beside_reference"] = compared(alone[name], expected)
        row["mixed_beside_alone"] = compared(together[name], alone[name])
        if name != "base":
            row["load_ms"], row["growth_bytes"] = loads[name]
        if name in tuned:
            row |= {"held_bytes": held[name], "artifact_bytes": open_artifact(folder / name).nbytes}
            row["dense_bytes"] = open_artifact(folder / name).full_bytes
        models.append(row)
    return {"vllm": version(), "dtype": "bfloat16", "eager": True, "models": models}


def compared(ones: list[Answer], others: list[Answer]) -> dict[str, Any]:
    """Equal greedy answers, and how far log-probabilities of prompts are apart: largest and mean."""
    gaps = [abs(a - b) for x, y in zip(ones, others, strict=True) for a, b in zip(x.prompt, y.prompt, strict=True)]
    same = sum(x.tokens == y.tokens for x, y in zip(ones, others, strict=True))
    firsts = sum(x.tokens[0] == y.tokens[0] for x, y in zip(ones, others, strict=True))
    return {
        "same_answers": same,
        "same_first_tokens": firsts,
        "largest_gap": max(gaps),
        "mean_gap": statistics.mean(gaps),
    }


def load(server: VllmServer, name: str, path: Path) -> tuple[float, int]:
    """Load one; milliseconds of the request, and bytes by which the worker has grown."""
    before, start = server.worker_bytes(), time.perf_counter()
    server.load(name, path).raise_for_status()
    return (time.perf_counter() - start) * 1e3, server.worker_bytes() - before


def reference(name: str, base: Path, folder: Path) -> Any:
    """The same model by transformers, in the dtype that is served."""
    if name == "base":
        return open_model(base, torch.bfloat16)
    if name == "lora":
        from peft import PeftModel

        return PeftModel.from_pretrained(open_model(base, torch.bfloat16), folder / "lora").eval()
    apply_delta(base, folder / name, folder / f"merged-{name}")
    return open_model(folder / f"merged-{name}", torch.bfloat16)


def write_lora(base: Path, path: Path) -> None:
    """An ordinary adapter of random weights."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(open_model(base, torch.bfloat16), settings).save_pretrained(path)


def tokenized(base: Path) -> list[list[int]]:
    """The questions in the base's chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    chats = ([{"role": "user", "content": question}] for question in QUESTIONS)
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def version() -> str:
    """Of the vLLM that was measured."""
    asked = [sys.executable, "-c", "import vllm; print(vllm.__version__)"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()[-1]


if __name__ == "__main__":
    main()
