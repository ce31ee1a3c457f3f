"""`make bench`: the benchmarks beside the peers that are installed, into one file of results.

    python benchmarks/bench.py [decode] [serving] [encoder] [training] [--rounds 7] [--out FOLDER]
    python benchmarks/bench.py --install-peers

Each benchmark is the script of its name, whose last line holds its raw samples; what is compared
takes turns in it. Measured is what `make quickstart` left: its encoder's bundle, and an int4 bundle
of its decoder, which is exported when it is not there; or the bundles that --decoder and --encoder
name. The file is DATE-HOST.json: the machine with its read bandwidth before and after, versions,
commands, samples, medians and targets. A benchmark that was run alone joins the others of that day.
Then `bench_page.py` writes SPEED.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_measures import READ

from edgetune import __version__
from edgetune.core.errors import EdgetuneError
from edgetune.core.files import read_json, write_text
from edgetune.devices import probe_host
from edgetune.runtime.bundle.manifest import read_manifest
from edgetune.runtime.check.host import host_speed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
ROOT = HERE.parent
DATA = ROOT / "edgetune" / "quickstart" / "data"
PACKAGES = ("numpy", "onnxruntime", "tokenizers", "torch", "transformers", "peft")
WHY = "not installed"
SETTLE = 2.0
"""Seconds for a benchmark's own processes to be gone, before other work is looked for."""


@dataclass(frozen=True)
class Peer:
    """A row of `peers.toml`; `python` has it, None where none has."""

    name: str
    package: str
    requires: tuple[str, ...]
    benchmarks: tuple[str, ...]
    beside_edgetune: bool = False
    python: str | None = None
    version: str | None = None

    def how_to(self) -> str:
        """What installs it."""
        wanted = " ".join(f"'{one}'" for one in self.requires)
        if self.beside_edgetune:
            return f".venv/bin/pip install {wanted}"
        place = f".peers/{self.name}"
        return f"python3 -m venv {place} && {place}/bin/pip install {wanted}"


def find_peers(folder: Path) -> dict[str, Peer]:
    """Every peer of the table, with its python and version where it is installed."""
    table = tomllib.loads((HERE / "peers.toml").read_text(encoding="utf-8"))
    found = {}
    for name, row in table.items():
        own = folder / name / "bin" / "python"
        python = sys.executable if row.get("beside_edgetune") else str(own.absolute())
        code = f"import importlib.metadata as m; print(m.version({row['package']!r}))"
        there = Path(python).is_file()
        asked = [python, "-c", code] if there else ["false"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        version = done.stdout.strip() if done.returncode == 0 else None
        facts = {key: tuple(v) if isinstance(v, list) else v for key, v in row.items()}
        found[name] = Peer(name, **facts, python=python if version else None, version=version)
    return found


def install_peers(folder: Path) -> None:
    """An environment for each peer that lacks one."""
    for peer in find_peers(folder).values():
        if peer.python is None:
            python = sys.executable
            if not peer.beside_edgetune:
                venv.create(folder / peer.name, with_pip=True)
                python = str(folder / peer.name / "bin" / "python")
            subprocess.run([python, "-m", "pip", "install", *peer.requires], check=True)


class Runs:
    """The command of each benchmark, with the peers that are there."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.peers = find_peers(options.peers)

    def commands(self, benchmark: str) -> Iterator[list[str]]:
        """Words after python."""
        rounds = ["--rounds", str(self.options.rounds), "--threads", str(self.options.threads)]
        if benchmark == "training":
            more = ["--steps", str(self.options.steps), "--rounds", str(self.options.rounds + 1)]
            if self._python("trl") is None:
                more += ["--only", "edgetune;trainer;trainer, grouped by length"]
            more += ["--threads", str(self.options.threads)]
            home, support = (str(DATA / f"{name}_train.jsonl") for name in ("home", "support"))
            yield ["training.py", "sft", "--data", home, "--columns", "request,action", *more]
            yield ["training.py", "classification", "--data", support, *more]
            return
        bundle = self._encoder() if benchmark == "encoder" else self._decoder()
        given = [f"{benchmark}.py", "--bundle", str(bundle), *rounds]
        adapters = read_manifest(bundle).adapters
        name = adapters[0].name if adapters else ""
        if benchmark == "serving":
            sections = ["streams", "swap", "http", "cold"]
            llama = self._llama(bundle, "")
            given[1:1] = sections + (["llama"] if llama else [])
            lengths = ["--prompt", str(min(32, self.options.prompt)), "--new"]
            yield [*given, *lengths, str(min(64, self.options.new)), *llama]
            return
        given += ["--adapter", name] if name else []
        if benchmark == "encoder":
            given += ["--texts", str(DATA / "support_train.jsonl")]
            if python := self._python("sentence-transformers"):
                from edgetune.models.resolve import resolve_base

                base = resolve_base(read_manifest(bundle).base.name).folder
                given += ["--base", str(base), "--peer-python", python]
        else:
            given += ["--prompt", str(self.options.prompt), "--new", str(self.options.new)]
            given += ["--genai-python", python] if (python := self._python("genai")) else []
            given += ["--genai", str(self.options.genai)] if python and self.options.genai else []
            given += self._llama(bundle, name)
        yield given

    def _python(self, peer: str) -> str | None:
        return self.peers[peer].python

    def _decoder(self) -> Path:
        """The bundle that is asked for, or the quickstart's adapter in int4."""
        if self.options.decoder:
            return Path(self.options.decoder)
        bundle = self.options.quickstart / "bundles" / "bench-int4"
        run = self.options.quickstart / "runs" / "home"
        if not bundle.exists():
            if not run.exists():
                raise SystemExit(
                    f"{run}: not there. Run make quickstart, or give --decoder BUNDLE."
                )
            words = ["export", "--adapter", f"home={run}", "--precision", "int4"]
            words = [sys.executable, "-m", "edgetune", *words, "--out", str(bundle)]
            subprocess.run(words, check=True)
        return bundle

    def _encoder(self) -> Path:
        bundle = Path(self.options.encoder or self.options.quickstart / "bundles" / "minilm")
        if not bundle.exists():
            raise SystemExit(f"{bundle}: not there. Run make quickstart, or give --encoder BUNDLE.")
        return bundle

    def _llama(self, bundle: Path, adapter: str) -> list[str]:
        """llama.cpp reads the GGUF file that a built-in base came in, and the adapter as one."""
        from edgetune.export.gguf import export_gguf_adapters
        from edgetune.models.builtin import BUILTINS

        base = read_manifest(bundle).base.name
        file = BUILTINS[base].folder / "source.gguf" if base in BUILTINS else None
        python = self._python("llama")
        if python is None or file is None or not file.is_file():
            return []
        found = ["--llama", str(file), "--llama-python", python]
        if adapter:
            out = self.work / f"{adapter}.gguf"
            folder = bundle / "adapters" / adapter
            if not out.exists():
                export_gguf_adapters([(adapter, folder)], out, base_name=base)
            found += ["--llama-adapter", str(out)]
        return found


def shown(words: list[str]) -> str:
    """A command as a reader can give it: places of this machine are the names of their options."""
    before = ["", *words]
    cells = [
        option.removeprefix("--").upper().replace("-", "_") if os.sep in word else word
        for option, word in zip(before, words, strict=False)
    ]
    quoted = [f'"{cell}"' if ";" in cell or " " in cell else cell for cell in cells]
    return f"python benchmarks/{' '.join(quoted)}"


def last_line(words: list[str]) -> dict[str, Any] | str:
    """Run a script and pass on what it prints; its JSON line, or why there is none."""
    command = [sys.executable, str(HERE / words[0]), *words[1:]]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                last = line
            else:
                print(line, end="", flush=True)
    if process.returncode or not last:
        return f"{words[0]} ended with exit code {process.returncode}"
    found: dict[str, Any] = json.loads(last)
    return found


def machine() -> dict[str, Any]:
    """What other work and the memory leave, at this moment."""
    busy = busy_cores()
    speeds = {"one": host_speed(1), "all": host_speed()}
    read = {name: round(speed.gb_s, 1) for name, speed in speeds.items()}
    return {"busy_cores": busy, "read_gb_s": read, "threads": speeds["all"].threads}


def busy_cores(seconds: float = 1.0) -> float | None:
    """Cores at others' work while this process waits; None where the system does not tell."""
    seen = []
    for pause in (seconds, 0.0):
        try:
            times = [
                int(ticks) for ticks in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
            ]
        except OSError:
            return None
        seen.append((sum(times), times[3] + times[4]))  # all; idle and waiting for a disk
        time.sleep(pause)
    spent, idle = (after - before for before, after in zip(*seen, strict=True))
    return round((1 - idle / spent) * (os.cpu_count() or 1), 1) if spent else None


def versions(peers: Mapping[str, Peer], benchmark: str) -> dict[str, str]:
    """Of what took part."""
    found = {"edgetune": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    for peer in peers.values():
        if benchmark in peer.benchmarks and peer.version:
            found[peer.package] = peer.version
    return found


def measured(runs: Runs, benchmark: str) -> dict[str, Any]:
    """One benchmark, as the file holds it."""
    missing = [
        {"what": peer.package, "why": WHY, "how": peer.how_to()}
        for peer in runs.peers.values()
        if benchmark in peer.benchmarks and peer.python is None
    ]
    commands, measures = [], []
    asked = [*runs.commands(benchmark)]  # exports what is not there yet
    before, start = machine(), time.monotonic()
    for words in asked:
        commands.append(shown(words))
        line = last_line(words)
        if isinstance(line, str):
            missing.append({"what": benchmark, "why": "failed", "how": line})
        else:
            measures += [one.to_dict() for one in READ[benchmark](line)]
    seconds = round(time.monotonic() - start)
    time.sleep(SETTLE)
    return {
        "rounds": runs.options.rounds,
        "commands": commands,
        "seconds": seconds,
        "versions": versions(runs.peers, benchmark),
        "machine": {"before": before, "after": machine()},
        "measures": measures,
        "not_measured": missing,
    }


def results_path(folder: Path, host: Mapping[str, Any], date: str) -> Path:
    """DATE-HOST.json; a host is its processor and its cores."""
    words = re.sub(r"\((r|tm)\)|\bcpu\b|@.*|\bprocessor\b", " ", str(host["cpu"]).lower())
    slug = re.sub(r"[^a-z0-9]+", "-", words).strip("-")
    return folder / f"{date}-{slug}-{host['cores']}-cores.json"


def as_text(document: Mapping[str, Any]) -> str:
    """JSON, a list of numbers on one line."""
    text = json.dumps(document, indent=1, ensure_ascii=False)
    return (
        re.sub(r"\[[-\d.,e+\s]+\]", lambda found: f"[{' '.join(found[0][1:-1].split())}]", text)
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmarks", nargs="*", metavar="BENCHMARK", help=" | ".join(READ))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=256, help="decode: tokens")
    parser.add_argument("--new", type=int, default=128, help="decode: tokens")
    parser.add_argument("--steps", type=int, default=4, help="training: in a turn")
    parser.add_argument("--decoder", help="a bundle; default: the quickstart's adapter in int4")
    parser.add_argument("--encoder", help="a bundle; default: the quickstart's")
    parser.add_argument("--genai", help="a folder of onnxruntime-genai's own int4 of the base")
    parser.add_argument("--quickstart", type=Path, default=ROOT / "quickstart-out")
    parser.add_argument("--peers", type=Path, default=ROOT / ".peers")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--install-peers", action="store_true")
    options = parser.parse_args()
    if unknown := [name for name in options.benchmarks if name not in READ]:
        parser.error(f"no benchmark {unknown[0]!r}: one of {', '.join(READ)}")
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    if options.install_peers:
        install_peers(options.peers)
        return
    try:
        run(options)
    except EdgetuneError as error:
        raise SystemExit(f"bench: {error}") from error


def run(options: argparse.Namespace) -> None:
    """Measure, write after each benchmark."""
    host = probe_host()
    path = results_path(options.out, host, time.strftime("%Y-%m-%d", time.gmtime()))
    document: dict[str, Any] = {"schema": 1, "host": host, "benchmarks": {}}
    if path.is_file():
        document |= {"benchmarks": read_json(path, error=EdgetuneError)["benchmarks"]}
    failed = False
    with tempfile.TemporaryDirectory() as work:
        runs = Runs(options, Path(work))
        for benchmark in options.benchmarks or READ:
            found = measured(runs, benchmark)
            failed = failed or any(one["why"] == "failed" for one in found["not_measured"])
            document["benchmarks"][benchmark] = found
            write_text(path, as_text(document))
    print(f"written: {path}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
