"""`edgetune report`: runs → one page that compares them."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN…", type=click.Path(path_type=Path))
@click.option(
    "--out",
    default="comparison.html",
    show_default=True,
    type=click.Path(path_type=Path),
    help="The page.",
)
def command(runs: tuple[Path, ...], out: Path) -> None:
    """Compare finished runs on one page: results, speed, memory, loss curves, and the settings that
    differ.
    """
    from edgetune.core.files import write_text
    from edgetune.report.comparison import read_runs, render_comparison

    found = read_runs(runs)
    write_text(out, render_comparison(found))
    click.echo(f"{len(found)} run{'s' if len(found) > 1 else ''} compared in {out}")
