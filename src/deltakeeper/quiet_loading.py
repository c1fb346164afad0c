"""Loading models without the progress bars of transformers, and without what its imports say of themselves."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

_OF_IMPORTS = {"torchao": "Failed to load ", "torch.utils._pytree": "%s is an Enum subclass and is now natively "}
"""What importing the models of transformers logs, by logger: it imports torchao, which tries compiled parts for other
GPUs and Python versions and registers enums in a way that torch no longer needs. Nobody here can act on either."""


def quiet_imports() -> None:
    """Drop these messages, and no others, from now on; called before the imports."""
    for name in _OF_IMPORTS:
        logging.getLogger(name).addFilter(_is_news)  # a filter that is there already is not added again


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_OF_IMPORTS[record.name])


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep the progress bars of transformers off the screen for a while: commands have their own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
