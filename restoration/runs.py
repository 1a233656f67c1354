"""What the folder of a training run holds: settings, checkpoints to go on from, and in the end the weights."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import fields, replace
from pathlib import Path

from torch import Tensor

from restoration.adam import Adam
from restoration.checkpoints import (
    NETWORK_PREFIX,
    Checkpoint,
    load_checkpoint,
    load_parameters,
    save_checkpoint,
    save_network,
)
from restoration.collection import Painting
from restoration.config import SHAPING, TrainingConfig, checked, option
from restoration.errors import UserError
from restoration.files import check_can_be_written, content_hash, read_json, size_in_bytes
from restoration.step import TrainingStep

LOSSES_PREFIX = "losses."
OPTIMIZER_PREFIX = "optimizer."
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d{7,})\.safetensors")
WEIGHTS_NAME = "network.safetensors"
SETTINGS_NAME = "config.json"  # the first file of every run


def checkpoint_to_resume(run: Path, resume: bool, initial_weights: Path | None) -> Path | None:
    """The newest checkpoint of run, or None for a run that starts. UserError where that is not what was asked for."""
    try:
        os.fspath(run).encode()
    except UnicodeEncodeError:
        raise UserError(f"--out must be a name in UTF-8, as TensorBoard asks for, got {os.fspath(run)!r}") from None
    check_can_be_written(run)
    if resume and initial_weights is not None:
        raise UserError("--initial-weights are for a run that starts; --resume goes on with the run's own")
    newest = _checkpoint_of_a_run(run) if resume else newest_checkpoint(run)
    if newest is not None and not resume:
        raise UserError(f"{run}: holds a training run already; give --resume to go on, or another --out")
    if newest is None and not _holds_settings(run):
        for name in (SETTINGS_NAME, WEIGHTS_NAME):
            if os.path.lexists(run / name):
                raise UserError(f"{run / name}: is of something else and would be written over; give another --out")
    return newest


def _holds_settings(run: Path) -> bool:
    """Whether a run was begun in the folder, by the program of today or an older one."""
    return {"preset", "iterations", "crop"} <= read_json(run / SETTINGS_NAME).keys()


def check_unchanged(run: Path, checkpoint_path: Path | None) -> None:
    """UserError where another run has gone on in the folder between the look at it and the lock."""
    if newest_checkpoint(run) != checkpoint_path:
        raise UserError(
            f"{run}: another run has changed its checkpoints meanwhile; start once more, or give another --out"
        )


def inputs_of(
    data: Path, paintings: list[Painting], styles: list[str] | None, vgg: Path | None
) -> dict[str, str | list[str] | None]:
    """What a run is trained on and with, beside its settings: for its checkpoints.

    Of the paintings a hash of names, styles, works and sizes in bytes, wherever data lies: to read all of them, of a
    built data set, would take minutes.
    """
    lines = sorted(
        f"{one.style}\0{one.painting_id}\0{one.path.relative_to(data)}\0{size_in_bytes(one.path)}" for one in paintings
    )
    return {
        "styles": styles,
        "vgg": None if vgg is None else str(vgg.resolve()),
        "paintings": hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest(),
        "vgg_contents": None if vgg is None else content_hash(vgg),
    }


def changed_inputs(before: dict, now: dict) -> list[str]:
    """What is other than it was. What an older program has saved tells neither."""
    names = {"paintings": "the paintings", "vgg_contents": "the VGG weights"}
    return [name for key, name in names.items() if before.get(key) not in (None, now[key])]


def save_weights(run: Path, config: TrainingConfig, step_module: TrainingStep, step: int) -> None:
    save_network(run / WEIGHTS_NAME, step_module.network, {"training": config.to_dict(), "step": step})


def save_training(
    run: Path,
    config: TrainingConfig,
    step_module: TrainingStep,
    optimizer: Adam,
    inputs: dict[str, object],
    step: int,
) -> Path:
    """Writes checkpoint-<step>.safetensors. inputs: beside the settings, what was trained on and with."""
    tensors = {NETWORK_PREFIX + name: value for name, value in step_module.network.state_dict().items()}
    tensors |= {LOSSES_PREFIX + name: value for name, value in _trained_losses(step_module).items()}
    names = [name for name, _ in step_module.named_parameters()]
    for index, state in optimizer.state.items():
        tensors |= {f"{OPTIMIZER_PREFIX}{names[index]}.{key}": value for key, value in state.items()}
    path = run / f"checkpoint-{step:07d}.safetensors"
    description = {
        "architecture": step_module.network.architecture.to_dict(),
        "training": config.to_dict(),
        "inputs": inputs,
        "step": step,
    }
    save_checkpoint(path, tensors, description)
    return path


def remove_old_checkpoints(run: Path, kept: int) -> None:
    """All but the newest."""
    for old in checkpoints_of(run)[:-kept]:
        old.unlink(missing_ok=True)


def restore(checkpoint: Checkpoint, path: Path, step_module: TrainingStep, optimizer: Adam) -> None:
    """Fills network, projection heads and optimiser."""
    load_parameters(step_module.network, checkpoint.part(NETWORK_PREFIX), path)
    heads = step_module.losses.contrast
    if heads is not None:
        prefix = LOSSES_PREFIX + "contrast."
        load_parameters(heads, checkpoint.part(prefix), path)
    moments = checkpoint.part(OPTIMIZER_PREFIX)
    state = {}
    for index, (name, _) in enumerate(step_module.named_parameters()):
        keys = ("step", "exp_avg", "exp_avg_sq")
        if f"{name}.step" in moments:
            state[index] = {key: moments[f"{name}.{key}"] for key in keys}
    optimizer.load(state)


def _trained_losses(step_module: TrainingStep) -> dict[str, Tensor]:
    """The projection heads' parameters; the VGG's are constants and stay out of checkpoints."""
    return {name: value for name, value in step_module.losses.named_parameters()}


def checkpoints_of(run: Path) -> list[Path]:
    """The run's own, oldest first; a copy that somebody keeps there under another name is none of them."""
    return sorted((path for path in run.glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name)), key=steps_done)


def steps_done(checkpoint: Path) -> int:
    """The number of steps in the name of one of checkpoints_of."""
    return int(CHECKPOINT_NAME.fullmatch(checkpoint.name)[1])


def newest_checkpoint(run: Path) -> Path | None:
    return next(reversed(checkpoints_of(run)), None)


def _checkpoint_of_a_run(run: Path) -> Path:
    """The newest; UserError where there is none."""
    newest = newest_checkpoint(run)
    if newest is None:
        raise UserError(f"{run}: holds no checkpoint to resume from")
    return newest


def load_training(path: Path) -> Checkpoint:
    """UserError where the file holds weights alone."""
    checkpoint = load_checkpoint(path)
    if not {"training", "step"} <= checkpoint.description.keys() or not checkpoint.part(OPTIMIZER_PREFIX):
        raise UserError(f"{path}: is no checkpoint of a training run, but weights alone, which --initial-weights takes")
    step = checkpoint.description["step"]
    if CHECKPOINT_NAME.fullmatch(path.name) and steps_done(path) != step:
        raise UserError(f"{path}: is of step {step}, not of the {steps_done(path)} of its name; rename or remove it")
    return checkpoint


def resumed_config(run: Path, overrides: dict[str, object]) -> TrainingConfig:
    """Settings of run's newest checkpoint, with those overrides that are not None, none of them among SHAPING."""
    path = _checkpoint_of_a_run(run)
    known = {field.name for field in fields(TrainingConfig)}
    try:
        stored = load_training(path).description["training"]
    except UserError as error:
        *older, _ = checkpoints_of(run)
        way_on = f"once it is removed, --resume goes on from {older[-1].name}" if older else "there is no older one"
        raise UserError(f"{error}; {way_on}") from error
    before = TrainingConfig(**{name: value for name, value in stored.items() if name in known})
    config = checked(replace(before, **{name: value for name, value in overrides.items() if value is not None}))
    for name in SHAPING:
        wanted, got = getattr(before, name), getattr(config, name)
        if got != wanted:
            asked, needed = (_as_typed(name, value) for value in (got, wanted))
            raise UserError(f"{needed} must stay, as when the run in {run} was started, got {asked}")
    return config


def _as_typed(name: str, value: object) -> str:
    if isinstance(value, bool):
        return option(name if value else f"no_{name}")
    return f"{option(name)} {value}"


def where_to_go_on(run: Path, first_skipped: int) -> str:
    """What to do with the checkpoints of a run whose steps are all skipped from one on."""
    made = checkpoints_of(run)
    proved = [path.name for path in made if steps_done(path) < first_skipped]
    doubtful = [path.name for path in made[len(proved) :]]
    if not proved:
        return f"{', '.join(doubtful)} may be past use, and there is no other" if doubtful else "no checkpoint was made"
    removed = f"once {', '.join(doubtful)}, which may be past use, is removed, " if doubtful else ""
    return f"{removed}--resume goes on from {proved[-1]}"
