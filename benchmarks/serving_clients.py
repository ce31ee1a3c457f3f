"""The clients of the serving benchmark's soak: what they send, and what came of it."""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from serving_checks import Check
from serving_load import Prompts, Server, request_bytes

LONG = 48
"""tokens of a long answer, and of a stream that may be left early"""
MOST = 400
"""tokens of a long prompt"""
OUTSTANDING = 64
SHARES = {
    "check": 0.55, "long": 0.08, "structured": 0.07, "vanish": 0.13, "malformed": 0.13, "look": 0.04
}  # fmt: skip


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

    def __init__(
        self, server: Server, checks: dict[str, list[Check]], *, vocabulary: int, context: int
    ) -> None:
        self.server, self.checks, self.context = server, checks, context
        self.prompts = Prompts(vocabulary, seed=2)
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

    def long(self, chance: random.Random) -> None:
        """A prompt of several chunks and an answer to its end, as a stream that is read slowly or
        not."""
        ids = self.prompts(chance.randrange(LONG, min(self.context // 2, MOST)))
        body = {"model": self.any_check(chance).adapter, "prompt": ids, "max_tokens": LONG}
        stream = Stream(
            self.server.port, request_bytes("/v1/completions", {**body, "stream": True})
        )
        while stream.some():
            time.sleep(chance.choice((0.0, 0.0, 0.05)))
        self.ended(stream)

    def structured(self, chance: random.Random) -> None:
        """A conversation whose answer must be JSON of one of some schemas."""
        keys = [f"k{chance.randrange(40)}" for _ in range(chance.randint(1, 4))]
        schema = {
            "type": "object", "properties": {key: {"enum": ["on", "off"]} for key in keys},
            "required": sorted(set(keys)), "additionalProperties": False,
        }  # fmt: skip
        status, answer = self.post("/v1/chat/completions", {
            "model": self.any_check(chance).adapter, "max_tokens": 64, "temperature": 1.0,
            "messages": [{"role": "user", "content": f"state of {keys}"}],
            "response_format": {
                "type": "json_schema", "json_schema": {"name": "state", "schema": schema}
            },
        })  # fmt: skip
        if status == 200:
            choice = json.loads(answer)["choices"][0]
            if choice["finish_reason"] == "stop":
                found = json.loads(choice["message"]["content"])
                fits = set(found) == set(keys) and set(found.values()) <= {"on", "off"}
                self.count(
                    "structured, right" if fits else "structured, wrong", "" if fits else str(found)
                )

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
                getattr(self, kind)(chance)
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
        load = {"lora_name": name, "lora_path": first.adapter}
        if not self.expect("/v1/load_lora_adapter", load, 200):  # an earlier round was broken off
            self.expect("/v1/unload_lora_adapter", {"lora_name": name}, 200)
            return
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

    def expect(self, path: str, body: Any, status: int) -> bool:
        """A request that must have this status."""
        found, answer = self.post(path, body)
        if found != status:
            self.count(
                "unexpected status",
                f"{found} instead of {status} for {path} {body}: {answer[:200]!r}",
            )
        return found == status


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


def left_running(load: Load) -> float:
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
