"""`edgetune quickstart`: the whole road on embedded data and the two built-in bases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune.cli.options import wait_briefly

if TYPE_CHECKING:
    from edgetune.quickstart.outcome import Outcome


@click.command("quickstart")
@click.option(
    "--out",
    default="quickstart-out",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Where runs, bundles, results.json and report.html go.",
)
def command(out: Path) -> int:
    """Train three adapters on two bases, export and prove two bundles, check and call them; a few
    minutes.

    Exit 0: done; 1: a proof fails or a limit of the host's budget is exceeded.
    """
    wait_briefly()
    from edgetune.quickstart.plan import embedded_plan
    from edgetune.quickstart.run import run_quickstart

    return conclude(run_quickstart(embedded_plan(), out), out)


def conclude(outcome: Outcome, out: Path) -> int:
    """Print table, time and what is over the budget; the exit code."""
    from edgetune.core.layout import REPORT
    from edgetune.quickstart.outcome import last_words, result_lines

    click.echo("\n" + "\n".join(result_lines(outcome)))
    click.echo(f"\n{last_words(outcome)}\nreport: {out / REPORT}")
    for failure in outcome.failures:
        click.echo(f"over the budget: {failure}", err=True)
    return 1 if outcome.failures else 0
