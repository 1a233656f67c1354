"""Differences of neighbouring features in plain PyTorch: the definition that every backend is measured against."""

import torch


def neighbor_difference_reference(features, anchors, neighbors):
    """Row 8n+j = features[anchor n] - features[its neighbor j], for features [B, C, H, W], as [B, 8N, C]."""
    batch, channels = features.shape[:2]
    places = torch.cat([anchors[:, None], neighbors], dim=1)
    # One gather for both: its backward writes one dense gradient of the features, not two.
    values = features.flatten(2).gather(2, places.flatten().expand(batch, channels, -1)).unflatten(2, places.shape)
    return (values[..., :1] - values[..., 1:]).flatten(2).transpose(1, 2)
