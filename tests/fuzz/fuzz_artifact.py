"""Fuzz the reader of artifacts with atheris: `python tests/fuzz/fuzz_artifact.py -max_total_time=60`.

Options are libFuzzer's. An input is the length of the manifest in four bytes, the manifest, and the payload file; the
corpus begins with whole artifacts of several codecs. Anything but a DeltakeeperError is a find, as are 10 seconds or
256 MiB at once. Needs `pip install atheris`, which is no dependency.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["deltakeeper", "json"]):
    import hostile

    from deltakeeper.errors import DeltakeeperError

LIMITS = ["-timeout=10", "-malloc_limit_mb=256", "-rss_limit_mb=4096", "-max_len=65536"]
WORDS = (
    '"shape"',
    '"terms"',
    '"settings"',
    '"data_offsets":[',
    '"slice":',
    '"added_rows":',
    '"I32"',
    '"BF16"',
    "-1",
    "99999999999",
)


def main() -> None:
    """Write the corpus and fuzz until libFuzzer stops."""
    home = Path(tempfile.mkdtemp(prefix="fuzz-artifact-"))
    corpus, folder = home / "corpus", home / "artifact"
    corpus.mkdir()
    folder.mkdir()
    for made in hostile.make_artifacts(home / "made"):
        manifest = (made / "delta_config.json").read_bytes()
        payload = (made / "delta_model.safetensors").read_bytes()
        (corpus / made.name).write_bytes(len(manifest).to_bytes(4, "little") + manifest + payload)
    words = "".join('"' + word.replace('"', '\\"') + '"\n' for word in WORDS)
    (home / "words").write_text(words)

    def read(data: bytes) -> None:
        length = int.from_bytes(data[:4], "little")
        (folder / "delta_config.json").write_bytes(data[4 : 4 + length])
        (folder / "delta_model.safetensors").write_bytes(data[4 + length :])
        try:
            with hostile.hashes_agree():
                hostile.read_everything(folder)
        except DeltakeeperError:
            pass

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        draw = random.Random(seed)
        length = int.from_bytes(data[:4], "little")
        manifest, payload = data[4 : 4 + length], data[4 + length :]
        try:
            if (how := draw.randrange(3)) == 0:
                value = json.loads(manifest)
                hostile.alter_json(value, draw)
                manifest = json.dumps(value).encode()
            elif how == 1:
                value, rest = hostile.split(payload)
                hostile.alter_json(value, draw)
                payload = hostile.join(json.dumps(value).encode(), rest)
        except (ValueError, IndexError, RecursionError):
            how = 2  # it is no JSON any more
        if how == 2:
            return bytes(atheris.Mutate(data, max_size))
        return (len(manifest).to_bytes(4, "little") + manifest + payload)[:max_size]

    finds = Path.cwd() / "fuzz-"
    atheris.Setup(
        [sys.argv[0], *LIMITS, f"-dict={home / 'words'}", f"-artifact_prefix={finds}", *sys.argv[1:], str(corpus)],
        read,
        custom_mutator=mutate,
    )
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
