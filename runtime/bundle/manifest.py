"""`edgetune.json`: what a bundle holds, as frozen dataclasses; the exporter writes it, the runtime
reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from edgetune.core.errors import BundleError, SignatureError
from edgetune.core.files import read_hashed_json
from edgetune.core.format_version import FORMAT_VERSIONS, unknown_version
from edgetune.core.head_layers import HeadLayers
from edgetune.core.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST
from edgetune.core.precisions import PRECISIONS
from edgetune.core.settings import about, from_dict, key_of
from edgetune.core.tasks import ENCODER_TASKS, GENERATION, PROBLEMS, TAGGING

MAX_SIZE = 1 << 24
"""Of a vocabulary, a context or a layer's width."""
SCORE_OUTPUT = "score"
"""graph output of a decoder whose head is in the graph: a merged reward, or the graph for other
engines
"""
STATES = "last_hidden_state"
"""graph output: every token's state (encoders), or the states that the logits asked for are made of
(decoders)
"""


@dataclass(frozen=True)
class BaseInfo:
    """The frozen base model; `digest` is what an adapter must have been trained on."""

    name: str
    digest: str
    model_type: str
    parameters: int


@dataclass(frozen=True)
class PrecisionInfo:
    """How the weights are stored: fp32, int8 or int4 (`block_size` weights share a scale), rounded
    by rtn, hqq or gptq.

    `activations` int8: what the products of 8-bit layers read is rounded to 8 bits too; their
    weights have a scale an output. `symmetric` false (only bundles of version 0.1): a block's
    zero stands where it costs least, not in the middle.
    """

    weights: str = field(metadata=about(choices=PRECISIONS))
    block_size: int | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    quantiser: str = "rtn"
    activations: str = "float"
    symmetric: bool = field(default=True, metadata=about(written_where_set=True))


@dataclass(frozen=True)
class GraphInfo:
    """The graph files and the sizes a caller needs. `layers`, `kv_heads`, `head_dim`: decoders
    only.

    `situations` is a file of bundles of version 0.1 that nothing opens any more. Of an
    encoder-decoder `engine` is the decoder; `encoder`
    reads the prompt, and an answer begins after `start_token_id`. `native` describes a decoder to
    the native engine (`native_plan`); None: that engine does not take it.
    """

    engine: str
    standard: str | None
    data: str | None
    max_length: int
    vocab_size: int
    hidden_size: int
    layers: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    cache_dtype: str | None = field(
        default="float32", metadata=about(choices=("float32", "float16"))
    )
    pooling: str | None = field(default=None, metadata=about(choices=("mean", "cls")))
    token_type_ids: bool = False
    situations: str | None = field(default=None, metadata=about(written_where_set=True))
    encoder: str | None = field(default=None, metadata=about(written_where_set=True))
    start_token_id: int | None = field(default=None, metadata=about(written_where_set=True))
    native: str | None = field(default=None, metadata=about(written_where_set=True))


@dataclass(frozen=True)
class Part:
    """One module of the base inside a packed site: it owns columns start:stop of the site's
    output.
    """

    module: str
    start: int
    stop: int


@dataclass(frozen=True)
class Site:
    """One place where adapters enter the graph: inputs A (group, in, rank) and B (group, rank,
    out).

    `graph`: the file whose inputs they are, where that is not the engine.
    """

    name: str
    A: str
    B: str
    in_features: int = field(metadata=about(key="in"))  # a Python keyword
    out_features: int = field(metadata=about(key="out"))
    parts: tuple[Part, ...]
    graph: str | None = field(default=None, metadata=about(written_where_set=True))


@dataclass(frozen=True)
class HeadInfo:
    """The task head's tensors: weight (group, in, labels) and bias (group, labels).

    Graph inputs of an encoder. A decoder's head reads the last token's state; the runtime applies
    it, and so only `standard` has it as inputs. `sequence`, `words`: the layers of transformers'
    own classifiers of texts and of words, which the runtime applies, too; `file` holds those that
    the base brings (`own`), for adapters that bring none.
    """

    weight: str
    bias: str
    in_features: int = field(metadata=about(key="in"))
    sequence: HeadLayers | None = field(default=None, metadata=about(written_where_set=True))
    words: HeadLayers | None = field(default=None, metadata=about(written_where_set=True))
    own: tuple[str, ...] = field(default=(), metadata=about(written_where_set=True))
    file: str | None = field(default=None, metadata=about(written_where_set=True))

    def layers(self, task: str) -> HeadLayers | None:
        """Those of transformers' classifier for this task; None for one linear layer."""
        return self.words if task == TAGGING else self.sequence


@dataclass(frozen=True)
class TokenizerInfo:
    """Tokenizer files and the ids that generation needs. `tool_template`: the chat template of
    conversations with tools, where it is another one. `clean_up`: decoded text loses spaces before
    punctuation and in contractions.
    """

    file: str
    chat_template: str | None
    special_tokens: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    model_max_length: int | None = None
    clean_up: bool = field(default=False, metadata=about(written_where_set=True))
    tool_template: str | None = field(default=None, metadata=about(written_where_set=True))


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter that ships in the bundle. `path` is None when it is merged into the graph.

    `problem` of a classification: single-label (also None), multi-label or regression.
    `max_length`: tokens of a text that it was trained on at most. `confidence` of a merged one: see
    `core.confidence`; others bring it in their folder.
    """

    name: str
    path: str | None
    task: str
    labels: tuple[str, ...] | None
    prompt_format: dict[str, Any] | None
    generation: dict[str, Any] | None
    rank: int
    digest: str | None
    onnx_adapter: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    problem: str | None = field(default=None, metadata=about(choices=PROBLEMS))
    max_length: int | None = field(default=None, metadata=about(written_where_set=True))
    confidence: dict[str, Any] | None = field(default=None, metadata=about(written_where_set=True))


@dataclass(frozen=True)
class FileInfo:
    """Digest (hex sha256) and size of one file of the bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The whole of `edgetune.json`."""

    schema: int
    edgetune_version: str
    task: str = field(metadata=about(choices=(GENERATION, *ENCODER_TASKS)))
    base: BaseInfo
    mode: str = field(metadata=about(choices=("separate", "merged")))
    precision: PrecisionInfo
    graph: GraphInfo
    sites: tuple[Site, ...]
    head: HeadInfo | None
    tokenizer: TokenizerInfo
    adapters: tuple[AdapterEntry, ...]
    proof: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileInfo] = field(default_factory=dict)

    @property
    def is_decoder(self) -> bool:
        """True for text generation, False for any encoder."""
        return self.task == GENERATION

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, ready for `write_json`."""
        value: dict[str, Any] = _plain(self)
        return value

    def adapter(self, name: str) -> AdapterEntry | None:
        """The shipped adapter of that name, or None."""
        return next((entry for entry in self.adapters if entry.name == name), None)


def read_manifest(folder: str | Path, *, sha256: str | None = None) -> Manifest:
    """Read and check a bundle's manifest. BundleError names the file, the field, expected and
    got; SignatureError: what was read has not this `sha256`, which was signed.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        raise BundleError(
            f"no {MANIFEST} in this folder",
            where=str(folder),
            fix="Give the folder that `edgetune export --out` wrote.",
        )
    document, digest = read_hashed_json(path, error=BundleError)
    if sha256 is not None and digest != sha256:
        raise SignatureError("it was changed while it was read", where=str(path))
    manifest = manifest_from_dict(document, where=str(path))
    _check_complete(manifest, str(path))
    _check_sizes(manifest, str(path))
    return manifest


def manifest_from_dict(document: Any, *, where: str = MANIFEST) -> Manifest:
    """Build a Manifest from parsed JSON; BundleError when a field is missing, unknown or of a wrong
    type.
    """
    if not isinstance(document, dict):
        raise BundleError("a manifest is a JSON object", where=where, got=type(document).__name__)
    if unknown_version(document.get("schema")) is not None:
        raise BundleError(
            "the bundle has another schema version",
            where=where,
            expected=" or ".join(map(str, FORMAT_VERSIONS)),
            got=f"{document.get('schema')!r:.40}",
            fix="Export it again with this version of edgetune, or upgrade edgetune.",
        )
    manifest = from_dict(
        Manifest,
        document,
        where=where,
        error=BundleError,
        table="an object",
        fix="The bundle was written by another version of edgetune: export it again.",
    )
    _check_paths(manifest, where)
    return manifest


def _check_paths(manifest: Manifest, where: str) -> None:
    """A bundle names only files inside itself: a manifest is data from somewhere else."""
    paths = [*_answering_files(manifest), manifest.tokenizer.tool_template, *manifest.files]
    for entry in manifest.adapters:
        paths += [entry.path, entry.onnx_adapter]
    for path in paths:
        if path is not None and (
            PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\0" in path
        ):
            raise BundleError("a path leaves the bundle", where=where, got=repr(path))


def _answering_files(manifest: Manifest) -> list[str | None]:
    """Files that answers are made from, those of adapters aside; None for what a bundle lacks."""
    graph, tokenizer, head = manifest.graph, manifest.tokenizer, manifest.head
    return [
        graph.engine,
        graph.standard,
        graph.situations,
        graph.data,
        graph.encoder,
        graph.native,
        tokenizer.file,
        tokenizer.chat_template,
        None if head is None else head.file,
    ]


def _check_complete(manifest: Manifest, where: str) -> None:
    """What answers are made from stands in `files` with its sha256, or nobody could say that it is
    as exported.
    """
    needed = _answering_files(manifest)
    for entry in manifest.adapters:
        needed.append(entry.onnx_adapter)
        if entry.path is not None and manifest.mode == "separate":
            needed += [f"{entry.path}/{name}" for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    if missing := [path for path in needed if path is not None and path not in manifest.files]:
        raise BundleError(
            "the manifest does not list every file that answers are made from",
            where=where,
            expected=f"sha256 and size of {_first(missing)} in `files`",
            fix="Copy the bundle again, or export it again.",
        )


def _check_sizes(manifest: Manifest, where: str) -> None:
    """Sizes that memory is made by are sizes."""
    graph, head = manifest.graph, manifest.head
    sizes = [graph.max_length, graph.vocab_size, graph.hidden_size]
    sizes += [size for site in manifest.sites for size in (site.in_features, site.out_features)]
    sizes += [] if head is None else [head.in_features]
    if wrong := [size for size in sizes if not 1 <= size <= MAX_SIZE]:
        raise BundleError(
            "a size is out of range",
            where=where,
            expected=f"1 to {MAX_SIZE}",
            got=str(wrong[0]),
            fix="Copy the bundle again, or export it again.",
        )


def _first(paths: list[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(f"{path:.80}" for path in paths[:3]) + more


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            key_of(f): _plain(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if not (f.metadata.get("written_where_set") and getattr(value, f.name) == f.default)
        }
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
