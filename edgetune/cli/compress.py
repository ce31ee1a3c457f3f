"""`edgetune compress`: a trained adapter → a small one."""

from __future__ import annotations

from pathlib import Path

import click

from edgetune.cli.options import share_of, wait_briefly

BITS = ["2", "3", "4", "8"]


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="The folder to write: the small adapter and the run's recipe.",
)
@click.option(
    "--max-loss",
    metavar="SHARE",
    help=(
        "How much of the task metric may be lost against the adapter as trained, as 0.5% (of its"
        " value).  [default: 0.5%; none where --rank and --bits say the size]"
    ),
)
@click.option(
    "--rank",
    type=click.FloatRange(min=1),
    metavar="R",
    help=(
        "Only as many numbers as rank R of every module takes; which module has which rank is"
        " chosen by singular values."
    ),
)
@click.option("--bits", type=click.Choice(BITS), help="Only so many bits a number.")
@click.option(
    "--steps",
    type=click.IntRange(min=0),
    metavar="N",
    help=(
        "Steps of training against the rounded weights, on the run's own rows, for sizes that would"
        " lose too much; 0: none.  [default: 100]"
    ),
)
@click.option(
    "--task-rows",
    type=click.IntRange(min=0),
    metavar="N",
    help=(
        "Validation rows (of the run's recipe) to measure on; not given: 64 of a decoder, 1,000 of"
        " an encoder; 0: none, with --rank and --bits."
    ),
)
@click.option(
    "--task-data",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Rows to measure on, instead of the recipe's own.",
)
@click.option(
    "--base", "base_name", metavar="NAME", help="The base, for an adapter of another tool."
)
def command(
    run: Path,
    out: Path,
    max_loss: str | None,
    rank: float | None,
    bits: str | None,
    steps: int | None,
    task_rows: int | None,
    task_data: Path | None,
    base_name: str | None,
) -> None:
    """Make the adapter of RUN small: a lower rank in few bits, chosen on validation rows."""
    wait_briefly()
    from edgetune.compression.compress import compress, table_of
    from edgetune.core.progress import Progress

    found = compress(
        run,
        out,
        max_loss=None if max_loss is None else share_of(max_loss),
        rank=rank,
        bits=None if bits is None else int(bits),
        steps=steps,
        rows=task_rows,
        data=task_data,
        base_name=base_name,
        progress=Progress(),
    )
    for line in table_of(found):
        click.echo(line)
    chosen = found.trials[found.chosen]
    click.echo(
        f"{out}: rank {chosen.rank:.3g} in {chosen.bits} bits, {chosen.bytes / 1e6:.3f} MB of"
        f" {found.whole_bytes / 1e6:.3f}"
    )
