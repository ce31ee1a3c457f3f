"""`edgetune label`: rows for training out of few labelled ones and many texts without labels."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("label")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--data",
    "labelled",
    required=True,
    type=click.Path(path_type=Path),
    help="The rows that have labels.",
)
@click.option(
    "--texts",
    required=True,
    type=click.Path(path_type=Path),
    help="The texts without labels; a label that stands beside them is not read.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Where the rows go (.jsonl): those with labels first, then the surest texts.",
)
@click.option("--text", metavar="TEMPLATE", help="The text: a column or Jinja; not set: text.")
@click.option("--label", metavar="TEMPLATE", help="Its label: a column or Jinja; not set: label.")
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.85,
    show_default=True,
    help="Of the texts that join, the surest first.",
)
@click.option(
    "--copies",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Times that the rows with labels are written.",
)
@click.option(
    "--heads-weight",
    type=click.FloatRange(0, 1),
    default=0.3,
    show_default=True,
    help="Of the bundle's classifiers, beside neighbours in the embedding.",
)
@click.option(
    "--measure",
    type=click.Path(path_type=Path),
    help="Rows with labels: say how many the voices label rightly. They do not join.",
)
def command(
    bundle: Path,
    labelled: Path,
    texts: Path,
    out: Path,
    text: str | None,
    label: str | None,
    share: float,
    copies: int,
    heads_weight: float,
    measure: Path | None,
) -> None:
    """Label texts by BUNDLE and by the rows that have labels, and write the surest as training
    rows.

    Two voices are heard, the weighted geometric mean counts: the bundle's classifiers (several
    seeds of one recipe), and labels that spread among neighbours in its embedding: that of its
    adapters trained by contrast, else of the base.
    """
    from edgetune.core.files import write_text
    from edgetune.data.prompts import PromptFormat, row_template
    from edgetune.labelling.pseudo import Labelling, label_texts

    form = PromptFormat(
        text=row_template(text, "text", key="--text"),
        label=row_template(label, "label", key="--label"),
    )
    found = label_texts(
        bundle,
        labelled,
        texts,
        form=form,
        how=Labelling(share=share, copies=copies, heads_weight=heads_weight),
        measure=measure,
        say=lambda line: click.echo(line, err=True),
    )
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows)
    write_text(out, "".join(lines))
    for voice, right in (found.right or {}).items():
        click.echo(f"  {voice:<12} {right:.4f} of the measured rows right")
    click.echo(
        f"{out}: {found.given} rows with labels {copies} times, {found.joined} of {found.texts}"
        " texts without"
    )
