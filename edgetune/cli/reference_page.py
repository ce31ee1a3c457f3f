"""The command line's reference page, derived from the commands: `python -m
edgetune.cli.reference_page > docs/reference/command-line.md`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from edgetune.cli import COMMANDS, cli

OPENING = """# The command line, option by option

Made from the code by `python -m edgetune.cli.reference_page`; a test keeps it true.
`edgetune COMMAND --help` says the same.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a proof, a check or a budget failed; of `diff`: the bundles differ; of `bench`: slower |
| 2 | bad usage or bad input: one line on standard error says what, where, expected, got and fix |
| 3 | `check`, `bench`: too noisy to tell |
| 130 | interrupted |

The Tab key completes commands, options, choices and files after one of these, for good in
`~/.bashrc`, `~/.zshrc` or `~/.config/fish/config.fish`:

    eval "$(_EDGETUNE_COMPLETE=bash_source edgetune)"
    eval "$(_EDGETUNE_COMPLETE=zsh_source edgetune)"
    _EDGETUNE_COMPLETE=fish_source edgetune | source
"""


def command_line_page() -> str:
    """The whole page as Markdown."""
    context = click.Context(cli, info_name="edgetune")
    return OPENING + "".join("\n" + "\n".join(_section(context, name)) + "\n" for name in COMMANDS)


def _section(group: click.Context, name: str) -> Iterator[str]:
    command = cli.get_command(group, name)
    assert command is not None
    context = click.Context(command, info_name=name, parent=group)
    yield f"## edgetune {name}\n"
    while isinstance(command, click.Group):  # of one command
        name, command = next(iter(command.commands.items()))
        context = click.Context(command, info_name=name, parent=context)
    yield f"    {' '.join([context.command_path, *command.collect_usage_pieces(context)])}\n"
    yield inspect.cleandoc(command.help or "") + "\n"
    yield "| option | value | default | meaning |"
    yield "|---|---|---|---|"
    for option in command.params:
        if isinstance(option, click.Option):
            names = ", ".join(f"`{word}`" for word in option.opts)
            cells = [names, _value(option), _default(option), option.help or ""]
            yield "|" + "|".join(" " + cell.replace("|", "\\|") + " " for cell in cells) + "|"


def _value(option: click.Option) -> str:
    """What is written after the option, and within which limits."""
    kind = option.type
    if option.is_flag:
        return ""
    if isinstance(kind, click.Choice):
        return " | ".join(f"`{choice}`" for choice in kind.choices)
    word = option.metavar or kind.name.removesuffix(" range").upper()
    if isinstance(kind, click.IntRange | click.FloatRange):
        if kind.max is not None:
            word += f", {kind.min} to {kind.max}"
        elif kind.min is not None:
            word += f", at least {kind.min}"
    return word + (", repeatable" if option.multiple else "")


def _default(option: click.Option) -> str:
    if option.required:
        return "required"
    return f"`{option.default}`" if option.show_default and not option.is_flag else ""


if __name__ == "__main__":
    print(command_line_page(), end="")
