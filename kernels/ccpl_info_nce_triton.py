"""The contrastive loss of CCPL (InfoNCE) in Triton: formula in ccpl_info_nce.py.

A program owns rows of query and walks over the keys, a tile of logits at a time, with a running maximum and sum.
Backward makes the probabilities again and multiplies them with the keys, for some of the columns. No atomics.
"""

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

# Rows and keys of a tile, the most numbers of a row that are multiplied at a time, and warps. On tensor cores logits
# of 64 x 64 take 32 registers a thread, and as many the gradient. Wider numbers are multiplied one by one, from
# registers, and spill in larger tiles.
_TILE, _WIDE_TILE = (64, 64, 64, 4), (32, 16, 16, 4)
# tl.dot takes no less.
_LEAST_WIDTH = 16
# Probabilities are multiplied by this, as float16 knows nothing between 0 and 6e-8. The largest is then a quarter of
# what it can hold.
_PROBABILITY_SCALE = tl.constexpr(2.0**14)


def forward(query, key, loss, log_sum, batch, rows, width, temperature):
    """Fills loss and log_sum [B,S]."""
    ROWS, KEYS, WIDTH, warps = _tile(query)
    grid = (triton.cdiv(rows, ROWS), batch)
    if batch:
        info_nce_forward_kernel[grid](
            query, key, loss, log_sum, rows, width, 1 / temperature, ROWS, KEYS, WIDTH, _operand(query), num_warps=warps
        )


def backward(grad_loss, query, key, log_sum, grad_query, batch, rows, width, temperature):
    """Fills grad_query [B,S,D]."""
    ROWS, KEYS, WIDTH, warps = _tile(query)
    grid = (triton.cdiv(rows, ROWS), batch, triton.cdiv(width, WIDTH))
    if batch:
        info_nce_backward_kernel[grid](
            grad_loss,
            query,
            key,
            log_sum,
            grad_query,
            rows,
            width,
            1 / temperature,
            ROWS,
            KEYS,
            WIDTH,
            _operand(query),
            num_warps=warps,
        )


def _tile(query):
    rows, keys, most, warps = _TILE if query.element_size() == 2 else _WIDE_TILE
    return rows, keys, min(max(triton.next_power_of_2(query.shape[2]), _LEAST_WIDTH), most), warps


def _operand(tensor):
    """The dtype that products are computed from. The interpreter's product of bfloat16 numbers is wrong."""
    if tensor.dtype == torch.bfloat16 and isinstance(info_nce_forward_kernel, InterpretedFunction):
        return tl.float32
    return getattr(tl, str(tensor.dtype).removeprefix("torch."))


@triton.jit
def _logits(
    query,
    key,
    row,
    column,
    rows,
    width,
    INVERSE_TEMPERATURE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    WIDTH: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """[ROWS, KEYS] logits of a tile; -inf beyond the last key.

    1/temperature is a constant, and each new one is compiled anew: float32 has no register left for it on sm_86.
    """
    total = tl.zeros([row.shape[0], column.shape[0]], ACCUMULATE)
    for first in range(0, width, WIDTH):
        place = first + tl.arange(0, WIDTH)
        left_inside = (row[:, None] < rows) & (place[None, :] < width)
        right_inside = (column[None, :] < rows) & (place[:, None] < width)
        left = tl.load(query + row[:, None] * width + place[None, :], mask=left_inside, other=0).to(OPERAND)
        right = tl.load(key + column[None, :] * width + place[:, None], mask=right_inside, other=0).to(OPERAND)
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=ACCUMULATE)
    return tl.where(column[None, :] < rows, total * tl.full([], INVERSE_TEMPERATURE, ACCUMULATE), float("-inf"))


@triton.jit
def info_nce_forward_kernel(
    query,
    key,
    loss,
    log_sum,
    rows,
    width,
    INVERSE_TEMPERATURE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """loss and log_sum of some rows of one image."""
    ACCUMULATE: tl.constexpr = loss.dtype.element_ty
    image = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    query += image * rows * width
    key += image * rows * width
    maximum = tl.full([ROWS], float("-inf"), ACCUMULATE)
    total = tl.zeros([ROWS], ACCUMULATE)
    positive = tl.zeros([ROWS], ACCUMULATE)
    for first in range(0, rows, KEYS):
        column = first + tl.arange(0, KEYS).to(tl.int64)
        logits = _logits(query, key, row, column, rows, width, INVERSE_TEMPERATURE, ACCUMULATE, WIDTH, OPERAND)
        shift = tl.maximum(maximum, tl.max(logits, 1))
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
        positive += tl.sum(tl.where(row[:, None] == column[None, :], logits, 0), 1)
        maximum = shift
    # In this order a row that is told apart from all others loses no digits: maximum and positive are then equal.
    tl.store(loss + image * rows + row, maximum - positive + tl.log(total), mask=row < rows)
    tl.store(log_sum + image * rows + row, maximum + tl.log(total), mask=row < rows)


@triton.jit
def info_nce_backward_kernel(
    grad_loss,
    query,
    key,
    log_sum,
    grad_query,
    rows,
    width,
    INVERSE_TEMPERATURE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """WIDTH columns of grad_query, for some rows of one image. The positive's key is subtracted as p - 1."""
    ACCUMULATE: tl.constexpr = grad_loss.dtype.element_ty
    image = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    query += image * rows * width
    key += image * rows * width
    place = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    shift = tl.load(log_sum + image * rows + row, mask=row < rows, other=0)
    total = tl.zeros([ROWS, WIDTH], ACCUMULATE)
    for first in range(0, rows, KEYS):
        column = first + tl.arange(0, KEYS).to(tl.int64)
        logits = _logits(query, key, row, column, rows, width, INVERSE_TEMPERATURE, ACCUMULATE, WIDTH, OPERAND)
        weights = tl.exp(logits - shift[:, None]) - (row[:, None] == column[None, :]).to(ACCUMULATE)
        inside = (column[:, None] < rows) & (place[None, :] < width)
        keys = tl.load(key + column[:, None] * width + place[None, :], mask=inside, other=0).to(OPERAND)
        weights = (weights * _PROBABILITY_SCALE).to(OPERAND)
        total = tl.dot(weights, keys, total, input_precision="ieee", out_dtype=ACCUMULATE)
    factor = tl.load(grad_loss + image * rows + row, mask=row < rows, other=0) * tl.full(
        [], INVERSE_TEMPERATURE / _PROBABILITY_SCALE, ACCUMULATE
    )
    inside = (row[:, None] < rows) & (place[None, :] < width)
    tl.store(
        grad_query + image * rows * width + row[:, None] * width + place[None, :], factor[:, None] * total, mask=inside
    )
