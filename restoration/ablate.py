"""The ablation of the paper's Table 5: one module off at a time, the same budget, several seeds.

Source: Sun, Zhang, Wu, npj Heritage Science 13 (2025), Table 5. Its paintings are not public: only directions compare.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, variance

import torch
from rich.console import Console
from rich.progress import track
from scipy.stats import t as students_t

import restoration
from restoration.checkpoints import load_network
from restoration.collection import Pair, find_paintings
from restoration.config import TrainingConfig, make_config
from restoration.errors import UserError
from restoration.evaluate import NETWORK, check_readable, check_size, choose_methods, evaluate, pair_cases
from restoration.evaluation_report import aligned_table, summarise
from restoration.files import content_hash, make_folder, read_json, sole_writer, write_json, write_text_whole
from restoration.journal import TrainingDivergedError
from restoration.runs import load_training, newest_checkpoint
from restoration.train import check_precision, train
from restoration.vgg import VGG19Features

WHOLE = "all"
# Variant: what it switches off, and the SSIM and the Gram loss that the paper prints for it.
VARIANTS = {
    "without DPCA": ({"dpca": False}, 0.788, 0.00872),
    "without CAFE": ({"cafe": False}, 0.802, 0.01528),
    "without CCPL": ({"ccpl": False}, 0.775, 0.01070),
    WHOLE: ({}, 0.805, 0.00794),
}
SCORES = {"ssim": "SSIM", "relative_gram": "relative Gram"}
SCORES_FILE, PAINTINGS_FILE = "scores.json", "paintings.json"  # of each run: what it reached, and on what it trained
FINDINGS, TABLE = "ablation.json", "table.md"
DIVERGED = {"all": {"finite": 0.0}}  # summary of a run that training ended
HASH_DIGITS = 2 * hashlib.sha256().digest_size
MOST_SEEDS = 1_000  # days of work, and a slip of the hand
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Run:
    """One trained and evaluated network. summary: style -> score -> mean over its pairs with a finite result."""

    variant: str
    seed: int
    summary: dict[str, dict[str, float]]


def ablate(
    data: Path,
    out: Path,
    pairs: list[Pair],
    features: VGG19Features,
    *,
    settings: dict[str, object],
    seeds: int,
    size: int,
    device: torch.device,
    styles: list[str] | None = None,
) -> Iterator[Run]:
    """Trains and evaluates each variant with each of several seeds, in folders of out, seed by seed.

    A run that was stopped goes on from its checkpoint; what is trained or evaluated already is not done again.
    settings: overrides of the preset `small`. UserError where out holds runs of other settings or paintings, or other
    files where the report will stand.
    """
    if seeds < 2:
        raise UserError(f"--seeds must be at least 2, or nothing tells a difference from chance; got {seeds}")
    if seeds > MOST_SEEDS:
        raise UserError(f"--seeds must be at most {MOST_SEEDS}, got {seeds}")
    check_size(size)
    planned = plan(settings, seeds)
    check_precision(planned[0][1], device)
    check_readable(pairs)
    paintings = _fingerprints(data, styles)
    folders = [out / f"{variant.replace(' ', '_')}_seed{config.seed}" for variant, config in planned]
    with sole_writer(out):
        _check_output(out, folders)
        steps = [_steps_done(folder, config, paintings) for folder, (_, config) in zip(folders, planned, strict=True)]
        for (variant, config), folder, done in zip(planned, folders, steps, strict=True):
            print(f"{variant}, seed {config.seed}: {done} of {config.iterations} steps done")
            summary = DIVERGED
            if done == 0:
                make_folder(folder)
                write_json(folder / PAINTINGS_FILE, paintings)
            try:
                if done < config.iterations:
                    train(data, folder, config, device=device, styles=styles, resume=done > 0)
                summary = _evaluated(folder, pairs, features, size, device)
            except TrainingDivergedError as error:
                # The other runs are worth having, and called again this one would end here again.
                print(f"{variant}, seed {config.seed}: {error}")
            yield Run(variant, config.seed, summary)


def plan(settings: dict[str, object], seeds: int) -> list[tuple[str, TrainingConfig]]:
    """Each variant's settings with each seed, seed by seed."""
    return [
        (variant, make_config("small", **settings, **switches, seed=seed, keep_checkpoints=1))
        for seed in range(seeds)
        for variant, (switches, *_) in VARIANTS.items()
    ]


def _check_output(out: Path, folders: list[Path]) -> None:
    """UserError where a report, scores or fingerprints of an ablation would replace what is none of them."""
    reported = {"comparison", "runs"} <= read_json(out / FINDINGS).keys()
    ours = {out / FINDINGS: reported, out / TABLE: reported}
    for folder in folders:
        ours[folder / SCORES_FILE] = {"subject", "summary"} <= read_json(folder / SCORES_FILE).keys()
        ours[folder / PAINTINGS_FILE] = _are_fingerprints(read_json(folder / PAINTINGS_FILE))
    for path, is_ours in ours.items():
        if os.path.lexists(path) and not (is_ours and path.is_file()):
            raise UserError(f"{path}: was not written by an ablation; move it elsewhere, or take another --out")


def _fingerprints(data: Path, styles: list[str] | None) -> dict[str, str]:
    """style -> hash of the names, works and contents of its paintings to train on, wherever data lies."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for painting in find_paintings(data, styles=styles, split="train"):
        name = painting.path.relative_to(data).as_posix()
        found.setdefault(painting.style, []).append((name, painting.painting_id, content_hash(painting.path)))
    return {style: hashlib.sha256(json.dumps(sorted(found[style])).encode()).hexdigest() for style in sorted(found)}


def _are_fingerprints(found: dict) -> bool:
    hashes = found.values()
    return bool(hashes) and all(isinstance(each, str) and len(each) == HASH_DIGITS for each in hashes)


def _steps_done(folder: Path, config: TrainingConfig, paintings: dict[str, str]) -> int:
    """Steps that the run in folder has made with these very settings, but for their number, on these paintings."""
    newest = newest_checkpoint(folder)
    if newest is None:
        return 0
    description = load_training(newest).description
    wanted = config.to_dict()
    for name, value in description["training"].items():
        if name != "iterations" and wanted.get(name) != value:
            raise UserError(f"{folder}: was begun with {name} {value}, now {wanted.get(name)}; take another --out")
    difference = _difference(read_json(folder / PAINTINGS_FILE), paintings)
    if difference is not None:
        raise UserError(f"{folder}: {difference}; take another --out")
    if description["step"] > config.iterations:
        raise UserError(f"{folder}: has reached step {description['step']} already; take another --out")
    return description["step"]


def _difference(before: dict[str, str], now: dict[str, str]) -> str | None:
    """What distinguishes the paintings that a run was begun with; both are `_fingerprints`."""
    if not before:
        return "does not tell which paintings it was begun with"
    if before.keys() != now.keys():
        return f"was begun with the styles {', '.join(before)}, now {', '.join(now)}"
    changed = [style for style in now if before[style] != now[style]]
    return f"was begun with other paintings of {', '.join(changed)} than --data holds now" if changed else None


def _evaluated(folder: Path, pairs: list[Pair], features: VGG19Features, size: int, device: torch.device) -> dict:
    """The summary of the folder's newest checkpoint on the pairs; read where it was written for the same ones."""
    checkpoint = newest_checkpoint(folder)
    subject = {
        "version": restoration.__version__,
        "checkpoint": content_hash(checkpoint),
        "size": size,
        "pairs": [[pair.style, content_hash(pair.degraded), content_hash(pair.reference)] for pair in pairs],
    }
    scores = folder / SCORES_FILE
    stored = read_json(scores)
    if stored.get("subject") == subject:
        return stored["summary"]
    methods = choose_methods(load_network(checkpoint).to(device), device, baselines=False)
    # The pictures of one pair are kept, the fewest that can be: nobody looks at them.
    evaluations = evaluate(pair_cases(pairs, size), methods, features, shown_every=len(pairs))
    summary = summarise(list(track(evaluations, "evaluating", total=len(pairs), console=Console(stderr=True))))
    means = {style: rows[NETWORK] for style, rows in summary.items()}
    write_json(scores, {"subject": subject, "summary": means})
    return means


def compare(runs: list[Run]) -> dict[str, dict[str, dict[str, float | bool]]]:
    """variant -> score -> mean, spread, and difference from the whole model with its verdict.

    spread: standard deviation over seeds. `exceeds`: the difference is larger than `chance`, what two means of that
    many seeds differ by in 95 % of cases where nothing but the seed differs: Student's t times the spread, pooled over
    the variants, times sqrt(2 / seeds). A variant that diverged with a seed has no scores: its other seeds alone would
    flatter it. Where the whole model did, no variant has a difference.
    """
    table: dict[str, dict[str, dict[str, float | bool]]] = {variant: {} for variant in VARIANTS}
    for score in SCORES:
        values = {variant: [r.summary["all"].get(score) for r in runs if r.variant == variant] for variant in VARIANTS}
        sound = {variant: column for variant, column in values.items() if None not in column}
        chance = _chance(list(sound.values())) if WHOLE in sound else None
        for variant, column in sound.items():
            entry = {"mean": mean(column), "spread": variance(column) ** 0.5}
            if variant != WHOLE and chance is not None:
                difference = entry["mean"] - mean(sound[WHOLE])
                entry |= {"difference": difference, "chance": chance, "exceeds": abs(difference) > chance}
            table[variant][score] = entry
    return table


def _chance(columns: list[list[float]]) -> float:
    seeds = len(columns[0])
    pooled = mean(variance(column) for column in columns) ** 0.5
    quantile = students_t.ppf((1 + CONFIDENCE) / 2, len(columns) * (seeds - 1))
    return float(quantile * pooled * (2 / seeds) ** 0.5)


def report(runs: list[Run], out: Path, settings: dict[str, object]) -> str:
    """Writes FINDINGS and TABLE into out; returns the Markdown of the latter: a table, and what it shows in words."""
    table = compare(runs)
    sentences = [*_verdicts(table), *_failures(runs)]
    markdown = f"{_table(table)}\n\n" + "\n".join(f"- {sentence}" for sentence in sentences) + "\n"
    found = {
        "settings": settings,
        "comparison": table,
        "runs": [{"variant": run.variant, "seed": run.seed, "summary": run.summary} for run in runs],
    }
    write_json(out / FINDINGS, found)
    write_text_whole(out / TABLE, markdown)
    return markdown


def _table(table: dict) -> str:
    lines = [["variant", *SCORES.values(), "paper's SSIM", "paper's Gram"]]
    for variant, scores in table.items():
        cells = [_cell(scores.get(score)) for score in SCORES]
        lines.append([variant, *cells, f"{VARIANTS[variant][1]:.3f}", f"{VARIANTS[variant][2]:.5f}"])
    return aligned_table(lines, words=1)


def _cell(entry: dict | None) -> str:
    return "diverged" if entry is None else f"{entry['mean']:.4f} ± {entry['spread']:.4f}"


def _verdicts(table: dict) -> Iterator[str]:
    for variant, scores in table.items():
        for score, entry in scores.items():
            if "difference" in entry:
                verdict = "exceeds" if entry["exceeds"] else "does not exceed"
                yield (
                    f"{variant}, {SCORES[score]}: {entry['difference']:+.4f} against {WHOLE}, which {verdict} the "
                    f"{entry['chance']:.4f} that seeds alone explain"
                )


def _failures(runs: list[Run]) -> Iterator[str]:
    for run in runs:
        share = run.summary["all"]["finite"]
        if share < 1:
            trouble = f"its means are of the {share:.0%} of the results that are finite" if share else "diverged"
            yield f"{run.variant}, seed {run.seed}: {trouble}"
