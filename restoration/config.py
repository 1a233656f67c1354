"""Settings of a training run: every value has a default, a preset may change it, the command line has the last word."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from restoration.errors import UserError
from restoration.flow import Architecture
from restoration.losses import STYLE_DISTANCES, LossWeights

PRECISIONS = ("fp32", "tf32", "bf16")
SCHEDULES = ("constant", "cosine")
PAIRINGS = ("random", "nearest")


@dataclass(frozen=True)
class TrainingConfig:
    """The defaults are the paper's recipe; fields that the paper does not mention are this project's."""

    preset: str = "paper"
    crop: int = 512
    batch: int = 2
    iterations: int = 80_000
    learning_rate: float = 1e-5
    schedule: str = "constant"
    gradient_clip: float = 0.0  # largest gradient norm, 0 = none
    # fp32; tf32 in all convolutions, on a GPU; or bf16 in the residual functions and the loss network. Streams, colour
    # transfer, losses and optimiser keep float32 or more.
    precision: str = "fp32"
    reversible: bool = True  # rebuild activations in backward in place of keeping them
    capture: bool = True  # the whole step as one CUDA graph, on one GPU
    seed: int = 0

    blocks: int = 10  # a stage
    dpca: bool = True
    cafe: bool = True
    ccpl: bool = True
    ccp_weight: float = 5.0  # these four are the weights of eq. 6
    style_weight: float = 1.0
    matting_weight: float = 1500.0
    cycle_weight: float = 10.0
    style_distance: str = "mse"
    anchors: int = 64
    temperature: float = 0.07  # of the contrastive loss
    projection: bool = True  # heads of the contrastive loss, trained with the network

    pairing: str = "random"
    largest_box: float = 3.0  # boxes are cut at 1 to this many times the crop, then reduced to it
    workers: int = 2
    cache_mb: int = 512  # MiB of decoded pictures, all workers together: about 200 paintings of 1024 x 640 pixels
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    sample_every: int = 500

    def architecture(self) -> Architecture:
        return Architecture(blocks_per_stage=self.blocks, dpca=self.dpca, cafe=self.cafe)

    def network_precision(self) -> str:
        """Of network and loss network: tf32 is a setting of the device, not of the network."""
        return "bf16" if self.precision == "bf16" else "fp32"

    def loss_weights(self) -> LossWeights:
        ccp_weight = self.ccp_weight if self.ccpl else 0.0
        return LossWeights(ccp_weight, self.style_weight, self.matting_weight, self.cycle_weight)

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)


PRESETS: dict[str, dict[str, object]] = {
    "paper": {},
    # After CAP-VSTNet's training (learning rate, clipping), at a size that two CPU cores finish in an hour.
    "small": {
        "crop": 128,
        "iterations": 1_000,
        "learning_rate": 1e-4,
        "gradient_clip": 5.0,
        "workers": 0,
        "checkpoint_every": 100,
        "sample_every": 100,
    },
}

# What the command line may change; a run's preset is chosen once.
OVERRIDABLE = tuple(field.name for field in dataclasses.fields(TrainingConfig) if field.name != "preset")

# What says which weights there are: a run keeps these.
SHAPING = ("blocks", "dpca", "cafe", "ccpl", "projection")

LARGEST_CROP = 16_384
# Field: smallest and largest value allowed. Most of the latter lie beyond any use, so that a slip of the hand is found
# before the work.
_RANGES = {
    "crop": (24, LARGEST_CROP),  # below it VGG19's relu4_1 has no pixel with eight neighbours
    "batch": (1, 65_536),
    "iterations": (1, 10_000_000),
    "blocks": (1, 1_000),
    "anchors": (1, 10_000_000),
    "temperature": (1e-3, 1_000.0),  # below, one pair of a row decides alone
    "workers": (0, 1_000),
    "cache_mb": (0, 100_000_000),
    "checkpoint_every": (1, 10_000_000),
    "keep_checkpoints": (1, 10_000_000),
    "sample_every": (1, 10_000_000),
    "seed": (0, 2**40),  # of this and a step's number is made the seed of its anchors, 63 bits for PyTorch
    "largest_box": (1.0, 1_000.0),
    "gradient_clip": (0.0, 1e12),
    "ccp_weight": (0.0, 1e12),
    "style_weight": (0.0, 1e12),
    "matting_weight": (0.0, 1e12),
    "cycle_weight": (0.0, 1e12),
}
_LEAST_RATE = 1e-30  # float32 has no numbers much smaller
_CHOICES = {
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
    "style_distance": STYLE_DISTANCES,
    "pairing": PAIRINGS,
    "preset": tuple(PRESETS),
}


def make_config(preset: str = "paper", **overrides: object) -> TrainingConfig:
    """The preset's settings with overrides; an override of None keeps the preset's value. Raises UserError."""
    if preset not in PRESETS:
        raise UserError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    given = {name: value for name, value in overrides.items() if value is not None}
    return checked(TrainingConfig(**{"preset": preset, **PRESETS[preset], **given}))


def checked(config: TrainingConfig) -> TrainingConfig:
    """The same settings; UserError names the first that is out of range."""
    for name, (least, most) in _RANGES.items():
        value = getattr(config, name)
        if not value >= least:  # nor is NaN
            raise UserError(f"{option(name)} must be at least {least}, got {value}")
        if value > most:
            raise UserError(f"{option(name)} must be at most {most}, got {value}")
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            raise UserError(f"{option(name)} must be one of {', '.join(choices)}, got {getattr(config, name)!r}")
    if not _LEAST_RATE <= config.learning_rate < 1:
        raise UserError(f"--learning-rate must lie between {_LEAST_RATE} and 1, got {config.learning_rate}")
    if 0 < config.gradient_clip < _LEAST_RATE:
        raise UserError(f"--gradient-clip must be 0 or at least {_LEAST_RATE}, got {config.gradient_clip}")
    if not any(dataclasses.astuple(config.loss_weights())):
        weights = "--style-weight, --matting-weight, --cycle-weight"
        weights = f"--ccp-weight, {weights}" if config.ccpl else f"{weights} with --no-ccpl"
        raise UserError(f"{weights}: one must be above 0")
    return config


def option(name: str) -> str:
    """A setting's name on the command line."""
    return f"--{name.replace('_', '-')}"
