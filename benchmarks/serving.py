"""Tokens a second and memory, ours and our peers', each in a process of its own, in interleaved rounds.

    benchmarks/peers/install.sh /tmp/peers
    python benchmarks/serving_setup.py --peers /tmp/peers
    python benchmarks/serving.py --peers /tmp/peers --vllm /tmp/peers/vllm/bin/python --rounds 5

Every round runs every contest once, so that what slows the machine for a while slows all of them. Writes
`benchmarks/results/serving.json`, whose `rows` are `workload`, `environment` and `contests`. A contest that could not
run has `absent` with the reason, or `failed`. All else is the median over rounds; `tokens_s` and the like also have
`_min`, `_max` and `_rounds`, in the order of the rounds (null where a round failed), for ratios round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import record

from deltakeeper.lab.embedded import prepare_embedded_model

PEERS = Path(__file__).parent / "peers"
TIMED = ("tokens_s", "decode_tokens_s", "prefill_tokens_s", "first_token_s")
MEASURED = ("rss_mib", "rss_anon_mib", "peak_rss_mib", "rss_before_tenants_mib", "rss_with_tenants_mib")
RATES = (*TIMED, *MEASURED, "load_s_per_tenant")
SMALL, LARGE = "smollm2-135m", "llama-1b"
LORA = "adapters of rank 64 on all linears, bfloat16; compare bytes_per_tenant"
EAGER = "enforce_eager"


@dataclass(frozen=True)
class Contest:
    """One peer at one size.

    Attributes:
        name: its own, as `--only` matches it.
        peer: script under `peers/`.
        mode: what the script does.
        model: of the two models.
        batch: requests at once.
        tenants: different tenants among them, 0 for the base.
        remark: what a reader of the figures should know.
        slow: whether it takes minutes, so that it has fewer rounds and repeats.
    """

    name: str
    peer: str
    mode: str
    model: str
    batch: int
    tenants: int = 0
    remark: str = ""
    slow: bool = False


def contests(model: str, most_large: int) -> list[Contest]:
    """All contests on one model, those that are compared with each other side by side."""
    bench = "llama-batched-bench: random tokens, no sampling"
    found = []
    small = model == SMALL
    for batch in (1, 32):
        found.append(Contest(f"ours base x{batch}", "ours", "base", model, batch))
        found.append(Contest(f"llama.cpp base x{batch}", "llamacpp", "base", model, batch, remark=bench))
        if small:
            found.append(Contest(f"vllm base x{batch}", "vllm_cpu", "base", model, batch, remark=EAGER))
            found.append(Contest(f"vllm compiled base x{batch}", "vllm_cpu", "base-compiled", model, batch))
        found.append(Contest(f"hf generate base x{batch}", "hf", "generate", model, batch))
        if small:
            found.append(Contest(f"hf continuous base x{batch}", "hf", "continuous", model, batch))
    sizes = (1, 8, 32, 128) if small else (1, most_large)
    for size in sizes:
        if size not in (1, 32):
            found.append(Contest(f"ours base x{size}", "ours", "base", model, size))
        remark = "a request of each tenant"
        found.append(Contest(f"ours 1-bit T={size}", "ours", "tenants", model, size, size, remark))
    lora = 32 if small else most_large
    if small:
        found.append(Contest("ours 1-bit T=1 x32", "ours", "tenants", model, 32, 1, "one tenant's requests"))
        found.append(Contest("ours 1-bit T=8 x32", "ours", "tenants", model, 32, 8, "four requests of each tenant"))
        found.append(Contest(f"vllm LoRA T={lora}", "vllm_cpu", "lora", model, lora, lora, f"{EAGER}; {LORA}", True))
    found.append(Contest(f"peft LoRA T={lora}", "peft_lora", "lora", model, lora, lora, LORA, True))
    remark = "a whole model for each request, one after the other; copying its weights is not timed"
    found.append(Contest(f"hf merged T={lora}", "hf", "merged", model, lora, lora, remark, True))
    return found


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2, help="timings in each process, after its warm-up")
    parser.add_argument("--slow-rounds", type=int, default=2, help="rounds of contests that take minutes, once each")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", choices=(SMALL, LARGE, "both"), default=SMALL)
    parser.add_argument("--large-tenants", type=int, default=8, help="tenants of the large model")
    parser.add_argument("--only", default="", help="regular expression that a contest's name must match")
    parser.add_argument("--peers", type=Path, default=Path("/tmp/peers"))
    parser.add_argument("--vllm", default="/tmp/vllm/v/bin/python", help="interpreter of an environment with vLLM")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one process")
    parser.add_argument("--record", default="serving", help="name of the results, so that a trial overwrites nothing")
    parser.add_argument("--list", action="store_true", help="only name the contests")
    arguments = parser.parse_args()
    models = (SMALL, LARGE) if arguments.model == "both" else (arguments.model,)
    chosen = [c for m in models for c in contests(m, arguments.large_tenants) if re.search(arguments.only, c.name)]
    if arguments.list:
        print("\n".join(f"{c.model}: {c.name}" for c in chosen))
        return
    run(arguments, chosen)


def run(arguments: argparse.Namespace, chosen: list[Contest]) -> None:
    """Round after round; the file is written after each contest, so that an interrupted run keeps what it has."""
    folders = {SMALL: prepare_embedded_model().resolve(), LARGE: arguments.peers / LARGE}
    answers: dict[Contest, list[dict[str, Any]]] = {contest: [] for contest in chosen}
    for turn in range(arguments.rounds):
        for contest in chosen:
            seen = answers[contest]
            if contest.slow and turn >= arguments.slow_rounds:
                continue
            if seen and all("samples" not in answer for answer in seen):
                seen.append(seen[0])  # it did not run in the first round either
                continue
            seen.append(ask(arguments, contest, folders[contest.model]))
            told = seen[-1].get("tokens_s") or seen[-1].get("absent") or seen[-1].get("failed")
            print(f"round {turn + 1} | {contest.model} | {contest.name} | {told}", flush=True)
            record.save(arguments.record, rows(arguments, turn + 1, answers))


def rows(arguments: argparse.Namespace, rounds: int, answers: dict[Contest, list[dict[str, Any]]]) -> dict[str, Any]:
    """What is recorded so far."""
    fields = ("prompt", "new", "threads", "repeats", "slow_rounds")
    return {
        "workload": {field: getattr(arguments, field) for field in fields}
        | {"rounds": rounds, "sampling": "greedy, end-of-text ignored", "dtype": "bfloat16"},
        "environment": {"cpu_flags": cpu_flags(), "load_average": os.getloadavg()},
        "contests": [asdict(contest) | summary(seen) for contest, seen in answers.items() if seen],
    }


def ask(arguments: argparse.Namespace, contest: Contest, model: Path) -> dict[str, Any]:
    """The answer of one process: the last line of its output, or why there is none."""
    python = arguments.vllm if contest.peer == "vllm_cpu" else sys.executable
    if not Path(python).is_file():
        return {"absent": f"{python} is not there: run peers/install.sh"}
    if not (model / "config.json").is_file():
        return {"absent": f"{model} is not there: run serving_setup.py"}
    words = {"mode": contest.mode, "batch": contest.batch, "tenants": contest.tenants}
    words |= {k: getattr(arguments, k) for k in ("prompt", "new", "threads", "peers")}
    words |= {"model": model, "repeats": 1 if contest.slow else arguments.repeats}
    command = [python, str(PEERS / f"{contest.peer}.py")]
    command += [f"--{name}={value}" for name, value in words.items()]
    threads = {"OMP_NUM_THREADS": str(arguments.threads), "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=arguments.timeout,
            env=os.environ | threads,
            cwd=arguments.peers,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer within {arguments.timeout:g} s"}
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    # an environment may crash while it shuts down; the answer is whole by then
    if answers:
        return json.loads(answers[-1])
    return {"failed": " | ".join(done.stderr.strip().splitlines()[-3:]) or f"it ended with {done.returncode}"}


def summary(seen: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and extremes over the rounds, and whatever else the last round said."""
    good = [answer for answer in seen if "samples" in answer]
    if not good:
        return {key: seen[-1][key] for key in ("absent", "failed") if key in seen[-1]}
    found = {key: value for key, value in good[-1].items() if key not in (*RATES, "samples")}
    for rate in RATES:
        values = [answer[rate] for answer in good if answer.get(rate) is not None]
        if not values:
            continue
        found[rate] = statistics.median(values)
        if rate in TIMED:
            found |= {f"{rate}_min": min(values), f"{rate}_max": max(values)}
            found[f"{rate}_rounds"] = [answer.get(rate) for answer in seen]
    if len(good) < len(seen):
        found["failed_rounds"] = [answer.get("failed") for answer in seen if "samples" not in answer]
    return found


def cpu_flags() -> list[str]:
    """Vector extensions of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return sorted(flag for flag in flags if flag.startswith(("avx", "fma", "amx", "f16c", "vnni")))


if __name__ == "__main__":
    main()
