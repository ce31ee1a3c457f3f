"""How a bundle stores its weights: which of them in how many bits. The exporter and training both
ask here. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from edgetune.core.errors import AdapterError, ExportError
from edgetune.core.precisions import BITS, PRECISIONS

BLOCK_SIZE = 32  # weights that share a scale, unless `edgetune export` is told otherwise
# how 4-bit weights are rounded: to nearest, half-quadratic, to the layer's inputs
QUANTISERS = ("rtn", "hqq", "gptq")
# The output projection (and the embedding tied to it) suffers most from 4 bits, and 8 cost no
# measurable speed there.
INT4_DECODER = {"lm_head": "int8"}


@dataclass(frozen=True)
class Precision:
    """How weights are stored: the default, and module-name endings that are kept at another
    precision.
    """

    weights: str = "fp32"
    block_size: int = BLOCK_SIZE
    symmetric: bool = True  # False only of a bundle of version 0.1, whose proof is repeated
    overrides: Mapping[str, str] = field(default_factory=dict)
    quantiser: str = "rtn"
    activations: str = "float"
    """int8 (encoders): products of 8-bit layers read their input in 8 bits too, one scale a run of
    the graph
    """

    def bits(self, modules: Sequence[str]) -> int:
        """0 for float, else 4 or 8, of a linear layer made of these modules."""
        asked = self.override(modules)
        return BITS.get(self.weights, 0) if asked is None else asked

    def embedding_bits(self, module: str, *, tied: int, is_input: bool, columns: int) -> int:
        """0 for float, else 4 or 8, of an embedding (rows, columns).

        What is asked for by name; else the bits of the output projection it is tied to (`tied`, 0:
        none); else 8 for the token embedding of a quantised model (4 would cost too much there) and
        float for the small ones. The engine's operator wants whole blocks.
        """
        asked = self.override([module])
        bits = (
            asked if asked is not None else tied or (8 if is_input and self.bits([module]) else 0)
        )
        return 0 if columns % self.block_size else bits

    def override(self, modules: Sequence[str]) -> int | None:
        """The bits that an override asks for, where one names any of these modules; ExportError
        where two disagree.
        """
        asked = {name for ending, name in self.overrides.items() if named(ending, modules)}
        if len(asked) > 1:
            names = ", ".join(sorted({path.rpartition(".")[2] for path in modules}))
            raise ExportError(
                f"{names} are one product here",
                where="--keep",
                expected="one precision for them",
                got=" and ".join(sorted(asked)),
            )
        return BITS[asked.pop()] if asked else None

    def settled(self, products: Sequence[Sequence[str]], others: Sequence[str] = ()) -> Precision:
        """The same precision, with what an override decides for a product (layers stored as one
        weight) said of each of its layers.

        Whoever then asks layer by layer hears what the product got. `products`: the modules of each
        linear layer of the graph; `others`: its further modules (embeddings). Names are short where
        nothing else is called so, else whole paths.
        """
        names = {bits: name for name, bits in BITS.items()}
        decided = {path: self.bits(modules) for modules in products for path in modules} | {
            path: self.bits([path]) for path in others
        }
        overrides = dict(self.overrides)
        for modules in products:
            asked = self.override(modules)
            for path in modules if asked is not None else ():
                if self.override([path]) is None:
                    short = path.rpartition(".")[2]
                    alike = all(
                        bits == asked for other, bits in decided.items() if named(short, [other])
                    )
                    overrides[short if alike else path] = names[asked]  # type: ignore[index]
        return replace(self, overrides=overrides)

    def check(self, modules: Sequence[str]) -> None:
        """ExportError for an override that names none of the graph's modules: it would silently do
        nothing.
        """
        for ending in self.overrides:
            if not named(ending, modules):
                endings = sorted({path.rpartition(".")[2] for path in modules})
                raise ExportError(
                    f"no module is called {ending!r}",
                    where="--keep",
                    expected=", ".join(endings),
                    got=ending,
                )

    def to_dict(self) -> dict[str, Any]:
        """For an adapter's metadata."""
        values = {**asdict(self), "overrides": dict(self.overrides)}
        if self.quantiser == "rtn":
            del values["quantiser"]
        if self.activations == "float":
            del values["activations"]
        return values


def shipped_precision(weights: str, kind: str) -> Precision:
    """What `edgetune export --precision WEIGHTS` writes for a base of this kind, without further
    options.
    """
    return Precision(
        weights, overrides=dict(INT4_DECODER) if weights == "int4" and kind != "encoder" else {}
    )


def named(ending: str, modules: Sequence[str]) -> bool:
    """Whether an override's ending names any of these modules."""
    return any(path == ending or path.endswith(f".{ending}") for path in modules)


def trained_precision(recorded: Mapping[str, Any], *, where: str) -> Precision:
    """What an adapter's metadata says of the base it was trained on, as `Precision.to_dict` wrote
    it.
    """
    try:
        values = {
            name: recorded[name] for name in ("weights", "block_size", "symmetric", "overrides")
        }
        return Precision(**values, quantiser=recorded.get("quantiser", "rtn"))
    except (KeyError, TypeError) as error:
        raise AdapterError(
            f"cannot read how its base was rounded: no {error}",
            where=where,
            expected="weights, block_size, symmetric, overrides",
            got=str(recorded),
        ) from error


def coarsest(precisions: Iterable[str]) -> str:
    """The precision whose bounds hold for a bundle that mixes several."""
    return max(precisions, key=PRECISIONS.index)
