"""The demonstration: the package draws a painting, fades it and brings its colours back."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from restoration.contact_sheet import contact_sheet
from restoration.errors import UserError
from restoration.files import make_folder
from restoration.imaging import check_writable, from_pillow, read_image, write_image
from restoration.reconstruct import Job, Recolourer, Report
from restoration.samples import PALETTES, sample_pair

SIDE_BY_SIDE_CELL = 480  # brush strokes still show, and three of them fit a page


def make_demo(
    out: Path,
    *,
    palette: str = "blue_green",
    checkpoint: Path | None = None,
    device: torch.device,
    force: bool = False,
) -> Report:
    """Writes degraded.png, reference.png, result.png and side_by_side.png into the folder out, made where missing."""
    degraded, reference, result, side_by_side = pictures = [
        out / f"{name}.png" for name in ("degraded", "reference", "result", "side_by_side")
    ]
    if palette not in PALETTES:
        raise UserError(f"--palette must be one of {', '.join(PALETTES)}, got {palette!r}")
    # What is wrong is found before there is anything that a second call would have to overwrite.
    recolourer = Recolourer(device, checkpoint=checkpoint)
    make_folder(out)
    for picture in pictures:
        check_writable(picture, force=force)

    written = []
    try:
        for path, drawn in zip((degraded, reference), sample_pair(palette), strict=True):
            write_image(path, from_pillow(Image.fromarray(drawn)), force=force)
            written.append(path)
        (report,) = recolourer.recolour_files([Job(degraded, reference, result)], force=force)
        written.append(result)
        row = [read_image(path).rgb for path in (degraded, reference, result)]
        titles = ("faded", "reference", "recoloured")
        write_image(side_by_side, contact_sheet([("", row)], titles, cell=SIDE_BY_SIDE_CELL), force=force)
    except BaseException:
        for path in written:  # the others may be of a second demonstration in this folder
            path.unlink(missing_ok=True)
        raise
    return report
