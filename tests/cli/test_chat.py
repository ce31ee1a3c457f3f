"""`edgetune chat`: lines from a pipe, and a real terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from runtime_helpers import decoder_bundle, encoder_bundle

from edgetune.cli import cli
from edgetune.runtime import Runtime
from edgetune.runtime.tasks.chat_session import ChatSession


def piped(bundle: Path, text: str, *options: str) -> tuple[int, str, str]:
    given = ["chat", str(bundle), "--threads", "1", *options]
    result = CliRunner().invoke(cli, given, input=text)
    failure = str(result.exception) if result.exception else ""
    return result.exit_code, result.stdout, result.stderr + failure


def test_a_line_from_a_pipe_is_a_turn_and_only_answers_are_printed(tiny_decoder: Path) -> None:
    bundle = decoder_bundle(tiny_decoder)
    lines = "hello\n\n/adapter a\nhello\n/settings max_new_tokens=2\nhello\n/exit\nnever\n"
    code, out, said = piped(bundle, lines, "--max-new-tokens", "5")
    with Runtime.open(bundle, threads=1) as runtime:
        first = "".join(ChatSession(runtime, max_new_tokens=5).ask("hello"))
        second, third = (
            runtime.generate(["hello"], "a", max_new_tokens=count)[0].text for count in (5, 2)
        )
    assert (code, out, said) == (0, f"{first}\n{second}\n{third}\n", "")


def test_stats_follow_an_answer_where_they_are_asked_for(tiny_decoder: Path) -> None:
    bundle = decoder_bundle(tiny_decoder)
    _, _, said = piped(bundle, "hello\n", "--max-new-tokens", "3", "--stats")
    assert re.fullmatch(r"\[3 tokens, first after \d+ ms, \d+ tokens/s, length\]\n", said)


def test_how_sure_an_answer_is_follows_it_where_it_is_asked_for(tiny_decoder: Path) -> None:
    _, _, said = piped(decoder_bundle(tiny_decoder), "/settings confidence=true\nhello\n")
    assert re.fullmatch(r"confidence [01]\.\d{4}\n", said)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/adapter nobody", r"there is no adapter 'nobody' \(expected a, b, none\)"),
        ("/adapter", "/adapter needs a name"),
        ("/what", r"there is no command /what \(expected /adapter, /adapters"),
        (
            "/settings temperature=hot",
            r"temperature has a wrong type \(expected a number, got 'hot'\)",
        ),
        ("/settings max_new_tokens=1e3", "max_new_tokens has a wrong type"),
        ("""/settings 'logit_bias={"x": 1}'""", "logit_bias has a wrong type"),
        ("/settings beams=2", "unknown generation setting 'beams'"),
        ("/settings seed", r"/settings \(expected key=value, got seed\)"),
        ("word " * 5000, "longer than the context"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_ends_a_pipe(
    tiny_decoder: Path, line: str, message: str
) -> None:
    code, out, said = piped(decoder_bundle(tiny_decoder), f"{line}\nhello\n")
    assert code != 0 and out.strip() == ""
    assert re.search(message, said)


def test_an_encoder_is_one_clear_line(tiny_encoder: Path) -> None:
    code, _, said = piped(encoder_bundle(tiny_encoder), "hello\n")
    assert code != 0 and "it holds no conversation" in said


class Screen:
    """`edgetune chat` in a terminal of its own."""

    def __init__(self, bundle: Path, *options: str) -> None:
        self._ours, theirs = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "edgetune", "chat", str(bundle), "--threads", "1", *options],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(theirs)
        self.text = ""

    def until(self, pattern: str, *, seconds: float = 120) -> str:
        """Read until the new text holds the pattern; the text up to its end."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            ready, _, _ = select.select([self._ours], [], [], max(0.0, end - time.monotonic()))
            assert ready, self.text
            self.text += os.read(self._ours, 4096).decode(errors="replace")
        seen, self.text = self.text[: found.end()], self.text[found.end() :]
        return seen

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def interrupt(self) -> None:
        os.kill(self._process.pid, signal.SIGINT)

    def end(self) -> int:
        return self._process.wait(60)


def test_a_terminal_is_asked_interrupted_and_left(tiny_decoder: Path) -> None:
    screen = Screen(decoder_bundle(tiny_decoder), "--max-new-tokens", "4", "--stats")
    screen.until("adapters: a, b; /help")
    screen.until("base> ")
    screen.type("hello\n")
    screen.until(r"\[4 tokens")
    screen.until("base> ")
    screen.type("/nothing\n")
    screen.until("there is no command /nothing")
    screen.until("base> ")
    screen.type("/adapter a\n")
    screen.until("a> ")
    screen.type("tell me\n")
    screen.until("each line is asked by itself\\)\r\n")
    screen.until(r"\[4 tokens")
    screen.until("a> ")
    screen.type("half a line")
    screen.until("half a line")
    time.sleep(0.5)  # Python loses a signal just before it waits for the next key
    screen.interrupt()
    screen.until("\r\na> ")
    screen.type("/adapter none\n")
    screen.until("base> ")
    screen.type("\x04")
    assert screen.end() == 0
