"""The serving benchmark's soak: mixed load on a real server while adapters come and go, every
answer checked.

A check is a prompt whose first greedy tokens under one adapter are nobody else's, neither another
adapter's nor the base's, and are chosen with a margin, so that rounding in another batch cannot
turn them: a graph whose activations are rounded to 8 bits answers otherwise in another batch (sums
of two threads in another order, rounded to another step: up to 0.6 standard deviations of the
logits measured with SmolLM2 int4 and these adapters). It was computed before, alone in the engine;
an answer that is not it is counted apart when it is the one of another adapter. Requests come at
random times, whether others have ended or not; beside them two clients of their own load adapters
under one name, exchange them while a stream runs, and unload them again.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from serving_load import Prompts, Row, Server, make_adapters, memory_mb, request_bytes, served

from edgetune.runtime import Runtime

ADAPTERS, STRENGTH, MARGIN, LEAST, MOST, LONG = 8, 0.2, 0.6, 1, 3, 48
"""adapters and their strength; lead of the first choice; tokens of a check; tokens of a stream that
may be left early
"""
OUTSTANDING, CHURNERS = 64, 2
SHARES = {"check": 0.65, "vanish": 0.15, "malformed": 0.15, "look": 0.05}


@dataclass(frozen=True)
class Check:
    """What only this adapter answers."""

    adapter: str
    ids: list[int]
    new: int
    text: str
    others: frozenset[str]
    """the same number of tokens of the other adapters and of the base"""


def greedy(runtime: Runtime, name: str | None, ids: list[int]) -> tuple[list[int], list[float]]:
    """The first tokens of the answer, alone in the engine, and by how many standard deviations of
    the logits each was ahead of the second choice."""
    assert runtime.decoder is not None
    state, logits = runtime.decoder.start(
        [ids], [runtime.bound(name)], capacity=len(ids) + MOST + 1
    )
    tokens, margins = list[int](), list[float]()
    while len(tokens) < MOST:
        second, first = np.partition(logits[0], -2)[-2:]
        margins.append(float((first - second) / logits[0].std()))
        tokens.append(int(logits[0].argmax()))
        if tokens[-1] in runtime.tokenizer.eos_token_ids:
            break
        logits = state.step(tokens[-1:])
    return tokens, margins


def find_checks(
    runtime: Runtime, names: list[str], *, each: int = 3, tries: int = 200
) -> dict[str, list[Check]]:
    """`each` checks an adapter, from random prompts. SystemExit when an adapter has none: they are
    too much alike.
    """
    prompts, lengths = (
        Prompts(runtime.manifest.graph.vocab_size, seed=1),
        (8, 24, 40, min(96, runtime.manifest.graph.max_length // 2)),
    )
    found: dict[str, list[Check]] = {name: [] for name in names}
    for attempt in range(tries):
        if all(len(checks) >= each for checks in found.values()):
            break
        ids = prompts(lengths[attempt % len(lengths)])
        answers = {name: greedy(runtime, name, ids) for name in [*names, None]}
        for name in names:
            tokens, margins = answers[name]
            new = next((i for i, margin in enumerate(margins) if margin < MARGIN), len(tokens))
            if len(found[name]) >= each or new < min(LEAST, len(tokens)):
                continue
            text = text_of(runtime, name, ids, tokens[:new])
            others = frozenset(
                text_of(runtime, name, ids, other[:new])
                for of, (other, _) in answers.items()
                if of != name
            )
            if text not in others and text.strip("\ufffd"):
                found[name].append(Check(name, ids, new, text, others))
    if not all(found.values()):
        raise SystemExit(
            f"no checks for {[name for name in names if not found[name]]}: their answers are not"
            " their own"
        )
    return found


def text_of(runtime: Runtime, name: str | None, ids: list[int], tokens: list[int]) -> str:
    """The text of an answer of so many tokens."""
    if not tokens:
        return ""
    sequence = runtime.sequence(ids, runtime.settings(name, max_new_tokens=len(tokens)))
    for token in tokens:
        sequence.add(token)
    return sequence.text


# --------------------------------------------------------------------------------
# the clients


class Stream:
    """One request on a connection of its own."""

    def __init__(self, port: int, data: bytes) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.sendall(data)
        self.received = bytearray()

    def some(self, *, timeout_s: float = 120.0) -> bool:
        """Wait for more; False at the end."""
        self._socket.settimeout(timeout_s)
        data = self._socket.recv(65536)
        self.received += data
        return bool(data)

    def rest(self) -> tuple[int, bytes]:
        """Status and body, once it is complete."""
        with self._socket:
            while self.some():
                pass
        head, _, body = bytes(self.received).partition(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1]), body

    def vanish(self, *, reset: bool) -> None:
        """Close it, politely or not."""
        if reset:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()


def streamed_text(body: bytes) -> str:
    """The text of an event stream; an error event raises ValueError."""
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith(b"data: {")]
    if failed := [event for event in events if "error" in event]:
        raise ValueError(str(failed[0]))
    return "".join(choice["text"] for event in events for choice in event["choices"])


class Load:
    """Everything that is sent, and what came of it (`seen`)."""

    def __init__(self, server: Server, checks: dict[str, list[Check]], folder: Path) -> None:
        self.server, self.checks, self.folder = server, checks, folder
        self.seen: Counter[str] = Counter()
        self.examples: list[str] = []
        self._lock = threading.Lock()

    def count(self, what: str, example: str = "") -> None:
        """One more; examples of what should not be are kept."""
        with self._lock:
            self.seen[what] += 1
            if example and len(self.examples) < 10:
                self.examples.append(f"{what}: {example}")

    def post(self, path: str, body: Any) -> tuple[int, bytes]:
        """Send and wait for all of the answer; its status is counted."""
        return self.ended(Stream(self.server.port, request_bytes(path, body)))

    def ended(self, stream: Stream) -> tuple[int, bytes]:
        """The rest of an answer; its status is counted."""
        status, body = stream.rest()
        self.count(
            f"status {status // 100}xx",
            body[:300].decode(errors="replace") if status >= 500 else "",
        )
        return status, body

    def check(self, chance: random.Random, check: Check, model: str | None = None) -> None:
        """Ask what only one adapter answers so, whole or as a stream."""
        body = {
            "model": model or check.adapter,
            "prompt": check.ids,
            "max_tokens": check.new,
            "temperature": 0,
        }
        stream = chance.random() < 0.5
        status, answer = self.post("/v1/completions", {**body, "stream": stream})
        if status == 200:
            self.judge(
                streamed_text(answer) if stream else json.loads(answer)["choices"][0]["text"],
                check,
                exact=True,
            )
        elif status == 429:
            self.count("refused, queue full")
        else:
            self.count("unexpected status", f"{status} for {body['model']}: {answer[:200]!r}")

    def judge(self, text: str, check: Check, *, exact: bool) -> None:
        """Count an answer as right or wrong; of a longer one the beginning (but for half a
        character).
        """
        right = text == check.text if exact else text.startswith(check.text.rstrip("\ufffd"))
        said = "right" if right else "wrong, another adapter's" if text in check.others else "wrong"
        self.count(said, "" if right else f"{check.adapter}: expected {check.text!r}, got {text!r}")

    def vanish(self, chance: random.Random) -> None:
        """Go away in the middle of a stream, before its first token, or before the request is
        complete.
        """
        check = self.any_check(chance)
        data = request_bytes(
            "/v1/completions",
            {"model": check.adapter, "prompt": check.ids, "max_tokens": LONG, "stream": True},
        )
        stream = Stream(
            self.server.port,
            data if chance.random() < 0.85 else data[: chance.randrange(1, len(data))],
        )
        for _ in range(chance.choice((0, 1, 1, 2, 4))):
            try:
                if not stream.some(timeout_s=2.0):
                    break
            except TimeoutError:  # the request was cut off: nothing comes
                break
        stream.vanish(reset=chance.random() < 0.5)
        self.count("vanished")

    def malformed(self, chance: random.Random) -> None:
        """Something that no server should take, and none should fall over."""
        good: dict[str, Any] = {"model": "a0", "prompt": [5, 6, 7], "max_tokens": 2}
        path, body = chance.choice(
            [
                ("/v1/completions", b"{"),
                ("/v1/completions", b"\xff\xfe\x00"),
                ("/v1/completions", b"[" * 100_000),
                ("/v1/completions", []),
                ("/v1/completions", {**good, "model": "nobody"}),
                ("/v1/completions", {**good, "model": "../a0"}),
                ("/v1/completions", {**good, "prompt": [2**31]}),
                ("/v1/completions", {**good, "prompt": [5] * 20_000}),
                ("/v1/completions", {**good, "prompt": ""}),
                ("/v1/completions", {**good, "max_tokens": -1}),
                ("/v1/completions", {**good, "temperature": "hot"}),
                ("/v1/completions", {**good, "no_such_field": 1}),
                ("/v1/completions", {**good, "guided_regex": "("}),
                (
                    "/v1/completions",
                    {
                        **good,
                        "response_format": {
                            "type": "json_schema",
                            "json_schema": {"name": "x", "schema": {"type": 7}},
                        },
                    },
                ),
                ("/v1/chat/completions", {"model": "a0", "messages": []}),
                (
                    "/v1/chat/completions",
                    {"model": "a0", "messages": [{"role": "nobody", "content": "x"}]},
                ),
                ("/v1/load_lora_adapter", {"lora_name": "bad", "lora_path": "/etc"}),
                ("/v1/load_lora_adapter", {"lora_name": "bad", "lora_path": "nowhere"}),
                ("/v1/unload_lora_adapter", {"lora_name": "nobody"}),
                ("/no/such/path", good),
            ]
        )
        status, answer = self.post(path, body)
        self.count(
            "malformed, refused" if 400 <= status < 500 else "malformed, not refused",
            f"{path} {str(body)[:80]}: {status} {answer[:80]!r}" if status < 400 else "",
        )

    def look(self, chance: random.Random) -> None:
        """What a monitor reads."""
        path = chance.choice(("/metrics", "/health", "/ready", "/v1/models"))
        data = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        if (status := self.ended(Stream(self.server.port, data))[0]) != 200:
            self.count("unexpected status", f"{status} for {path}")

    def any_check(self, chance: random.Random) -> Check:
        """Of any adapter; those of small numbers are asked for more often, so that some stay and
        some are evicted.
        """
        names = list(self.checks)
        return chance.choice(self.checks[names[min(int(chance.expovariate(0.5)), len(names) - 1)]])

    def one(self, seed: int) -> None:
        """One request of some kind."""
        chance = random.Random(seed)
        kind = chance.choices(list(SHARES), list(SHARES.values()))[0]
        try:
            if kind == "check":
                self.check(chance, self.any_check(chance))
            else:
                {"vanish": self.vanish, "malformed": self.malformed, "look": self.look}[kind](
                    chance
                )
        except (OSError, ValueError, LookupError) as error:
            self.count("broken", f"{kind}: {type(error).__name__}: {error}")

    def churn(self, name: str, over: threading.Event) -> None:
        """Load adapters under a name that is always another's, exchange them under a running
        stream, unload them.
        """
        chance = random.Random(name)
        while not over.wait(1.0):
            try:
                self._churn_once(name, chance)
            except (OSError, ValueError, LookupError) as error:
                self.count("broken", f"churn: {type(error).__name__}: {error}")

    def _churn_once(self, name: str, chance: random.Random) -> None:
        first, second = (
            chance.choice(self.checks[adapter]) for adapter in chance.sample(list(self.checks), 2)
        )
        self.expect("/v1/load_lora_adapter", {"lora_name": name, "lora_path": first.adapter}, 200)
        self.check(chance, first, name)
        running = Stream(
            self.server.port,
            request_bytes(
                "/v1/completions",
                {"model": name, "prompt": first.ids, "max_tokens": LONG, "stream": True},
            ),
        )
        running.some()
        if not running.received.startswith(b"HTTP/1.1 200"):
            running.rest()
            self.count(
                "refused, queue full" if b" 429 " in running.received[:20] else "unexpected status"
            )
        self.expect(
            "/v1/load_lora_adapter",
            {"lora_name": name, "lora_path": second.adapter, "load_inplace": True},
            200,
        )
        self.check(chance, second, name)
        if running.received.startswith(b"HTTP/1.1 200"):
            self.judge(streamed_text(self.ended(running)[1]), first, exact=False)
        self.expect("/v1/unload_lora_adapter", {"lora_name": name}, 200)
        self.expect("/v1/completions", {"model": name, "prompt": first.ids, "max_tokens": 1}, 404)
        self.count("loaded, exchanged, unloaded")

    def expect(self, path: str, body: Any, status: int) -> None:
        """A request that must have this status."""
        found, answer = self.post(path, body)
        if found != status:
            self.count(
                "unexpected status",
                f"{found} instead of {status} for {path} {body}: {answer[:200]!r}",
            )


def dispatch(load: Load, *, rate: float, seconds: float, sample: Callable[[float], None]) -> None:
    """Requests at exponential intervals; one that finds too many outstanding is not sent, and
    counted.
    """
    chance, start, outstanding = random.Random(0), time.monotonic(), set[Future[None]]()
    due, sampled = 0.0, -1.0
    with ThreadPoolExecutor(OUTSTANDING) as pool:
        for number in range(2**31):
            due += chance.expovariate(rate)
            while (now := time.monotonic() - start) < min(due, seconds):
                if now - sampled >= 1:
                    sampled = now
                    sample(now)
                time.sleep(min(0.2, due - now))
            if now >= seconds:
                break
            outstanding = {future for future in outstanding if not future.done()}
            if len(outstanding) < OUTSTANDING:
                outstanding.add(pool.submit(load.one, number))
            else:
                load.count("not sent, too many outstanding")


def soak(options: argparse.Namespace, work: Path) -> list[Row]:
    """Mixed load for `--minutes`; prints what was counted, and examples of what should not have
    been.
    """
    library, seconds = work / "library", options.minutes * 60
    library.mkdir()
    with Runtime.open(options.bundle, threads=options.threads, adapter_folder=library) as runtime:
        names = make_adapters(library, runtime.manifest, ADAPTERS, strength=STRENGTH)
        checks = find_checks(runtime, names)
        adapter_mb = runtime.adapter(names[0]).nbytes / 1e6
    limit = f"{3.5 * adapter_mb:.6f}"  # three and a half of eight adapters: evictions all the time
    flags = [
        "--adapter-library",
        str(library),
        "--adapter-folder",
        str(library),
        "--adapter-memory-mb",
        limit,
    ]
    flags += [
        "--threads",
        str(options.threads),
        "--max-rows",
        "8",
        "--max-queue",
        "32",
        "--cache-mb",
        "200",
    ]
    memory: list[tuple[float, float]] = []
    with served(options.bundle, work / "server.log", *flags) as server:
        load, over = Load(server, checks, library), threading.Event()
        churners = [
            threading.Thread(target=load.churn, args=(f"hot{k}", over)) for k in range(CHURNERS)
        ]
        for thread in churners:
            thread.start()
        try:
            dispatch(
                load,
                rate=options.load,
                seconds=seconds,
                sample=lambda now: memory.append((now, memory_mb(server.process.pid))),
            )
        finally:
            over.set()
            for thread in churners:
                thread.join()
        left = _left_running(load)
        errors = server.errors()
    seen = load.seen
    wrong = seen["wrong"] + seen["wrong, another adapter's"]
    print("\nsoak: " + ", ".join(f"{what} {count}" for what, count in sorted(seen.items())))
    print(
        f"server options: {' '.join(flags[4:])}; checks of {sum(map(len, checks.values()))} prompts"
    )
    print("\n".join([*load.examples, *errors[:5]]))
    early, late = (
        median(mb for at, mb in memory if low <= at / seconds < high)
        for low, high in ((0.2, 0.4), (0.8, 1.01))
    )
    return [
        Row("answers checked", seen["right"] + wrong, "", 1, at_least=True),
        Row("answers of the wrong adapter, or else wrong", wrong, "", 0),
        Row("status 5xx", seen["status 5xx"], "", 0),
        Row(
            "unexpected statuses, broken connections",
            seen["unexpected status"] + seen["broken"],
            "",
            0,
        ),
        Row("malformed requests not refused", seen["malformed, not refused"], "", 0),
        Row("error lines in the server's log", len(errors), "", 0),
        Row("requests still in the server after the last client left", left, "", 0),
        Row(
            "adapters loaded, exchanged under a stream, unloaded",
            seen["loaded, exchanged, unloaded"],
        ),
        Row("memory of the server, 20 to 40 % of the time", early, "MB"),
        Row("memory of the server, last fifth", late, "MB"),
        Row("memory growth between them", 100 * (late / early - 1), "%", 2),
    ]


def _left_running(load: Load) -> float:
    """Rows and queue by the server's own metrics, once it had ten seconds to let go."""
    data, total = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 0.0
    for _ in range(100):
        lines = Stream(load.server.port, data).rest()[1].decode().splitlines()
        wanted = ("edgetune_rows_running ", "edgetune_queue_depth ")
        total = sum(float(line.split()[-1]) for line in lines if line.startswith(wanted))
        if not total:
            break
        time.sleep(0.1)
    return total
