"""`edgetune eval`: task metrics of a run or a bundle on a data file."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command()
@click.argument("folder", metavar="RUN|BUNDLE", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="The rows to measure on, in the columns the adapter was trained with.")
@click.option("--adapter", metavar="NAME", help="Which of a bundle's adapters; needed when it has several.")
@click.option("--skip-invalid", is_flag=True, help="Leave out rows that cannot be used, and count them.")
@click.option("--json", "json_file", metavar="FILE", type=click.Path(path_type=Path), help="Write metrics and every prediction there.")
def command(folder: Path, data: Path, adapter: str | None, skip_invalid: bool, json_file: Path | None) -> None:
    """Measure a run (in torch) or a bundle (in the runtime) on a data file."""
    from dataclasses import asdict

    from edgetune.evaluate import evaluate
    from edgetune.files import write_json
    from edgetune.intervals import headline

    live = sys.stderr.isatty()

    def advance(done: int, total: int) -> None:
        if live:
            click.echo(f"\r{done}/{total} rows", nl=done == total, err=True)

    result = evaluate(folder, data, adapter=adapter, skip_invalid=skip_invalid, advance=advance)
    if json_file is not None:
        write_json(json_file, asdict(result))
    name = f"{result.source} [{result.adapter}]" if result.adapter else result.source
    click.echo(f"{name} on {result.rows} rows of {result.data}")
    for metric, value in headline(result.metrics).items():
        low, high = (result.metrics.get(f"{metric}_{end}") for end in ("low", "high"))
        interval = f"  (95 %: {low:.4f} to {high:.4f})" if low is not None else ""
        click.echo(f"  {metric:<18} {value:.4f}{interval}" if metric != "bleu" else f"  {metric:<18} {value:.2f}")
    if result.skipped:
        click.echo(f"  {result.skipped} rows skipped")
