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
        return image * 0
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
    colours[:, :, -3:] = eps**0.5 * torch.eye(3).to(colours)[:, :, None]
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
    return torch.addcmul(vectors, direction, (direction * vectors).sum(2, keepdim=True), value=-1)


def _centred_windows(image, radius):
    """All windows of 2·radius+1 pixels a side less their mean, in float64: [B, C, n, P]."""
    side = 2 * radius + 1
    windows = F.unfold(image.to(torch.float64), side).unflatten(1, (image.shape[1], side * side))
    return windows - windows.mean(2, keepdim=True)


def matting_laplacian_matrix_reference(guide, *, eps=1e-7, radius=1):
    """M as a sparse matrix [H·W, H·W] for one guide [3, H, W]: the sum of all windows' Id - 1/n - C_w (...)^-1 C_w^T.

    The blocks are never held at once. A pixel meets the (4·radius+1)² pixels that share a window with it, so the matrix
    is that many diagonals, each an image; entry (i, j) of all blocks is added to the diagonal of its offset j - i.
    """
    from scipy.sparse import csr_array  # a quarter of a second to import, for the only function that needs it

    guide = np.asarray(guide.detach().cpu().to(torch.float64))
    height, width = guide.shape[1:]
    side, reach = 2 * radius + 1, 2 * radius
    diagonals = np.zeros((2 * reach + 1, 2 * reach + 1, height, width))
    if min(height, width) >= side:
        _add_window_blocks(diagonals, guide, eps, side)
    rows = np.arange(height)[:, None] + np.arange(-reach, reach + 1)
    columns = np.arange(width)[:, None] + np.arange(-reach, reach + 1)
    # Axes: pixel row, pixel column, row offset, column offset; in that order a row's entries come sorted.
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[None, :, None, :]
    indices = (rows[:, None, :, None] * width + columns[None, :, None, :])[inside]
    starts = np.concatenate([[0], np.cumsum(inside.sum((2, 3)))])
    return csr_array((diagonals.transpose(2, 3, 0, 1)[inside], indices, starts), shape=(height * width,) * 2)


def _add_window_blocks(diagonals, guide, eps, side):
    rows, columns = guide.shape[1] - side + 1, guide.shape[2] - side + 1
    places = [(i, j) for i in range(side) for j in range(side)]
    pixels = np.stack([guide[:, i : i + rows, j : j + columns] for i, j in places])
    pixels -= pixels.mean(0)
    covariance = np.einsum("nghw,nkhw->hwgk", pixels, pixels) + eps * np.eye(3)
    # With the Cholesky factor L of the covariance, C (...)^-1 C^T is E^T E for E = L^-1 C^T.
    whitened = np.linalg.solve(np.linalg.cholesky(covariance), np.moveaxis(pixels, (0, 1), (3, 2)))
    for a, (i, j) in enumerate(places):
        for b, (k, l) in enumerate(places):
            block = (a == b) - 1 / len(places) - (whitened[..., a] * whitened[..., b]).sum(-1)
            diagonals[k - i + side - 1, l - j + side - 1, i : i + rows, j : j + columns] += block
