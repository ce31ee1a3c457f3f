"""`edgetune push`: a bundle or an adapter → a registry, the hub or a folder."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("source", metavar="BUNDLE|RUN|ADAPTER", type=click.Path(path_type=Path))
@click.argument("target")
@click.option(
    "--licence",
    metavar="SPDX",
    help="For the hub's model card: the base's licence; known of the built-in bases.",
)
@click.option("--private", is_flag=True, help="A new repository of the hub is for you alone.")
@click.option("--plain-http", is_flag=True, help="Without TLS also to another machine.")
def command(
    source: Path, target: str, licence: str | None, private: bool, plain_http: bool
) -> None:
    """Publish to TARGET: oci://HOST/REPOSITORY:TAG, hf://OWNER/NAME or a folder. What a registry
    has already is not sent again. The last line is what was published, by its digest.
    """
    from edgetune.publishing.push import push

    done = push(source, target, plain_http=plain_http, licence=licence, private=private)
    artifact = done.artifact
    click.echo(
        f"{artifact.kind}: {len(artifact.files)} files, {artifact.size:,} bytes,"
        f" {done.sent_bytes:,} of them sent"
    )
    click.echo(done.url)
