"""Task heads: an encoder's states, or a decoder's last one, → class logits or a reward.

Parameter names are transformers' own, so an adapter loads in its …ForSequenceClassification and
…ForTokenClassification, and the other way round.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetune.core.errors import BaseModelError
from edgetune.core.head_layers import TRANSFORMERS, HeadLayers, head_layers
from edgetune.core.tasks import TAGGING
from edgetune.models.sentence_encoder import Pooling

HEAD, SCORE = "classifier", "score"  # as transformers names them in encoders and in decoders
# modules that are a head's or a part of one
HEADS = (HEAD, SCORE, "pre_classifier", "head")
# an encoder's pooler: a part of some heads, and never the body's
UNUSED = ("pooler",)
RATES = ("classifier_dropout", "seq_classif_dropout", "cls_dropout", "hidden_dropout_prob")


class SequenceClassifier(nn.Module):
    """An encoder body and a head on its states.

    Without `layers` the head is one linear layer on the pooled states: `logits =
    classifier(pooled)`. With `layers` it is transformers' own for the family, with the base's own
    weights where it has any (`own`: module.weight → tensor, as `checkpoint_head` reads them).
    """

    def __init__(
        self,
        body: Any,
        *,
        labels: int,
        pooling: Pooling,
        layers: HeadLayers | None = None,
        own: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.pooling, self.layers = body.config, pooling, layers
        self.body_name: str = body.base_model_prefix
        if not self.body_name or self.body_name in HEADS:
            raise BaseModelError(
                f"{type(body).__name__} has no usable base_model_prefix", got=repr(self.body_name)
            )
        setattr(self, self.body_name, body)
        self._std = getattr(body.config, "initializer_range", 0.02)
        hidden = body.config.hidden_size
        if layers is None:
            self.classifier: Any = _drawn(nn.Linear(hidden, labels), self._std)
        else:
            self._add_layers(layers, hidden, labels, own or {})

    def _add_layers(
        self, layers: HeadLayers, hidden: int, labels: int, own: Mapping[str, Tensor]
    ) -> None:
        bias = bool(getattr(self.config, "classifier_bias", True)) or layers.norm is None
        self._put(layers.dense, _drawn(nn.Linear(hidden, hidden, bias=bias), self._std))
        if layers.norm is not None:
            with_bias = bool(getattr(self.config, "norm_bias", False))
            self._put(layers.norm, nn.LayerNorm(hidden, eps=layers.norm_eps, bias=with_bias))
        self._put(layers.output, _drawn(nn.Linear(hidden, labels), self._std))
        with torch.no_grad():
            for name in layers.inner:
                for part, parameter in self.layer(name).named_parameters():
                    if (tensor := own.get(f"{name}.{part}")) is not None:
                        parameter.copy_(tensor)

    def _place(self, name: str) -> str:
        """Where a layer of the head is in this model: BERT's pooler is the body's."""
        first = name.partition(".")[0]
        in_body = getattr(self.body, first, None) is not None and first in UNUSED
        return f"{self.body_name}.{name}" if in_body else name

    def _put(self, name: str, module: nn.Module) -> None:
        *parents, last = self._place(name).split(".")
        holder: nn.Module = self
        for parent in parents:
            if not hasattr(holder, parent):
                setattr(holder, parent, nn.Module())
            holder = getattr(holder, parent)
        setattr(holder, last, module)

    def layer(self, name: str) -> Any:
        """A layer of the head, also inside PEFT's wrappers, which `get_submodule` does not see."""
        return functools.reduce(getattr, self._place(name).split("."), self)

    @property
    def body(self) -> nn.Module:
        """The encoder without the head."""
        module: nn.Module = getattr(self, self.body_name)
        return module

    @property
    def output(self) -> Any:
        """The last layer, which gives the logits."""
        return self.classifier if self.layers is None else self.layer(self.layers.output)

    @property
    def head_modules(self) -> tuple[str, ...]:
        """The modules that hold the head, as PEFT's `modules_to_save` names them."""
        return (HEAD,) if self.layers is None else self.layers.modules

    def states(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(batch, seq) token ids → (batch, seq, hidden). Types of tokens (two texts in a row) where
        the body knows any.
        """
        types = (
            {}
            if token_type_ids is None or not has_token_types(self.config)
            else {"token_type_ids": token_type_ids}
        )
        hidden: Tensor = self.body(
            input_ids=input_ids, attention_mask=attention_mask, **types
        ).last_hidden_state
        return hidden

    def pooled(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(batch, seq) token ids → (batch, hidden), the embedding of a text."""
        states = self.states(input_ids, attention_mask, token_type_ids)
        return pool(states, attention_mask, self.pooling)

    def features(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(batch, seq) token ids → (batch, hidden): what the head reads."""
        if self.layers is None:
            return self.pooled(input_ids, attention_mask, token_type_ids)
        states = self.states(input_ids, attention_mask, token_type_ids)
        return pool(states, attention_mask, "mean" if self.layers.reads == "mean" else "cls")

    def before_output(self, features: Tensor) -> Tensor:
        """(…, hidden) → (…, hidden): what the last layer reads."""
        if self.layers is None:
            return features
        rate = next(filter(None, (getattr(self.config, name, None) for name in RATES)), 0.0)
        if self.layers.dense.startswith(HEAD):
            features = F.dropout(features, rate, self.training)
        inner = getattr(F, self.layers.activation)(self.layer(self.layers.dense)(features))
        if self.layers.norm is not None:
            inner = self.layer(self.layers.norm)(inner)
        return F.dropout(inner, rate, self.training)

    def logits_of(self, features: Tensor) -> Tensor:
        """(…, hidden) → (…, labels): the whole head."""
        logits: Tensor = self.output(self.before_output(features))
        return logits

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(batch, seq) token ids → (batch, labels) logits."""
        return self.logits_of(self.features(input_ids, attention_mask, token_type_ids))


def _drawn(layer: nn.Linear, std: float) -> nn.Linear:
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class DecoderClassifier(SequenceClassifier):
    """A decoder's body and a linear layer, without bias, on the state of a text's last token:
    transformers' …ForSequenceClassification of decoders.
    """

    def __init__(self, decoder: Any, *, labels: int) -> None:
        nn.Module.__init__(self)
        self.config, self.layers = decoder.config, None
        self.body_name = _decoder_body(decoder)
        setattr(self, self.body_name, decoder.base_model)
        std = getattr(decoder.config, "initializer_range", 0.02)
        self.score = _drawn(nn.Linear(decoder.config.hidden_size, labels, bias=False), std)

    @property
    def output(self) -> Any:
        """The last layer, which gives the logits."""
        return self.score

    @property
    def head_modules(self) -> tuple[str, ...]:
        """The modules that hold the head, as PEFT's `modules_to_save` names them."""
        return (SCORE,)

    def pooled(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(batch, seq) right-padded token ids → (batch, hidden) in fp32."""
        return last_hidden(self.body, input_ids, attention_mask)

    def logits_of(self, features: Tensor) -> Tensor:
        """(batch, hidden) → (batch, labels) in fp32."""
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.score(features.float())
        return logits


def _decoder_body(decoder: Any) -> str:
    name: str = decoder.base_model_prefix
    if not name or name == SCORE or decoder.base_model is decoder:
        raise BaseModelError(
            f"{type(decoder).__name__} has no usable base_model_prefix", got=repr(name)
        )
    return name


class RewardModel(nn.Module):
    """A decoder's body and a scalar on the hidden state of a sequence's last token: `reward =
    score(hidden)`.

    Parameter names are those of transformers' decoder `AutoModelForSequenceClassification` with
    `num_labels=1` (`score.weight` (1, hidden), no bias), so an adapter loads there.
    """

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.config = decoder.config
        self.body_name = _decoder_body(decoder)
        setattr(self, self.body_name, decoder.base_model)
        self.score = nn.Linear(decoder.config.hidden_size, 1, bias=False)
        nn.init.normal_(self.score.weight, std=getattr(decoder.config, "initializer_range", 0.02))

    @property
    def body(self) -> nn.Module:
        """The decoder without its output projection."""
        module: nn.Module = getattr(self, self.body_name)
        return module

    def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, seq) right-padded token ids → (batch, hidden) in fp32."""
        return last_hidden(self.body, input_ids, attention_mask)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, seq) right-padded token ids → (batch,) rewards."""
        hidden = self.pooled(input_ids, attention_mask)
        with torch.autocast(
            hidden.device.type, enabled=False
        ):  # a reward in bf16 would have 8 bits
            rewards: Tensor = self.score(hidden).squeeze(-1)
        return rewards


class Embedder(nn.Module):
    """An encoder's body under its own `base_model_prefix`, without a head: what an adapter of
    masked-lm or contrastive gives a text is its pooled state.
    """

    def __init__(self, body: Any, *, pooling: Pooling) -> None:
        super().__init__()
        self.config, self.pooling, self.body_name = body.config, pooling, body.base_model_prefix
        setattr(self, self.body_name, body)

    @property
    def body(self) -> nn.Module:
        """The encoder."""
        module: nn.Module = getattr(self, self.body_name)
        return module

    def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, seq) token ids → (batch, hidden)."""
        states = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return pool(states, attention_mask, self.pooling)


def last_hidden(body: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """A causal body's hidden states (batch, hidden), fp32, at the last real token of right-padded
    rows.

    No mask goes in: a token sees no later one, so padding on the right changes nothing before it.
    """
    hidden = body(input_ids=input_ids, use_cache=False).last_hidden_state
    last = attention_mask.sum(dim=1) - 1
    state: Tensor = hidden[torch.arange(len(hidden), device=hidden.device), last].float()
    return state


def has_token_types(config: Any) -> bool:
    """Whether an encoder has an embedding for the types of tokens, which tell two texts of a row
    apart.
    """
    return (getattr(config, "type_vocab_size", None) or 0) > 1


def head_of(model: nn.Module) -> tuple[str, ...]:
    """The modules of the model's task head; none for one that has none."""
    if isinstance(model, SequenceClassifier):
        return model.head_modules
    return (SCORE,) if isinstance(model, RewardModel) else ()


def unwrapped(model: Any) -> Any:
    """The model inside a PEFT model, its adapted layers included; another model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def pool(hidden: Tensor, attention_mask: Tensor, pooling: Pooling) -> Tensor:
    """(batch, seq, hidden) → (batch, hidden): the first token, or the mean over real tokens."""
    if pooling == "cls":
        return hidden[:, 0]
    mask = attention_mask.unsqueeze(-1).to(torch.float32)
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)


class TokenClassifier(SequenceClassifier):
    """An encoder body and a head on every token's state: `logits = classifier(hidden)`, and
    ModernBERT's own layers before it.

    Pooling is for what else the body is asked (embeddings); the head does not use it.
    """

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(batch, seq) token ids → (batch, seq, labels) logits. Rows are one text: there are no
        types.
        """
        return self.logits_of(self.states(input_ids, attention_mask))


def build_classifier(
    body: Any,
    *,
    task: str,
    labels: int,
    pooling: Pooling | None,
    head: str | None = None,
    own: Mapping[str, Tensor] | None = None,
) -> SequenceClassifier:
    """The model with the head that the task needs, untrained; `head`: of an encoder, transformers
    or (None) linear.
    """
    if body.base_model is not body:  # a decoder under its output projection
        return DecoderClassifier(body, labels=labels)
    layers = head_layers(body.config.to_dict(), task) if head == TRANSFORMERS else None
    kind = TokenClassifier if task == TAGGING else SequenceClassifier
    return kind(body, labels=labels, pooling=pooling or "mean", layers=layers, own=own)
