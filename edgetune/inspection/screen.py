"""A look at rows as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from edgetune.inspection.overview import Overview, histogram, spread_of

NOT_HELD = "nothing is held out"  # how a note begins that stands on a line of its own
BLOCKS = " ▁▂▃▄▅▆▇█"
BAR, LABELS = 24, 12  # characters of the longest bar; labels that are shown


def rows_line(overview: Overview) -> str:
    """How many rows there are, and of what."""
    counts = [f"{of + overview.unusable.get(name, 0):,}" for name, of in overview.rows.items()]
    notes = "; ".join(note for note in overview.notes.get("train", ()) if NOT_HELD not in note)
    return f"{overview.source}: {' + '.join(counts)} rows" + (f" ({notes})" if notes else "")


def held_out_line(overview: Overview) -> str:
    """What is measured on, where no file says so; "" where one does."""
    notes = [note for of in overview.notes.values() for note in of]
    return next((note for note in notes if NOT_HELD in note or "held out of train" in note), "")


def lengths_line(overview: Overview) -> str:
    """How long rows are in tokens."""
    tokens = spread_of([one for of in overview.lengths.values() for one in of])
    return (
        f"tokens: half of the rows have at most {tokens['median']}, 99 % {tokens['99 %']}, the"
        f" longest {tokens['longest']}"
    )


def screen(overview: Overview) -> Iterator[str]:
    """One screen: rows, lengths against the limit, labels, and what is odd."""
    yield rows_line(overview)
    reads = ", ".join(f"{key} {value}" for key, value in overview.reads.items())
    problem = "" if overview.problem == "single-label" else f", {overview.problem}"
    yield f"{overview.method}{problem}" + (f": {reads}" if reads else "")
    yield ""
    yield from _table(overview)
    yield ""
    yield from _lengths(overview)
    yield from _labels(overview)
    yield ""
    if held_out := held_out_line(overview):
        yield f"validation: {held_out}"
    for name, notes in overview.notes.items():
        other = [note for note in notes if note != held_out]
        if name != "train" and other:
            yield f"{name}: {'; '.join(other)}"
    for finding in overview.findings:
        yield f"{'warning: ' if finding.matters else 'note: '}{finding.line}{_where(finding.lines)}"
    if not overview.findings:
        yield "nothing odd is found"


def _where(lines: Sequence[int]) -> str:
    shown = ", ".join(str(line) for line in lines)
    return f" [line {shown}]" if len(lines) == 1 else f" [lines {shown}]" if lines else ""


def _table(overview: Overview) -> Iterator[str]:
    head = f"{'':<12}{'rows':>9}{'unusable':>10}   tokens:{'median':>8}{'90 %':>7}{'longest':>9}"
    yield head + f"{'over ' + str(overview.limit):>12}"
    for name, of in overview.lengths.items():
        tokens = spread_of(of) if of else {"median": 0, "90 %": 0, "longest": 0}
        over = sum(one.tokens > overview.limit for one in of)
        yield (
            f"{name:<12}{overview.rows[name]:>9,}{overview.unusable.get(name, 0):>10,}"
            f"{tokens['median']:>18}{tokens['90 %']:>7}{tokens['longest']:>9}{over:>12,}"
        )


def _lengths(overview: Overview) -> Iterator[str]:
    bins = histogram(overview.lengths, overview.limit)
    if bins:
        most = max(rows for _, _, rows in bins)
        bars = "".join(BLOCKS[-(-rows * (len(BLOCKS) - 1) // most)] for _, _, rows in bins)
        yield f"tokens of a row, 0 to {bins[-1][1]}: |{bars}|"


def _labels(overview: Overview) -> Iterator[str]:
    if not overview.labels:
        return
    sums = {label: sum(counts.values()) for label, counts in overview.labels.items()}
    most, total = max(sums.values()), sum(overview.rows.values())
    yield ""
    yield f"{len(sums)} {'tags' if overview.method == 'token-classification' else 'labels'}:"
    shown = _shown(sums)
    width = min(30, max(len(label) for label in shown))
    for label in shown:
        bar = "█" * max(1, round(BAR * sums[label] / most))
        share = sums[label] / max(1, total)
        yield f"  {label[:width]:<{width}} {sums[label]:>7,} {share:>6.1%} {bar}"
        if len(sums) > LABELS and label == shown[LABELS // 2 - 1]:
            yield f"  … {len(sums) - LABELS} more"


def _shown(sums: Mapping[str, int]) -> list[str]:
    """The labels of most and of least rows."""
    names = list(sums)
    half = LABELS // 2
    return names if len(names) <= LABELS else names[:half] + names[-half:]
