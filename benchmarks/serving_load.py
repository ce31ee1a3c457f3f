"""What the serving benchmark's sections share: timed requests to the scheduler and over HTTP, a
server process, rows of a table.
"""

from __future__ import annotations

import argparse
import json
import random
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.runtime import Runtime
from edgetune.runtime.scheduler.requests import (
    Event,
    FailedEvent,
    FinishedEvent,
    GenerationRequest,
    TokenEvent,
)
from edgetune.runtime.scheduler.scheduler import Scheduler

STREAMS = 8
"""requests that are under way together"""

# --------------------------------------------------------------------------------
# the table


@dataclass(frozen=True)
class Row:
    """A measured value beside its target (None: for comparison only); `at_least`: the target is a
    lower bound; `samples`: of each turn, where the value is their median.
    """

    title: str
    value: float
    unit: str = ""
    target: float | None = None
    at_least: bool = False
    samples: list[float] = field(default_factory=list)

    def line(self) -> str:
        """The row as markdown."""
        value = f"{self.value:,.2f} {self.unit}" if self.unit else f"{self.value:g}"
        if self.target is None:
            return f"| {self.title} | {value} | – |"
        met = self.value >= self.target if self.at_least else self.value <= self.target
        bound = f"{'≥' if self.at_least else '≤'} {self.target:g} {self.unit}".rstrip()
        return f"| {self.title} | **{value}** | {bound}: {'met' if met else 'missed'} |"


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    return "\n".join(
        ["| measure | measured | to reach |", "|---|---|---|", *(row.line() for row in rows)]
    )


def middle(
    title: str,
    samples: Sequence[float],
    unit: str,
    target: float | None = None,
    *,
    at_least: bool = False,
) -> Row:
    """A row of the median of the turns."""
    return Row(title, statistics.median(samples), unit, target, at_least, [*samples])


def opened(options: argparse.Namespace, adapters: Path | None = None) -> Runtime:
    """The bundle, by the first engine of the options."""
    return Runtime.open(
        options.bundle,
        threads=options.threads,
        adapter_folder=adapters,
        engine=options.engine[0],
    )


def made(folder: Path) -> Path:
    """A folder that did not exist, with those above it."""
    folder.mkdir(parents=True)
    return folder


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of 100 lies."""
    return float(np.percentile(np.array(values), share))


def memory_mb(pid: int | str = "self") -> float:
    """Resident memory of a process, 10⁶ bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return (
        int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
        * 1024
        / 1e6
    )


# --------------------------------------------------------------------------------
# requests


@dataclass(frozen=True)
class Job:
    """A request that is sent `at` seconds after the round's start, whatever the others do (open
    loop).
    """

    adapter: str | None
    ids: list[int]
    new: int
    at: float = 0.0


@dataclass
class Answer:
    """Seconds: to the first text, from when the job was due; to the end, from the round's start."""

    first: float = 0.0
    end: float = 0.0
    tokens: int = 0


class Prompts:
    """Pseudo-random prompts, never the same twice, so that no prefix is found again."""

    def __init__(self, vocabulary: int, seed: int = 0) -> None:
        self._vocabulary, self._random = vocabulary, random.Random(seed)

    def __call__(self, tokens: int) -> list[int]:
        """Token ids above the special ones."""
        return [
            self._random.randrange(self._vocabulary // 8, self._vocabulary) for _ in range(tokens)
        ]


def no_end(runtime: Runtime) -> dict[int, float]:
    """A bias that bans the end tokens: every answer has all its tokens."""
    return dict.fromkeys(runtime.tokenizer.eos_token_ids, -100.0)


def by_python(scheduler: Scheduler, jobs: Sequence[Job]) -> list[Answer]:
    """Send the jobs through the scheduler of this process."""
    answers, left, bias = (
        [Answer() for _ in jobs],
        threading.Semaphore(0),
        no_end(scheduler.runtime),
    )
    failures: list[Exception] = []
    start = time.perf_counter()

    def listener(job: Job, answer: Answer) -> Any:
        def on_event(event: Event) -> None:
            if isinstance(event, TokenEvent):
                if event.text and not answer.first:
                    answer.first = time.perf_counter() - start - job.at
                return
            answer.end = time.perf_counter() - start
            if isinstance(event, FinishedEvent):
                answer.tokens = event.completion.completion_tokens
            elif isinstance(event, FailedEvent):
                failures.append(event.error)
            left.release()

        return on_event

    for job, answer in sorted(zip(jobs, answers, strict=True), key=lambda pair: pair[0].at):
        time.sleep(max(0.0, start + job.at - time.perf_counter()))
        settings = scheduler.runtime.settings(job.adapter, max_new_tokens=job.new, logit_bias=bias)
        scheduler.submit(GenerationRequest(job.ids, job.adapter, settings), listener(job, answer))
    for _ in jobs:
        left.acquire()
    if failures:
        raise failures[0]
    return answers


def request_bytes(path: str, body: Any) -> bytes:
    """A POST as it goes over the wire; `body` is JSON, or bytes that pretend to be."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection:"
        f" close\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def by_http(port: int, jobs: Sequence[Job], bias: dict[int, float]) -> list[Answer]:
    """Send the jobs to a server: one thread, one selector, no parsing but of the last event, to
    take little of the cores.
    """
    answers, picked = [Answer() for _ in jobs], selectors.DefaultSelector()
    waiting = sorted(range(len(jobs)), key=lambda i: jobs[i].at)[::-1]
    received: dict[int, bytearray] = {}
    start = time.perf_counter()
    while waiting or picked.get_map():
        while waiting and jobs[waiting[-1]].at <= time.perf_counter() - start:
            i = waiting.pop()
            stream = socket.create_connection(("127.0.0.1", port))
            stream.sendall(request_bytes("/v1/completions", _body(jobs[i], bias)))
            received[i] = bytearray()
            picked.register(stream, selectors.EVENT_READ, i)
        pause = max(0.0, start + jobs[waiting[-1]].at - time.perf_counter()) if waiting else None
        if not picked.get_map():
            time.sleep(pause or 0)
            continue
        for key, _ in picked.select(pause):
            i, stream = key.data, key.fileobj
            assert isinstance(stream, socket.socket)
            data = stream.recv(65536)
            received[i] += data
            if not answers[i].first and b"data: " in received[i]:
                answers[i].first = time.perf_counter() - start - jobs[i].at
            if not data:
                answers[i].end, answers[i].tokens = (
                    time.perf_counter() - start,
                    _tokens(received[i]),
                )
                picked.unregister(stream)
                stream.close()
    return answers


def _body(job: Job, bias: dict[int, float]) -> dict[str, Any]:
    return {
        "model": job.adapter or "base",
        "prompt": job.ids,
        "max_tokens": job.new,
        "logit_bias": {str(token): value for token, value in bias.items()},
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _tokens(received: bytearray) -> int:
    events = [part for part in received.split(b"data: ") if b'"completion_tokens"' in part]
    if not events:
        raise SystemExit(
            f"the server did not answer to the end: {received[:300].decode(errors='replace')}"
        )
    return int(json.loads(events[-1].split(b"\n")[0])["usage"]["completion_tokens"])


def speed(answers: Sequence[Answer]) -> float:
    """Tokens/s of a round, prompts included: all tokens by the time until the last one."""
    return sum(answer.tokens for answer in answers) / max(answer.end for answer in answers)


# --------------------------------------------------------------------------------
# server


class Server:
    """`edgetune serve` as a process."""

    def __init__(self, process: subprocess.Popen[str], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def errors(self) -> list[str]:
        """Lines of its log of level error."""
        return [
            line
            for line in self.log.read_text().splitlines()
            if '"level": "error"' in line or "Traceback" in line
        ]


@contextmanager
def served(bundle: Path, log: Path, *options: str) -> Iterator[Server]:
    """Serve until the block ends; it must end by itself after SIGTERM, with exit status 0."""
    command = [
        sys.executable,
        "-m",
        "edgetune",
        "serve",
        str(bundle),
        "--port",
        "0",
        "--model-name",
        "base",
        *options,
    ]
    with (
        log.open("w") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if "http://127.0.0.1:" not in line:
                raise SystemExit(f"the server did not start: {line}{log.read_text()[-2000:]}")
            port = int(line.rpartition(":")[2])
            _until_ready(port)
            yield Server(process, port, log)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                status = process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                status = -9
    if status:
        raise SystemExit(f"the server ended with status {status}, see {log}")


def _until_ready(port: int) -> None:
    for _ in range(600):
        try:
            with socket.create_connection(("127.0.0.1", port)) as stream:
                stream.sendall(
                    b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                )
                if b" 200 " in stream.recv(100):
                    return
        except OSError:
            pass
        time.sleep(0.05)
    raise SystemExit("the server did not become ready within 30 s")
