"""What an evaluation leaves: means by style and method, a Markdown table, JSON and a contact sheet."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import torch

import restoration
from restoration.collection import ALL_STYLES
from restoration.contact_sheet import contact_sheet
from restoration.errors import UserError
from restoration.evaluate import NETWORK, UNTOUCHED, Evaluation
from restoration.files import (
    check_can_be_written,
    check_replaceable,
    lies_within,
    make_folder,
    write_json,
    write_text_whole,
)
from restoration.imaging import check_writable, write_image

METRICS, TABLE, SHEET = "metrics.json", "table.md", "contact_sheet.png"

# Title and format of each column, in this order; a column that an evaluation does not have is left out.
COLUMNS = {
    "ssim": ("SSIM", ".3f"),
    "gram": ("Gram", ",.0f"),
    "relative_gram": ("relative Gram", ".3f"),
    "tint": ("tint", ".1f"),
    "ciede2000": ("CIEDE2000", ".2f"),
    "nearer": ("nearer", ".0%"),
    "clipped": ("clipped", ".2%"),
    "most_clipped": ("at most", ".2%"),
    "finite": ("finite", ".0%"),
}
CAPTION = (
    "SSIM: 1 is best; Gram losses, tint (distance of the mean a*, b* of CIELAB) and CIEDE2000: 0 is best. Means over "
    "the pairs; nearer: share of pairs with a lower relative Gram loss, or CIEDE2000, than the untouched painting; "
    "clipped: share of pixels newly at 0 or 255, mean and worst pair; finite: share of pairs; surpassed: the network "
    "is lower in relative Gram loss, or CIEDE2000, at no lower SSIM."
)

Summary = dict[str, dict[str, dict[str, float | bool]]]


def check_output(out: Path, data: Path | None = None, *, force: bool = False) -> None:
    """UserError where out cannot become, or already holds, an evaluation, of paintings in data. Makes nothing."""
    if data is not None and lies_within(out, data):
        raise UserError(f"{out}: must lie outside of {data}, or its contact sheet would be evaluated as a painting")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: must be a folder")
    check_can_be_written(out)
    if not out.exists():
        return
    for path in (out / METRICS, out / TABLE):
        check_replaceable(path, replace=force)
    check_writable(out / SHEET, force=force)


def write_report(evaluations: list[Evaluation], out: Path, *, size: int, force: bool = False) -> None:
    """Writes TABLE, METRICS and SHEET into out, which `check_output` has approved; last what takes most room.

    UserError where one of them has appeared since, unless force replaces it.
    """
    summary = summarise(evaluations)
    make_folder(out)
    write_text_whole(out / TABLE, f"{markdown_table(summary)}\n\n{CAPTION}\n", replace=force)
    report = {
        "versions": {"restoration": restoration.__version__, "torch": torch.__version__},
        "size": size,
        "summary": summary,
        "pairs": [{"style": e.style, "pair": e.name, "scores": e.scores} for e in evaluations],
    }
    write_json(out / METRICS, report, replace=force)
    rows = [(_label(e), list(e.pictures.values())) for e in evaluations if e.pictures]
    write_image(out / SHEET, contact_sheet(rows, list(evaluations[0].pictures)), force=force)


def _label(evaluation: Evaluation) -> str:
    scores = evaluation.scores[NETWORK]
    if scores is None:
        return f"{evaluation.style}: {evaluation.name}, not finite"
    goal, untouched = _goal(evaluation), evaluation.scores[UNTOUCHED]
    title, form = COLUMNS[goal]
    return (
        f"{evaluation.style}: {evaluation.name}, SSIM {scores['ssim']:.3f}, {title} {scores[goal]:{form}} "
        f"(untouched {untouched[goal]:{form}})"
    )


def _goal(evaluation: Evaluation) -> str:
    """The score that recolouring lowers."""
    return "ciede2000" if "ciede2000" in evaluation.scores[UNTOUCHED] else "relative_gram"


def summarise(evaluations: list[Evaluation]) -> Summary:
    """style (ALL_STYLES last) -> method -> column -> value: means over the pairs whose result was finite.

    Baselines also get `surpassed`: the network is lower in the goal and not lower in SSIM.
    """
    groups = {style: [e for e in evaluations if e.style == style] for style in sorted({e.style for e in evaluations})}
    groups[ALL_STYLES] = evaluations
    summary: Summary = {}
    for style, group in groups.items():
        rows = {method: _means(method, group) for method in group[0].scores}
        goal, network = _goal(group[0]), rows[NETWORK]
        for method, row in rows.items():
            if method not in (NETWORK, UNTOUCHED) and network["finite"] and row["finite"]:
                row["surpassed"] = network[goal] < row[goal] and network["ssim"] >= row["ssim"]
        summary[style] = rows
    return summary


def _means(method: str, group: list[Evaluation]) -> dict[str, float | bool]:
    goal = _goal(group[0])
    finite = [evaluation.scores for evaluation in group if evaluation.scores[method] is not None]
    if not finite:
        return {"pairs": len(group), "finite": 0.0}
    row = {"pairs": len(group)} | {name: mean(s[method][name] for s in finite) for name in finite[0][method]}
    if method != UNTOUCHED:
        row["nearer"] = mean(s[method][goal] < s[UNTOUCHED][goal] for s in finite)
    row["most_clipped"] = max(scores[method]["clipped"] for scores in finite)
    row["finite"] = len(finite) / len(group)
    return row


def markdown_table(summary: Summary) -> str:
    """A row for each style and method."""
    columns = [name for name in COLUMNS if any(name in row for row in summary[ALL_STYLES].values())]
    lines = [["style", "method", *(COLUMNS[name][0] for name in columns), "surpassed"]]
    for style, rows in summary.items():
        for method, row in rows.items():
            verdict = {True: "yes", False: "no", None: ""}[row.get("surpassed")]
            pairs = f"{style} ({row['pairs']})" if method == NETWORK else ""
            lines.append([pairs, method, *(_cell(row.get(name), COLUMNS[name][1]) for name in columns), verdict])
    return aligned_table(lines, words=2)


def aligned_table(lines: list[list[str]], *, words: int) -> str:
    """Markdown, readable in a terminal too, of lines of cells, titles first; all but the first `words` are numbers."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width if index < words else "-" * (width - 1) + ":" for index, width in enumerate(widths)]
    marks = ["<"] * words + [">"] * (len(widths) - words)
    rows = []
    for line in (lines[0], rule, *lines[1:]):
        cells = (f"{cell:{mark}{width}}" for cell, mark, width in zip(line, marks, widths, strict=True))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
