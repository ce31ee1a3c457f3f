"""Which engine runs a bundle's model: our native one where it was built and the bundle fits, else
ONNX Runtime; and why, in one line.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgetune.core.errors import BundleError, InputError
from edgetune.runtime.bundle.manifest import Manifest
from edgetune.runtime.engine.interface import Decoder
from edgetune.runtime.engine.native.library import NoLibraryError
from edgetune.runtime.engine.providers import CPU, parse_providers

AUTO, OURS, ONNX_RUNTIME = "auto", "native", "onnxruntime"
SMALL_CACHE = f"{OURS}:cache=int8"
"""the native engine with keys and values in 8 bits"""
ENGINES = (AUTO, OURS, SMALL_CACHE, ONNX_RUNTIME)
log = logging.getLogger("edgetune.runtime")


@dataclass(frozen=True)
class EngineInUse:
    """The engine that answers; `why` it is not the other one or not as usual, empty where it is."""

    name: str
    why: str = ""
    instructions: str | None = None
    """the instruction set of the native engine's kernels"""

    def __str__(self) -> str:
        detail = "; ".join(part for part in (self.instructions, self.why) if part)
        return f"{self.name} ({detail})" if detail else self.name


def check_engine_name(engine: str) -> None:
    """InputError for a name that is no engine's."""
    if engine not in ENGINES:
        raise InputError("unknown engine", expected=", ".join(ENGINES), got=repr(engine))


def open_decoder(
    folder: Path,
    manifest: Manifest,
    *,
    engine: str = AUTO,
    threads: int | None = None,
    providers: Sequence[str] = (),
) -> tuple[Decoder, EngineInUse]:
    """The engine of a bundle that generates. InputError where the native engine was asked for and
    cannot run it; "auto" says why it is ONNX Runtime then.
    """
    check_engine_name(engine)
    why = "asked for" if engine == ONNX_RUNTIME else _unfit(manifest, providers)
    if engine == AUTO and not why and manifest.precision.weights == "fp32":
        why = "weights in fp32; the native engine keeps keys, values and adapters in half precision"
    if not why:
        from edgetune.runtime.engine.native.decoder import NativeDecoder

        try:
            cache = "int8" if engine == SMALL_CACHE else "fp16"
            native = NativeDecoder(folder, manifest, threads=threads, cache_precision=cache)
        except NoLibraryError as error:
            why = str(error)
        except BundleError as error:
            why = str(error)
            if engine == AUTO:
                log.warning("onnxruntime answers instead of the native engine: %s", error)
        else:
            small = "keys and values in 8 bits" if engine == SMALL_CACHE else ""
            return native, EngineInUse(OURS, small, instructions=native.model.instructions)
    if engine in (OURS, SMALL_CACHE):
        raise InputError(
            f"the native engine cannot run this bundle: {why}",
            where=str(folder),
            fix="Leave the choice to edgetune (engine auto), or ask for onnxruntime.",
        )
    from edgetune.runtime.engine.seq2seq import decoder_engine

    graph = decoder_engine(folder, manifest, threads=threads, providers=providers)
    return graph, EngineInUse(ONNX_RUNTIME, "" if engine == ONNX_RUNTIME else why)


def _unfit(manifest: Manifest, providers: Sequence[str]) -> str:
    """Why the native engine does not run this bundle here; empty where it does."""
    graph = manifest.graph
    others = [choice.provider.name for choice in parse_providers(providers)]
    if others and others != [CPU]:
        return f"the native engine runs on the cpu, and {others[0]} was asked for"
    if graph.encoder is not None:
        return "the native engine takes no encoder-decoder"
    if graph.native is None:
        return (
            "the bundle has no native.json: it was exported by an earlier version, or its model or"
            " precision is not for the native engine"
        )
    return ""
