"""The training loop: pairs in, checkpoints and TensorBoard scalars out, resumable to the bit on a CPU."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from restoration.checkpoints import (
    NETWORK_PREFIX,
    Checkpoint,
    load_checkpoint,
    load_parameters,
    save_checkpoint,
    save_network,
)
from restoration.config import SHAPING, TrainingConfig, checked, option
from restoration.data import Painting, PairDataset, find_paintings, small_picture
from restoration.distributed import ALONE, World
from restoration.errors import UserError
from restoration.files import sole_writer, write_json
from restoration.flow import ReversibleNetwork
from restoration.journal import Journal, StepRecord
from restoration.loader import load_batches
from restoration.losses import ReconstructionLoss
from restoration.step import Optimisation, Outcome, TrainingStep
from restoration.vgg import VGG19Features, loss_features, measure_channel_means, metric_features

LOSSES_PREFIX = "losses."
OPTIMIZER_PREFIX = "optimizer."
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d{7,})\.safetensors")
WEIGHTS_NAME = "network.safetensors"
SETTINGS_NAME = "config.json"  # the first file of every run
SMOOTHING = 0.98  # of the losses shown: they jump tenfold from batch to batch
LOG_EVERY = 10  # steps between TensorBoard scalars
# Steps between readings of what a GPU computed, each of which waits for it; a CPU has nothing to wait for.
READ_EVERY = {"cpu": 1, "cuda": 10}
IMBALANCE = 100  # a weighted loss that many times all others at the first step drowns them
NORMALISATION_PICTURES = 64  # for channel means of user-given VGG weights


def train(
    data: Path,
    run: Path,
    config: TrainingConfig,
    *,
    device: torch.device,
    vgg: Path | None = None,
    styles: list[str] | None = None,
    initial_weights: Path | None = None,
    resume: bool = False,
    world: World = ALONE,
) -> Path:
    """Trains on the paintings of data and returns the last checkpoint's path.

    run receives checkpoints, config.json, TensorBoard events and, at the end, network.safetensors (float16). The
    network starts from initial_weights, a file of such weights or a checkpoint, or from random ones. With resume the
    newest checkpoint of run goes on; on a CPU the result is that of an uninterrupted run, bit for bit. Each process of
    world takes its part of every batch; a run may go on with another number of them.
    """
    checkpoint_path = world.decide(lambda: _checkpoint_to_resume(run, resume, initial_weights))
    world.together(lambda: check_precision(config, device))
    paintings = world.decide(lambda: find_paintings(data, styles=styles, split="train"))
    torch.manual_seed(config.seed)
    features = world.together(lambda: loss_network(vgg, paintings))
    step_module = build_step(config, features).to(device)
    optimise = Optimisation(world.averaging(step_module), config, device)
    start = 0
    if initial_weights is not None:
        weights = world.decide(lambda: load_checkpoint(initial_weights).part(NETWORK_PREFIX))
        world.together(lambda: load_parameters(step_module.network, weights, initial_weights))
    if checkpoint_path is not None:
        checkpoint = world.decide(lambda: load_checkpoint(checkpoint_path))
        start = world.together(lambda: restore(checkpoint, checkpoint_path, step_module, optimise.optimizer))
    batches = world.together(lambda: _batches(run, config, start, world))
    dataset = world.decide(lambda: training_pairs(paintings, config, vgg))
    with ExitStack() as held:
        world.decide(lambda: held.enter_context(sole_writer(run)))
        world.decide(lambda: _check_unchanged(run, checkpoint_path))
        world.decide(lambda: write_json(run / SETTINGS_NAME, config.to_dict()))
        loaded = load_batches(dataset, batches, config.workers, device)
        return _run_steps(run, config, step_module, optimise, loaded, start, world)


def _checkpoint_to_resume(run: Path, resume: bool, initial_weights: Path | None) -> Path | None:
    """The newest checkpoint of run, or None for a run that starts. UserError where that is not what was asked for."""
    if resume and initial_weights is not None:
        raise UserError("--initial-weights are for a run that starts; --resume goes on with the run's own")
    newest = newest_checkpoint(run)
    if resume and newest is None:
        raise UserError(f"{run}: holds no checkpoint to resume from")
    if newest is not None and not resume:
        raise UserError(f"{run}: holds a training run already; give --resume to go on, or another --out")
    if (run / WEIGHTS_NAME).exists() and not (run / SETTINGS_NAME).exists():
        raise UserError(
            f"{run}: holds {WEIGHTS_NAME} of something else, which would be written over; give another --out"
        )
    return newest


def _check_unchanged(run: Path, checkpoint_path: Path | None) -> None:
    """UserError where another run has gone on in the folder between the look at it and the lock."""
    if newest_checkpoint(run) != checkpoint_path:
        raise UserError(
            f"{run}: another run has changed its checkpoints meanwhile; start once more, or give another --out"
        )


def check_precision(config: TrainingConfig, device: torch.device) -> None:
    """UserError where the device has no convolutions of that precision."""
    if config.precision == "tf32" and device.type != "cuda":
        raise UserError(f"--precision tf32 is of CUDA devices, got the device {device.type}; take fp32 or bf16")


def _batches(run: Path, config: TrainingConfig, start: int, world: World) -> list[range]:
    if start >= config.iterations:
        raise UserError(f"{run}: has reached step {start} already; give more --iterations to go on")
    return world.batches(start, config.iterations, config.batch)


def training_pairs(paintings: list[Painting], config: TrainingConfig, vgg: Path | None) -> PairDataset:
    """The dataset of a run's settings; says which files are damaged."""
    dataset = PairDataset(
        paintings,
        config.crop,
        pairing=config.pairing,
        seed=config.seed,
        scale_range=(1.0, config.largest_box),
        describe=statistics_of(metric_features(vgg)) if config.pairing == "nearest" else None,
        cache_bytes=config.cache_mb * 2**20 // max(1, config.workers),
    )
    if dataset.skipped:
        print(f"{len(dataset.skipped)} damaged files left out: {', '.join(map(str, dataset.skipped))}")
    return dataset


def build_step(config: TrainingConfig, features: VGG19Features) -> TrainingStep:
    precision = config.network_precision()
    network = ReversibleNetwork(config.architecture(), precision, config.reversible)
    losses = ReconstructionLoss(
        features.convolving_in(torch.bfloat16) if precision == "bf16" else features,
        config.loss_weights(),
        ccpl=config.ccpl,
        anchors=config.anchors,
        style_distance=config.style_distance,
    )
    return TrainingStep(network, losses)


def loss_network(vgg: Path | None, paintings: list[Painting]) -> VGG19Features:
    """Channel-normalised VGG19; the normalisation of other than the default weights is measured on the paintings."""
    if vgg is None:
        return loss_features()
    stride = max(1, len(paintings) // NORMALISATION_PICTURES)
    pictures = (small_picture(painting.path) for painting in paintings[::stride])
    return loss_features(vgg, measure_channel_means(vgg, pictures))


def statistics_of(features: VGG19Features) -> Callable[[Tensor], Tensor]:
    """A painting's description for nearest pairs: channel means and deviations of each layer, at unit length."""

    @torch.no_grad()
    def describe(image: Tensor) -> Tensor:
        parts = []
        for feature in features(image[None]):
            deviation, mean = torch.std_mean(feature[0], dim=(1, 2))
            parts.append(nn.functional.normalize(torch.cat((mean, deviation)), dim=0))
        return torch.cat(parts)

    return describe


def _run_steps(
    run: Path,
    config: TrainingConfig,
    step_module: TrainingStep,
    optimise: Optimisation,
    batches: Iterator[dict],
    start: int,
    world: World,
) -> Path:
    journal, smoothed = Journal(world), {}
    saved = None
    began = time.monotonic()
    # purge_step: of a run that was killed, TensorBoard forgets the steps after the checkpoint.
    writing = world.speaker(lambda: SummaryWriter(str(run), purge_step=start))
    with (
        stop_requests() as stop,
        _disk_errors_are_told(run),
        writing as writer,
        world.speaker(_progress_bar) as progress,
    ):
        bar = progress.add_task("training", total=config.iterations, completed=start, status="")
        for step, batch in enumerate(batches, start):
            outcome = optimise(step, batch["degraded"], batch["reference"])
            journal.add(step, outcome, [*batch["degraded_file"], *batch["reference_file"]])
            done = step + 1
            progress.update(bar, completed=done)
            stopped = world.largest(stop.signal)
            saving = done % config.checkpoint_every == 0 or done == config.iterations or stopped
            if step == start or done % READ_EVERY[batch["degraded"].device.type] == 0 or saving:
                rate = (done - start) * config.batch / (time.monotonic() - began)
                for record in journal.read():
                    _report(record, progress, writer, smoothed)
                progress.update(bar, status=_status(smoothed, rate))
                writer.add_scalar("speed/images_per_second", rate, step)
            if step % config.sample_every == 0:
                _log_pictures(writer, step, batch, outcome)
            if done == config.iterations:
                # Before the last checkpoint, which says that the run is complete.
                world.decide(partial(save_weights, run, config, step_module, done))
            if saving:
                saved = world.decide(partial(save_training, run, config, step_module, optimise.optimizer, done))
            if stopped:
                raise InterruptedError(stopped, f"stopped by signal at step {done}; saved {saved}")
    if (trouble := journal.summary()) is not None:
        world.tell(trouble)
    return saved


@contextmanager
def _disk_errors_are_told(run: Path) -> Iterator[None]:
    """A disk too full for TensorBoard's file, say, becomes a UserError."""
    previous = threading.excepthook

    def pass_over(trouble: threading.ExceptHookArgs) -> None:
        # TensorBoard's thread hands its error on to the next call of the writer.
        if not isinstance(trouble.exc_value, OSError):
            previous(trouble)

    threading.excepthook = pass_over
    try:
        yield
    except InterruptedError:
        raise
    except OSError as error:
        raise UserError(f"{run}: training cannot go on ({error.strerror}); the last checkpoint is kept") from error
    finally:
        threading.excepthook = previous


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )


def save_weights(run: Path, config: TrainingConfig, step_module: TrainingStep, step: int) -> None:
    save_network(run / WEIGHTS_NAME, step_module.network, {"training": config.to_dict(), "step": step})


def save_training(
    run: Path, config: TrainingConfig, step_module: TrainingStep, optimizer: torch.optim.Adam, step: int
) -> Path:
    """Writes checkpoint-<step>.safetensors and then removes all but the newest keep_checkpoints."""
    tensors = {NETWORK_PREFIX + name: value for name, value in step_module.network.state_dict().items()}
    tensors |= {LOSSES_PREFIX + name: value for name, value in _trained_losses(step_module).items()}
    names = [name for name, _ in step_module.named_parameters()]
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{OPTIMIZER_PREFIX}{names[index]}.{key}": value for key, value in state.items()}
    path = run / f"checkpoint-{step:07d}.safetensors"
    description = {
        "architecture": step_module.network.architecture.to_dict(),
        "training": config.to_dict(),
        "step": step,
    }
    save_checkpoint(path, tensors, description)
    for old in checkpoints_of(run)[: -config.keep_checkpoints]:
        old.unlink(missing_ok=True)
    return path


def restore(checkpoint: Checkpoint, path: Path, step_module: TrainingStep, optimizer: torch.optim.Adam) -> int:
    """Fills network, projection heads and optimiser; returns the number of steps done."""
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
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(checkpoint.description["step"])


def _trained_losses(step_module: TrainingStep) -> dict[str, Tensor]:
    """The projection heads' parameters; the VGG's are constants and stay out of checkpoints."""
    return {name: value for name, value in step_module.losses.named_parameters()}


def checkpoints_of(run: Path) -> list[Path]:
    """The run's own, oldest first; a copy that somebody keeps there under another name is none of them."""
    named = ((CHECKPOINT_NAME.fullmatch(path.name), path) for path in run.glob("checkpoint-*"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]


def newest_checkpoint(run: Path) -> Path | None:
    return next(reversed(checkpoints_of(run)), None)


def resumed_config(run: Path, overrides: dict[str, object]) -> TrainingConfig:
    """Settings of run's newest checkpoint, with those overrides that are not None, none of them among SHAPING."""
    path = newest_checkpoint(run)
    if path is None:
        raise UserError(f"{run}: holds no checkpoint to resume from")
    known = {field.name for field in fields(TrainingConfig)}
    stored = load_checkpoint(path).description["training"]
    before = TrainingConfig(**{name: value for name, value in stored.items() if name in known})
    config = checked(replace(before, **{name: value for name, value in overrides.items() if value is not None}))
    for name in SHAPING:
        wanted, got = getattr(before, name), getattr(config, name)
        if got != wanted:
            raise UserError(f"{option(name)} must be {wanted}, as when the run in {run} was started, got {got}")
    return config


@dataclass
class StopRequest:
    """The first SIGINT or SIGTERM that came, 0 while none has."""

    signal: int = 0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns Ctrl-C and SIGTERM into a request that the loop sees after its step; a second one acts at once."""
    request = StopRequest()
    previous = {}

    def remember(number: int, frame: object) -> None:
        request.signal = number
        signal.signal(number, previous[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.getsignal(number)
        signal.signal(number, remember)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _status(smoothed: dict[str, float], rate: float) -> str:
    shown = " ".join(f"{name} {value:.3g}" for name, value in smoothed.items())
    return f"{shown} · {rate:.2f} images/s"


def _report(record: StepRecord, progress: Progress, writer: SummaryWriter, smoothed: dict[str, float]) -> None:
    """Shows what was found in one step, and blends its losses into smoothed."""
    if record.skipped:
        progress.console.print(f"[yellow]skipped {record.complaint()}[/yellow]")
        return
    for name, value in record.losses.items():
        smoothed[name] = SMOOTHING * smoothed.get(name, value) + (1 - SMOOTHING) * value
    if record.step == 0:
        _warn_of_imbalance(record.losses, progress)
    if record.step % LOG_EVERY == 0:
        for name, value in record.numbers.items():
            writer.add_scalar(f"{'loss' if name in record.losses else 'step'}/{name}", value, record.step)


def _warn_of_imbalance(losses: dict[str, float], progress: Progress) -> None:
    terms = {name: value for name, value in losses.items() if name != "total"}
    progress.console.print("weighted losses at step 0: " + ", ".join(f"{k} {v:.3g}" for k, v in terms.items()))
    *_, second, largest = [0.0, *sorted(terms.values())]
    if largest > IMBALANCE * second:
        progress.console.print(f"[yellow]one of them exceeds all others by more than {IMBALANCE} times[/yellow]")


def _log_pictures(writer: SummaryWriter, step: int, batch: dict, outcome: Outcome) -> None:
    rows = [batch["degraded"][0], batch["reference"][0], outcome.result[0].clamp(0, 1)]
    writer.add_image("degraded | reference | result", torch.cat(rows, 2), step)
