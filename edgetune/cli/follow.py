"""`edgetune serve --follow`: its options, and the roll-outs that they ask for."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from edgetune.runtime.server.http.service import Service

Command = TypeVar("Command", bound=Callable[..., Any])
ONE_SERVER = "Stop the other server, or give this one a --follow-state of its own."
OPTIONS = (
    click.option(
        "--follow",
        "follows",
        multiple=True,
        metavar="[NAME=]SOURCE",
        help=(
            "Fetch new versions of the adapter NAME, try each behind the alias NAME, and roll back"
            " what does worse."
        ),
    ),
    click.option(
        "--follow-every",
        "follow_every_s",
        default=60.0,
        show_default=True,
        type=click.FloatRange(min=1),
        help="Seconds between two looks at the source.",
    ),
    click.option(
        "--follow-state",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="FOLDER",
        help="Where versions and what became of them are kept (default: BUNDLE.rollout).",
    ),
    click.option(
        "--follow-bound",
        "follow_bounds",
        multiple=True,
        metavar="KEY=NUMBER",
        help=(
            "share, requests, wait_s of a trial; errors, latency, agreement, proof that it must"
            " keep; shadow: share of requests that both versions answer."
        ),
    ),
    click.option(
        "--budget",
        "limits",
        multiple=True,
        metavar="KEY=LIMIT",
        help="Times that a new version must keep here, as for `edgetune check`; beside --device's.",
    ),
)


def follow_options(command: Command) -> Command:
    """`--follow` and what belongs to it."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


@contextlib.contextmanager
def following(
    service: Service,
    *,
    follows: tuple[str, ...],
    follow_every_s: float,
    follow_state: Path | None,
    follow_bounds: tuple[str, ...],
    limits: tuple[str, ...],
    device_name: str | None,
    signed_by: Path | None,
) -> Iterator[None]:
    """Have the sources followed while the block runs; what answered before answers first."""
    if not follows:
        yield
        return
    from edgetune.core.exclusive import exclusive
    from edgetune.devices import load_device, parse_budget
    from edgetune.runtime.rollout.follow import Follower
    from edgetune.runtime.rollout.rollout import AliasRollout, RolloutRules
    from edgetune.runtime.rollout.source import ArtifactVersions
    from edgetune.runtime.rollout.trial import parse_bounds
    from edgetune.runtime.signature.keys import read_public_key

    runtime = service.runtime
    kind = "decoder" if runtime.manifest.is_decoder else "encoder"
    device = load_device(device_name or "host")
    own = device.budget.get(kind, {}) if device_name else {}
    rules = RolloutRules(
        bounds=parse_bounds(follow_bounds),
        signed_by=None if signed_by is None else read_public_key(signed_by),
        budget={**own, **parse_budget(limits)},
        device=device,
    )
    named = [followed(text) for text in follows]
    for at, (alias, _) in enumerate(named):
        if alias.casefold() in (one.casefold() for one, _ in named[:at]):  # as some disks see it
            raise click.UsageError(
                f"--follow: two sources are called {alias}; name one NAME=SOURCE"
            )
    state = follow_state or state_beside(runtime.folder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(exclusive(state, fix=ONE_SERVER))
        if follow_state is None:
            take_over(state, runtime.folder)
        for alias, source in named:
            rollout = AliasRollout(
                alias,
                ArtifactVersions(source, state / alias / "store", manifest=runtime.manifest),
                state / alias,
                runtime,
                service.aliases,
                rules=rules,
                tell=partial(service.tell, alias),
            )
            stack.callback(rollout.close)
            rollout.open()
            service.rollouts[alias] = rollout
        with Follower(list(service.rollouts.values()), every_s=follow_every_s):
            yield


def state_beside(bundle: Path) -> Path:
    """The folder of what is followed for a bundle: beside it, under its whole name. Where the
    bundle is a link, beside the link, so that what it leads to may change.
    """
    path = bundle.absolute() if bundle.name not in ("", "..") else bundle.resolve()
    return path.with_name(f"{path.name}.rollout")


def take_over(state: Path, bundle: Path) -> None:
    """Move the state of a bundle here from where it lay once: beside what a link leads to, and
    under the bundle's name without its last suffix. One that another bundle has a right to stays.
    """
    from edgetune.core.errors import OutputError
    from edgetune.core.exclusive import exclusive

    place = bundle.resolve()
    before = place.with_suffix(".rollout")
    owner = before.with_suffix("")
    if state.exists() or not before.is_dir() or (owner != place and owner.exists()):
        return
    with contextlib.suppress(OutputError, OSError), exclusive(before):  # another disk: begins anew
        before.replace(state)


def followed(text: str) -> tuple[str, str]:
    """`home=SOURCE`, or a SOURCE whose last part is the name: `oci://host/acme/home:stable`."""
    head, equals, rest = text.partition("=")
    name, source = head, rest
    if not equals or re.search(r"[/:]", head):  # the = of a URL
        source, name = text, re.sub(r"[:@].*$", "", text.rstrip("/").rpartition("/")[2])
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) or not source:
        raise click.UsageError(
            f"--follow {text!r}: expected NAME=SOURCE, where NAME is of letters, digits, . _ -"
        )
    return name, source
