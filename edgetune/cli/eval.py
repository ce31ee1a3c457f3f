"""`edgetune eval`: task metrics of a run, a bundle or a base on a data file, and what training
forgot.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune.cli.options import engine_option, provider_option
from edgetune.core.errors import InputError

if TYPE_CHECKING:
    from edgetune.evaluation.answers import Prompting


@click.command()
@click.argument("folder", metavar="RUN|BUNDLE|BASE", type=click.Path(path_type=Path))
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="The rows to measure on, in the columns the adapter was trained with.",
)
@click.option(
    "--adapter", metavar="NAME", help="Which of a bundle's adapters; needed when it has several."
)
@click.option(
    "--skip-invalid", is_flag=True, help="Leave out rows that cannot be used, and count them."
)
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write metrics and every prediction there.",
)
@click.option(
    "--errors",
    "errors_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write every row that is answered wrongly there (.jsonl), the surest first.",
)
@click.option(
    "--out-of-scope",
    metavar="LABEL",
    help=(
        "Rows with this label are none of the adapter's; not set: what its recipe named, and rows"
        " without a label where it has a threshold."
    ),
)
@click.option(
    "--forgetting",
    is_flag=True,
    help="General ability before and after training; of a base as it is.",
)
@click.option(
    "--general",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="The general sets; not set: $EDGETUNE_DATASETS/general_ability.",
)
@click.option(
    "--limit", type=click.IntRange(min=2), help="Items of each general set at most; not set: all."
)
@click.option(
    "--prompt",
    metavar="TEMPLATE",
    help="A base: what it is given, a column or Jinja; not set: the column prompt.",
)
@click.option(
    "--completion",
    metavar="TEMPLATE",
    help="A base: what it shall answer; not set: the column completion.",
)
@click.option(
    "--shots",
    type=click.IntRange(min=0),
    default=0,
    help="A base: examples shown before every question, drawn from --train.",
)
@click.option(
    "--train",
    type=click.Path(path_type=Path),
    help="A base: the rows that examples and labels come from.",
)
@click.option(
    "--choose",
    is_flag=True,
    help="A base: take the likeliest of the known answers instead of generating one.",
)
@provider_option
@engine_option
@click.option("--plain", is_flag=True, help="A base: plain text even where it has a chat template.")
def command(
    folder: Path,
    data: Path | None,
    adapter: str | None,
    skip_invalid: bool,
    json_file: Path | None,
    errors_file: Path | None,
    out_of_scope: str | None,
    forgetting: bool,
    general: Path | None,
    limit: int | None,
    providers: tuple[str, ...],
    engine: str,
    **asked: Any,
) -> None:
    """Measure a run or a base (in torch) or a bundle (in the runtime) on a data file, or what
    training forgot.
    """
    from edgetune.core.files import write_json, write_text
    from edgetune.runtime.tasks.prediction_file import row_line

    if data is None and not forgetting:
        raise InputError("nothing to measure", expected="--data FILE, or --forgetting, or both")
    found: dict[str, Any] = {}
    if data is not None:
        found = _measure(
            folder,
            data,
            adapter,
            skip_invalid,
            _prompting(asked),
            providers,
            engine,
            out_of_scope,
        )
        if errors_file is not None:
            write_text(errors_file, "".join(map(row_line, found["errors"])))
            click.echo(f"  {len(found['errors'])} wrong rows: {errors_file}")
    elif errors_file is not None:
        raise InputError("--errors needs rows to answer", expected="--data FILE")
    if forgetting:
        from edgetune.evaluation.forgetting.subjects import forgetting as measure_forgetting

        place = general or _general()
        results = measure_forgetting(
            folder,
            place,
            adapter=adapter,
            limit=limit,
            providers=providers,
            engine=engine,
            say=click.echo,
        )
        found["forgetting"] = [asdict(result) for result in results]
    if json_file is not None:
        write_json(json_file, found)


def _prompting(asked: dict[str, Any]) -> Prompting | None:
    """How a base is asked; None when no such option is given."""
    from edgetune.evaluation.answers import Prompting

    how = Prompting(**asked)
    return None if how == Prompting() else how


def _general() -> Path:
    root = os.environ.get("EDGETUNE_DATASETS")
    if not root:
        raise InputError(
            "where are the general sets?",
            expected="--general FOLDER, or the variable EDGETUNE_DATASETS",
        )
    return Path(root) / "general_ability"


def _measure(
    folder: Path,
    data: Path,
    adapter: str | None,
    skip_invalid: bool,
    how: Prompting | None,
    providers: tuple[str, ...],
    engine: str,
    out_of_scope: str | None,
) -> dict[str, Any]:
    from edgetune.cli.error_lines import error_lines
    from edgetune.core.errors import DataError
    from edgetune.evaluation.evaluate import evaluate
    from edgetune.metrics.statistics import headline

    live = sys.stderr.isatty()

    def advance(done: int, total: int) -> None:
        if live:
            click.echo(f"\r{done}/{total} rows", nl=done == total, err=True)

    try:
        result = evaluate(
            folder,
            data,
            adapter=adapter,
            skip_invalid=skip_invalid,
            advance=advance,
            how=how,
            providers=providers,
            engine=engine,
            out_of_scope=out_of_scope,
        )
    except DataError as error:  # a recipe has a key for it, this command an option
        fix = error.fix.replace("data.skip_invalid = true", "--skip-invalid")
        raise DataError(
            error.what, where=error.where, expected=error.expected, got=error.got, fix=fix
        ) from error
    name = f"{result.source} [{result.adapter}]" if result.adapter else result.source
    click.echo(f"{name} on {result.rows} rows of {result.data}")
    width = max(18, *map(len, headline(result.metrics)), 0)
    for metric, value in headline(result.metrics).items():
        low, high = (result.metrics.get(f"{metric}_{end}") for end in ("low", "high"))
        interval = f"  (95 %: {low:.4f} to {high:.4f})" if low is not None else ""
        click.echo(
            f"  {metric:<{width}} {value:.4f}{interval}"
            if metric != "bleu"
            else f"  {metric:<{width}} {value:.2f}"
        )
    for line in error_lines(result.analysis):
        click.echo(f"  {line}")
    for note in result.notes:
        click.echo(f"  note: {note}")
    if result.skipped:
        click.echo(f"  {result.skipped} rows skipped")
    return asdict(result)
