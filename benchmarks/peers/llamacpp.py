"""llama.cpp's own `llama-batched-bench`: a bfloat16 GGUF, sequences of random tokens, no sampling and no text.

It feeds tokens and computes logits as a server would, but chooses nothing from them, which is in its favour.
"""

from __future__ import annotations

import json
import resource
import subprocess

import workload


def main() -> None:
    """Run the base."""
    work = workload.parse(("base",))
    program = work.peers / "llama-build" / "bin" / "llama-batched-bench"
    weights = work.peers / f"{work.model.name}-bf16.gguf"
    for path in (program, weights):
        if not path.is_file():
            workload.absent(f"{path} is not there: run peers/install.sh and serving_setup.py")
    # the pass over the prompt gives the first token, so that new - 1 passes are left
    sizes = {
        "-npp": work.prompt,
        "-ntg": max(work.new - 1, 1),
        "-npl": ",".join([str(work.batch)] * (1 + work.repeats)),
    }
    sizes |= {"-c": max(512, 2 * work.batch * (work.prompt + work.new)), "-t": work.threads, "-tb": work.threads}
    command = [str(program), "-m", str(weights), "--output-format", "jsonl"]
    command += [str(word) for pair in sizes.items() for word in pair]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    samples = [{"first_token_s": row["t_pp"], "seconds": row["t_pp"] + row["t_tg"]} for row in rows[1:]]
    version = subprocess.run([str(program), "--version"], capture_output=True, text=True, check=False)
    workload.report(
        work,
        samples,
        {"llama.cpp": (version.stdout + version.stderr).strip().splitlines()[0]},
        peak_rss_mib=round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, 1),
    )


if __name__ == "__main__":
    main()
