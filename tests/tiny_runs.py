"""Training runs of seconds, for tests."""

from restoration.checkpoints import load_checkpoint
from restoration.config import make_config


def config(**overrides):
    tiny = {"crop": 24, "batch": 1, "blocks": 1, "iterations": 4, "checkpoint_every": 2, "sample_every": 2}
    return make_config("small", **{**tiny, **overrides})


def tensors(path):
    return load_checkpoint(path).tensors
