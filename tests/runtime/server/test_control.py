"""The server under pressure: clients that leave, full queues, deadlines, draining, keys, foreign
hosts.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from runtime_helpers import decoder_bundle
from server_helpers import NEVER_EOS, Running, in_background, paced, serve, until

LONG = {"model": "a", "prompt": "x", "max_tokens": 200, "logit_bias": {str(NEVER_EOS): -100}}
SHORT = {"model": "a", "prompt": "x", "max_tokens": 2}


@pytest.fixture(scope="module")
def server(tiny_decoder: Path) -> Iterator[Running]:
    options = {
        "api_keys": (),
        "allowed_hosts": ("127.0.0.1",),
        "cors_origins": ("https://example.org",),
    }
    with serve(decoder_bundle(tiny_decoder), scheduler={"max_queue": 3}, **options) as running:
        yield running


def ended(server: Running, reason: str) -> int:
    return server.service.scheduler.stats().requests_total.get(reason, 0)


def test_a_client_that_leaves_mid_stream_frees_its_row(server: Running) -> None:
    before = ended(server, "cancelled")
    leave = threading.Event()

    def read_one_line_and_leave() -> str:
        with server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
            line = next(answer.iter_lines())
            leave.wait(20)
            return line

    with paced(server) as pace:
        client = in_background(read_one_line_and_leave)
        until(lambda: server.running() == 2)
        for _ in range(5):
            pace.step()
        leave.set()
        assert client.result(20).startswith("data: {")
        until(lambda: server.service.metrics.open._value.get() == 0)
        pace.step()
        pace.step()
        assert ended(server, "cancelled") == before + 1


def test_a_client_that_leaves_before_the_first_token_frees_its_place(server: Running) -> None:
    before = ended(server, "cancelled")
    with paced(server):
        with pytest.raises(httpx.ReadTimeout):
            server.http.post("/v1/completions", json=LONG, timeout=httpx.Timeout(5, read=0.2))
        until(lambda: server.service.metrics.open._value.get() == 0)
    until(lambda: ended(server, "cancelled") >= before + 2)  # the pace's own row, and this one


def test_a_full_queue_is_429_with_the_time_to_wait(server: Running) -> None:
    with paced(server):
        waiting = [in_background(lambda: server.post("/v1/completions", SHORT)) for _ in range(3)]
        until(lambda: server.service.scheduler.stats().waiting == 3)
        refused = server.post("/v1/completions", SHORT)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert refused.json()["error"]["code"] == "queue_full"
    assert [answer.result(20).status_code for answer in waiting] == [200, 200, 200]


def test_several_prompts_are_queued_all_or_none(server: Running) -> None:
    with paced(server):
        waiting = in_background(
            lambda: server.post("/v1/completions", {**SHORT, "prompt": ["x", "y"]})
        )
        until(lambda: server.service.scheduler.stats().waiting == 2)
        refused = server.post("/v1/completions", {**SHORT, "n": 2})
    assert refused.status_code == 429
    assert [choice["index"] for choice in waiting.result(20).json()["choices"]] == [0, 1]
    until(lambda: server.running() == 0)


def test_more_rows_than_the_queue_holds_can_never_be_answered(server: Running) -> None:
    answer = server.post("/v1/completions", {**SHORT, "n": 4})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")


def test_a_deadline_that_passes_is_408(server: Running) -> None:
    with paced(server) as pace:
        late = in_background(lambda: server.post("/v1/completions", {**LONG, "deadline_s": 0.01}))
        until(lambda: server.service.scheduler.stats().waiting == 1)
        while not late.done():
            pace.step()
    assert (late.result().status_code, late.result().json()["error"]["code"]) == (
        408,
        "deadline_exceeded",
    )


def test_a_deadline_that_passes_mid_stream_is_an_error_event(server: Running) -> None:
    with paced(server) as pace:
        body = {**LONG, "deadline_s": 0.5, "stream": True}
        late = in_background(lambda: server.post("/v1/completions", body))
        while not late.done():
            pace.step()
            time.sleep(0.02)
    events = late.result().text.strip().split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert events[-1] == "data: [DONE]"


def test_a_draining_server_is_alive_but_not_ready_and_takes_nothing(server: Running) -> None:
    assert server.get("/ready").status_code == 200
    server.service.draining = True
    try:
        found = [server.get("/health"), server.get("/ready"), server.post("/v1/completions", SHORT)]
    finally:
        server.service.draining = False
    assert [answer.status_code for answer in found] == [200, 503, 503]
    assert found[2].headers["retry-after"]


def test_sigterm_lets_the_answer_under_way_finish(tiny_decoder: Path) -> None:
    with serve(decoder_bundle(tiny_decoder)) as own:
        with paced(own) as pace:
            answer = in_background(lambda: own.post("/v1/completions", SHORT))
            until(lambda: own.running() == 2)
            own.server.handle_exit(15, None)
            pace.step()
            with pytest.raises(
                httpx.TransportError
            ):  # refused, or an idle connection that is closed
                while True:
                    own.get("/health")
        assert len(answer.result(20).json()["choices"]) == 1


def test_what_the_drain_has_no_time_for_ends_with_an_error_in_openais_form(
    tiny_decoder: Path,
) -> None:
    with serve(decoder_bundle(tiny_decoder), drain_s=1.0) as own, paced(own) as pace:
        stream = in_background(
            lambda: own.post(
                "/v1/completions",
                {**SHORT, "stream": True, "max_tokens": 60, "logit_bias": {str(NEVER_EOS): -100}},
            )
        )
        until(lambda: own.running() == 2)
        for _ in range(4):
            pace.step()
        whole = in_background(lambda: own.post("/v1/completions", SHORT))
        until(lambda: own.running() == 3)
        own.server.handle_exit(15, None)
        answer, events = whole.result(20), stream.result(20).text.split("\n\n")
    expected = {"message": "The server stopped before the answer was done.", "type": "server_error"}
    assert answer.status_code == 503
    assert answer.json()["error"].items() >= expected.items()
    assert json.loads(events[-3].removeprefix("data: "))["error"].items() >= expected.items()
    assert events[-2:] == ["data: [DONE]", ""]


def test_a_web_page_that_points_its_name_here_is_refused(server: Running) -> None:
    answer = server.get("/v1/models", headers={"Host": "evil.example"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (421, "unknown_host")


def test_only_the_allowed_origin_may_read_answers(server: Running) -> None:
    def allowed(origin: str) -> str | None:
        return server.get("/v1/models", headers={"Origin": origin}).headers.get(
            "access-control-allow-origin"
        )

    assert allowed("https://example.org") == "https://example.org"
    assert allowed("https://evil.example") is None


def test_a_form_from_another_site_is_no_json(server: Running) -> None:
    answer = server.http.post(
        "/v1/completions", content="{}", headers={"Content-Type": "text/plain"}
    )
    assert answer.status_code == 415


def test_keys_open_the_models_but_the_probes_need_none(tiny_decoder: Path) -> None:
    with serve(decoder_bundle(tiny_decoder), api_keys=("first", "second")) as own:
        assert [model.id for model in own.client(api_key="second").models.list()] == [
            "tiny",
            "a",
            "b",
        ]
        with pytest.raises(openai.AuthenticationError) as caught:
            own.client(api_key="third").models.list()
        assert caught.value.code == "invalid_api_key"
        paths = ("/health", "/ready", "/", "/openapi.json", "/metrics", "/v1/models", "/nowhere")
        assert [own.get(path).status_code for path in paths] == [200, 200, 200, 200, 401, 401, 401]
        assert own.get("/metrics").headers["www-authenticate"] == "Bearer"


def test_a_request_id_comes_back_and_a_strange_one_is_replaced(server: Running) -> None:
    assert (
        server.get("/health", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    )
    assert (
        len(server.get("/health", headers={"X-Request-ID": "a b\tc"}).headers["x-request-id"]) == 32
    )


def test_metrics_count_requests_tokens_and_adapters(server: Running) -> None:
    server.post("/v1/completions", SHORT)
    page = server.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert float(lines['edgetune_http_requests_total{route="/v1/completions",status="200"}']) >= 1
    assert float(lines['edgetune_adapter_generated_tokens_total{adapter="a"}']) >= 2
    assert float(lines["edgetune_ttft_seconds_count"]) >= 1
    assert float(lines["edgetune_resident_memory_bytes"]) > 1e6
    assert "edgetune_queue_depth" in lines
