"""The command line: thin verbs, one sentence for every error that a person can act on."""

from __future__ import annotations

import os
import sys

import typer

from deltakeeper.commands.apply import apply
from deltakeeper.commands.codecs import codecs
from deltakeeper.commands.compress import compress
from deltakeeper.commands.demo import demo
from deltakeeper.commands.inspect import inspect
from deltakeeper.commands.verify import verify
from deltakeeper.errors import DeltakeeperError

app = typer.Typer(
    name="deltakeeper",
    help="Compress, measure and serve the difference between a fine-tuned language model and its base.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for verb in (compress, inspect, verify, apply, codecs, demo):
    app.command()(verb)


def main() -> None:
    """Run the command line; exit status 0 is success, 1 a failed check or a bug, 2 an error of use or of input."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except DeltakeeperError as error:
        sys.stderr.write(f"deltakeeper: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("deltakeeper: interrupted; the same command goes on from here.\n")
        sys.exit(130)
