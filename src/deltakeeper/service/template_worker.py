"""A process that renders chat templates of strangers within limits, for `templates.Templates`.

It imports nothing of ours, so that it is small. A request is a line of JSON on standard input, its answer a line on
standard output: `{"text"}`, `{"error"}`, or `{"full"}` where memory did not suffice, after which the process ends. A
template that takes too long ends it too: the system sees to that.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template


def main() -> None:
    """Render until standard input ends; the arguments are seconds of a text and bytes of memory."""
    seconds, memory = int(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sizes = Path("/proc/self/statm")
    if sizes.is_file():  # of Linux; elsewhere there is no limit that counts only what comes from now on
        held = int(sizes.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + memory, held + memory))
    _say({})  # it is ready
    for line in sys.stdin:
        spent = resource.getrusage(resource.RUSAGE_SELF)
        end = math.ceil(spent.ru_utime + spent.ru_stime) + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))
        try:
            _say(_answer(json.loads(line)))
        except MemoryError:  # it may be held on to, in a cache of templates
            _say({"full": True})
            return


def _answer(asked: dict[str, Any]) -> dict[str, str]:
    try:
        rendered, _ = render_jinja_template(**asked["with"])
    except MemoryError:
        raise
    except Exception as error:  # a template is a program, and may fail in any way
        return {"error": (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")}
    text = rendered[0]
    return {"text": text} if len(text) <= asked["most"] else {"error": f"it writes {len(text):,} characters"}


def _say(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
