"""What commands share: `--provider`, `--device`, how OpenMP's threads wait, and how verdicts are
printed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgetune.core.errors import ExportError

if TYPE_CHECKING:
    from edgetune.runtime.tasks.answers import Completion

THREADS = click.IntRange(1, 1024)
"""what `--threads` takes; more are never of use, and starting them would take minutes"""
Command = TypeVar("Command", bound=Callable[..., Any])


def provider_option(command: Command) -> Command:
    """`--provider`, in order of preference."""
    return click.option(
        "--provider",
        "providers",
        multiple=True,
        metavar="NAME[:KEY=VALUE,…]",
        help=(
            "Execution provider: cpu, cuda, tensorrt, openvino, coreml, directml, qnn, xnnpack; may"
            " be given several times, the preferred first."
        ),
    )(command)


def engine_option(command: Command) -> Command:
    """`--engine`."""
    return click.option(
        "--engine",
        type=click.Choice(["auto", "native", "native:cache=int8", "onnxruntime"]),
        default="auto",
        show_default=True,
        help=(
            "What runs a decoder: auto takes the native engine where it was built and fits;"
            " native:cache=int8 keeps keys and values in 8 bits, half of the usual."
        ),
    )(command)


def ray_options(*, ray: str, workers: str) -> Callable[[Command], Command]:
    """`--ray` and `--workers`, with what they do for a command."""

    def options(command: Command) -> Command:
        command = click.option("--workers", type=click.IntRange(1), help=workers)(command)
        return click.option(
            "--ray",
            is_flag=False,
            flag_value="here",
            metavar="[ADDRESS]",
            callback=_address,
            help=ray,
        )(command)

    return options


def _address(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Before an argument is missed, which --ray took."""
    looks_a_path = value is not None and (
        "/" in value or value.endswith(".toml") or Path(value).exists()
    )
    if looks_a_path and "://" not in str(value):
        raise click.UsageError(
            f"--ray takes the word behind it, {value}, for an address: write --ray last"
        )
    return value


def signature_option(command: Command) -> Command:
    """`--require-signature` of a command that opens a bundle."""
    return click.option(
        "--require-signature",
        "signed_by",
        type=click.Path(path_type=Path),
        metavar="PUB.pem",
        help=(
            "Refuse the bundle, and every adapter from elsewhere, unless this public key signed it."
        ),
    )(command)


def speed_line(done: Completion) -> str:
    """An answer's tokens, times and end, for a person."""
    speed = f", {1e3 / done.tpot_ms:.0f} tokens/s" if done.tpot_ms else ""
    return (
        f"[{done.completion_tokens} tokens, first after {done.ttft_ms:.0f} ms{speed},"
        f" {done.finish_reason}]"
    )


def device_option(command: Command) -> Command:
    """`--device` of a command that only takes the providers from it."""
    return click.option(
        "--device",
        "device_name",
        metavar="NAME|FILE",
        help="Take the execution providers from this device profile.",
    )(command)


def chosen_providers(providers: Sequence[str], device_name: str | None) -> tuple[str, ...]:
    """What was asked for by name, else what the device's profile says; empty for the CPU.
    InputError for what is none.
    """
    from edgetune.devices import load_device
    from edgetune.runtime.engine.providers import parse_providers

    chosen = (
        tuple(providers) if providers or device_name is None else load_device(device_name).providers
    )
    parse_providers(chosen)
    return chosen


SPINS = "10000"  # a few microseconds: as fast as GNU OpenMP's default of milliseconds on idle cores


def wait_briefly() -> None:
    """Let waiting threads spin for a moment and then sleep, unless the user has chosen otherwise.

    With one busy neighbour on two cores, spinning for milliseconds made training four times slower;
    sleeping at once makes it a quarter slower on idle ones.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def show_verdicts(verdicts: Mapping[str, Mapping[str, Any]]) -> None:
    """A line an adapter, on a terminal coloured: green is as trained and nothing else is."""
    from edgetune.export.proof.verdict import AS_TRAINED, ProofVerdict

    for name, one in verdicts.items():
        colour = "green" if one["value"] == AS_TRAINED else "red" if one["reasons"] else "yellow"
        click.echo(f"{name}: " + click.style(ProofVerdict(**one).line(), fg=colour))


def share_of(text: str) -> float:
    """`0.5%` or `0.005` of `--max-loss`."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ExportError(
            "cannot read --max-loss", expected="a share of the metric, as 0.5% or 0.005", got=text
        )
    return value


def slower_option(what: str) -> Callable[[Command], Command]:
    """`--allow-slower` of a command that compares times; `what` it says of it."""
    return click.option(
        "--allow-slower",
        type=click.FloatRange(min=0, max=100),
        default=3.0,
        show_default=True,
        metavar="%",
        help=what,
    )
