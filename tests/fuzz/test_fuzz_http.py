"""A real server of a decoder and of an encoder under mixed load, drawn by a seed: streams, slow
readers, clients that hang up, adapters that come and go, bodies that nobody should take. No status
5xx, nothing that is not finite, every greedy answer the one that the same request gives alone, and
in the end everything is free.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fuzz.figures import ROUNDS, SEED, Figures
from fuzz.test_fuzz_adapters import FILES, VALUES
from runtime_helpers import decoder_bundle, encoder_bundle
from server_helpers import Running, serve, until

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from serving_clients import Stream
from serving_load import request_bytes

Body = dict[str, Any]
CLIENTS = 12
TEXTS = (
    "hello",
    "Turn on the lights",
    "My card has not arrived yet",
    "a b c d e f g h",
    "é😀",
    "?",
)
SCHEMA = {"type": "object", "properties": {"on": {"enum": ["yes", "no"]}}, "required": ["on"]}
FORM = {"type": "json_schema", "json_schema": {"name": "state", "schema": SCHEMA}}
FIELDS = (
    "model", "prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed",
    "stop", "n", "logit_bias", "frequency_penalty", "logprobs", "stream", "stream_options", "tools",
    "response_format", "guided_regex", "guided_grammar", "deadline_s", "input", "text_1", "text_2",
    "encoding_format", "truncate", "lora_name", "lora_path", "load_inplace", "in_use", "nobody",
)  # fmt: skip
OWN_VALUES: tuple[Any, ...] = (
    "a", "b", "intent", "tiny", "hello", 7, 0.5, [1, 2], [2**31], [-1], ["a", 5], [[5, 6], [7]],
    {"5": 1e9}, {"type": "json_object"}, [{"role": "user", "content": "x"}], [{"role": 7}], "(",
    "forget", [["a", "b"]], [[["a"]]], "start: /a+/", "../x", "/etc", 2**63,
)  # fmt: skip


def decoder_bodies() -> list[tuple[str, Body]]:
    """Greedy requests of every form."""
    bodies: list[tuple[str, Body]] = []
    for i, text in enumerate(TEXTS):
        for model in ("a", "b", "tiny"):
            one = {"model": model, "max_tokens": 4 + 5 * (i % 4), "temperature": 0}
            chat = {**one, "messages": [{"role": "user", "content": text}]}
            bodies += [
                ("/v1/completions", {**one, "prompt": text}),
                ("/v1/completions", {**one, "prompt": [20 + i, 30, 40], "logprobs": 2}),
                ("/v1/chat/completions", chat),
                ("/v1/chat/completions", {**chat, "response_format": FORM, "max_tokens": 40}),
            ]
    return bodies


def encoder_bodies() -> list[tuple[str, Body]]:
    return [
        (path, {"model": model, "input": texts})
        for texts in (*TEXTS, list(TEXTS), [TEXTS[0]] * 9)
        for path, models in (
            ("/classify", ("intent", "mood")), ("/v1/embeddings", ("intent", "tiny"))
        )
        for model in models
    ]  # fmt: skip


def parsed(data: bytes) -> Any:
    """JSON whose numbers are all finite; ValueError for others."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} in an answer")

    return json.loads(data, parse_constant=refuse)


def events_of(body: bytes) -> list[Any]:
    return [parsed(line[6:]) for line in body.splitlines() if line.startswith(b"data: {")]


def streamed(events: list[Any]) -> str:
    choices = [choice for event in events for choice in event.get("choices", ())]
    return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)


def said(path: str, answer: Any) -> Any:
    """What counts of an answer: a text, or numbers."""
    if path == "/classify":
        return [number for one in answer["data"] for number in one["probs"]]
    if path == "/v1/embeddings":
        return [number for one in answer["data"] for number in one["embedding"]]
    choice = answer["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def same(found: Any, wanted: Any) -> bool:
    """Texts to the letter; numbers as far as another batch rounds them otherwise."""
    if isinstance(wanted, str):
        return bool(found == wanted)
    return len(found) == len(wanted) and all(
        math.isclose(a, b, abs_tol=1e-4) for a, b in zip(found, wanted, strict=True)
    )


class Clients:
    """Everything that is sent to one server, and what came of it."""

    def __init__(
        self, running: Running, bodies: list[tuple[str, Body]], figures: Figures, folder: Path
    ) -> None:
        self.port, self.figures, self.folder = running.http.base_url.port or 0, figures, folder
        self.bodies = bodies
        self.adapters = sorted(path.name for path in folder.iterdir())
        self.alone = [said(path, self.answer(path, body)) for path, body in bodies]
        self._lock = threading.Lock()

    def answer(self, path: str, body: Body) -> Any:
        status, data = Stream(self.port, request_bytes(path, body)).rest()
        assert status == 200, (path, body, data)
        return parsed(data)

    def count(self, what: str) -> None:
        with self._lock:
            self.figures.count(what)

    def fault(self, what: str, example: str) -> None:
        with self._lock:
            self.figures.fault(what, example)

    def ended(self, stream: Stream, what: str) -> tuple[int, bytes]:
        """The rest of an answer; a status 5xx is a fault."""
        status, data = stream.rest()
        if status >= 500:
            self.fault("status 5xx", f"{what}: {status} {data[:200]!r}")
        return status, data

    def asked(self, chance: random.Random) -> None:
        """A greedy request whose answer is known, whole or as a stream, read at once or slowly."""
        number = chance.randrange(len(self.bodies))
        path, body = self.bodies[number]
        self.judge(number, path, body, chance)

    def judge(self, number: int, path: str, body: Body, chance: random.Random) -> None:
        stream = "max_tokens" in body and chance.random() < 0.5
        connection = Stream(
            self.port, request_bytes(path, {**body, "stream": stream} if stream else body)
        )
        if chance.random() < 0.2:
            while connection.some():
                time.sleep(0.02)
        status, data = self.ended(connection, path)
        if status == 429:
            self.count("429")
            return
        if status != 200:
            if status < 500:
                self.fault("wrong", f"{path} {body}: {status} {data[:200]!r}")
            return
        found = streamed(events_of(data)) if stream else said(path, parsed(data))
        if same(found, self.alone[number]):
            self.count("as alone")
        else:
            self.fault("wrong", f"{path} {body}: {found!r}, alone {self.alone[number]!r}")

    def vanished(self, chance: random.Random) -> None:
        """Hang up somewhere: within the request, before an answer, in the middle of a stream."""
        path, body = chance.choice(self.bodies)
        data = request_bytes(path, {**body, "stream": True} if "max_tokens" in body else body)
        cut = chance.random() < 0.3
        connection = Stream(self.port, data[: chance.randrange(1, len(data))] if cut else data)
        for _ in range(0 if cut else chance.choice((0, 1, 2))):
            connection.some()
        connection.vanish(reset=chance.random() < 0.5)
        self.count("hung up")

    def malformed(self, chance: random.Random) -> None:
        """Bytes that are no JSON, or a good body with a hostile value; refused, or harmless."""
        path, good = chance.choice(self.bodies)
        path = chance.choice([path, path, "/score", "/pooling", "/tag", "/v1/load_lora_adapter"])
        body: Any = chance.choice(FILES[:8])
        if chance.random() < 0.8:
            body = dict(good)
            for _ in range(chance.choice((1, 1, 2))):
                values = VALUES if chance.random() < 0.5 else OWN_VALUES
                body[chance.choice(FIELDS if chance.random() < 0.5 else list(good))] = (
                    chance.choice(values)
                )
        status, data = self.ended(
            Stream(self.port, request_bytes(path, body)), f"{path} {body!r:.200}"
        )
        (events_of if b"data: " in data else parsed)(data)
        self.count("refused" if status >= 400 else "answered")

    def swapped(self, chance: random.Random) -> None:
        """Load an adapter under a name of one's own, ask it, unload it."""
        name, adapter = f"own-{chance.randrange(10**9)}", chance.choice(self.adapters)
        load = {"lora_name": name, "lora_path": str(self.folder / adapter)}
        status, data = self.ended(
            Stream(self.port, request_bytes("/v1/load_lora_adapter", load)), "load"
        )
        if status != 200:
            if status < 500:
                self.fault("wrong", f"load: {status} {data[:200]!r}")
            return
        numbers = [k for k, (_, body) in enumerate(self.bodies) if body["model"] == adapter]
        number = chance.choice(numbers)
        path, body = self.bodies[number]
        self.judge(number, path, {**body, "model": name}, chance)
        unload = request_bytes("/v1/unload_lora_adapter", {"lora_name": name})
        self.ended(Stream(self.port, unload), "unload")

    def looked(self, chance: random.Random) -> None:
        path = chance.choice(("/metrics", "/health", "/ready", "/v1/models", "/openapi.json", "/"))
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        if self.ended(Stream(self.port, head), path)[0] != 200:
            self.fault("wrong", f"{path}: not 200")
        self.count("looked")

    def one(self, seed: int) -> None:
        """One action of some kind."""
        chance = random.Random(seed)
        actions: list[Callable[[random.Random], None]] = [
            self.asked, self.vanished, self.malformed, self.swapped, self.looked
        ]  # fmt: skip
        action = chance.choices(actions, (8, 3, 6, 1, 1))[0]
        what = f"seed {seed}, {action.__name__}"
        try:
            action(chance)
        except TimeoutError as error:
            self.fault("frozen", f"{what}: {error}")
        except Exception as error:
            kind = "not finite" if "in an answer" in str(error) else "other exceptions"
            self.fault(kind, f"{what}: {type(error).__name__}: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_server_answers_as_if_each_client_were_alone(
    tiny_encoder: Path, tiny_decoder: Path, tmp_path: Path, kind: str
) -> None:
    encoder = kind == "encoder"
    bundle = encoder_bundle(tiny_encoder) if encoder else decoder_bundle(tiny_decoder)
    figures, folder = Figures(f"HTTP, {kind}"), tmp_path / "adapters"
    shutil.copytree(bundle / "adapters", folder)
    limits = {"max_rows": 4, "max_queue": 4}
    with serve(bundle, scheduler=limits, adapter_folders=(folder,), drain_s=5.0) as running:
        bodies = encoder_bodies() if encoder else decoder_bodies()
        clients = Clients(running, bodies, figures, folder)
        figures.tried = 5 * ROUNDS
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(clients.one, range(SEED, SEED + figures.tried)))
        until(lambda: running.running() == 0)
        metrics = dict(
            line.rsplit(" ", 1)
            for line in running.get("/metrics").text.splitlines()
            if line and line[0] != "#"
        )
        assert float(metrics.get("edgetune_cache_slots_used", 0)) == 0
        assert float(metrics["edgetune_http_requests_open"]) <= 1  # this one
        assert {*running.runtime.adapters} >= {*clients.adapters}
        for number, (path, body) in enumerate(bodies):
            if not same(said(path, clients.answer(path, body)), clients.alone[number]):
                figures.fault("wrong", f"afterwards: {path} {body}")
    figures.check()
