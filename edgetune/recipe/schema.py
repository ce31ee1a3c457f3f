"""The recipe: what to train, from which base, on which data. One frozen dataclass tree, read from
TOML.

Paths: data files are relative to the recipe file; `$VARIABLE` and `~` are expanded. `base` is taken
relative to the recipe file when such a folder or file exists there. `out` is relative to the
current folder.
"""

# ruff: noqa: RUF009 - `option` is dataclasses.field
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

from edgetune.core.settings import option
from edgetune.core.tasks import METHODS, MethodName, Problem, Task
from edgetune.recipe.confidence import ConfidenceSettings
from edgetune.recipe.own_settings import Contrastive, Dpo, Grpo
from edgetune.recipe.parameters import Parameters as Parameters
from edgetune.recipe.parameters import what_learns as what_learns

DeviceChoice = Literal["auto", "cpu", "cuda", "mps"]
Own = TypeVar("Own")


@dataclass(frozen=True, kw_only=True)
class Data:
    """The rows of a stage and how a row becomes an example.

    `prompt`, `completion`, `chosen`, `rejected`, `text`, `text_pair` and `label` are each a
    column's name or a Jinja template over the row; `tokens` and `tags` are names of columns that
    hold lists.
    """

    train: str | tuple[str, ...] = option(
        help=(
            "training rows: a file (.jsonl .json .csv .tsv .parquet .xlsx .txt, also .gz or .zst),"
            " a folder, a pattern such as data/*.jsonl, a hub data set"
            " (`owner/name[@revision][:configuration][:split]`), or a list of these"
        )
    )
    validation: str | tuple[str, ...] | None = option(
        None, help="validation rows, never trained on; named as train is"
    )
    encoding: str | None = option(
        None, help='how text files are encoded, e.g. "cp1252"; not set: UTF-8, else guessed'
    )
    prompt: str | None = option(
        None,
        help=(
            'decoders: what the model is given, e.g. "{{ question }}"; default: column prompt (for'
            " reward, dpo and grpo the column may also hold a conversation, a list of messages)"
        ),
    )
    completion: str | None = option(
        None,
        help=(
            "sft: what it shall answer; default: column completion (rows with a column messages"
            " instead are conversations, and every answer of the assistant is learned); grpo: not"
            " used for training, `edgetune eval` compares with it"
        ),
    )
    chosen: str | None = option(None, help="reward, dpo: the better answer; default: column chosen")
    rejected: str | None = option(
        None, help="reward, dpo: the worse answer; default: column rejected"
    )
    control_tokens: Literal["text", "tokens"] = option(
        "text",
        help=(
            "what a control token (<|im_end|>, </s>, [SEP] …) is that a row spells: text, so"
            " characters as any other, or tokens, the token itself; templates always mean the token"
        ),
    )
    text: str | None = option(
        None, help="causal-lm, masked-lm and classification: the text; default: column text"
    )
    text_pair: str | None = option(
        None,
        help=(
            "sequence-classification: a second text, read together with the first (sentence1,"
            " sentence2); not set: one text. contrastive: a text that is like the first"
        ),
    )
    negative: str | None = option(
        None, help="contrastive: a text that is unlike the first; default: column negative, if any"
    )
    label: str | tuple[str, ...] | None = option(
        None,
        help=(
            'classification: its label; with problem = "multi-label" the name of a column that'
            " holds several, or a list of columns that hold 0 or 1 each; with"
            ' "regression" a number; default: column label. contrastive: rows of a label are alike;'
            " beside text_pair a number, how much alike both are"
        ),
    )
    normalise_labels: bool = option(
        False,
        help="classification: labels that differ only in case or spaces are one (in small letters)",
    )
    label_names: bool = option(
        False,
        help=(
            'with labels: every label\'s name is one more training row ("card_arrival" reads'
            ' "card arrival"), which helps where there are few rows of each'
        ),
    )
    tokens: str | None = option(
        None, help="token-classification: the column with the list of words; default: tokens"
    )
    tags: str | None = option(
        None, help="token-classification: the column with the list of their tags; default: tags"
    )
    case_marks: bool = option(
        False,
        help=(
            'token-classification, where the tokenizer makes all letters small: "^" before words'
            ' with a capital letter, "^^" before those that have no other, in training as on the'
            " device"
        ),
    )
    swap_entities: int = option(
        0,
        help=(
            "token-classification: so many versions more of every training row, in which entities"
            " are replaced by others of their type from the training rows; 0: none"
        ),
        at_least=0,
    )
    system: str | None = option(
        None,
        help=(
            "decoders with a chat template: the system message, or a Jinja template or the name of"
            " a column with a row's own; not set: the row's column system, else the template's"
            ' default one; "": an explicit empty one (where the template has a default, this saves'
            " its tokens on the device)"
        ),
    )
    template: Literal["auto", "chat", "plain"] = option(
        "auto",
        help=(
            "decoders: chat = the tokenizer's chat template; plain = prompt + completion; auto ="
            " chat if there is one"
        ),
    )
    skip_invalid: bool = option(
        False, help="leave out rows that cannot be used and count them, instead of stopping"
    )
    hold_out: int | None = option(
        None,
        help=(
            "without a validation file: this many rows of train, drawn with the seed, are for"
            " validation; 0: none; not set: a tenth, 20 to 1,000 rows, of 100 or more"
        ),
        at_least=0,
    )
    limit: int | None = option(
        None, help="train on a random subset of this many rows, drawn with the seed", at_least=1
    )


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A share of general text in every step of a stage, against forgetting: causal-lm on its own
    rows.
    """

    data: str = option(help="file of general text or hub data set id")
    share: float = option(
        0.1, help="weight of its loss, and its share of a step's tokens", above=0, below=1
    )
    text: str | None = option(
        None, help="the text: a column or a Jinja template; default: column text"
    )


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """General ability before and after training, on the sets of a folder; results in summary.json
    and the report.
    """

    general: str = option(
        help="folder of the sets (WikiText-2, LAMBADA, PIQA, HellaSwag, ARC-E; STS-B for encoders)"
    )
    tasks: tuple[str, ...] = option(
        (),
        help="only these: wikitext2, lambada, piqa, hellaswag, arc_easy, stsb; []: all there are",
    )
    limit: int | None = option(200, help="items of each at most, at equal distances", at_least=2)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What the adapter brings along for its answers; a request may ask for something else."""

    schema: str | None = option(
        None,
        help=(
            'a JSON schema file, or "auto": derived from the JSON answers of the last sft stage;'
            " every answer is JSON that it accepts (needs llguidance)"
        ),
    )
    regex: str | None = option(
        None, help="a regular expression that every answer matches (needs llguidance)"
    )
    grammar: str | None = option(
        None, help="a Lark grammar file that every answer follows (needs llguidance)"
    )
    max_new_tokens: int | None = option(
        None,
        help="tokens of an answer; not set: a little more than the longest learned",
        at_least=1,
    )
    temperature: float | None = option(
        None, help="0 takes the likeliest token, above 0 samples", at_least=0
    )
    top_k: int | None = option(None, help="sample among this many likeliest tokens", at_least=0)
    top_p: float | None = option(
        None, help="sample among the likeliest tokens of this total probability", above=0, at_most=1
    )
    stop: tuple[str, ...] = option((), help="an answer ends before the first of these texts")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One pass of training with one objective; stages run in succession on the same weights."""

    method: MethodName = option(help="the objective")
    data: Data = option(help="the rows")
    replay: Replay | None = option(
        None, help="general text mixed into the stage; decoders only, not for reward"
    )
    epochs: float | Literal["auto"] = option(
        "auto",
        help="passes over the training rows; auto = by method and number of rows, or --search",
        above=0,
    )
    max_steps: int | None = option(None, help="stop after this many optimizer steps", at_least=1)
    learning_rate: float | Literal["auto"] = option(
        "auto",
        help="peak learning rate; auto = by method, what learns and the base's width, or --search",
        above=0,
    )
    head_learning_rate: float | None = option(
        None, help="peak learning rate of the task head; not set: learning_rate", above=0
    )
    batch_size: int | Literal["auto"] = option(
        8,
        help=(
            "examples per optimizer step, over all processes; what is too long for one pass is cut"
            " into parts whose gradients are added up; auto = the largest that fits in one pass and"
            " makes a row cheaper, measured once"
        ),
        at_least=1,
    )
    max_length: int = option(
        512,
        help="tokens per example (causal-lm: per packed sequence), also limited by the base",
        at_least=8,
    )
    warmup_ratio: float = option(
        0.05, help="share of the steps with rising learning rate", at_least=0, below=1
    )
    weight_decay: float = option(0.0, help="AdamW's decoupled weight decay", at_least=0)
    max_grad_norm: float = option(1.0, help="gradients are clipped to this 2-norm", above=0)
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto", help="number format of the matrix products"
    )
    validate_every: int | None = option(
        None,
        help=(
            "steps between validations; not set: once per epoch, and in a stage of fewer than 5"
            " epochs 5 times, unless that would cost more than a fifth of the training"
        ),
        at_least=1,
    )
    keep: Literal["best", "last"] = option(
        "best",
        help=(
            "which weights a stage leaves: those of its best validation (by the method's own"
            " metric), or of its last step; without validation rows always the last"
        ),
    )
    patience: int | None = option(
        None,
        help="stop after this many validations in a row that are no better; not set: never",
        at_least=1,
    )
    label_smoothing: float = option(
        0.0, help="probability mass spread over all labels", at_least=0, below=1
    )
    class_weights: Literal["none", "balanced"] | dict[str, float] = option(
        "none",
        help=(
            "classification: what a row of each label counts in the loss; balanced: rows / (labels"
            " · rows of the label), as scikit-learn has it, for several labels a row rows without /"
            " rows with it; or a table of label = weight, 1 for those that it leaves out"
        ),
        above=0,
    )
    problem: Problem = option(
        "single-label",
        help=(
            "sequence-classification: a row has one label; multi-label = any number of labels, each"
            " with a probability of its own, chosen from 0.5; regression = a number"
        ),
    )
    head_init: Literal["probe", "random"] = option(
        "probe",
        help=(
            "probe = logistic (for numbers: ridge) regression on the frozen features first (LP-FT,"
            " Kumar et al. 2022); random"
        ),
    )
    adapter: str | None = option(
        None,
        help=(
            "reward: the name of an adapter of its own, for the `reward` of a later grpo stage; not"
            " set: the run's adapter"
        ),
    )
    contrastive: Contrastive | None = option(None, help="settings of contrastive")
    dpo: Dpo | None = option(None, help="settings of dpo; not set: the defaults")
    grpo: Grpo | None = option(None, help="settings of grpo, where `reward` is needed")

    @property
    def learned(self) -> str:
        """What its loader and its objective are registered under: the method, or the problem where
        that is another than single-label.
        """
        return self.method if self.problem == "single-label" else self.problem

    @property
    def iterations(self) -> int:
        """Optimizer steps on the same rows."""
        return 1 if self.grpo is None else self.grpo.iterations

    def own(self, table: type[Own]) -> Own:
        """The settings that only this stage's method has: `stage.own(Grpo).kl`."""
        settings = getattr(self, self.method, None)
        return settings if isinstance(settings, table) else table()

    @property
    def task(self) -> Task:
        """What an adapter trained by this stage does."""
        return METHODS[self.method].task


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a run depends on."""

    base: str = option(
        help="builtin:NAME, a local folder, a .gguf file, folder#file.gguf or a hub id"
    )
    out: str = option("runs/run", help="run folder")
    seed: int = option(
        0, help="the same seed gives the same adapter on the same machine", at_least=0
    )
    threads: int | None = option(
        None, help="CPU threads; not set: as many as torch chooses", at_least=1, at_most=1024
    )
    device: DeviceChoice = option(
        "auto", help="where training computes; auto = a CUDA GPU, else Apple's (MPS), else the CPU"
    )
    checkpoint_every: int | None = option(
        None,
        help=(
            "steps between checkpoints, for train --resume; not set: a tenth of a stage, at least"
            " 50. Also written between stages; gone when the run is finished"
        ),
        at_least=1,
    )
    keep_checkpoints: int = option(
        2, help="at most this many checkpoints are kept, the newest", at_least=1
    )
    parameters: Parameters = option(help="which weights learn", factory=Parameters)
    forgetting: Forgetting | None = option(None, help="measure general ability before and after")
    generation: Generation | None = option(
        None, help="how the adapter answers where a request does not say"
    )
    confidence: ConfidenceSettings | None = option(
        None, help="how sure its answers are, and which are not given"
    )
    stage: tuple[Stage, ...] = option(help="at least one [[stage]]")

    @property
    def task(self) -> Task:
        """What the finished adapter does."""
        return self.stage[-1].task
