"""`edgetune chat`: a conversation with a bundle in the terminal, or a turn a line from a pipe."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune.cli.options import (
    THREADS,
    chosen_providers,
    device_option,
    engine_option,
    provider_option,
    speed_line,
)
from edgetune.core.errors import EdgetuneError, InputError

if TYPE_CHECKING:
    from edgetune.runtime.tasks.chat_session import ChatSession

HELP = """\
/adapter NAME       have this adapter answer; none: the base model
/adapters           the bundle's adapters
/system TEXT        a system message from now on; without TEXT: none
/reset              forget what was said
/settings key=value how answers are generated (temperature=0.7 max_new_tokens=50 …); key= takes it
                    back; without any: what is set
/help               this
/exit               leave, as Ctrl-D does
Ctrl-C stops an answer. A line that begins with // is text that begins with /."""


@click.command("chat")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--adapter", metavar="NAME", help="Who answers; not given: the base model.")
@click.option("--system", metavar="TEXT", help="A system message.")
@click.option("--max-new-tokens", type=int, help="Tokens of an answer at most.")
@click.option(
    "--temperature", type=float, help="0 (default) takes the most likely token; above 0 samples."
)
@click.option("--seed", type=int, help="Same seed, same samples.")
@click.option("--stats", is_flag=True, help="After each answer its tokens and their speed.")
@click.option("--threads", type=THREADS, help="Processor threads (default: all cores).")
@provider_option
@engine_option
@device_option
@click.option(
    "--no-verify", is_flag=True, help="Do not compare the bundle's hashes first (faster start)."
)
def command(
    bundle: Path,
    adapter: str | None,
    system: str | None,
    stats: bool,
    threads: int | None,
    providers: tuple[str, ...],
    engine: str,
    device_name: str | None,
    no_verify: bool,
    **settings: Any,
) -> None:
    """Talk to BUNDLE: what you type is answered as it is generated, and the conversation goes on.
    Lines that begin with / are commands; /help lists them.

    From a pipe every line is a turn, and only the answers are printed. An adapter that was trained
    on plain prompts is asked each line by itself.
    """
    from edgetune.runtime.tasks.chat_session import ChatSession
    from edgetune.runtime.tasks.runtime import Runtime

    chosen = chosen_providers(providers, device_name)
    with Runtime.open(
        bundle, threads=threads, providers=chosen, verify=not no_verify, engine=engine
    ) as runtime:
        terminal = Terminal(ChatSession(runtime, adapter, system=system, **settings), stats=stats)
        if sys.stdin.isatty():
            terminal.talk()
        else:
            for line in sys.stdin:
                if not terminal.take(line.strip()):
                    break


class Leave(Exception):  # noqa: N818
    """The user is done."""


class Terminal:
    """Lines in, answers out."""

    def __init__(self, session: ChatSession, *, stats: bool) -> None:
        self._session, self._stats = session, stats
        self._told_left_out = self._told_alone = False
        self._commands: dict[str, Callable[[str], None]] = {
            "adapter": self._adapter,
            "adapters": self._adapters,
            "system": self._system,
            "reset": lambda rest: session.reset(),
            "settings": self._settings,
            "help": lambda rest: click.echo(HELP),
            "exit": self._exit,
        }

    def talk(self) -> None:
        """Ask for lines until the user leaves; what is wrong with one is said and forgotten."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (arrow keys and history)
        names = ", ".join(self._session.runtime.adapters)
        click.echo(f"adapters: {names or 'none'}; /help lists the commands, Ctrl-D leaves")
        while True:
            try:
                line = input(f"{self._session.adapter or 'base'}> ").strip()
                if not self.take(line):
                    return
            except KeyboardInterrupt:
                click.echo()
            except EOFError:
                click.echo()
                return
            except EdgetuneError as error:
                click.echo(str(error), err=True)

    def take(self, line: str) -> bool:
        """Answer a line, or do what it says; False when the user leaves. EdgetuneError where it
        cannot be done.
        """
        if not line:
            return True
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].partition(" ")
            if name not in self._commands:
                known = ", ".join(f"/{known}" for known in self._commands)
                raise InputError(f"there is no command /{name}", expected=known)
            try:
                self._commands[name](rest.strip())
            except Leave:
                return False
            return True
        self._answer(line[1:] if line.startswith("//") else line)
        return True

    def _answer(self, text: str) -> None:
        session = self._session
        self._say_alone()
        pieces = session.ask(text)
        try:
            for piece in pieces:
                click.echo(piece, nl=False)
                sys.stdout.flush()
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            click.echo(" [stopped]", nl=False)
        finally:
            pieces.close()
            click.echo()
        if session.left_out and not self._told_left_out:
            self._told_left_out = True
            context = session.runtime.manifest.graph.max_length
            click.echo(
                f"(the oldest turns no longer fit the context of {context:,} tokens and are left"
                " out)",
                err=True,
            )
        if session.completion is not None and session.completion.confidence is not None:
            click.echo(f"confidence {session.completion.confidence:.4f}", err=True)
        if self._stats and session.completion is not None:
            click.echo(speed_line(session.completion), err=True)

    def _say_alone(self) -> None:
        if self._session.alone and not self._told_alone and sys.stdin.isatty():
            self._told_alone = True
            who = self._session.adapter or "the base model"
            click.echo(f"({who} reads plain prompts: each line is asked by itself)", err=True)

    def _adapter(self, name: str) -> None:
        if not name:
            raise InputError("/adapter needs a name", expected=self._names())
        chosen = None if name == "none" else name
        if chosen is not None and not self._session.runtime.registry.knows(chosen):
            raise InputError(f"there is no adapter {name!r}", expected=self._names())
        self._session.choose(chosen)
        self._told_alone = False

    def _adapters(self, rest: str) -> None:
        for name in self._session.runtime.adapters:
            chosen = "*" if name == self._session.adapter else " "
            click.echo(f"{chosen} {name}  {self._session.runtime.task(name)}")

    def _names(self) -> str:
        return ", ".join([*self._session.runtime.adapters, "none"])

    def _system(self, text: str) -> None:
        self._session.system = text or None

    def _settings(self, rest: str) -> None:
        if not rest:
            found = self._session.settings
            click.echo(" ".join(f"{k}={json.dumps(v)}" for k, v in found.items()) or "(defaults)")
            return
        try:
            pairs = [pair.partition("=") for pair in shlex.split(rest)]
        except ValueError as error:
            raise InputError(f"/settings: {error}", expected="key=value", got=rest) from error
        if wrong := next((key for key, sign, _ in pairs if not sign), None):
            raise InputError("/settings", expected="key=value", got=wrong)
        self._session.set(**{key: _value(text) for key, _, text in pairs})

    def _exit(self, rest: str) -> None:
        raise Leave


def _value(text: str) -> Any:
    """A setting as JSON has it, else as a text; nothing is None."""
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text
