"""`edgetune serve` and `edgetune top` as commands: they start, answer, drain on SIGTERM and say in
one line what is wrong.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import CommandLine
from runtime_helpers import MISSING, decoder_bundle
from server_helpers import serve

import edgetune.runtime.server
from edgetune.cli.serve import load_adapters, read_keys
from edgetune.cli.top import MetricsReading, Rates, Watch, parse, read_metrics, sparkline
from edgetune.runtime import Runtime


def test_the_command_serves_logs_json_and_ends_well_on_sigterm(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    bundle = decoder_bundle(tiny_decoder)
    (tmp_path / "keys").write_text("# ours\nsecret\n")
    command = [
        sys.executable,
        "-m",
        "edgetune",
        "serve",
        str(bundle),
        "--port",
        "0",
        "--threads",
        "1",
    ]
    command += [
        "--adapter",
        f"mine={bundle / 'adapters' / 'a'}",
        "--api-key-file",
        str(tmp_path / "keys"),
    ]
    command += [
        "--lookup",
        "2",
        "--provider",
        MISSING,
        "--pin",
        "mine",
        "--pin",
        "b",
        "--adapter-memory-mb",
        "0",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = re.search(r"http://\S+", line)
        assert url and "a, b, mine" in line
        body = {"model": "mine", "prompt": "x", "max_tokens": 2}
        headers = {"Authorization": "Bearer secret", "X-Request-ID": "mine-1"}
        assert (
            httpx.post(
                f"{url[0]}/v1/completions", json=body, headers=headers, timeout=120
            ).status_code
            == 200
        )
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    lines = [json.loads(line) for line in err.splitlines()]
    (request,) = [line for line in lines if line["event"] == "request"]
    assert [
        line["level"]
        for line in lines
        if line["event"].startswith(f"the execution provider {MISSING} is not")
    ] == ["warning"]
    assert (request["request_id"], request["status"], request["model"]) == ("mine-1", 200, "mine")
    assert request["completion_tokens"] == 2
    assert [line["signal"] for line in lines if line["event"] == "draining"] == ["SIGTERM"]
    assert process.returncode == 0


def test_a_place_that_is_taken_is_one_line(command_line: CommandLine, tiny_decoder: Path) -> None:
    with serve(decoder_bundle(tiny_decoder)) as running:
        port = running.url.rpartition(":")[2]
        code, _, err = command_line("serve", decoder_bundle(tiny_decoder), "--port", port)
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"127.0.0.1:{port}: cannot listen" in err


def test_an_adapter_with_the_bases_name_is_one_line(
    command_line: CommandLine, tiny_decoder: Path
) -> None:
    code, _, err = command_line(
        "serve", decoder_bundle(tiny_decoder), "--port", 0, "--model-name", "a"
    )
    assert (code, "an adapter has the base model's name 'a'" in err) == (2, True)


def test_without_the_extra_the_way_to_it_is_one_line(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, tiny_decoder: Path
) -> None:
    for name in [name for name in sys.modules if name.startswith("edgetune.runtime.server")]:
        monkeypatch.delitem(sys.modules, name)
    # importing it again sets this too: the other tests need it to be the module they have
    monkeypatch.setattr(edgetune.runtime, "server", edgetune.runtime.server)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = command_line("serve", decoder_bundle(tiny_decoder))
    assert code == 2
    assert err.strip().endswith("pip install 'edgetune[serve]'")


def test_what_is_pinned_stays_while_others_make_room(tiny_decoder: Path) -> None:
    bundle = decoder_bundle(tiny_decoder)
    with Runtime.open(bundle, threads=1, adapter_memory_mb=0) as runtime:
        load_adapters(
            runtime,
            [("mine", bundle / "adapters/a"), ("other", bundle / "adapters/a")],
            ["mine", "b"],
        )
        runtime.generate(["x"] * 3, adapters=["a", "other", "mine"], max_new_tokens=1)
        found = {
            status.name: (status.resident, status.pinned) for status in runtime.registry.statuses()
        }
    assert found == {
        "a": (False, False),
        "b": (True, True),
        "mine": (True, True),
        "other": (False, False),
    }


def test_a_pin_on_what_is_not_there_is_one_line(
    command_line: CommandLine, tiny_decoder: Path
) -> None:
    code, _, err = command_line("serve", decoder_bundle(tiny_decoder), "--port", 0, "--pin", "c")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "unknown adapter 'c'" in err and "a, b" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--adapter", "x"),
        ("--port", "99999"),
        ("--max-rows", "0"),
        ("--cors-origin", "example.org"),
        ("--cors-origin", "https://example.org/"),
    ],
)
def test_wrong_usage_exits_2(
    arguments: tuple[str, str], command_line: CommandLine, tiny_decoder: Path
) -> None:
    assert command_line("serve", decoder_bundle(tiny_decoder), *arguments)[0] == 2


def test_keys_come_from_a_file_and_from_the_environment(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\n\n# not this\n two \n")
    assert read_keys(tmp_path / "keys", "three, four,") == ("one", "two", "three", "four")
    assert read_keys(None, "") == ()


def test_top_shows_what_a_server_does(command_line: CommandLine, tiny_decoder: Path) -> None:
    with serve(decoder_bundle(tiny_decoder)) as running:
        running.post("/v1/completions", {"model": "a", "prompt": "x", "max_tokens": 3})
        code, out, _ = command_line("top", running.url, "--once")
        watch, first = Watch(running.url), read_metrics(running.url, 0.0)
        watch.page(first)
        running.post(
            "/v1/completions",
            {"model": "a", "prompt": "x", "max_tokens": 6, "logit_bias": {"2": -100}},
        )
        later = watch.page(read_metrics(running.url, 2.0))
    assert code == 0
    assert re.search(r"^a +1 +\d+", out, re.MULTILINE)
    assert "200 1" in out
    assert re.search(r"generated +3\.0 tokens/s", later)


@pytest.mark.parametrize(
    ("url", "message"), [("http://127.0.0.1:9", "no answer"), ("nonsense://x", "no answer")]
)
def test_top_without_a_server_is_one_line(
    url: str, message: str, command_line: CommandLine
) -> None:
    code, _, err = command_line("top", url, "--once")
    assert (code, len(err.splitlines())) == (2, 1)
    assert message in err


def test_top_of_another_server_is_one_line(command_line: CommandLine) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>not metrics</html>")

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever).start()
        code, _, err = command_line("top", f"127.0.0.1:{server.server_port}", "--once")
        server.shutdown()
    assert (code, len(err.splitlines())) == (2, 1)
    assert "no server of edgetune's" in err


def test_metrics_text_is_parsed_with_its_labels() -> None:
    text = '# HELP x y\nx_total{a="1",b="q\\"}"} 3.0\nx_bucket{le="+Inf"} 2\nplain 1e3\n'
    expected: dict[Any, float] = {
        ("x_total", (("a", "1"), ("b", 'q"}'))): 3.0,
        ("plain", ()): 1000.0,
    }
    assert parse(text) == expected | {("x_bucket", (("le", "+Inf"),)): 2.0}


def test_a_quantile_is_linear_inside_its_bucket() -> None:
    text = 'x_bucket{le="1.0"} 2\nx_bucket{le="3.0"} 6\nx_bucket{le="+Inf"} 8\n'
    rates = Rates(MetricsReading(0, {}), MetricsReading(1, parse(text)), 1.0)
    assert rates.quantile("x", 0.5) == pytest.approx(2.0)
    assert rates.quantile("x", 0.95) == 3.0
    assert rates.quantile("y", 0.5) is None


def test_a_sparkline_grows_with_its_values() -> None:
    assert sparkline([0, 1, 2]) == "▁▅█"
    assert sparkline([0, 0]) == "▁▁"
