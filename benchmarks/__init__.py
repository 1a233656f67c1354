"""Benchmarks of the fused operators: ``pytest benchmarks/``, see README.md in this folder."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What judges the operators in the tests, tests/compare.py, is also the gate that a benchmark passes before it is timed.
sys.path.insert(0, str(ROOT / "tests"))


def commit():
    """The commit, marked where files differ from it; in a copy without a history, what RESTORATION_COMMIT says."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("RESTORATION_COMMIT", "unknown")
