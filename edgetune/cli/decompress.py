"""`edgetune decompress`: a small adapter → PEFT's own folder."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The PEFT folder to write."
)
def command(folder: Path, out: Path) -> None:
    """Write the small adapter in FOLDER as PEFT's own: float32, with the same values."""
    from edgetune.compression.compress import decompress

    decompress(folder, out)
    click.echo(f"{out}: a PEFT adapter")
