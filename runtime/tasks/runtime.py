"""A bundle opened for answers: classify, tag, embed, generate, stream, score."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.core.layout import MANIFEST
from edgetune.core.text import Text
from edgetune.runtime.adapters.packing import PackedAdapter
from edgetune.runtime.adapters.registry import AdapterRegistry, InUse
from edgetune.runtime.bundle.digests import as_exported
from edgetune.runtime.bundle.manifest import Manifest, read_manifest
from edgetune.runtime.bundle.tokenizer import BundleTokenizer
from edgetune.runtime.engine.interface import AdapterRow, Decoder, Encoder
from edgetune.runtime.engine.providers import ProvidersInUse, parse_providers
from edgetune.runtime.generation.sampling import TokenSequence
from edgetune.runtime.generation.settings import GenerationSettings
from edgetune.runtime.signature.folder import open_as_signed
from edgetune.runtime.signature.keys import read_public_key
from edgetune.runtime.tasks.answers import Classification, Completion, TextStream
from edgetune.runtime.tasks.choose_engine import AUTO, EngineInUse
from edgetune.runtime.tasks.decoder import DecoderAnswers, Prompt
from edgetune.runtime.tasks.encoder import EncoderAnswers
from edgetune.runtime.tasks.open_bundle import OpenBundle
from edgetune.runtime.tasks.scoring import Answered
from edgetune.runtime.tasks.tagging import Tagging, Words


class Runtime:
    """One base model and its adapters. Open it with `Runtime.open(folder)`; use it as a context
    manager.

    Every call prepares its own rows and cache, so several streams may be read in turn or from
    several threads. Whoever works on the bundle's parts itself (a scheduler, a server, a proof)
    finds them in `opened`; the commonest are properties here.
    """

    def __init__(self, opened: OpenBundle) -> None:
        self.opened = opened
        self._encoding, self._decoding = EncoderAnswers(opened), DecoderAnswers(opened)

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
        strict: bool = False,
        engine: str = AUTO,
        signed_by: str | Path | None = None,
    ) -> Runtime:
        """Open a bundle. `verify` compares every file's sha256 with the manifest; BundleError lists
        what differs.

        `providers`: execution providers in order of preference, such as `["cuda"]` or
        `["openvino:device_type=GPU"]`; one that is missing gives way to the next and at last to the
        CPU, and a line is logged (`Runtime.providers` has what is in use; InputError for an unknown
        name). `adapter_folder` and `adapter_memory_mb`: see AdapterRegistry. `strict`: adapters
        from elsewhere are refused where their base cannot be checked, and where they have no
        effect. `engine`: "native", "onnxruntime", or "auto", native where it was built and fits the
        bundle and the providers; "native:cache=int8": native with keys and values in 8 bits
        (`Runtime.engine` says which it is and why; InputError where
        "native" cannot be had). `signed_by`: a PEM file's public key, which must have signed the
        bundle and every adapter from elsewhere; SignatureError where it has not.
        """
        parse_providers(providers)  # a typo is found before gigabytes are hashed
        path = Path(folder)
        key = None if signed_by is None else read_public_key(signed_by)

        def opened(signed: Mapping[str, str] | None) -> OpenBundle:
            manifest = read_manifest(path, sha256=None if signed is None else signed.get(MANIFEST))
            with as_exported(path, manifest) if verify else contextlib.nullcontext():
                return OpenBundle(
                    path,
                    manifest,
                    threads=threads,
                    providers=providers,
                    adapter_folder=None if adapter_folder is None else Path(adapter_folder),
                    adapter_memory_mb=adapter_memory_mb,
                    strict=strict,
                    engine=engine,
                    signed_by=key,
                    signed=signed,
                )

        return cls(opened(None) if key is None else open_as_signed(path, key, opened))

    def close(self) -> None:
        """Let go of the engine's and the adapters' memory."""
        self.opened.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def folder(self) -> Path:
        """The bundle's folder."""
        return self.opened.folder

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self.opened.manifest

    @property
    def tokenizer(self) -> BundleTokenizer:
        """The bundle's tokenizer and its templates."""
        return self.opened.tokenizer

    @property
    def registry(self) -> AdapterRegistry:
        """The adapters, to be held, pinned or replaced."""
        return self.opened.registry

    @property
    def decoder(self) -> Decoder | None:
        """The engine of a bundle that generates text; None in another, and when closed."""
        return self.opened.decoder

    @property
    def encoder(self) -> Encoder | None:
        """The engine of a bundle that encodes texts; None in another, and when closed."""
        return self.opened.encoder

    @property
    def engine(self) -> EngineInUse:
        """The engine that answers, and why it is not the other one."""
        return self.opened.engine

    @property
    def providers(self) -> ProvidersInUse:
        """The execution providers that the model runs on."""
        return self.opened.providers

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that can be used: shipped in the bundle, or loaded."""
        return self.registry.names()

    def load_adapter(self, name: str, folder: str | Path, *, pin: bool = False) -> PackedAdapter:
        """Load a PEFT folder under a new name; its `.notes` say what could not be checked. See
        `pack_adapter`.
        """
        return self.registry.load(name, folder, pin=pin)

    def unload_adapter(
        self, name: str, *, in_use: InUse = "forget", timeout_s: float | None = None
    ) -> None:
        """Forget an adapter; a text that is being generated with it goes on, or see
        AdapterRegistry.unload.
        """
        self.registry.unload(name, in_use=in_use, timeout_s=timeout_s)

    def adapter(self, name: str) -> PackedAdapter:
        """An adapter's labels, prompt format and tensors (read from the bundle at first use)."""
        return self.opened.adapter(name)

    def labels(self, name: str | None) -> tuple[str, ...] | None:
        """What an adapter classifies into; None for the base model and for adapters that generate
        or embed.
        """
        return self.opened.labels(name)

    def task(self, name: str | None) -> str | None:
        """What an adapter was trained for, as in its recipe's methods; None for a base that
        embeds.
        """
        return self.opened.task(name)

    def chosen(self, adapter: str | None) -> str | None:
        """The adapter that answers: the one in the weights of a merged bundle, whether it is named
        or not.
        """
        return self.opened.chosen(adapter)

    def bound(self, name: str | None) -> AdapterRow:
        """What the engine takes for an adapter's name; None is the base model."""
        return self.opened.bound(name)

    def classify(
        self,
        texts: Sequence[Text],
        adapter: str | None = None,
        *,
        adapters: Sequence[str | None] | None = None,
        truncate: bool = False,
        threshold: float | None = None,
    ) -> list[Classification]:
        """The label of each text, or of each pair of texts that belong together, with one adapter
        for all or one a text.

        An answer whose score is below the adapter's own threshold has the label None and says what
        it `rejected`; `threshold` (0 to 1) holds in its place, and 0 lets every answer through.
        `truncate` cuts a text to what the adapter was trained with; else a text longer than the
        model's positions is an InputError.
        """
        return self._encoding.classify(
            texts, adapter, adapters=adapters, truncate=truncate, threshold=threshold
        )

    def tag(
        self,
        rows: Sequence[Words],
        adapter: str | None = None,
        *,
        adapters: Sequence[str | None] | None = None,
        truncate: bool = False,
    ) -> list[Tagging]:
        """The tag of every word, with one adapter for all rows or one a row.

        A row is a list of words, or a plain text, which is split at white space and at each
        punctuation mark or symbol (`edgetune.core.text.split_words`). `truncate` as for `classify`;
        words that are cut off are tagged O.
        """
        return self._encoding.tag(rows, adapter, adapters=adapters, truncate=truncate)

    def embed(
        self,
        texts: Sequence[Text],
        adapter: str | None = None,
        *,
        adapters: Sequence[str | None] | None = None,
        normalize: bool = True,
        truncate: bool = False,
    ) -> npt.NDArray[np.float32]:
        """Pooled states (texts, hidden) float32, of length 1 unless `normalize` is False."""
        return self._encoding.embed(
            texts, adapter, adapters=adapters, normalize=normalize, truncate=truncate
        )

    def text_ids(
        self,
        text: Text,
        adapter: str | None = None,
        *,
        truncate: bool = False,
        control_tokens: str | None = None,
    ) -> list[int]:
        """Token ids of a text, or of two, for an encoder; `truncate` cuts to what the adapter was
        trained with. `control_tokens`: see `prompt_ids`.
        """
        return self._encoding.text_ids(
            text, adapter, truncate=truncate, control_tokens=control_tokens
        )

    def need_labels(self, name: str | None) -> None:
        """InputError when there is nothing to classify into."""
        self._encoding.need_labels(name)

    def need_tags(self, name: str | None) -> None:
        """InputError for an adapter that tags no words."""
        self._encoding.need_tags(name)

    def generate(
        self,
        prompts: Sequence[Prompt],
        adapter: str | None = None,
        *,
        adapters: Sequence[str | None] | None = None,
        n: int = 1,
        **settings: Any,
    ) -> list[Completion]:
        """A completion of each prompt, with one adapter for all or one (or None) a prompt, mixed in
        a batch.

        `n` completions of each prompt stand one after the other; sampling makes them differ.
        `settings`: fields of GenerationSettings; what is not given comes from the row's adapter,
        then the defaults.
        """
        return self._decoding.generate(prompts, adapter, adapters=adapters, n=n, **settings)

    def stream(self, prompt: Prompt, adapter: str | None = None, **settings: Any) -> TextStream:
        """The text of one prompt in pieces, as they become certain."""
        return self._decoding.stream(prompt, adapter, **settings)

    def score(
        self,
        answers: Sequence[Answered],
        adapter: str | None = None,
        *,
        adapters: Sequence[str | None] | None = None,
        truncate: bool = False,
    ) -> list[float]:
        """The reward of each answer, with one reward adapter for all or one an answer.

        An answer is a conversation that ends with it, a pair (prompt, answer), or a text that is
        read as it stands. `truncate` keeps the end of what is longer than the context; else that is
        an InputError.
        """
        return self._decoding.score(answers, adapter, adapters=adapters, truncate=truncate)

    def prompt_ids(
        self,
        prompt: Prompt,
        adapter: str | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        control_tokens: str | None = None,
    ) -> list[int]:
        """Token ids of a prompt as the adapter was trained to see it. InputError when it does not
        fit the context.

        `tools` (OpenAI's objects) reach the chat template of a conversation; not given: those that
        it has of its own (`core.messages.Conversation`). `control_tokens`: what is spelled of them
        in the prompt is "text" or "tokens"; None: as the adapter was trained.
        """
        return self._decoding.prompt_ids(
            prompt, adapter, tools=tools, control_tokens=control_tokens
        )

    def settings(self, adapter: str | None = None, **given: Any) -> GenerationSettings:
        """Generation settings: what is given (None: not given), else the adapter's own defaults,
        else edgetune's.
        """
        return self._decoding.settings(adapter, **given)

    def sequence(
        self,
        ids: Sequence[int],
        settings: GenerationSettings,
        *,
        choice: int = 0,
        context: int | None = None,
    ) -> TokenSequence:
        """One answer to be generated; `context`: tokens of prompt and answer, at most (None: the
        graph's).
        """
        return self._decoding.sequence(ids, settings, choice=choice, context=context)

    def need_text(self, name: str | None) -> None:
        """InputError for an adapter that gives scores instead of text."""
        self._decoding.need_text(name)

    def need_scores(self, name: str | None) -> None:
        """InputError for an adapter that gives no scores."""
        self._decoding.need_scores(name)
