"""The example that draws the losses of a run."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "plot_losses.py"
EXAMPLE = runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Twenty steps, the last ten of which were made again after the run was resumed."""
    folder = tmp_path_factory.mktemp("run")
    for first, factor in ((0, 1.0), (10, 0.5)):
        with SummaryWriter(str(folder), purge_step=first) as writer:
            for step in range(first, 20):
                writer.add_scalar("loss/style", factor * 10.0 ** -(step / 10), step)
                writer.add_scalar("speed/images_per_second", 1.0, step)
    return folder


def test_a_resumed_run_is_read_once(run):
    losses = EXAMPLE["read_losses"](run)
    assert losses.keys() == {"style"}
    steps, values = losses["style"]
    np.testing.assert_array_equal(steps, np.arange(20))
    np.testing.assert_allclose(values, np.where(steps < 10, 1.0, 0.5) * 10.0 ** -(steps / 10), rtol=1e-6)


def test_smoothing_keeps_an_exponential_and_evens_out_jumps():
    steps = np.arange(0, 1000, 10)
    falling = np.exp(-steps / 300)
    inside = slice(10, -10)
    np.testing.assert_allclose(EXAMPLE["smooth"](steps, falling)[inside], falling[inside])
    jumping = falling * np.where(steps // 10 % 2, 10.0, 0.1)
    np.testing.assert_allclose(EXAMPLE["smooth"](steps, jumping)[inside], falling[inside], rtol=0.5)


def test_command(run, tmp_path):
    picture = tmp_path / "curve.png"
    subprocess.run([sys.executable, SCRIPT, run, picture], check=True)
    with Image.open(picture) as image:
        assert np.asarray(image.convert("L")).std() > 0
    for folder, output, message in (
        (tmp_path / "none", picture, "no such folder"),
        (tmp_path, tmp_path / "other.png", "holds no losses"),
        (run, tmp_path / "none" / "curve.png", "No such file"),
        (run, tmp_path / "curve.docx", "'docx' is not supported"),
        (run, tmp_path / "curve", "must end in .png"),
        (run, picture, "exists already (--force overwrites)"),
    ):
        result = subprocess.run([sys.executable, SCRIPT, folder, output], capture_output=True, text=True, check=False)
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    subprocess.run([sys.executable, SCRIPT, run, picture, "--force"], check=True)
