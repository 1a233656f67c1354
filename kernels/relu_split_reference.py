"""ReLU and split of a map in plain PyTorch: the definition that every backend is measured against."""

import torch.nn.functional as F


def relu_split_reference(x, channels):
    """relu(x[:, :channels]) and x[:, channels:], each contiguous."""
    return F.relu(x[:, :channels]).contiguous(), x[:, channels:].contiguous()
