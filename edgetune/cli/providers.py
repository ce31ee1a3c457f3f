"""`--provider` and `--device` of the commands that open a bundle: which execution providers run its graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def provider_option(command: Command) -> Command:
    """`--provider`, in order of preference."""
    return click.option(
        "--provider", "providers", multiple=True, metavar="NAME[:KEY=VALUE,…]",
        help="Execution provider: cpu, cuda, tensorrt, openvino, coreml, directml, qnn, xnnpack; may be given several times, the preferred first.",
    )(command)  # fmt: skip


def device_option(command: Command) -> Command:
    """`--device` of a command that only takes the providers from it."""
    return click.option("--device", "device_name", metavar="NAME|FILE", help="Take the execution providers from this device profile.")(command)


def chosen_providers(providers: Sequence[str], device_name: str | None) -> tuple[str, ...]:
    """What was asked for by name, else what the device's profile says; empty for the CPU. InputError for what is none."""
    from edgetune.devices import load_device
    from edgetune.runtime.providers import parse_providers

    chosen = tuple(providers) if providers or device_name is None else load_device(device_name).providers
    parse_providers(chosen)
    return chosen
