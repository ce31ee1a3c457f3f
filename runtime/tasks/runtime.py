"""A bundle opened for answers: classify, embed, generate, stream, score; adapters load and swap
without touching the base.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from edgetune.runtime.bundle.digests import as_exported
from edgetune.runtime.bundle.manifest import read_manifest
from edgetune.runtime.engine.providers import parse_providers
from edgetune.runtime.tasks.decoder import DecoderAnswers
from edgetune.runtime.tasks.encoder import EncoderAnswers


class Runtime(EncoderAnswers, DecoderAnswers):
    """One base model and its adapters. Open it with `Runtime.open(folder)`; use it as a context
    manager.

    Every call prepares its own rows and cache, so several streams may be read in turn or from
    several threads.
    """

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        threads: int | None = None,
        providers: Sequence[str] = (),
        verify: bool = True,
        adapter_folder: str | Path | None = None,
        adapter_memory_mb: float | None = None,
        situations: bool = False,
    ) -> Runtime:
        """Open a bundle. `verify` compares every file's sha256 with the manifest; BundleError lists
        what differs.

        `providers`: execution providers in order of preference, such as `["cuda"]` or
        `["openvino:device_type=GPU"]`; one that is missing gives way to the next and at last to the
        CPU, and a line is logged (`Runtime.providers` has what is in use; InputError for an unknown
        name). `adapter_folder` and `adapter_memory_mb`: see AdapterRegistry. `situations`: for a
        process that answers long and often without any adapter: a decoder's base alone then takes
        up to a tenth less for a token, while loading takes half as long again and, for its
        duration, 100 MB more for a model of 135M.
        """
        parse_providers(providers)  # a typo is found before gigabytes are hashed
        path = Path(folder)
        manifest = read_manifest(path)
        many = None if adapter_folder is None else Path(adapter_folder)
        with as_exported(path, manifest) if verify else contextlib.nullcontext():
            return cls(
                path,
                manifest,
                threads=threads,
                providers=providers,
                adapter_folder=many,
                adapter_memory_mb=adapter_memory_mb,
                situations=situations,
            )

    def __enter__(self) -> Runtime:
        return self
