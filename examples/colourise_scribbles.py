"""Colours a grey picture from a few coloured strokes, by the Matting Laplacian of the picture itself.

    python examples/colourise_scribbles.py grey.png scribbled.png coloured.png

scribbled.png is grey.png with strokes painted over it: where the two differ, the stroke's colour is wanted. Everywhere
else neighbouring pixels of equal lightness get equal colours. With M the Matting Laplacian of the grey picture, D one
on the strokes and zero elsewhere, and s their colours, the result solves (M + strength · D) x = strength · D s: by
conjugate gradients, which need M only through products.
"""

import argparse

import torch

from restoration.errors import UserError
from restoration.imaging import check_writable, read_image, write_image
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


def colourise_files(grey, scribbled, result, *, force=False):
    """Colours one file from another. UserError, before any work, where a file or their sizes do not do."""
    picture = read_image(grey)
    check_writable(result, force=force, like=picture)
    grey, scribbled = (rgb.double()[None] for rgb in (picture.rgb, read_image(scribbled).rgb))
    if grey.shape != scribbled.shape:
        raise UserError(f"the pictures must be of one size, got {list(grey.shape[2:])} and {list(scribbled.shape[2:])}")
    marked = ((scribbled - grey).abs() > STROKE_LEVELS / 255).any(1, keepdim=True)
    if not marked.any():
        raise UserError(
            f"strokes must differ from the grey picture by more than {STROKE_LEVELS} levels of 255: none does"
        )
    write_image(result, colourise(grey, scribbled, marked)[0], picture, force=force)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description="Colours a grey picture from a few coloured strokes.")
    for name in ("grey", "scribbled", "result"):
        parser.add_argument(name)
    parser.add_argument("--force", action="store_true", help="overwrite the result")
    try:
        colourise_files(**vars(parser.parse_args()))
    except (UserError, ValueError, RuntimeError) as error:  # the latter two of operators, for RESTORATION_BACKEND
        parser.error(str(error))


if __name__ == "__main__":
    main()
