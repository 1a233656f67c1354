"""The training loop: pairs in, checkpoints and TensorBoard scalars out, resumable to the bit on a CPU."""

from __future__ import annotations

import math
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from restoration.checkpoints import NETWORK_PREFIX, load_checkpoint, load_parameters
from restoration.collection import Painting, find_paintings
from restoration.config import TrainingConfig
from restoration.data import PairDataset, small_picture
from restoration.distributed import ALONE, World
from restoration.errors import ReportedError, UserError
from restoration.files import sole_writer, write_json
from restoration.flow import ReversibleNetwork
from restoration.journal import Journal, StepRecord, TrainingDivergedError
from restoration.loader import load_batches
from restoration.losses import ReconstructionLoss
from restoration.memory import telling_of_memory
from restoration.progress import LastingConsole
from restoration.runs import (
    SETTINGS_NAME,
    changed_inputs,
    check_unchanged,
    checkpoint_to_resume,
    checkpoints_of,
    inputs_of,
    load_training,
    remove_old_checkpoints,
    restore,
    save_training,
    save_weights,
    where_to_go_on,
)
from restoration.step import Optimisation, Outcome, TrainingStep
from restoration.vgg import VGG19Features, load_vgg_weights, loss_features, measure_channel_means, metric_features

SMOOTHING = 0.98  # of the losses shown: they jump tenfold from batch to batch
LOG_EVERY = 10  # steps between TensorBoard scalars
# Steps between readings of what a GPU computed, each of which waits for it; a CPU has nothing to wait for.
READ_EVERY = {"cpu": 1, "cuda": 10}
IMBALANCE = 100  # a weighted loss that many times all others at the first step drowns them
NORMALISATION_PICTURES = 64  # for channel means of user-given VGG weights
AGAIN = 2.0  # seconds; signals to a whole job come to its processes twice, the second time by way of torchrun
LOST_WORKER = re.compile(r"DataLoader worker \(pid.*?\) (is killed|exited)")


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
    newest checkpoint of run goes on, with the styles and the loss network that it had where none are given; on a CPU
    the result is that of an uninterrupted run, bit for bit. Each process of world takes its part of every batch; a run
    may go on with another number of them.
    """
    checkpoint_path = world.decide(lambda: checkpoint_to_resume(run, resume, initial_weights))
    world.together(lambda: check_precision(config, device))
    checkpoint = None
    if checkpoint_path is not None:
        checkpoint = world.decide(lambda: load_training(checkpoint_path))
        before = checkpoint.description.get("inputs", {})
        styles = styles or before.get("styles")
        vgg = vgg or (before.get("vgg") and Path(before["vgg"]))
    # Before paintings are read, which can take minutes: what else may be wrong.
    weights = None
    if initial_weights is not None:
        weights = world.decide(lambda: weights_that_fit(config, initial_weights))
    world.together(lambda: load_vgg_weights(vgg))
    start = 0 if checkpoint is None else int(checkpoint.description["step"])
    batches = world.together(lambda: _batches(run, config, start, world))
    paintings = world.decide(lambda: find_paintings(data, styles=styles, split="train"))
    inputs = world.decide(lambda: inputs_of(data, paintings, styles, vgg))
    if checkpoint is not None:
        for name in changed_inputs(before, inputs):
            world.tell(f"{name} are not those that {checkpoint_path.name} was trained with: the run goes on with these")
    dataset = world.decide(lambda: training_pairs(paintings, config, vgg))
    torch.manual_seed(config.seed)
    features = world.together(lambda: loss_network(vgg, dataset.paintings))
    step_module = build_step(config, features).to(device)
    optimise = Optimisation(world.averaging(step_module), config, device)
    if weights is not None:
        world.together(lambda: load_parameters(step_module.network, weights, initial_weights))
    if checkpoint is not None:
        world.together(lambda: restore(checkpoint, checkpoint_path, step_module, optimise.optimizer))
    with ExitStack() as held:
        world.decide(lambda: held.enter_context(sole_writer(run)))
        world.decide(lambda: check_unchanged(run, checkpoint_path))
        world.decide(lambda: write_json(run / SETTINGS_NAME, config.to_dict()))
        loaded = load_batches(dataset, batches, config.workers, device)
        return _run_steps(run, config, step_module, optimise, loaded, inputs, start, world)


def check_precision(config: TrainingConfig, device: torch.device) -> None:
    """UserError where the device has no convolutions of that precision."""
    if config.precision == "tf32" and device.type != "cuda":
        raise UserError(f"--precision tf32 is of CUDA devices, got the device {device.type}; take fp32 or bf16")


def weights_that_fit(config: TrainingConfig, path: Path) -> dict[str, Tensor]:
    """The network's parameters that a file holds; UserError where they are not those of the settings' architecture."""
    weights = load_checkpoint(path).part(NETWORK_PREFIX)
    load_parameters(ReversibleNetwork(config.architecture()), weights, path)
    return weights


def _batches(run: Path, config: TrainingConfig, start: int, world: World) -> Iterator[range]:
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
        temperature=config.temperature,
        projection=config.projection,
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
    inputs: dict[str, object],
    start: int,
    world: World,
) -> Path:
    journal, smoothed = Journal(world), {}
    saved, due, unproven, done = None, False, math.inf, start

    def save() -> Path:
        return save_training(run, config, step_module, optimise.optimizer, inputs, done)

    def save_what_was_trained() -> None:
        journal.read()
        if done > start and not journal.skipped_in_a_row:
            world.tell(f"saved {save()}, from which --resume goes on")

    began = time.monotonic()
    # purge_step: of a run that was killed, TensorBoard forgets the steps after the checkpoint.
    writing = world.speaker(lambda: SummaryWriter(str(run), purge_step=start))
    with (
        stop_requests() as stop,
        _told_in_one_line(run, world),
        writing as writer,
        world.speaker(_progress_bar) as progress,
    ):
        bar = progress.add_task("training", total=config.iterations, completed=start, status="")
        for step, batch in enumerate(until_they_end(batches, world, save_what_was_trained), start):
            outcome = optimise(step, batch["degraded"], batch["reference"])
            journal.add(step, outcome, [*batch["degraded_file"], *batch["reference_file"]])
            done = step + 1
            progress.update(bar, completed=done)
            stopped = world.largest(stop.signal)
            complete = done == config.iterations
            due = due or done % config.checkpoint_every == 0
            ending = complete or stopped
            if step == start or done % READ_EVERY[batch["degraded"].device.type] == 0 or due or ending:
                rate = (done - start) * config.batch / (time.monotonic() - began)
                for record in journal.read():
                    _report(record, progress, writer, smoothed)
                progress.update(bar, status=_status(smoothed, rate))
                writer.add_scalar("speed/images_per_second", rate, step)
            if step % config.sample_every == 0:
                _log_pictures(writer, step, batch, outcome)
            if complete and journal.last_good < start:
                raise TrainingDivergedError(f"{record.complaint()}; all {done - start} steps were skipped", start)
            if complete:
                # Before the last checkpoint, which says that the run is complete.
                world.decide(partial(save_weights, run, config, step_module, done))
            # Where weights are past use, every step is skipped: not from them should a run go on.
            if ending or (due and not journal.skipped_in_a_row):
                saved, due, unproven = world.decide(save), False, done
            # A step that was not skipped has proved the weights from which it went out; until then older ones stay.
            if unproven <= journal.last_good or (complete and journal.last_good == step):
                world.decide(partial(remove_old_checkpoints, run, config.keep_checkpoints))
                unproven = math.inf
            if stopped:
                skipped = journal.skipped_in_a_row
                doubt = f", which may be past use: the last {skipped} steps were skipped" if skipped else ""
                raise InterruptedError(stopped, f"stopped by signal at step {done}; saved {saved}{doubt}")
    if (trouble := journal.summary()) is not None:
        world.tell(trouble)
    return saved


def until_they_end(batches: Iterator[dict], world: World, save: Callable[[], None]) -> Iterator[dict]:
    """The batches. Where a picture or a process has gone, and no more can come, the one process of world saves."""
    try:
        yield from batches
    except (UserError, RuntimeError):
        # Several would have to agree first, and the others wait for this one's part of a step.
        if world.size == 1:
            save()
        raise


@contextmanager
def _told_in_one_line(run: Path, world: World) -> Iterator[None]:
    """What a disk, memory, the system or the weights put an end to becomes a UserError that says what to do."""
    previous = threading.excepthook

    def pass_over(trouble: threading.ExceptHookArgs) -> None:
        # TensorBoard's thread hands its error on to the next call of the writer.
        if not isinstance(trouble.exc_value, OSError):
            previous(trouble)

    threading.excepthook = pass_over
    try:
        with memory_told_in_one_line():
            yield
    except InterruptedError:
        raise
    except TrainingDivergedError as error:  # of all processes together
        if not world.first:
            raise ReportedError(str(error)) from error
        raise TrainingDivergedError(f"{error}; {where_to_go_on(run, error.first)}", error.first) from error
    except OSError as error:
        kept = "checkpoints are kept" if checkpoints_of(run) else "no checkpoint was made"
        # What fails to be written has no name: it can be what is printed, too.
        raise UserError(f"{run}, or this output: training cannot go on ({error.strerror}); {kept}") from error
    finally:
        threading.excepthook = previous


@contextmanager
def memory_told_in_one_line() -> Iterator[None]:
    """The end of memory, that of a process that loads pictures too, becomes a UserError that says what to do."""
    try:
        with telling_of_memory("memory does not suffice for a step; take a smaller --crop or --batch"):
            yield
    except RuntimeError as error:
        if LOST_WORKER.search(str(error)) is None:
            raise
        raise UserError(
            f"a process that loads pictures has ended ({error}); where memory or /dev/shm is short, take fewer "
            "--workers or less --cache-mb"
        ) from error


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
        console=LastingConsole(),
    )


@dataclass
class StopRequest:
    """The first SIGINT, SIGTERM or SIGHUP that came, 0 while none has."""

    signal: int = 0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns signals to leave into a request that the loop sees after its step; one AGAIN later acts at once.

    They are Ctrl-C, SIGTERM, and that of a terminal that closes, unless nohup has it ignored.
    """
    request = StopRequest()
    previous = {}
    came = math.inf

    def remember(number: int, frame: object) -> None:
        nonlocal came
        if time.monotonic() > came + AGAIN:
            signal.signal(number, previous[number])
            signal.raise_signal(number)
            return
        came = min(came, time.monotonic())
        request.signal = number

    hangup = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    for number in (signal.SIGINT, signal.SIGTERM, *hangup):
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
        _warn(f"skipped {record.complaint()}", progress)
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
    compared = sorted(value for value in terms.values() if value != 0)  # 0 is what is switched off
    if len(compared) > 1 and compared[-1] > IMBALANCE * compared[-2]:
        _warn(f"one of them exceeds all others by more than {IMBALANCE} times", progress)


def _warn(text: str, progress: Progress) -> None:
    # Names of files may hold brackets, and long lines are for log files.
    progress.console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _log_pictures(writer: SummaryWriter, step: int, batch: dict, outcome: Outcome) -> None:
    rows = [batch["degraded"][0], batch["reference"][0], outcome.result[0].clamp(0, 1)]
    writer.add_image("degraded | reference | result", torch.cat(rows, 2), step)
