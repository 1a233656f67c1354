"""ICC profiles of curves and primaries, for pictures of 16 bits a channel: littlecms, as Pillow has it, takes 8."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

SHADES = 2**16
_ROWS_AT_ONCE = 256  # in float32 beside the picture

# Their XYZ in columns, adapted to D50 as in every profile, and rounded as in littlecms' own of sRGB.
SRGB_PRIMARIES = np.array([[28_576, 25_239, 9_375], [14_581, 46_983, 3_972], [912, 6_361, 46_787]]) / 65_536

# The parametric curves (ICC.1, 10.18) by their number: how many parameters they have, and g a b c d e f of the last,
# which has them all: max(a x + b, 0)^g + e from d on, c x + f below.
_PARAMETRIC = {
    0: (1, lambda g: (g, 1, 0, 0, 0, 0, 0)),
    1: (3, lambda g, a, b: (g, a, b, 0, 0, 0, 0)),
    2: (4, lambda g, a, b, e: (g, a, b, 0, 0, e, 0)),
    3: (5, lambda g, a, b, c, d: (g, a, b, c, d, 0, 0)),
    4: (7, lambda *parameters: parameters),
}


class OtherProfileError(ValueError):
    """Of a profile without curves and primaries, or a damaged one."""


@dataclass(frozen=True)
class MatrixProfile:
    """curves: the linear light of each shade, float32 [C, 65536]; primaries: their XYZ in columns, None of grey."""

    curves: np.ndarray
    primaries: np.ndarray | None

    def to_srgb(self, values: np.ndarray) -> np.ndarray:
        """uint16 [H, W, C] in this profile's colours as uint16 [H, W, 3] in sRGB."""
        result = np.empty((*values.shape[:2], 3), np.uint16)
        mixing = None if self.primaries is None else np.linalg.solve(SRGB_PRIMARIES, self.primaries)
        for first in range(0, len(values), _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            light = np.stack([curve[values[rows, :, channel]] for channel, curve in enumerate(self.curves)], axis=2)
            if mixing is not None:
                light = (light @ mixing.T.astype(np.float32)).clip(0, 1)
            result[rows] = _shades_of_srgb(light)
        return result


def _shades_of_srgb(light: np.ndarray) -> np.ndarray:
    values = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** np.float32(1 / 2.4) - 0.055)
    return np.rint(values * (SHADES - 1)).astype(np.uint16)


def matrix_profile(profile: bytes) -> MatrixProfile:
    """OtherProfileError where it is none."""
    try:
        return _parsed(profile)
    except (struct.error, KeyError) as error:
        raise OtherProfileError(repr(error)) from error


def _parsed(profile: bytes) -> MatrixProfile:
    (count,) = struct.unpack_from(">I", profile, 128)
    tags = {}
    for entry in range(132, 132 + 12 * count, 12):
        name, place, length = struct.unpack_from(">4sII", profile, entry)
        tags[name] = profile[place : place + length]
    if profile[16:20] == b"GRAY":
        return MatrixProfile(_curve(tags[b"kTRC"])[None], None)
    primaries = [struct.unpack_from(">3i", tags[name + b"XYZ"], 8) for name in (b"r", b"g", b"b")]
    curves = np.stack([_curve(tags[name + b"TRC"]) for name in (b"r", b"g", b"b")])
    return MatrixProfile(curves, np.array(primaries).T / 65_536)


def _curve(tag: bytes) -> np.ndarray:
    shades = np.linspace(0, 1, SHADES)
    if tag[:4] == b"para":
        (number,) = struct.unpack_from(">H", tag, 8)
        count, in_full = _PARAMETRIC[number]
        g, a, b, c, d, e, f = in_full(*np.array(struct.unpack_from(f">{count}i", tag, 12)) / 65_536)
        with np.errstate(all="ignore"):  # of a damaged profile, which is not heeded in the end
            curve = np.where(shades >= d, np.maximum(a * shades + b, 0) ** g + e, c * shades + f)
    elif tag[:4] == b"curv":
        (count,) = struct.unpack_from(">I", tag, 8)
        points = np.array(struct.unpack_from(f">{count}H", tag, 12))
        if count == 0:
            curve = shades
        elif count == 1:
            curve = shades ** (points[0] / 256)
        else:
            curve = np.interp(shades * (count - 1), np.arange(count), points / 65_535)
    else:
        raise OtherProfileError(f"has a curve of the kind {tag[:4]!r}")
    return curve.clip(0, 1).astype(np.float32)
