"""Matting Laplacian in plain PyTorch and as a sparse matrix: the definitions that every backend is measured against.

Everything is computed in float64 whatever the dtype, and without the 3x3 covariances: the colours of an ink painting
are nearly grey and make them nearly singular.
"""

import numpy as np
import torch
import torch.nn.functional as F


def matting_laplacian_energy_reference(image, guide, *, eps=1e-7, radius=1):
    """1/(H·W) sum over channels and windows of |r_w|² + eps |a_w|² (Sun 2025, eq. 9), as [B]."""
    pixels = image.shape[2] * image.shape[3]
    dtype = torch.promote_types(image.dtype, torch.float32)
    if _has_no_window(image, radius):
        return image[:, :, :0].sum((1, 2, 3)).to(dtype)
    return (_window_residuals(image, guide, eps, radius).square().sum((1, 2, 3)) / pixels).to(dtype)


def matting_laplacian_apply_reference(image, guide, *, eps=1e-7, radius=1):
    """(M V)_i = sum over the windows that contain i of r_w[i], like image."""
    if _has_no_window(image, radius):
        # Not image * 0, which is NaN where the image is NaN or Inf.
        return torch.zeros_like(image) + image[:, :, :0].sum(2, keepdim=True)
    side = 2 * radius + 1
    residuals = _window_residuals(image, guide, eps, radius)[:, :, : side * side]
    return F.fold(residuals.flatten(1, 2), image.shape[2:], side).to(image.dtype)


def _has_no_window(image, radius):
    return min(image.shape[2:]) < 2 * radius + 1


def _window_residuals(image, guide, eps, radius):
    """What a ridge fit by the guide's colours leaves of the image, in the P windows that lie inside it.

    With C_w the n guide colours and x_w the n values of a window, both less their mean, a_w minimises
    |x_w - C_w a_w|² + eps |a_w|²: an ordinary least squares fit of x_w over three zeros by C_w over √eps·Id. Its
    residuals [B, C, n+3, P] are r_w over -√eps·a_w. They are what is left of the values after taking out their
    components along an orthonormal basis of the three columns (modified Gram-Schmidt).
    """
    colours = F.pad(_centred_windows(guide, radius), (0, 0, 0, 3))
    colours[:, :, -3:] = eps**0.5 * torch.eye(3, dtype=colours.dtype, device=colours.device)[:, :, None]
    residuals = F.pad(_centred_windows(image, radius), (0, 0, 0, 3))
    basis = []
    for column in colours.split(1, dim=1):
        for direction in basis:
            column = _less_component(column, direction)
        # At least √eps long, because the columns of √eps·Id are orthogonal.
        basis.append(column / column.square().sum(2, keepdim=True).sqrt())
    for direction in basis:
        residuals = _less_component(residuals, direction)
    return residuals


def _less_component(vectors, direction):
    component = (direction * vectors).sum(2, keepdim=True)
    if torch.compiler.is_compiling():  # the tangent of addcmul ends the process there, in PyTorch 2.13
        return vectors - direction * component
    return torch.addcmul(vectors, direction, component, value=-1)


def _centred_windows(image, radius):
    """All windows of 2·radius+1 pixels a side less their mean, in float64: [B, C, n, P]."""
    side = 2 * radius + 1
    windows = F.unfold(image.to(torch.float64), side).unflatten(1, (image.shape[1], side * side))
    return windows - windows.mean(2, keepdim=True)


# Windows that are worked on at a time: a hundred arrays of as many float64 numbers stay in a cache of 2 MB.
_BLOCK_WINDOWS = 2048


def matting_laplacian_matrix_reference(guide, *, eps=1e-7, radius=1):
    """M as a sparse matrix [H·W, H·W] for one guide [3, H, W]: the sum over windows of Id - 1/n - C_w (...)^-1 C_w^T.

    A pixel meets the (4·radius+1)² pixels that share a window with it, so the matrix is that many diagonals, each an
    image; entry (i, j) of the windows' blocks is added to the diagonal of its offset j - i.
    """
    from scipy.sparse import csr_array  # a quarter of a second to import, for the only function that needs it

    guide = np.asarray(guide.detach().cpu().to(torch.float64))
    height, width = guide.shape[1:]
    side, reach = 2 * radius + 1, 2 * radius
    diagonals = np.zeros((2 * reach + 1, 2 * reach + 1, height, width))
    step = max(1, _BLOCK_WINDOWS // width)
    if min(height, width) >= side:
        for row in range(0, height - reach, step):
            rows = slice(row, min(row + step + reach, height))
            _add_window_blocks(diagonals[:, :, rows], guide[:, rows], eps, side)
    rows = np.arange(height)[:, None] + np.arange(-reach, reach + 1)
    columns = np.arange(width)[:, None] + np.arange(-reach, reach + 1)
    # Axes: pixel row, pixel column, row offset, column offset; in that order a row's entries come sorted.
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[None, :, None, :]
    # SciPy keeps the integers that it is given: where 32 bits count all entries, they take a third of the memory less.
    integer = np.int32 if inside.size < 2**31 else np.int64
    indices = (rows[:, None, :, None] * width + columns[None, :, None, :])[inside].astype(integer)
    starts = np.concatenate([[0], np.cumsum(inside.sum((2, 3)))]).astype(integer)
    return csr_array((diagonals.transpose(2, 3, 0, 1)[inside], indices, starts), shape=(height * width,) * 2)


def _add_window_blocks(diagonals, guide, eps, side):
    """Adds the blocks of all windows inside some rows of the guide."""
    rows, columns = guide.shape[1] - side + 1, guide.shape[2] - side + 1
    places = [(i, j) for i in range(side) for j in range(side)]
    pixels = np.stack([guide[:, i : i + rows, j : j + columns] for i, j in places], axis=1)
    pixels -= pixels.mean(1, keepdims=True)
    basis = _orthonormal_basis(pixels, eps)
    for a, (i, j) in enumerate(places):
        # Blocks are symmetric: (a, b) gives (b, a).
        for b, (k, l) in enumerate(places[a:], a):
            block = (a == b) - 1 / len(places) - np.einsum("ghw,ghw->hw", basis[:, a], basis[:, b])
            diagonals[k - i + side - 1, l - j + side - 1, i : i + rows, j : j + columns] += block
            if a != b:
                diagonals[i - k + side - 1, j - l + side - 1, k : k + rows, l : l + columns] += block


def _orthonormal_basis(colours, eps):
    """The first n rows of an orthonormal basis of three columns [3, n, rows, columns] over √eps·Id, as above."""
    basis = np.concatenate([colours, np.zeros((3, 3, *colours.shape[2:]))], axis=1)
    for column in range(3):
        basis[column, column - 3] = eps**0.5
        for earlier in range(column):
            basis[column] -= basis[earlier] * np.einsum("nhw,nhw->hw", basis[earlier], basis[column])
        basis[column] /= np.sqrt(np.einsum("nhw,nhw->hw", basis[column], basis[column]))
    return basis[:, :-3]
