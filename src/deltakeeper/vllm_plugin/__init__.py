"""A plugin for vLLM: artifacts take slots of its LoRA machinery, beside ordinary LoRA adapters, and stay packed there.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes. Nothing of vLLM
is imported before that. What vLLM does not promise to keep is touched in `hooks` alone.
"""

from __future__ import annotations


def register() -> None:
    """Teach this process' vLLM to load artifacts; once is as good as often.

    With a vLLM that the plugin was never tested with, it leaves everything alone and says so in the log.
    """
    from deltakeeper.vllm_plugin.versions import untested

    reason = untested()
    if reason is not None:
        from vllm.logger import init_logger

        init_logger("vllm.deltakeeper").warning("%s", reason)
        return
    from deltakeeper.vllm_plugin.hooks import install

    install()
