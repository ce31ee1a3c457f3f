"""Execution providers: what a user calls them, what ONNX Runtime does, which package brings them,
and what is in use.

What is asked for and missing gives way to the next one asked for, at last to the CPU, and a line
says which package to install. What is asked for and there, but does not start (a driver, a device),
does the same.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgetune.core.errors import InputError

log = logging.getLogger("edgetune.runtime")


@dataclass(frozen=True)
class Provider:
    """One execution provider of ONNX Runtime."""

    name: str
    """what users and device profiles call it"""
    ort_name: str
    package: str
    """what to install to have it"""
    options: Mapping[str, str] = field(default_factory=dict)
    """what edgetune sets where the user says nothing"""
    before: tuple[str, ...] = ()
    """providers that take what this one leaves, before the CPU does"""


GPU, CPU = "onnxruntime-gpu (in place of onnxruntime)", "cpu"
PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(CPU, "CPUExecutionProvider", "onnxruntime"),
        # TF32 has 10 bits of mantissa: fp32 graphs would not be what the proof compared.
        Provider("cuda", "CUDAExecutionProvider", GPU, {"use_tf32": "0"}),
        Provider("tensorrt", "TensorrtExecutionProvider", GPU, before=("cuda",)),
        Provider(
            "openvino",
            "OpenVINOExecutionProvider",
            "onnxruntime-openvino (in place of onnxruntime)",
            {"device_type": "CPU"},
        ),
        Provider(
            "coreml",
            "CoreMLExecutionProvider",
            "onnxruntime on macOS",
            {"ModelFormat": "MLProgram"},
        ),
        Provider(
            "directml",
            "DmlExecutionProvider",
            "onnxruntime-directml on Windows (in place of onnxruntime)",
        ),
        Provider(
            "qnn",
            "QNNExecutionProvider",
            "onnxruntime-qnn on a Qualcomm device",
            {"backend_type": "htp"},
        ),
        Provider(
            "xnnpack",
            "XnnpackExecutionProvider",
            "a build of ONNX Runtime with --use_xnnpack (no Python wheel has it)",
        ),
    )
}


@dataclass(frozen=True)
class Choice:
    """A provider as it was asked for, with the options of its own."""

    provider: Provider
    options: Mapping[str, str]

    @property
    def for_session(self) -> tuple[str, dict[str, str]]:
        """As `onnxruntime.InferenceSession` takes it."""
        return self.provider.ort_name, {**self.provider.options, **self.options}


@dataclass(frozen=True)
class ProvidersInUse:
    """What a session really runs on: providers in order of preference, nodes of the graph each has,
    and what to say.
    """

    names: tuple[str, ...]
    nodes: Mapping[str, int] = field(default_factory=dict)
    """empty where ONNX Runtime does not tell (before 1.24) or nothing but the CPU was asked for"""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join(
            f"{name} ({self.nodes[name]} nodes)" if name in self.nodes else name
            for name in self.names
        )


def parse_providers(texts: Sequence[str]) -> list[Choice]:
    """`cuda`, `openvino:device_type=GPU,num_streams=1` … in order of preference; InputError for
    what is none.
    """
    choices: list[Choice] = []
    for text in texts:
        name, _, rest = text.partition(":")
        provider = PROVIDERS.get(name.strip().lower())
        if provider is None:
            raise InputError(
                f"unknown execution provider {name.strip()!r}",
                expected=", ".join(PROVIDERS),
                got=text,
            )
        options = {}
        for pair in filter(None, rest.split(",")):
            key, equals, value = pair.partition("=")
            if not (key.strip() and equals):
                raise InputError(
                    "an option of a provider is key=value",
                    where=text,
                    expected="such as openvino:device_type=GPU",
                    got=pair,
                )
            options[key.strip()] = value.strip()
        if provider.name in (choice.provider.name for choice in choices):
            raise InputError(
                f"the execution provider {provider.name} is asked for twice", got=", ".join(texts)
            )
        choices.append(Choice(provider, options))
    return choices


def available() -> list[str]:
    """Names of the providers that this machine's ONNX Runtime was built with."""
    import onnxruntime

    there = set(onnxruntime.get_available_providers())
    return [name for name, provider in PROVIDERS.items() if provider.ort_name in there]


def choose(texts: Sequence[str]) -> tuple[list[Choice], list[str]]:
    """Those that are there, the CPU always last (it leaves nothing to what stands after it), and a
    line for each that is missing, with what to install."""
    asked, there = parse_providers(texts), available()
    names = [choice.provider.name for choice in asked]
    asked = asked[: names.index(CPU) + 1] if CPU in names else asked
    wanted: dict[str, Choice] = {}
    for choice in asked:
        wanted[choice.provider.name] = choice
        for name in choice.provider.before:
            if name not in names:
                wanted.setdefault(name, Choice(PROVIDERS[name], {}))
    last = wanted.pop(CPU, Choice(PROVIDERS[CPU], {}))
    chosen = [choice for name, choice in wanted.items() if name in there]
    instead = ", then ".join(choice.provider.name for choice in [*chosen, last])
    notes = [
        f"the execution provider {choice.provider.name} is not in this ONNX Runtime, so {instead}"
        f" runs the graph; to have it, install {choice.provider.package}"
        for choice in asked
        if choice.provider.name not in there
    ]
    return [*chosen, last], notes


def in_use(session: Any, chosen: Sequence[Choice], notes: Sequence[str]) -> ProvidersInUse:
    """What an open session runs on; `notes` of `choose` are logged with those of providers that did
    not start.
    """
    ours = {provider.ort_name: name for name, provider in PROVIDERS.items()}
    names = tuple(ours.get(name, name) for name in session.get_providers())
    nodes = _nodes(session, ours) if len(chosen) > 1 else {}
    lines = list(notes)
    for name in (choice.provider.name for choice in chosen if choice.provider.name != CPU):
        if name not in names:
            why = "is installed but did not start (its driver or device is missing)"
            lines.append(
                f"the execution provider {name} {why}, so {', then '.join(names)} runs the graph"
            )
        elif nodes and name not in nodes:
            others = " and ".join(nodes)
            lines.append(
                f"the execution provider {name} takes no node of this graph (its device or options"
                f" do not fit), so {others} runs it"
            )
    for line in lines:
        log.warning("%s", line)
    return ProvidersInUse(names, nodes, tuple(lines))


def cannot_run(tried: Sequence[Choice], error: Exception) -> str:
    """A line for the first provider of a session that could not be opened, which the others (the
    CPU last) now try alone; the last line of `error` says most, and not always which of several it
    was."""
    first, *others = (choice.provider.name for choice in tried)
    beside = f" together with {' and '.join(others[:-1])}" if others[:-1] else ""
    reason = (
        [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    )[-1]
    reason = reason.rpartition("&) ")[2]  # what stands before is a C++ function
    return (
        f"{first} cannot run this graph as asked{beside}, so {', then '.join(others)} does:"
        f" {reason[-200:]}"
    )


def _nodes(session: Any, ours: Mapping[str, str]) -> dict[str, int]:
    """How many nodes of the graph each provider took; sessions tell from ONNX Runtime 1.24 on,
    where they were asked to.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return {}
    counts: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        counts[ours.get(part.ep_name, part.ep_name)] += len(part.get_nodes())
    return dict(counts)
