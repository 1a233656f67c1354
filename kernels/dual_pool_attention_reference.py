"""Dual pooling attention in plain PyTorch: the definition that every backend is measured against."""

import torch
import torch.nn.functional as F


def dual_pool_attention_reference(x, weight, *, pool_size=50):
    """x · sigmoid(conv1d(mean(adaptive_avg_pool2d(x, pool_size)), weight)), channel by channel (Sun 2025, Fig. 3)."""
    rows = _pooling_weights(x.shape[2], pool_size, x)
    columns = _pooling_weights(x.shape[3], pool_size, x)
    means = (x @ columns) @ rows
    attention = torch.sigmoid(F.conv1d(means[:, None], weight[None, None], padding=weight.shape[0] // 2))[:, 0]
    return (x * attention[:, :, None, None]).contiguous()


def _pooling_weights(size, pool_size, like):
    """Share of each of size rows in the mean of the bins: bin i averages rows floor(i·size/P) to ceil((i+1)·size/P)."""
    bins = torch.arange(pool_size, device=like.device)[:, None]
    places = torch.arange(size, device=like.device)
    first, end = bins * size // pool_size, -(-(bins + 1) * size // pool_size)
    inside = ((places >= first) & (places < end)).to(torch.float64)
    return (inside / inside.sum(1, keepdim=True)).mean(0).to(like.dtype)
