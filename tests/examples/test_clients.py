"""The example clients: the same bundle answers from another language as from edgetune's own
runtime.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import onnxruntime
import pytest
from runtime_helpers import decoder_bundle

from edgetune.runtime import Runtime
from edgetune.runtime.engine.native.library import NAME, NoLibraryError, library

NATIVE = Path(__file__).parents[2] / "edgetune" / "runtime" / "engine" / "native"
CLIENTS = Path(__file__).parents[2] / "examples" / "clients"


def node_with(package: str) -> str:
    """Node with a package in its path, else a skip that says what is missing."""
    found = shutil.which("node")
    if found is None:
        pytest.skip("Node is not installed")
    probe = subprocess.run(
        [found, "-e", f"require('{package}')"], cwd=CLIENTS, capture_output=True, check=False
    )
    if probe.returncode:
        pytest.skip(f"{package} is not installed: cd examples/clients && npm install {package}")
    return found


@pytest.fixture(scope="module")
def node() -> str:
    return node_with("onnxruntime-node")


def native_library() -> Path:
    """The native engine's library, else a skip."""
    try:
        library()
    except NoLibraryError as error:
        pytest.skip(str(error))
    return NATIVE / NAME


def answer_of_the_runtime(bundle: Path, adapter: str | None) -> tuple[list[int], list[int]]:
    """Prompt and answer as token ids."""
    with Runtime.open(bundle, threads=1) as runtime:
        ids = runtime.prompt_ids("hello there", adapter)
        (expected,) = runtime.generate(["hello there"], adapter, max_new_tokens=16)
    return ids, list(expected.token_ids)


@pytest.mark.parametrize("adapter", ["a", "b", None])
def test_node_answers_with_the_same_tokens(
    adapter: str | None, node: str, tiny_decoder: Path
) -> None:
    bundle = decoder_bundle(tiny_decoder)
    ids, tokens = answer_of_the_runtime(bundle, adapter)
    arguments = [str(bundle), adapter or "-", *map(str, ids)]
    done = subprocess.run(
        [node, "generate.js", *arguments], cwd=CLIENTS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [int(token) for token in done.stdout.split()] == tokens


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`generate.cpp` compiled with the headers of ORT_HOME, or of the system; else a skip that says
    what is missing.
    """
    compiler, home = shutil.which("c++"), os.environ.get("ORT_HOME")
    if compiler is None:
        pytest.skip("no C++ compiler (c++) is installed")
    roots = (
        [Path(home)]
        if home
        else [Path("/usr"), Path("/usr/local"), Path("/opt/onnxruntime"), Path("/opt/homebrew")]
    )
    folders = [
        root / "include" / inner
        for root in roots
        for inner in ("", "onnxruntime", "onnxruntime/core/session")
    ]
    headers = next(
        (folder for folder in folders if (folder / "onnxruntime_cxx_api.h").is_file()), None
    )
    if headers is None:
        pytest.skip("no onnxruntime_cxx_api.h: set ORT_HOME to an unpacked release of ONNX Runtime")
    wheel = Path(onnxruntime.__file__).parent / "capi"
    libraries = [
        *(root / "lib" / "libonnxruntime.so" for root in roots),
        *sorted(wheel.glob("libonnxruntime.so.*")),
    ]
    library = next((file for file in libraries if file.is_file()), None)
    if library is None:
        pytest.skip("no libonnxruntime.so: set ORT_HOME to an unpacked release of ONNX Runtime")
    folder = tmp_path_factory.mktemp("cpp")
    for name in (
        "libonnxruntime.so",
        "libonnxruntime.so.1",
    ):  # what it is linked as, and what it is looked for as
        (folder / name).symlink_to(library)
    command = [
        compiler,
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{headers}",
        str(CLIENTS / "generate.cpp"),
    ]
    command += [
        f"-L{folder}",
        "-lonnxruntime",
        f"-Wl,-rpath,{folder}",
        "-o",
        str(folder / "generate"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "generate"


def test_cpp_answers_with_the_same_tokens_and_swaps_adapters(
    program: Path, tiny_decoder: Path
) -> None:
    bundle = decoder_bundle(tiny_decoder)
    for first, second in (("a", "b"), ("b", None), (None, "a")):
        ids, tokens = answer_of_the_runtime(bundle, first)
        done = subprocess.run(
            [program, bundle, f"{first or '-'},{second or '-'}", *map(str, ids)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answer, swapped = (
            [int(token) for token in line.split()] for line in done.stdout.splitlines()
        )
        assert answer == tokens
        assert swapped != answer


def test_cpp_names_the_adapter_that_is_missing(program: Path, tiny_decoder: Path) -> None:
    done = subprocess.run(
        [program, decoder_bundle(tiny_decoder), "nobody", "5"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("no adapter here: ") and "nobody.onnx_adapter" in done.stderr


@pytest.mark.parametrize("adapter", ["a", "b", None])
def test_node_answers_with_the_same_tokens_through_the_native_engine(
    adapter: str | None, tiny_decoder: Path
) -> None:
    path, program, bundle = native_library(), node_with("koffi"), decoder_bundle(tiny_decoder)
    ids, tokens = answer_of_the_runtime(bundle, adapter)
    done = subprocess.run(
        [program, "native.js", path, bundle, adapter or "-", *map(str, ids)],
        cwd=CLIENTS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [int(token) for token in done.stdout.split()] == tokens


def test_cpp_answers_with_the_same_tokens_through_the_native_engine(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    path, compiler = native_library(), shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler (c++) is installed")
    program, bundle = tmp_path / "native", decoder_bundle(tiny_decoder)
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE / 'csrc'}"]
    command = [compiler, *flags, CLIENTS / "native.cpp", path, f"-Wl,-rpath,{NATIVE}"]
    built = subprocess.run([*command, "-o", program], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    ids, tokens = answer_of_the_runtime(bundle, None)
    done = subprocess.run(
        [program, bundle, *map(str, ids)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [int(token) for token in done.stdout.split()] == tokens
    done = subprocess.run([program, bundle, "999999"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "outside the vocabulary" in done.stderr
