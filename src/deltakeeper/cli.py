"""The command line: thin verbs, one sentence for every error that a person can act on."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from typing import Annotated, NoReturn

import typer

from deltakeeper.commands.advise import advise
from deltakeeper.commands.apply import apply
from deltakeeper.commands.attest import attest
from deltakeeper.commands.bench import bench
from deltakeeper.commands.calibrate import calibrate
from deltakeeper.commands.codecs import codecs
from deltakeeper.commands.compress import compress
from deltakeeper.commands.defend import defend
from deltakeeper.commands.demo import demo
from deltakeeper.commands.evaluate import evaluate
from deltakeeper.commands.export_lora import export_lora
from deltakeeper.commands.finetune import finetune
from deltakeeper.commands.generate import generate
from deltakeeper.commands.heal import heal
from deltakeeper.commands.hub import pull, push
from deltakeeper.commands.import_delta import import_delta
from deltakeeper.commands.inspect import inspect
from deltakeeper.commands.kernels import kernels
from deltakeeper.commands.keys import keys
from deltakeeper.commands.lens import lens
from deltakeeper.commands.recipes import recipes
from deltakeeper.commands.report import report
from deltakeeper.commands.serve import serve
from deltakeeper.commands.study import study
from deltakeeper.commands.verify import verify
from deltakeeper.errors import DeltakeeperError
from deltakeeper.quiet_loading import quiet_imports

INTERRUPTED = 130


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"deltakeeper {metadata.version('deltakeeper')}\n")
        raise typer.Exit


app = typer.Typer(
    name="deltakeeper",
    help="Compress, measure and serve the difference between a fine-tuned language model and its base.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None: ...


_COMPRESS = (compress, inspect, verify, apply, heal, defend, codecs, push, pull, export_lora)
_SERVE = (generate, serve, kernels)
_STUDY = (demo, recipes, finetune, study, report, advise, evaluate, calibrate, lens)
for verb in (*_COMPRESS, *_SERVE, *_STUDY):
    app.command()(verb)
app.add_typer(attest)
app.add_typer(bench)
app.add_typer(keys)
app.command("import")(import_delta)  # a word that Python keeps for itself


UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""What the parser raises for a command line that makes no sense; typer does not export it."""


def main() -> None:
    """Run the command line; exit status 0 is success, 1 a failed check or a bug, 2 an error of use or of input."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_imports()
    try:
        status = app(sys.argv[1:] or ["--help"], prog_name="deltakeeper", standalone_mode=False)
    except DeltakeeperError as error:
        _fail(str(error), 2)
    except UsageError as error:
        _fail(_usage(error), 2)
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}; check the path, its rights and the disk.", 2)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    if status == INTERRUPTED:
        _fail("interrupted; nothing half-written is left, and a study goes on with the same command.", INTERRUPTED)
    sys.exit(status)


def _usage(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    message = str(error.format_message() if hasattr(error, "format_message") else error).strip().rstrip(".")
    command = "deltakeeper" if context is None else context.command_path
    return f"{message[:1].lower()}{message[1:]}; see `{command} --help`."


def _fail(sentence: str, status: int) -> NoReturn:
    sys.stderr.write(f"deltakeeper: {sentence}\n")
    sys.exit(status)
