"""`--threads` takes what a machine may have."""

from __future__ import annotations

import click
import pytest

from edgetune.cli import cli

COMMANDS = ("check", "diff", "export", "predict", "serve", "verify")


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("number", ["0", "1025", "1000000000000000000"])
def test_a_number_of_threads_that_no_machine_has_is_refused(name: str, number: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    (option,) = [p for p in command.params if p.name == "threads"]
    with pytest.raises(click.BadParameter, match="1<=x<=1024"):
        option.type_cast_value(click.Context(command), number)
