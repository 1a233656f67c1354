"""Colours a grey picture from a few coloured strokes, by the Matting Laplacian of the picture itself.

    python examples/colourise_scribbles.py grey.png scribbled.png coloured.png

scribbled.png is grey.png with strokes painted over it: where the two differ, the stroke's colour is wanted. Everywhere
else neighbouring pixels of equal lightness get equal colours. With M the Matting Laplacian of the grey picture, D one
on the strokes and zero elsewhere, and s their colours, the result solves (M + strength · D) x = strength · D s: by
conjugate gradients, which need M only through products.
"""

import argparse

import numpy as np
import torch
from PIL import Image

from restoration_kernels import matting_laplacian_apply

# Far above the eigenvalues of M that colours meet, so that strokes keep theirs to a level of 255.
STRENGTH = 100.0
# Weight of the slopes of colour over lightness: the larger, the smoother, and the faster it converges.
EPS = 1e-4
# A difference of so many levels of 255 is a stroke, not a trace of compression.
STROKE_LEVELS = 8


def colourise(grey, strokes, marked, *, eps=EPS, tolerance=1e-6, iterations=2000, backend=None):
    """Colours [1, 3, H, W] for a picture grey [1, 3, H, W] with the colours strokes where marked [1, 1, H, W]."""
    weight = STRENGTH * marked.to(grey)

    def matrix(x):
        return matting_laplacian_apply(x, grey, eps=eps, backend=backend) + weight * x

    # The grey picture is a good start: far from all strokes it is also the answer.
    return conjugate_gradients(matrix, weight * strokes, torch.where(marked, strokes, grey), tolerance, iterations)


def conjugate_gradients(matrix, right, x, tolerance, iterations):
    """x with matrix(x) = right, from a first guess, for a symmetric positive matrix and all channels at once."""
    residual = right - matrix(x)
    direction = residual
    squared = residual.square().sum((2, 3), keepdim=True)
    enough = tolerance**2 * right.square().sum((2, 3), keepdim=True)
    for _ in range(iterations):
        if (squared <= enough).all():
            break
        image = matrix(direction)
        # A channel that is solved exactly has no direction left.
        step = squared / (direction * image).sum((2, 3), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        x = x + step * direction
        residual = residual - step * image
        previous, squared = squared, residual.square().sum((2, 3), keepdim=True)
        direction = residual + squared / previous.clamp_min(torch.finfo(x.dtype).tiny) * direction
    return x


def read(path):
    """A picture as [1, 3, H, W] of float64 in [0, 1]."""
    values = np.asarray(Image.open(path).convert("RGB"), dtype=np.float64) / 255
    return torch.from_numpy(values).permute(2, 0, 1)[None]


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description="Colours a grey picture from a few coloured strokes.")
    for name in ("grey", "scribbled", "result"):
        parser.add_argument(name)
    arguments = parser.parse_args()
    grey, scribbled = read(arguments.grey), read(arguments.scribbled)
    if grey.shape != scribbled.shape:
        parser.error(f"the pictures must be of one size, got {list(grey.shape[2:])} and {list(scribbled.shape[2:])}")
    marked = ((scribbled - grey).abs() > STROKE_LEVELS / 255).any(1, keepdim=True)
    coloured = colourise(grey, scribbled, marked).clamp(0, 1)
    values = (coloured[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(values).save(arguments.result)


if __name__ == "__main__":
    main()
