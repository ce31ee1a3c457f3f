"""`edgetune init`: a data file → a recipe that trains as it stands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from edgetune.inspection.reading import Reading
    from edgetune.inspection.starting import Draft

FEW_ROWS = 50
ALSO = 3  # other readings that are shown
TASKS = (
    "sequence-classification",
    "multi-label",
    "regression",
    "token-classification",
    "sft",
    "dpo",
    "reward",
    "causal-lm",
    "masked-lm",
    "contrastive",
)
COLUMNS = {
    "text": "the text",
    "text-pair": "a second text, read together with the first, or alike (contrastive)",
    "negative": "a text that is unlike the first (contrastive)",
    "label": "its label, the list of its labels, or a number",
    "prompt": "what the model is asked",
    "completion": "what it shall answer",
    "chosen": "the better of two answers",
    "rejected": "the worse of two answers",
    "tokens": "the list of words",
    "tags": "the list of their tags",
}


def reading_options(command: Any) -> Any:
    """What says how a data file is to be read: --task, --base and the columns."""
    for name, what in reversed(COLUMNS.items()):
        command = click.option(f"--{name}", metavar="COLUMN", help=f"The column with {what}.")(
            command
        )
    command = click.option(
        "--base", metavar="BASE", help="The base model; not set: the built-in one for the task."
    )(command)
    return click.option(
        "--task",
        type=click.Choice(TASKS),
        help="What shall be learned, where the file can be read in several ways.",
    )(command)


@click.command()
@click.argument("data", metavar="DATA")
@reading_options
@click.option(
    "--validation",
    metavar="FILE",
    help="Rows to measure on; not set: some of DATA are held out, or a folder's own split.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="RECIPE",
    help="The recipe; not set: beside DATA, tickets.toml for tickets.csv.",
)
@click.option("--force", is_flag=True, help="Write over a recipe that is there already.")
def command(
    data: str,
    task: str | None,
    base: str | None,
    validation: str | None,
    out: Path | None,
    force: bool,
    **columns: str | None,
) -> None:
    """Look at DATA (a file, a folder, a pattern or a hub data set) and write a recipe for it."""
    from edgetune.core.files import write_text
    from edgetune.inspection.starting import (
        choices,
        draft,
        recipe_path,
        refuse_existing,
        sources_of,
    )

    given = {key: name for key, name in columns.items() if name is not None}
    path = out or recipe_path(data)
    refuse_existing(path, force=force)
    train, measured = sources_of(data, validation)
    found = choices(train, given, task, base)
    at = _asked(found) if task is None and not given else 0
    others = [one for one in found if one is not found[at]]
    made = draft(found[at], others, train, measured, path=path, base=base)
    write_text(path, made.text)
    _say(made)
    click.echo(f"{path} is written. Next: edgetune train {path}")


def _asked(found: Sequence[Reading]) -> int:
    """Which of the readings a person at a terminal wants; the first one where nobody can say."""
    shown = found[: ALSO + 1]
    if len(shown) == 1 or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return 0
    click.echo("This file can be read in several ways:")
    for number, one in enumerate(shown, start=1):
        click.echo(f"  {number}  {one.task}: {one.what}")
    choice = click.IntRange(1, len(shown))
    return int(click.prompt("Which one?", type=choice, default=1)) - 1


def _say(made: Draft) -> None:
    """What was found in the file, and what was made of it."""
    from edgetune.inspection.screen import held_out_line, lengths_line, rows_line

    click.echo(rows_line(made.overview))
    click.echo(f"read as {made.reading.task}: {made.reading.what}")
    for other in made.others[:ALSO]:
        click.echo(f"     or {other.options()}  ({other.what})")
    click.echo(lengths_line(made.overview))
    if held_out := held_out_line(made.overview):
        click.echo(f"to measure on: {held_out}")
    if (rows := made.overview.rows["train"]) < FEW_ROWS:
        click.echo(f"warning: {rows} rows are few to learn from")
    if made.note:
        click.echo(f"warning: {made.note}")
    for finding in made.findings:
        click.echo(f"{'warning: ' if finding.matters else ''}{finding.line}")
