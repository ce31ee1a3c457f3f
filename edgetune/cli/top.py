"""`edgetune top`: a server, live in the terminal."""

from __future__ import annotations

import os
import time

import click

CLEAR = "\x1b[H\x1b[2J"


@click.command("top")
@click.argument("url", default="http://127.0.0.1:8000")
@click.option("--interval", default=1.0, show_default=True, type=click.FloatRange(min=0.1), help="Seconds between two looks.")
@click.option("--once", is_flag=True, help="Print one page, since the server's start, and end.")
def command(url: str, interval: float, once: bool) -> None:
    """Watch the server at URL: rows, queue, cache, speed, latencies, adapters. Ctrl-C ends it."""
    from edgetune.runtime.server.watch import Watch, read_metrics

    url = url if "://" in url else f"http://{url}"
    key = os.environ.get("EDGETUNE_API_KEYS", "").split(",")[0].strip() or None
    watch = Watch(url)
    if once:
        click.echo(watch.page(read_metrics(url, time.monotonic(), key=key)))
        return
    while True:
        page = watch.page(read_metrics(url, time.monotonic(), key=key))
        click.echo(f"{CLEAR}{page}", nl=True)
        time.sleep(interval)
