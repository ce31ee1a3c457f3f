"""A LoRA adapter as a GGUF file that llama.cpp loads beside its own GGUF of the same base
(`llama-cli --lora FILE`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.adapters.lora import ALL_LINEAR, target_names
from edgetune.core.arrays import Array
from edgetune.core.errors import AdapterError, ExportError, OutputError, ProofError, listed
from edgetune.core.files import whole_file
from edgetune.core.layout import ADAPTER_CONFIG
from edgetune.core.progress import Say
from edgetune.export.gguf_names import TensorPlace, architecture, place_of
from edgetune.export.inputs.sources import AdapterSource, base_of, check_names, read_source
from edgetune.models.base import Base, weight_files
from edgetune.models.gguf import SOURCE
from edgetune.models.load import TASK_OF_KIND, auto_class
from edgetune.runtime.adapters.lora import LoraFolder, is_target, read_lora, refuse_if

CLOSE = 1e-4  # of a product's largest value: float32 sums in another order


@dataclass(frozen=True)
class Delta:
    """ΔW = B A of one linear layer `module`, and its place in llama.cpp. A (r, in), B (out, r) with
    scaling folded in.
    """

    module: str
    a: Array
    b: Array
    place: TensorPlace
    transposed: bool  # the base's file holds the weight (in, out)


def export_gguf_adapters(
    adapters: Sequence[tuple[str, Path]],
    out: Path,
    *,
    base_name: str | None = None,
    say: Say = lambda line: None,
) -> list[Path]:
    """Write adapters (name, run folder or PEFT folder) as GGUF files: one to `out` (NAME.gguf),
    several into the folder `out`.

    ExportError or AdapterError names everything that such a file cannot express; ProofError where
    the written file does not compute what the adapter does. Nothing is left behind then.
    """
    files = _files([name for name, _ in adapters], out)
    sources = [read_source(name, Path(folder)) for name, folder in adapters]
    for source in sources:
        _check_kind(source)
    base = base_of(sources, base_name)
    if base.kind == "encoder":
        raise ExportError(
            f"llama.cpp takes adapters for decoders only, and {base.name} is an encoder",
            where="--format gguf-adapter",
            got=base.model_type,
            fix="Export a bundle: it holds the encoder, its adapters and their heads.",
        )
    architecture(base.model_type)
    found = [(source, *_deltas(source, base)) for source in sources]
    with ExitStack() as written:  # every file gets its name when all are proven
        for source, deltas, read in found:
            if source.metadata.get("base_precision"):
                say(
                    f"adapter {source.name}: it was trained for the"
                    f" {source.metadata['base_precision']['weights']} base; llama.cpp has the"
                    " weights of its own file"
                )
            partial = written.enter_context(whole_file(files[source.name]))
            _write(partial, deltas, read, source=source, base=base)
            _prove(
                partial,
                deltas,
                base,
                say=functools.partial(_about, say, source.name),
            )
    return list(files.values())


def _about(say: Say, name: str, line: str) -> None:
    say(f"adapter {name}: {line}")


def _files(names: Sequence[str], out: Path) -> dict[str, Path]:
    check_names(names)
    if not names:
        raise ExportError(
            "there is no adapter to export", expected="--adapter NAME=RUN, once or several times"
        )
    single = out.suffix == ".gguf"
    if single and len(names) > 1:
        raise ExportError(
            "one GGUF file holds one adapter",
            where=str(out),
            got=", ".join(names),
            fix="Give --out a folder: each becomes NAME.gguf in it.",
        )
    files = {name: out if single else out / f"{name}.gguf" for name in names}
    for path in files.values():
        if path.exists() and not _is_adapter(path):
            raise OutputError(
                "there is something else at this place",
                where=str(path),
                expected="a new file, or a GGUF adapter",
                fix="Choose another --out.",
            )
    return files


def _is_adapter(path: Path) -> bool:
    """Whether a file that exists is a GGUF adapter, which may be replaced; a GGUF model may not."""
    from gguf import GGUFReader, Keys

    try:
        field = GGUFReader(path).get_field(Keys.General.TYPE)
        return field is not None and field.contents() == "adapter"
    except (ValueError, OSError, IndexError, KeyError):
        return False


def _check_kind(source: AdapterSource) -> None:
    where = str(source.folder)
    if source.is_model:
        raise ExportError(
            "all weights of this run were trained: it is a model, not an adapter",
            where=where,
            fix="Convert RUN/model with llama.cpp's convert_hf_to_gguf.py.",
        )
    if source.labels is not None or source.task not in (None, "text-generation"):
        raise ExportError(
            "a GGUF adapter holds no task head",
            where=where,
            got=str(source.task),
            fix="Export a bundle: its adapters keep their heads.",
        )


def _deltas(source: AdapterSource, base: Base) -> tuple[list[Delta], LoraFolder]:
    """The adapter's layers with their places; AdapterError lists everything that has none, has
    another shape, or is missing.
    """
    read = read_lora(source.folder, base_digest=base.digest if source.metadata else None)
    problems = list(read.problems)
    if read.head:
        problems.append("it has a task head, which a GGUF adapter cannot hold")
    model, found = _skeleton(base), []
    shapes = _shapes(model)
    short = {
        name.partition(".")[2]: name for name in shapes
    }  # saved from the model without its output projection
    for given, (a, b) in read.deltas.items():
        module = given if given in shapes else short.get(given, given)
        place = place_of(module, model.config) if module in shapes else None
        if module not in shapes:
            problems.append(f"{given}: {base.name} has no such linear layer")
        elif shapes[module] != (b.shape[0], a.shape[1]):
            problems.append(
                f"{given}: the base's weight is {shapes[module]} (out, in), the adapter's change is"
                f" {(b.shape[0], a.shape[1])}"
            )
        elif place is None:
            problems.append(f"{given}: llama.cpp has no name for this layer")
        elif (
            model.get_submodule(module) is model.get_output_embeddings()
            and model.config.tie_word_embeddings
        ):
            problems.append(
                f"{given}: llama.cpp has no weight of its own for an output projection that is tied"
                " to the embedding"
            )
        else:
            found.append(Delta(module, a, b, place, _is_transposed(model, module)))
    names = {short.get(name, name) for name in read.modules or ()} | set(read.modules or ())
    wanted = [name for name in target_names(model, ALL_LINEAR) if is_target(read.config, name)]
    problems += [
        f"{name}: missing, {ADAPTER_CONFIG} targets this module"
        for name in wanted
        if name not in names
    ]
    if problems:
        raise AdapterError(
            "a GGUF adapter cannot hold this adapter, nothing was written:"
            f" {listed(problems, 'reasons')}",
            where=str(source.folder),
        )
    refuse_if([] if found else ["it has no low-rank weights"], source.folder)
    return found, read


def _skeleton(base: Base) -> Any:
    """The base's modules without weights."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base.folder, local_files_only=True)
    with torch.device("meta"):
        return auto_class(TASK_OF_KIND[base.kind]).from_config(config)


def _shapes(model: Any) -> dict[str, tuple[int, int]]:
    """Path → (out, in) of every linear layer, the output projection too."""
    output = model.get_output_embeddings()
    names = [
        *target_names(model, ALL_LINEAR),
        *(name for name, module in model.named_modules() if module is output),
    ]
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in names}
    return {
        name: (
            (int(shape[1]), int(shape[0]))
            if _is_transposed(model, name)
            else (int(shape[0]), int(shape[1]))
        )
        for name, shape in shapes.items()
    }


def _is_transposed(model: Any, module: str) -> bool:
    """GPT-2's Conv1D, whose weight is (in, out)."""
    return type(model.get_submodule(module)).__name__ == "Conv1D"


def _write(
    path: Path, deltas: Sequence[Delta], read: LoraFolder, *, source: AdapterSource, base: Base
) -> None:
    from gguf import GGUFWriter, Keys, LlamaFileType

    alpha = float(read.config.get("lora_alpha", 8))
    writer = GGUFWriter(path, architecture(base.model_type))
    writer.add_type("adapter")
    writer.add_name(source.name)
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base.name)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_string("edgetune.base_digest", base.digest)
    if source.metadata.get("prompt_format"):
        writer.add_string(
            "edgetune.prompt_format",
            json.dumps(source.metadata["prompt_format"], ensure_ascii=False),
        )
    for delta in deltas:
        factor = (
            delta.a.shape[0] / alpha if alpha else 1.0
        )  # alpha 0 means a scale of 1 to llama.cpp
        b = (delta.place.reordered(delta.b).astype(np.float64) * factor).astype(np.float32)
        writer.add_tensor(f"{delta.place.tensor}.lora_a", np.ascontiguousarray(delta.a))
        writer.add_tensor(f"{delta.place.tensor}.lora_b", np.ascontiguousarray(b))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _prove(path: Path, deltas: Sequence[Delta], base: Base, *, say: Say) -> None:
    """Multiply a vector as llama.cpp does, from the written file, and compare with W₀x + ΔWx;
    ProofError where they differ.
    """
    from gguf import GGUFReader, Keys

    reader = GGUFReader(path)
    tensors = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    alpha = reader.get_field(Keys.Adapter.LORA_ALPHA)
    theirs, ours = _own_weights(base), _BaseWeights(base)
    generator, wrong = np.random.default_rng(0), []
    for delta in deltas:
        x = generator.standard_normal((delta.a.shape[1],)).astype(np.float32)
        a, b = (
            tensors.pop(f"{delta.place.tensor}.lora_a"),
            tensors.pop(f"{delta.place.tensor}.lora_b"),
        )
        scale = alpha.contents() / b.shape[1] if alpha is not None and alpha.contents() else 1.0
        pairs = [(scale * (b @ (a @ x)), delta.place.reordered(delta.b @ (delta.a @ x)))]
        if theirs is not None:
            weight, own = theirs(delta.place.tensor), ours(delta.module)
            pairs.append(
                (
                    np.full(1, np.inf) if weight is None else weight @ x,
                    delta.place.reordered((own.T if delta.transposed else own) @ x),
                )
            )
        if not all(
            np.abs(got - expected).max() <= CLOSE * max(np.abs(expected).max(), 1e-9)
            for got, expected in pairs
        ):
            wrong.append(delta.module)
    if wrong or tensors:
        raise ProofError(
            "the GGUF adapter does not compute what was trained:"
            f" {', '.join([*wrong, *tensors][:3])}",
            where=str(base.folder),
        )
    checked = (
        "its tensors"
        if theirs is None
        else f"its tensors and the weights of {base.name}'s own GGUF file"
    )
    say(f"proof: passed; {len(deltas)} layers as in torch, from {checked}")


def _own_weights(base: Base) -> Callable[[str], Array | None] | None:
    """The weights of the GGUF file that the base was converted from, dequantised one at a time;
    None where it was not.
    """
    if not (base.folder / SOURCE).is_file():
        return None
    from gguf import GGUFReader
    from gguf.quants import dequantize

    tensors = {tensor.name: tensor for tensor in GGUFReader(base.folder / SOURCE).tensors}

    def weight(name: str) -> Array | None:
        found = tensors.get(name)
        return None if found is None else dequantize(found.data, found.tensor_type)

    return weight


class _BaseWeights:
    """The base's weights by module, read one at a time."""

    def __init__(self, base: Base) -> None:
        from safetensors import safe_open

        files = [safe_open(path, framework="np") for path in weight_files(base.folder)]
        self._files: Mapping[str, Any] = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def __call__(self, module: str) -> Array:
        name = f"{module}.weight"
        return np.asarray(self._files[name].get_tensor(name), np.float32)
