"""Execution providers: chosen by name, missing ones named with their package, and what really runs
is told.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
from click.testing import CliRunner
from runtime_helpers import MISSING, decoder_bundle, encoder_bundle
from server_helpers import serve

from edgetune.cli import main
from edgetune.cli.check import command as check
from edgetune.core.errors import DeviceError, EdgetuneError, InputError
from edgetune.devices import load_device
from edgetune.runtime import Runtime
from edgetune.runtime.check.latency import Workload, measure_latency
from edgetune.runtime.engine.providers import (
    PROVIDERS,
    Choice,
    available,
    choose,
    in_use,
    parse_providers,
)

"""no machine has all of them: Windows on Arm, Windows, macOS"""


@pytest.fixture
def all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if ONNX Runtime had been built with every provider."""
    names = [provider.ort_name for provider in PROVIDERS.values()]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)


def test_onnxruntime_knows_every_name() -> None:
    assert {provider.ort_name for provider in PROVIDERS.values()} <= set(
        onnxruntime.get_all_providers()
    )
    assert "cpu" in available()


def test_an_unknown_name_is_refused_with_the_list_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"unknown execution provider 'cudda' \(expected cpu, cuda, tensorrt, openvino",
    ):
        Runtime.open(tmp_path / "no bundle", providers=["cudda"])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["openvino:GPU"], "an option of a provider is key=value"),
        (["openvino:=GPU"], "an option of a provider is key=value"),
        (["cuda", "CUDA:device_id=1"], "cuda is asked for twice"),
    ],
)
def test_what_is_no_provider_is_one_line(texts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_providers(texts)


@pytest.mark.usefixtures("all_there")
def test_options_and_order_reach_the_session() -> None:
    chosen, notes = choose(["OpenVINO:device_type=GPU, num_streams=2", "xnnpack"])
    assert [choice.for_session for choice in chosen] == [
        ("OpenVINOExecutionProvider", {"device_type": "GPU", "num_streams": "2"}),
        ("XnnpackExecutionProvider", {}),
        ("CPUExecutionProvider", {}),
    ]
    assert notes == []


@pytest.mark.usefixtures("all_there")
def test_nothing_is_left_to_what_stands_after_the_cpu() -> None:
    assert [choice.provider.name for choice in choose(["openvino", "cpu", "cuda"])[0]] == [
        "openvino",
        "cpu",
    ]


@pytest.mark.usefixtures("all_there")
def test_cuda_takes_what_tensorrt_leaves() -> None:
    assert [choice.provider.name for choice in choose(["tensorrt"])[0]] == [
        "tensorrt",
        "cuda",
        "cpu",
    ]
    assert [choice.provider.name for choice in choose(["tensorrt", "xnnpack", "cuda"])[0]] == [
        "tensorrt",
        "xnnpack",
        "cuda",
        "cpu",
    ]


def test_a_missing_provider_falls_back_and_names_its_package(
    tiny_decoder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = decoder_bundle(tiny_decoder)
    with (
        caplog.at_level(logging.WARNING, "edgetune.runtime"),
        Runtime.open(bundle, threads=1, providers=[MISSING]) as runtime,
    ):
        told = runtime.providers
        answer = runtime.generate(["hello"], "a", max_new_tokens=6)[0].text
    assert told.names == ("cpu",)
    assert told.notes == tuple(
        record.getMessage() for record in caplog.records if record.name == "edgetune.runtime"
    )
    assert told.notes[0].startswith(
        f"the execution provider {MISSING} is not in this ONNX Runtime, so cpu runs the graph"
    )
    assert PROVIDERS[MISSING].package in told.notes[0]
    with Runtime.open(bundle, threads=1) as runtime:
        assert (runtime.providers.names, runtime.providers.notes) == (("cpu",), ())
        assert runtime.generate(["hello"], "a", max_new_tokens=6)[0].text == answer


@pytest.mark.skipif("cuda" in available(), reason="here CUDA may start")
@pytest.mark.usefixtures("all_there")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start_is_told_too(tiny_encoder: Path) -> None:
    with Runtime.open(encoder_bundle(tiny_encoder), threads=1, providers=["cuda"]) as runtime:
        assert runtime.providers.names == ("cpu",)
        assert "cuda is installed but did not start" in runtime.providers.notes[0]
        assert runtime.classify(["lights"], "intent")[0].label


def test_the_nodes_of_a_graph_are_counted(
    tiny_decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device with a provider beside the CPU: the same session, asked to tell."""
    monkeypatch.setattr(
        "edgetune.runtime.engine.session.choose", lambda texts: (choose(["cpu"])[0] * 2, [])
    )
    with Runtime.open(decoder_bundle(tiny_decoder), threads=1) as runtime:
        assert runtime.providers.nodes["cpu"] > 20
        assert str(runtime.providers) == f"cpu ({runtime.providers.nodes['cpu']} nodes)"


def test_the_command_line_takes_providers_by_name_and_from_a_profile(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    bundle = encoder_bundle(tiny_encoder)
    profile = (
        Path(load_device.__code__.co_filename).parent / "profiles" / "raspberry-pi-5.toml"
    ).read_text()
    mine = tmp_path / "mine.toml"
    mine.write_text(f'providers = ["{MISSING}"]\n{profile}')
    for options in (["--provider", MISSING], ["--device", str(mine)]):
        command = [
            sys.executable,
            "-m",
            "edgetune",
            "predict",
            str(bundle),
            "lights",
            "--adapter",
            "mood",
            *options,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, len(done.stdout.split())) == (0, 2), done.stderr
        assert done.stderr.startswith(
            f"the execution provider {MISSING} is not in this ONNX Runtime"
        )


def test_check_says_what_ran(tiny_encoder: Path, tmp_path: Path) -> None:
    bundle, report = encoder_bundle(tiny_encoder), tmp_path / "check.json"
    arguments = [
        str(bundle),
        "--runs",
        "3",
        "--prompt-tokens",
        "8",
        "--provider",
        MISSING,
        "--provider",
        "cpu",
        "--json",
        str(report),
    ]
    done = CliRunner().invoke(check, arguments, standalone_mode=False)
    assert "execution providers: cpu\n" in done.stdout
    assert f"warning: the execution provider {MISSING}" in done.stderr
    document = json.loads(report.read_text())
    assert document["measured"]["providers"]["in_use"] == ["cpu"]
    assert document["workload"]["providers"] == [MISSING, "cpu"]


def test_an_error_of_the_measuring_process_is_told_without_what_it_logged_before(
    tiny_encoder: Path,
) -> None:
    with pytest.raises(EdgetuneError) as caught:
        measure_latency(
            Workload(
                str(encoder_bundle(tiny_encoder)),
                ("nobody",),
                threads=1,
                runs=3,
                providers=(MISSING,),
            )
        )
    assert str(caught.value).startswith("unknown adapter 'nobody'")


@pytest.mark.parametrize("command", ["predict", "serve", "check"])
def test_every_command_refuses_an_unknown_provider(
    command: str, tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(
            [
                command,
                str(encoder_bundle(tiny_encoder)),
                *(["x"] if command == "predict" else []),
                "--provider",
                "gpu",
            ]
        )
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert line.startswith(
        "edgetune: unknown execution provider 'gpu' (expected cpu, cuda, tensorrt, openvino,"
        " coreml, directml, qnn, xnnpack"
    )


def test_a_profile_whose_providers_are_no_list_is_refused(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(
        "providers = [1]\n"
        + (
            Path(load_device.__code__.co_filename).parent / "profiles" / "raspberry-pi-5.toml"
        ).read_text()
    )
    with pytest.raises(DeviceError, match="providers has a wrong value"):
        load_device(str(mine))


def test_metrics_tell_what_runs(tiny_encoder: Path) -> None:
    with serve(encoder_bundle(tiny_encoder)) as running:
        assert 'edgetune_execution_provider{provider="cpu"} 1.0' in running.get("/metrics").text


def test_a_provider_that_refuses_the_graph_gives_way_to_the_cpu(
    tiny_decoder: Path, monkeypatch: pytest.MonkeyPatch, all_there: None
) -> None:
    """As OpenVINO 2025.4 refuses a graph whose operator has more outputs than its reader knows."""
    session = onnxruntime.InferenceSession

    def refusing(
        path: str,
        options: object,
        *,
        providers: list[tuple[str, dict[str, str]]],
        enable_fallback: int,
    ) -> object:
        assert not enable_fallback
        if len(providers) > 1:
            raise RuntimeError(
                "Exception during initialization: …\n\nExpected output number of the node is 4\n\n"
            )
        return session(path, options, providers=providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", refusing)
    with Runtime.open(decoder_bundle(tiny_decoder), threads=1, providers=["openvino"]) as runtime:
        assert runtime.providers.names == ("cpu",)
        assert runtime.providers.notes == (
            (
                "openvino cannot run this graph as asked, so cpu does: Expected output number of"
                " the node is 4"
            ),
        )


def test_a_provider_that_refuses_the_graph_gives_way_to_the_next_one_first(
    tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch, all_there: None
) -> None:
    session, tried = onnxruntime.InferenceSession, []

    def refusing(
        path: str,
        options: object,
        *,
        providers: list[tuple[str, dict[str, str]]],
        enable_fallback: int,
    ) -> object:
        tried.append([name for name, _ in providers])
        if len(providers) > 2:
            raise RuntimeError("it does not start")
        return session(path, options, providers=providers[-1:])

    monkeypatch.setattr(onnxruntime, "InferenceSession", refusing)
    with Runtime.open(
        encoder_bundle(tiny_encoder), threads=1, providers=["openvino", "xnnpack"]
    ) as runtime:
        assert tried == [
            [PROVIDERS[name].ort_name for name in names]
            for names in (("openvino", "xnnpack", "cpu"), ("xnnpack", "cpu"))
        ]
        assert (
            runtime.providers.notes[0]
            == "openvino cannot run this graph as asked together with xnnpack, so xnnpack, then cpu"
            " does: it does not start"
        )


@pytest.mark.usefixtures("all_there")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_what_cudas_libraries_say_is_no_answer(
    tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = encoder_bundle(tiny_encoder)
    capsys.readouterr()
    monkeypatch.setattr(
        onnxruntime, "preload_dlls", lambda: print("Failed to load libcublasLt.so.12")
    )
    with Runtime.open(bundle, threads=1, providers=["cuda"]):
        captured = capsys.readouterr()
    assert "libcublasLt" in captured.err and not captured.out


def test_a_provider_that_takes_no_node_is_told() -> None:
    """As OpenVINO does with a device that it does not know."""

    class Node:
        ep_name = "CPUExecutionProvider"

        def get_nodes(self) -> list[int]:
            return [1, 2]

    class Session:
        def get_providers(self) -> list[str]:
            return ["OpenVINOExecutionProvider", "CPUExecutionProvider"]

        def get_provider_graph_assignment_info(self) -> list[Node]:
            return [Node()]

    found = in_use(Session(), [Choice(PROVIDERS[name], {}) for name in ("openvino", "cpu")], [])
    (note,) = found.notes
    assert note.startswith(
        "the execution provider openvino takes no node of this graph"
    ) and note.endswith("so cpu runs it")
    assert str(found) == "openvino, cpu (2 nodes)"
