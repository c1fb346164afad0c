"""Which versions of vLLM the plugin was tested with: what it uses of vLLM may change with every release."""

from __future__ import annotations

TESTED = ("0.32.0",)


def untested() -> str | None:
    """Why the plugin stays away from the vLLM of this process, or None where it was tested with it."""
    import vllm

    release = str(vllm.__version__).partition("+")[0]
    if release in TESTED:
        return None
    return (
        f"deltakeeper's plugin stays off: it was tested with vLLM {', '.join(TESTED)} and this is {release}; install a "
        "tested vLLM, or serve deltas as ordinary adapters with `deltakeeper export-lora`."
    )
