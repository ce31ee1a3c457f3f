"""What stands between an encoder's states and the labels in transformers' own classifiers, family
by family: PEFT puts its adapters on these classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgetune.core.settings import about
from edgetune.core.tasks import CLASSIFICATION, TAGGING

OUTPUT, LINEAR, TRANSFORMERS = "classifier", "linear", "transformers"
"""The module that every one of them ends in; and the two kinds of head: one layer on the pooled
states, or transformers' own layers.
"""
READS = ("cls", "mean", "tokens")
ACTIVATIONS = ("gelu", "relu", "sigmoid", "silu", "tanh")
KNOWN_AS = {"swish": "silu"}  # names of one activation


@dataclass(frozen=True)
class HeadLayers:
    """`output(norm(activation(dense(x))))`, where x is what the head reads of the states.

    `dense`, `norm` and `output` are modules, by their names without the body's (`pooler.dense`).
    """

    reads: str = field(metadata=about(choices=READS))
    dense: str
    activation: str = field(metadata=about(choices=ACTIVATIONS))
    output: str
    norm: str | None = None
    norm_eps: float = 1e-5

    @property
    def inner(self) -> tuple[str, ...]:
        """The layers before the output, which a base may bring."""
        return (self.dense,) if self.norm is None else (self.dense, self.norm)

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that hold all of them, as PEFT's `modules_to_save` names them."""
        return tuple(sorted({name.partition(".")[0] for name in (*self.inner, self.output)}))


def head_layers(config: Mapping[str, Any], task: str) -> HeadLayers | None:
    """The layers of an encoder's classifier of texts or of words, by its `config.json`; None for a
    single layer, and for a head that cannot be computed here.
    """
    family = config.get("model_type")
    if task == TAGGING:
        return _modernbert(config, "tokens") if family == "modernbert" else None
    if task != CLASSIFICATION:
        return None
    if family == "bert":
        return HeadLayers("cls", "pooler.dense", "tanh", OUTPUT)
    if family in ("roberta", "xlm-roberta", "camembert"):
        return HeadLayers("cls", "classifier.dense", "tanh", "classifier.out_proj")
    if family == "electra":
        return HeadLayers("cls", "classifier.dense", "gelu", "classifier.out_proj")
    if family == "distilbert":
        return HeadLayers("cls", "pre_classifier", "relu", OUTPUT)
    if family == "deberta-v2":
        activation = _activation(config.get("pooler_hidden_act") or "gelu")
        return activation and HeadLayers("cls", "pooler.dense", activation, OUTPUT)
    if family == "modernbert":
        return _modernbert(config, str(config.get("classifier_pooling") or "cls"))
    return None


def _modernbert(config: Mapping[str, Any], reads: str) -> HeadLayers | None:
    activation = _activation(config.get("classifier_activation") or "gelu")
    if activation is None or reads not in READS:
        return None
    eps = float(config.get("norm_eps") or 1e-5)
    return HeadLayers(reads, "head.dense", activation, OUTPUT, norm="head.norm", norm_eps=eps)


def _activation(name: str) -> Any:
    found = KNOWN_AS.get(name, name)
    return found if found in ACTIVATIONS else None
