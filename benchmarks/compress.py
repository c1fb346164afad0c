"""Benchmarks of compression: against the published code of each method, against size, and quality at equal bytes.

    python benchmarks/compress.py peers --references DIR    # checkouts of the repositories in references.py
    python benchmarks/compress.py scale --scratch DIR       # 0.1 to 7 billion parameters; needs 31 GB there
    python benchmarks/compress.py shapes --scratch DIR      # Llama-3.1-8B and Qwen2.5-7B; needs 36 GB there
    python benchmarks/compress.py svd
    python benchmarks/compress.py quality --run runs/demo   # the fine-tunes of `make demo`

Each writes `benchmarks/results/<name>.json`; `make docs` makes the tables of docs/results.md of them. Time nothing
while anything else runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import quality
import speed


def main() -> None:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    peers = verbs.add_parser("peers", help="one matrix, ours and theirs in turns")
    peers.add_argument("--references", type=Path, required=True)
    peers.add_argument("--rounds", type=int, default=5)
    peers.set_defaults(run=lambda a: speed.run_peers(a.references, a.rounds))
    scale = verbs.add_parser("scale", help="time and memory against the size of the model")
    scale.add_argument("--scratch", type=Path, required=True)
    scale.add_argument("--billions", type=float, nargs="+", default=[0.1, 0.3, 1, 3, 7])
    scale.add_argument("--rounds", type=int, default=3)
    scale.set_defaults(run=lambda a: speed.run_scale(a.scratch, a.billions, a.rounds))
    shapes = verbs.add_parser("shapes", help="size on disk at real shapes")
    shapes.add_argument("--scratch", type=Path, required=True)
    shapes.set_defaults(run=lambda a: speed.run_shapes(a.scratch))
    svd = verbs.add_parser("svd", help="randomised against exact decomposition")
    svd.set_defaults(run=lambda _: speed.run_svd())
    table = verbs.add_parser("quality", help="codecs at equal bytes on the embedded model")
    table.add_argument("--run", type=Path, dest="folder", required=True)
    table.add_argument("--minutes", type=float, default=600, help="stop after so long; run again to go on")
    table.set_defaults(run=lambda a: quality.run(a.folder, a.minutes))
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
