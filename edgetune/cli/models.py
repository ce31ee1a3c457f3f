"""`edgetune models`: list the built-in base models, or fetch them into the cache."""

from __future__ import annotations

import click


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "fetch_all", is_flag=True, help="Fetch all of them.")
def command(names: tuple[str, ...], fetch_all: bool) -> None:
    """List the built-in base models; with NAME or --all, fetch them into the cache.

    A base may also be a local folder, a .gguf file (or folder#file.gguf), or a hub id.
    """
    from edgetune.models.builtin import BUILTINS
    from edgetune.models.resolve import resolve_base

    if not names and not fetch_all:
        _list()
        return
    for name in BUILTINS if fetch_all else names:
        known = name if name in BUILTINS else f"builtin:{name}"  # the prefix may be left out here
        base = resolve_base(known if known in BUILTINS else name)
        click.echo(f"{base.name}  {base.digest[:19]}  {base.folder}")


def _list() -> None:
    from edgetune.models.builtin import BUILTINS, is_cached

    for builtin in BUILTINS.values():
        click.echo(f"{builtin.name}  [{'in the cache' if is_cached(builtin) else 'not fetched'}]")
        click.echo(f"    {builtin.about}")
    click.echo(
        "Fetch one: edgetune models NAME. Other bases: a local folder, a .gguf file, or a hub id."
    )
