"""Which paintings a folder holds: their styles, works and splits, and the pairs to evaluate on."""

from __future__ import annotations

import csv
import itertools
import logging
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from restoration.decoding import READABLE_SUFFIXES
from restoration.errors import UserError

logger = logging.getLogger(__name__)

INDEX_FILE = "index.csv"
MANIFEST_FILE = "MANIFEST.csv"
SPLIT_FILE = "SPLIT.csv"
ALL_STYLES = "all"  # names the means over all pairs of an evaluation
_SPLITS = {"train": "train", "validation": "test", "test": "test"}


@dataclass(frozen=True)
class Painting:
    """One image file. ``split`` is "train", "test", or None where nobody split the folder: such images serve as both.

    Images of one ``painting_id`` show the same work (or album, or handscroll).
    """

    path: Path
    style: str
    painting_id: str
    split: str | None


class Pair(NamedTuple):
    degraded: Path
    reference: Path
    style: str


def find_paintings(
    root: str | os.PathLike, styles: Sequence[str] | None = None, split: str | None = None
) -> list[Painting]:
    """List the images of a folder, in the order of index.csv, or by style and path, without opening them.

    ``root`` is either a folder made by ``build_dataset`` (its index.csv is believed), or a folder of style folders
    with images at any depth, or a folder of images (one style, named after it). In the last two, MANIFEST.csv (columns
    file, painting_id) tells which images show the same work, and SPLIT.csv (painting_id, split: train, validation or
    test; the last two mean the same) which works are held out; what those tables leave out is never held out.
    ``styles`` and ``split`` ("train" or "test") choose among them.
    Raises UserError where root is not such a folder, a table is malformed or contradicts itself, an image may be of a
    work that is held out, as MANIFEST.csv names no file of that or one that is not there, a style is unknown, or no
    image is left.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: is not a folder of paintings")
    indexed = os.path.lexists(root / INDEX_FILE)  # a link to what is not there is a table that cannot be read
    paintings = _indexed_paintings(root) if indexed else _paintings_in_folders(root)
    if not paintings:
        raise UserError(f"{root}: holds no images ({', '.join(READABLE_SUFFIXES)})")
    known = sorted({painting.style for painting in paintings})
    for style in styles or ():
        if style not in known:
            raise UserError(f"{root}: unknown style '{style}'; known styles: {', '.join(known)}")
    chosen = [
        painting
        for painting in paintings
        if (not styles or painting.style in styles) and (split is None or painting.split in (None, split))
    ]
    if not chosen:
        raise UserError(f"{root}: holds no {split} images of {', '.join(styles or known)}")
    return chosen


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The lines of a CSV file (UTF-8, first line column names) that must have ``columns``; UserError otherwise."""
    try:
        # utf-8-sig: spreadsheet programs put a byte order mark before the first column's name.
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            found = reader.fieldnames or ()
            lines = [(reader.line_num, line) for line in reader]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a CSV table ({error})") from None
    missing = [column for column in columns if column not in found]
    if missing:
        raise UserError(f"{path}: needs the columns {', '.join(columns)}; missing: {', '.join(missing)}")
    for number, line in lines:
        if any(not line[column] for column in columns):
            raise UserError(f"{path}: line {number} has an empty field among {', '.join(columns)}")
    return [line for _, line in lines]


def evaluation_pairs(
    root: str | os.PathLike, table: str | os.PathLike | None = None, count: int | None = None
) -> list[Pair]:
    """The pairs to evaluate on, at most ``count`` a style: those of a CSV file, or the same ones at every call.

    ``table`` has the columns degraded, reference: paths relative to ``root`` and within it. Without it every held-out
    image of ``root`` (every image, where none is held out) meets one of another work of its style; of another file
    where the style holds a single work; itself where the style holds a single file.
    Raises UserError where the folder or the table is malformed, a listed file is missing, or one of several styles is
    named as all of them together are.
    """
    if count is not None and count < 1:
        raise UserError(f"--count must be 1 or more, got {count}")
    pairs = _own_pairs(root, count) if table is None else _listed_pairs(Path(root), Path(table), count)
    styles = {pair.style for pair in pairs}
    if ALL_STYLES in styles and len(styles) > 1:
        raise UserError(f"{root}: rename the style '{ALL_STYLES}', whose name the means over all styles have")
    return pairs


def _own_pairs(root: str | os.PathLike, count: int | None) -> list[Pair]:
    pairs = []
    for group in by_style(find_paintings(root, split="test")):
        kept = len(group) if count is None else min(count, len(group))
        # Spread over the whole style: neighbours in the list are often crops of the same work.
        for place in (number * len(group) // kept for number in range(kept)):
            partners = partners_of(group, place)
            reference = group[partners[place % len(partners)]]
            pairs.append(Pair(group[place].path, reference.path, reference.style))
    return pairs


def by_style(paintings: Sequence[Painting]) -> list[list[Painting]]:
    """One list a style, both sorted, so that the caller's order never matters."""
    groups: dict[str, list[Painting]] = {}
    for painting in sorted(paintings, key=lambda painting: (painting.style, painting.path)):
        groups.setdefault(painting.style, []).append(painting)
    return list(groups.values())


def partners_of(group: Sequence[Painting], place: int) -> list[int]:
    """Places of the images that may be the reference of the one at ``place``."""
    work = group[place].painting_id
    others = [other for other, painting in enumerate(group) if painting.painting_id != work]
    return others or [other for other in range(len(group)) if other != place] or [place]


def _indexed_paintings(root: Path) -> list[Painting]:
    table = root / INDEX_FILE
    lines = read_table(table, ("file", "style", "split", "painting_id"))
    _told(table, lines, "painting_id", "split")
    return [
        Painting(
            path=_path_within(root, line["file"], table),
            style=line["style"],
            painting_id=line["painting_id"],
            split=_known_split(line["split"], table),
        )
        for line in lines
    ]


def _paintings_in_folders(root: Path) -> list[Painting]:
    works, splits = _works_and_splits(root)
    folders = sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    styles = {folder.name: images for folder in folders if (images := _images(_below(folder), root))}
    loose = _images(root.iterdir(), root)
    if not styles:
        styles = {root.resolve().name: loose}
    elif loose:
        logger.warning("%s: %d images outside the style folders are left out", root, len(loose))

    if splits is not None:
        _check_files(
            root, works, splits, {path.relative_to(root).as_posix() for path in itertools.chain(*styles.values())}
        )
    paintings = []
    for style, images in styles.items():
        for path in images:
            file = path.relative_to(root).as_posix()
            work = works.get(file, file)
            paintings.append(Painting(path, style, work, None if splits is None else splits.get(work, "train")))
    return paintings


def _below(folder: Path) -> Iterator[Path]:
    """What lies in the folder at any depth, hidden folders aside; UserError where one cannot be read."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = (name for name in folders if not name.startswith("."))
        for linked in sorted(filter(os.path.islink, (os.path.join(parent, name) for name in folders))):
            logger.warning("%s: is a link to a folder, which is not followed", linked)
        yield from (Path(parent, name) for name in names)


def _images(paths: Iterable[Path], root: Path) -> list[Path]:
    named_so = sorted(
        path
        for path in paths
        if path.suffix.lower() in READABLE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
    for path in named_so:
        if not path.exists():
            logger.warning("%s: is a link to what is not there; it is left out", path)
    return [path for path in named_so if path.is_file()]


def _works_and_splits(root: Path) -> tuple[dict[str, str], dict[str, str] | None]:
    """The painting_id of each file that MANIFEST.csv names, and the split of each painting_id (None: no SPLIT.csv)."""
    manifest, split_table = root / MANIFEST_FILE, root / SPLIT_FILE
    if not os.path.lexists(split_table):
        for path in root.iterdir():
            if path.name.casefold() == SPLIT_FILE.casefold():
                raise UserError(f"{path}: must be named {SPLIT_FILE}, if it says which works are held out; rename it")
        # A manifest of another make, without painting_id, says nothing here and does no harm.
        lines = read_table(manifest, ()) if os.path.lexists(manifest) else []
        lines = [line for line in lines if line.get("file") and line.get("painting_id")]
        return _works(manifest, lines), None

    # Strict: ignoring half of the tables would train on held-out works.
    lines = read_table(manifest, ("file", "painting_id"))
    for line in lines:
        _path_within(root, line["file"], manifest)
    works = _works(manifest, lines)
    lines = read_table(split_table, ("painting_id", "split"))
    splits = {
        work: _known_split(split, split_table)
        for work, split in _told(split_table, lines, "painting_id", "split").items()
    }
    unknown = sorted({work for work, split in splits.items() if split == "test"} - set(works.values()))
    if unknown:
        raise UserError(f"{split_table}: holds out '{unknown[0]}', of which {manifest} names no file")
    return works, splits


def _works(manifest: Path, lines: Iterable[dict[str, str]]) -> dict[str, str]:
    """The painting_id of each file, which is written as `Path.as_posix` writes it: without a "./" before it, say."""
    lines = [{**line, "file": PurePosixPath(line["file"]).as_posix()} for line in lines]
    return _told(manifest, lines, "file", "painting_id")


def _check_files(root: Path, works: dict[str, str], splits: dict[str, str], images: set[str]) -> None:
    """UserError where an image might be of a work that is held out, as the manifest names it otherwise than the folder.

    Of the names that no image has, those of held-out works may be of what somebody left out, if the folder has no image
    but those that the manifest names.
    """
    manifest = root / MANIFEST_FILE
    unmatched = [file for file in works if file not in images]
    spellings = {_loosely(file): file for file in unmatched}
    unnamed = sorted(images - works.keys())
    for image in unnamed:
        if (given := spellings.get(_loosely(image))) is not None:
            raise UserError(
                f"{manifest}: names '{given}', which is not there, in the place of '{image}', it seems; name it as it "
                "is"
            )
    missing = [file for file in unmatched if not (root / file).is_file()]
    hidden = [file for file in missing if splits.get(works[file]) == "test"]
    if hidden and unnamed:
        raise UserError(
            f"{manifest}: names '{hidden[0]}', of a work that is held out, which is not there, and does not name "
            f"'{unnamed[0]}', which may be it; name files by their paths from {root}"
        )
    if missing:
        logger.warning("%s: %d files are not there, such as '%s'", manifest, len(missing), missing[0])


def _loosely(file: str) -> str:
    """A file's name less what is written in several ways: case, accents, the suffix, "\\" for "/", spaces around it."""
    name = PurePosixPath(file.strip().replace("\\", "/")).with_suffix("").as_posix()
    return unicodedata.normalize("NFC", name).casefold()


def _told(table: Path, lines: Iterable[dict[str, str]], key: str, value: str) -> dict[str, str]:
    """What the table says of each key; UserError where it says two things."""
    told: dict[str, str] = {}
    for line in lines:
        if told.setdefault(line[key], line[value]) != line[value]:
            raise UserError(
                f"{table}: gives '{line[key]}' two values of {value}, '{told[line[key]]}' and '{line[value]}'"
            )
    return told


def _known_split(name: str, table: Path) -> str:
    if name not in _SPLITS:
        raise UserError(f"{table}: split must be one of {', '.join(_SPLITS)}, got '{name}'")
    return _SPLITS[name]


def _path_within(root: Path, name: str, table: Path) -> Path:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise UserError(f"{table}: paths must be relative to {root} and within it, got '{name}'")
    return root / relative


def _listed_pairs(root: Path, table: Path, count: int | None) -> list[Pair]:
    styles = {painting.path: painting.style for painting in find_paintings(root)}
    pairs: dict[str, list[Pair]] = {}
    for line in read_table(table, ("degraded", "reference")):
        degraded, reference = (_path_within(root, line[column], table) for column in ("degraded", "reference"))
        for path in (degraded, reference):
            if not path.is_file():
                raise UserError(f"{table}: lists {path}, which does not exist")
        style = styles.get(degraded, degraded.parent.name)
        pairs.setdefault(style, []).append(Pair(degraded, reference, style))
    if not pairs:
        raise UserError(f"{table}: lists no pairs")
    return [pair for style in sorted(pairs) for pair in pairs[style][:count]]
