"""Which sources the extension is built from: setup.py writes it into the extension, a working tree is held against it.

Run by setup.py outside of the package, as a build has no torch.
"""

import hashlib


def digest(csrc):
    """Twelve hexadecimal digits that change with any source in this folder (a Path)."""
    digits = hashlib.sha256()
    for path in sorted(csrc.iterdir()):
        if path.suffix in (".cpp", ".cu", ".cuh", ".h", ".txt"):
            digits.update(path.name.encode() + path.read_bytes())
    return digits.hexdigest()[:12]
