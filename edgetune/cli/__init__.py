"""The command line: a click group; a command is imported when it is called.

`edgetune --help` imports neither torch nor onnxruntime. Exit codes: 0 done; 1 a proof, a check or a
budget failed; 2 bad usage or bad input; 3 too noisy to tell; 130 interrupted.
"""

from __future__ import annotations

import importlib
import signal
import sys
import threading
import warnings
from typing import Any

import click

from edgetune import __version__
from edgetune.core.errors import EdgetuneError, ProofError

COMMANDS = {
    "quickstart": "The whole road on embedded data: train, export, prove, check, predict.",
    "models": "List the built-in base models and fetch them.",
    "init": "Look at a data file and write a recipe for it.",
    "data": "Show what a data file or a recipe's rows hold.",
    "train": "Train an adapter from a recipe.",
    "sweep": "Train a grid of settings and compare the runs.",
    "label": "Label texts by a bundle and few labelled rows, for training.",
    "report": "Compare runs on one page.",
    "eval": "Measure a run or a bundle on a data file.",
    "compress": "Make a trained adapter small: a lower rank in few bits.",
    "decompress": "Write a small adapter as PEFT's own again.",
    "export": "Turn adapters into a bundle, with proof.",
    "sign": "Sign a bundle or an adapter as its publisher.",
    "verify": "Check a bundle's hashes; with --key its signature, with --parity the proof again.",
    "push": "Publish a bundle or an adapter to a registry, the hub or a folder.",
    "pull": "Fetch a bundle or an adapter, only what is not here yet.",
    "diff": "Say what changed from one bundle to another.",
    "predict": "Answer one text or a file of rows.",
    "chat": "Talk to a bundle in the terminal.",
    "serve": "Answer over HTTP: OpenAI's endpoints, adapters as models, a playground.",
    "top": "Watch a server live in the terminal.",
    "check": "Measure latency and memory against a device's budget.",
    "bench": "Compare two files of results of make bench.",
    "devices": "Show device profiles and this machine's own.",
}


class LazyGroup(click.Group):
    """Knows every command's name and one-line help without importing it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"edgetune.cli.{name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="edgetune")
def cli() -> None:
    """Fine-tune small language models and put the proven result on edge devices."""


def main(args: list[str] | None = None) -> None:
    """Run the command line; every error a user can cause is one line on stderr."""
    warnings.filterwarnings(
        "ignore", category=FutureWarning
    )  # what libraries plan among themselves
    if threading.current_thread() is threading.main_thread():
        signal.signal(
            signal.SIGTERM, lambda *_: sys.exit(143)
        )  # so that half-written folders are removed
    try:
        result: Any = cli.main(args=args, prog_name="edgetune", standalone_mode=False)
    except click.exceptions.Abort:
        _stop("interrupted", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except ProofError as error:
        _stop(str(error), 1)
    except EdgetuneError as error:
        _stop(str(error), 2)
    except ModuleNotFoundError as error:
        extra = _extra_of(error.name or "")
        if extra is None:
            raise
        _stop(
            f"this command needs the Python package {error.name!r}. Install it: pip install"
            f" 'edgetune[{extra}]'",
            2,
        )
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    except OSError as error:  # a place that nobody expected to be unreadable
        _stop(f"{error.filename}: {error.strerror}" if error.filename else str(error), 2)
    else:
        sys.exit(result if isinstance(result, int) else 0)


def _extra_of(module: str) -> str | None:
    """The extra that brings a missing package, or None when it is not one of ours."""
    top = module.split(".")[0]
    if top in {"onnx", "onnxscript", "onnx_ir"}:
        return "export"
    if top in {"starlette", "uvicorn", "prometheus_client"}:
        return "serve"
    if top in {
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "pyarrow",
        "gguf",
        "optimum",
        "sklearn",
        "scipy",
        "optuna",
        "sacrebleu",
        "rouge_score",
        "cleanlab",
        "huggingface_hub",
    }:
        return "train"
    return None


def _stop(message: str, code: int) -> None:
    click.echo(f"edgetune: {message}", err=True)
    sys.exit(code)
