"""Compile the native decoder engine; everything else about the package is in pyproject.toml.

The engine is a plain C library that edgetune opens through ctypes: one wheel a platform, for every
Python. EDGETUNE_NATIVE says what happens where it cannot be built: `auto` (the default) installs
without it and says so in one line, `required` fails, `none` builds nothing. CXX names the compiler.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

LIBRARY = "edgetune.runtime.engine.native.libedgetune_native"
SOURCES = Path("edgetune/runtime/engine/native/csrc")
MODES = ("auto", "required", "none")

COMMON = [
    "-std=c++17",
    "-O3",
    "-fwrapv",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-pthread",
]
QUIET = ["-Wno-unknown-warning-option", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni"))]
# of an architecture: its kernel files, and what each is compiled with beside the common flags
KERNELS: dict[str, dict[str, list[str]]] = {
    "x86_64": {"scalar": [], "avx2": AVX2, "avx512": AVX512},
    "aarch64": {"scalar": [], "neon": ["-march=armv8.2-a+dotprod+fp16"]},
}


def architecture() -> str:
    """Of the Python that is built for: a key of KERNELS, or another name."""
    if sys.platform == "win32" or sys.maxsize < 2**32:
        return "Windows" if sys.platform == "win32" else "a 32-bit Python"
    platform = sysconfig.get_platform()  # linux-x86_64, macosx-11.0-arm64, macosx-11-universal2
    name = os.uname().machine if platform.endswith("universal2") else platform.split("-", 2)[-1]
    return "aarch64" if name.endswith("arm64") else name.split("-")[-1]


def compiler() -> list[str] | None:
    """The C++ compiler's command: CXX, else the first one on the path."""
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    found = (shutil.which(name) for name in ("c++", "g++", "clang++"))
    return next(([path] for path in found if path), None)


def sources(kernels: Iterable[str]) -> list[Path]:
    """Every .cpp but the kernels of other architectures."""
    own = {f"kernels_{name}.cpp" for name in kernels}
    files = sorted(SOURCES.glob("*.cpp"))
    return [file for file in files if not file.name.startswith("kernels_") or file.name in own]


class BuildLibrary(build_ext):
    """`build_ext` for a library that no Python is needed to open."""

    def get_ext_filename(self, fullname: str) -> str:
        suffix = ".dylib" if sys.platform == "darwin" else ".so"
        return str(Path(*fullname.split("."))) + suffix

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        mode = os.environ.get("EDGETUNE_NATIVE") or "auto"
        if mode not in MODES:
            ext.optional = False
            raise CompileError(f"EDGETUNE_NATIVE is {mode!r}; expected one of {', '.join(MODES)}")
        if problem := "EDGETUNE_NATIVE=none" if mode == "none" else self.problem_of_building(ext):
            if mode == "required":
                ext.optional = False  # an error, not a line in the log
                raise CompileError(f"edgetune's native engine is not built: {problem}")
            line = f"edgetune's native engine is not built, ONNX Runtime will answer: {problem}"
            print(line, file=sys.stderr)
            self.distribution.ext_modules = []  # the wheel fits every platform
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # of an earlier build

    def problem_of_building(self, ext: Extension) -> str | None:
        """Build the library; in a few words what kept it from being built, if anything did."""
        kernels, command = KERNELS.get(architecture()), compiler()
        if kernels is None:
            return f"it has no kernels for {architecture()}"
        if command is None:
            return "no C++ compiler is installed (c++, g++ or clang++; CXX names another)"
        folder, library = Path(self.build_temp), Path(self.get_ext_fullpath(ext.name))
        folder.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        shared = max(file.stat().st_mtime for file in [*SOURCES.glob("*.h"), Path(__file__)])

        def compiled(file: Path) -> Path:
            target = folder / f"{file.stem}.o"
            changed = max(file.stat().st_mtime, shared)
            if self.force or not target.exists() or target.stat().st_mtime < changed:
                flags = kernels.get(file.stem.removeprefix("kernels_"), [])
                command_line = [*command, *COMMON, *QUIET, *flags, "-c", str(file), "-o"]
                _run([*command_line, str(target)])
            return target

        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = [str(file) for file in pool.map(compiled, sources(kernels))]
            flags = ["-Wl,--no-undefined"] if sys.platform == "linux" else []
            _run([*command, "-shared", "-pthread", *flags, *objects, "-o", str(library)])
        except OSError as error:
            return f"{command[0]} cannot be run: {error.strerror}"
        except subprocess.CalledProcessError as error:
            print(error.stderr, file=sys.stderr)
            return f"{command[0]} ended with {error.returncode} at {Path(error.cmd[-1]).name}"
        return None


class PlatformWheel(bdist_wheel):
    """A wheel for every Python of a platform, or of any platform where there is no library."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        if self.distribution.has_ext_modules() and "universal2" in platform:
            platform = platform.replace("universal2", os.uname().machine)
        return "py3", "none", platform


def _run(command: list[str]) -> None:
    print(" ".join(command))
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    print(done.stderr, end="", file=sys.stderr)


setup(
    ext_modules=[
        Extension(
            LIBRARY,
            sources=[str(file) for file in sorted(SOURCES.glob("*.cpp"))],
            depends=[str(file) for file in sorted(SOURCES.glob("*.h"))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
