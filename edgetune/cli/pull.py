"""`edgetune pull`: a registry, the hub, a web server or a folder → a bundle or an adapter here."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command()
@click.argument("source")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Where files lie once each, by their sha256 (default: $EDGETUNE_STORE, else the cache).",
)
@click.option(
    "--prune",
    is_flag=True,
    help="Afterwards forget what no folder uses any more; nothing else may be pulling then.",
)
@click.option("--plain-http", is_flag=True, help="Without TLS also from another machine.")
def command(source: str, folder: Path, store: Path | None, prune: bool, plain_http: bool) -> None:
    """Make FOLDER what SOURCE has: oci://HOST/REPOSITORY:TAG (or @sha256:…), hf://OWNER/NAME,
    http(s)://… or a folder. Only files that are not here yet are fetched, a broken one from where
    it broke; every sha256 is compared. FOLDER is replaced when all is here, or stays as it was.
    """
    from edgetune.runtime.sources.pull import pull
    from edgetune.runtime.sources.store import Store, default_store

    live = sys.stderr.isatty()

    def show(came: int, total: int) -> None:
        if live:
            end = "\n" if came >= total else ""
            click.echo(f"\r{came / 1e6:,.1f} of {total / 1e6:,.1f} MB", err=True, nl=False)
            click.echo(end, err=True, nl=False)

    done = pull(source, folder, store=store, progress=show, plain_http=plain_http)
    artifact = done.artifact
    click.echo(
        f"{folder}: {artifact.kind}, {len(artifact.files)} files, {artifact.size:,} bytes,"
        f" {done.fetched_bytes:,} of them fetched"
    )
    if prune:
        freed = Store(store or default_store()).prune(keep={file.sha256 for file in artifact.files})
        click.echo(f"{freed:,} bytes of the store freed")
    click.echo(artifact.digest)
