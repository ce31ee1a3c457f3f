"""`edgetune serve`: a bundle over HTTP."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune.cli.follow import follow_options, following
from edgetune.cli.options import (
    THREADS,
    chosen_providers,
    device_option,
    engine_option,
    provider_option,
    signature_option,
)

if TYPE_CHECKING:
    from edgetune.runtime.server.http.service import Service
    from edgetune.runtime.tasks.runtime import Runtime


KEYS = "EDGETUNE_API_KEYS"


@click.command("serve")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; 0.0.0.0 is every one.",
)
@click.option(
    "--port",
    default=8000,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="0 takes a free port.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=FOLDER",
    help="A PEFT folder to load at the start.",
)
@click.option(
    "--adapter-folder",
    "folders",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Adapters inside this folder may be loaded over HTTP.",
)
@click.option(
    "--adapter-library",
    "library",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Every adapter in this folder is served under its folder's name, read at its first use.",
)
@click.option(
    "--adapter-memory-mb",
    type=click.FloatRange(min=0),
    help="Memory for adapters; the least recently used ones are read again.",
)
@click.option(
    "--pin",
    "pins",
    multiple=True,
    metavar="NAME",
    help="An adapter that is read at the start and never makes room; repeat for several.",
)
@click.option(
    "--alias",
    "aliases",
    multiple=True,
    metavar="NAME=ADAPTER[:SHARE,…]",
    help="A name that an adapter answers for, or several in shares: home=home@v1:90,home@v2:10.",
)
@click.option("--model-name", metavar="NAME", help="What clients call the base model.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help=f"Keys that open the server, one a line; also in the environment variable {KEYS}.",
)
@click.option(
    "--max-rows",
    default=16,
    show_default=True,
    type=click.IntRange(min=1),
    help="Rows of one decode step.",
)
@click.option(
    "--max-queue",
    default=64,
    show_default=True,
    type=click.IntRange(min=1),
    help="Rows that wait; then 429.",
)
@click.option(
    "--cache-mb", type=click.FloatRange(min=1), help="Memory for keys and values (10⁶ bytes)."
)
@click.option(
    "--prefill-chunk",
    default=128,
    show_default=True,
    type=click.IntRange(min=1),
    help="Prompt tokens a step.",
)
@click.option(
    "--lookup",
    default=0,
    show_default=True,
    type=click.IntRange(0, 16),
    help=(
        "Tokens guessed from the prompt while one greedy request runs alone; pays where answers"
        " repeat prompts."
    ),
)
@click.option(
    "--deadline",
    default=600.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Seconds for an answer; 0: no limit.",
)
@click.option(
    "--max-prompt-tokens",
    type=click.IntRange(min=1),
    help="Longest prompt or text (default: the model's context).",
)
@click.option(
    "--max-body-mb",
    default=8.0,
    show_default=True,
    type=click.FloatRange(min=0.001),
    help="Largest request.",
)
@click.option(
    "--drain",
    default=30.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Seconds to finish on SIGTERM.",
)
@click.option(
    "--cors-origin",
    "origins",
    multiple=True,
    metavar="URL",
    help="A web page's origin that may call.",
)
@click.option(
    "--allowed-host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="A host name this server answers for.",
)
@click.option("--threads", type=THREADS, help="Processor threads (default: all cores).")
@provider_option
@engine_option
@device_option
@signature_option
@follow_options
@click.option(
    "--no-verify", is_flag=True, help="Do not compare the bundle's hashes first (faster start)."
)
@click.option(
    "--strict",
    is_flag=True,
    help="Refuse adapters whose base cannot be checked, and adapters without effect.",
)
@click.option(
    "--log-level",
    default="info",
    show_default=True,
    type=click.Choice(["debug", "info", "warning", "error"]),
)
def command(
    bundle: Path,
    host: str,
    port: int,
    adapters: tuple[str, ...],
    folders: tuple[Path, ...],
    library: Path | None,
    adapter_memory_mb: float | None,
    pins: tuple[str, ...],
    aliases: tuple[str, ...],
    model_name: str | None,
    api_key_file: Path | None,
    max_rows: int,
    max_queue: int,
    cache_mb: float | None,
    prefill_chunk: int,
    lookup: int,
    deadline: float,
    max_prompt_tokens: int | None,
    max_body_mb: float,
    drain: float,
    origins: tuple[str, ...],
    hosts: tuple[str, ...],
    threads: int | None,
    providers: tuple[str, ...],
    engine: str,
    device_name: str | None,
    signed_by: Path | None,
    no_verify: bool,
    strict: bool,
    log_level: str,
    **follow: Any,
) -> None:
    """Serve BUNDLE with OpenAI's HTTP endpoints, its adapters as models, and a playground at /.

    Listens on this machine only, unless --host says otherwise. Logs are JSON lines on stderr.
    SIGTERM lets answers under way finish.
    """
    from edgetune.devices.host import share_memory_between_threads
    from edgetune.runtime.rollout.aliases import Aliases, parse_alias
    from edgetune.runtime.scheduler.scheduler import Scheduler
    from edgetune.runtime.server.http.logs import set_up_logging
    from edgetune.runtime.server.http.service import ServerOptions, Service
    from edgetune.runtime.server.listen import DrainingServer, hosts_of, listen
    from edgetune.runtime.tasks.runtime import Runtime

    named = [_named(text) for text in adapters]
    split, known = [parse_alias(text) for text in aliases], Aliases()
    options = ServerOptions(
        model_name=model_name,
        adapter_folders=tuple(folder.resolve() for folder in folders),
        api_keys=read_keys(api_key_file, os.environ.get(KEYS, "")),
        deadline_s=deadline or None,
        max_body_mb=max_body_mb,
        max_prompt_tokens=max_prompt_tokens,
        cors_origins=tuple(_origin(text) for text in origins),
        allowed_hosts=hosts_of(host, hosts),
        drain_s=drain,
    )
    set_up_logging(log_level)
    share_memory_between_threads()
    with (
        listen(host, port) as place,
        Runtime.open(
            bundle,
            threads=threads,
            providers=chosen_providers(providers, device_name),
            verify=not no_verify,
            adapter_folder=library,
            adapter_memory_mb=adapter_memory_mb,
            strict=strict,
            engine=engine,
            signed_by=signed_by,
        ) as runtime,
    ):
        for line in load_adapters(runtime, named, pins):
            click.echo(f"note: {line}", err=True)
        scheduler = Scheduler(
            runtime,
            max_rows=max_rows,
            max_queue=max_queue,
            cache_mb=cache_mb,
            prefill_chunk=prefill_chunk,
            lookup=lookup,
        )
        service = Service(runtime, scheduler, options, known)
        for alias, shares in split:
            _check_versions(service, alias, shares)
            known.set(alias, shares)
        follow |= {"device_name": device_name, "signed_by": signed_by}
        with scheduler, following(service, **follow):
            _announce(service, host, place.getsockname()[1])
            DrainingServer(service).run(sockets=[place])


def _announce(service: Service, host: str, port: int) -> None:
    """Say what is served where, and whether anyone may use it."""
    providers = service.runtime.providers
    address = f"[{host}]" if ":" in host else host
    on = "" if providers.names == ("cpu",) else f" on {providers}"
    click.echo(f"serving {', '.join(service.models())} at http://{address}:{port}{on}")
    if service.runtime.manifest.is_decoder:
        click.echo(f"engine: {service.runtime.engine}")
    if host not in ("127.0.0.1", "::1", "localhost") and not service.options.api_keys:
        click.echo(
            "note: whoever reaches this address can use it; keys close it (--api-key-file)",
            err=True,
        )


def _check_versions(service: Service, alias: str, versions: Iterable[str]) -> None:
    """InputError where an alias names what is not there, or hides the base."""
    from edgetune.core.errors import InputError
    from edgetune.core.settings import nearest

    if alias == service.base:
        raise InputError(f"--alias {alias!r} is the base model's name", fix="Choose another.")
    for name in versions:
        if name not in service.models():
            where = f"--alias {alias}"
            raise InputError(
                f"unknown adapter {name!r}", where=where, **nearest(name, service.models())
            )


def load_adapters(
    runtime: Runtime, named: Sequence[tuple[str, Path]], pins: Sequence[str]
) -> list[str]:
    """Load adapters under new names, and keep those of `pins`, loaded here or known before, in
    memory; what is to be noted.
    """
    notes = [
        line
        for name, folder in named
        for line in runtime.load_adapter(name, folder, pin=name in pins).notes
    ]
    for name in pins:
        runtime.registry.pin(name)
    return notes


def read_keys(path: Path | None, environment: str) -> tuple[str, ...]:
    """Keys out of a file (one a line, # begins a comment) and out of the environment (separated by
    commas).
    """
    lines = [] if path is None else path.read_text(encoding="utf-8").splitlines()
    found = [line.strip() for line in lines if not line.lstrip().startswith("#")]
    found += [key.strip() for key in environment.split(",")]
    keys = tuple(dict.fromkeys(key for key in found if key))
    if path is not None and not keys:
        raise click.UsageError(f"{path} holds no key: expected one a line")
    return keys


def _origin(text: str) -> str:
    """As browsers send it (`https://host:port`), or `*`; another spelling would silently allow
    nobody.
    """
    if text != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+", text):
        raise click.UsageError(
            f"--cors-origin {text!r}: expected an origin such as https://example.org or"
            " http://localhost:3000, without a path, or *"
        )
    return text


def _named(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise click.UsageError(f"--adapter {text!r}: expected NAME=FOLDER")
    return name, Path(folder)
