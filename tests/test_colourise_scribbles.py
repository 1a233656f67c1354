"""The example of colourisation, against scipy's direct solution with the explicit matrix."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import scipy.sparse.linalg
import torch
from PIL import Image
from scipy.sparse import diags_array

from restoration_kernels import matting_laplacian_matrix

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "colourise_scribbles.py"
EXAMPLE = runpy.run_path(str(SCRIPT))


def picture():
    """Two grey fields with a soft border between them, and a stroke of colour on each."""
    _, column = torch.meshgrid(torch.arange(24.0), torch.arange(32.0), indexing="ij")
    grey = (0.3 + 0.4 * torch.sigmoid((column - 16) / 2)).double()
    grey = (grey * 255).round().div(255).expand(1, 3, -1, -1).contiguous()
    strokes, marked = grey.clone(), torch.zeros(1, 1, 24, 32, dtype=torch.bool)
    for columns, colour in ((slice(3, 8), (0.6, 0.2, 0.1)), (slice(24, 29), (0.4, 0.7, 0.9))):
        strokes[:, :, 10:12, columns] = torch.tensor(colour, dtype=torch.float64)[:, None, None]
        marked[:, :, 10:12, columns] = True
    return grey, strokes, marked


def test_solution():
    grey, strokes, marked = picture()
    ours = EXAMPLE["colourise"](grey, strokes, marked, tolerance=1e-10)
    weight = EXAMPLE["STRENGTH"] * marked.flatten().double().numpy()
    matrix = matting_laplacian_matrix(grey[0], eps=EXAMPLE["EPS"]) + diags_array(weight)
    exact = scipy.sparse.linalg.spsolve(matrix.tocsc(), weight[:, None] * strokes[0].flatten(1).numpy().T)
    np.testing.assert_allclose(ours[0].flatten(1).numpy().T, exact, atol=1e-6)
    left, right = ours[0, :, :, 0].mean(1), ours[0, :, :, -1].mean(1)
    assert left[0] > left[2], "the left field is to be red, as its stroke"
    assert right[2] > right[0], "the right field is to be blue, as its stroke"


def test_command(tmp_path):
    grey, strokes, _ = picture()
    paths = [tmp_path / name for name in ("grey.png", "scribbled.png", "coloured.png")]
    for path, values in zip(paths, (grey, strokes), strict=False):
        Image.fromarray((values[0] * 255).round().permute(1, 2, 0).to(torch.uint8).numpy()).save(path)
    subprocess.run([sys.executable, SCRIPT, *paths], check=True)
    coloured = np.asarray(Image.open(paths[2])).astype(int)
    assert coloured[0, 0, 0] > coloured[0, 0, 2] + 50
    assert coloured[0, -1, 2] > coloured[0, -1, 0] + 50


def test_mistakes_are_told_and_nothing_is_overwritten(tmp_path):
    grey, red, text, result = (tmp_path / name for name in ("grey.png", "red.png", "text.png", "result.png"))
    Image.new("RGB", (8, 8)).save(grey)
    Image.new("RGB", (8, 8), "red").save(red)
    text.write_text("no picture")
    result.write_bytes(b"of another")
    unknown = os.environ | {"RESTORATION_BACKEND": "abacus"}
    for arguments, environment, message in (
        ((grey, text, tmp_path / "new.png"), None, "text.png: is not"),
        ((grey, red, result), None, "--force"),
        ((grey, grey, tmp_path / "new.png"), None, "none does"),
        ((grey, red, tmp_path / "new.png"), unknown, "RESTORATION_BACKEND"),
    ):
        command = [sys.executable, SCRIPT, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert result.read_bytes() == b"of another" and not (tmp_path / "new.png").exists()
