"""Several processes on one job: the same gradients, batches and checkpoints as one process, and a common end."""

import contextlib
import io
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from restoration.checkpoints import load_checkpoint, save_network
from restoration.cli import main
from restoration.config import make_config
from restoration.distributed import World, joined
from restoration.errors import LostPeerError, ReportedError, UserError
from restoration.flow import Architecture, ReversibleNetwork
from restoration.journal import StepRecord, TrainingDivergedError, joined_record
from restoration.runs import newest_checkpoint
from restoration.step import Optimisation, TrainingStep
from restoration.train import _told_in_one_line, build_step, train
from restoration.vgg import loss_features

CPU = torch.device("cpu")
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["restoration.train"])


def config(**overrides):
    tiny = {"crop": 24, "batch": 2, "blocks": 1, "iterations": 4, "checkpoint_every": 2, "sample_every": 100}
    return make_config("small", **{**tiny, **overrides})


def _answer(rank: int, size: int, port: int, work: Callable, arguments: tuple, answer: Connection) -> None:
    # What torchrun tells its processes; the store that they meet at is the test's.
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    torch.set_num_threads(1)
    try:
        found = work(*arguments)
    except Exception as error:
        found = error
    answer.send(found)


def in_world(work, *arguments):
    with joined() as world:
        return work(world, *arguments)


def on_processes(size, work, *arguments, timeout=120):
    """What work(*arguments) returned or raised on each of some processes; None of one that was killed."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    processes, answers = [], []
    for rank in range(size):
        receiver, sender = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=_answer, args=(rank, size, store.port, work, arguments, sender))
        process.start()
        sender.close()
        processes.append((process, receiver))
    try:
        for _, receiver in processes:
            assert receiver.poll(timeout), "a process does not end"
            try:
                answers.append(receiver.recv())
            except EOFError:
                answers.append(None)
        return answers
    finally:
        for process, _ in processes:
            process.kill()
            process.join()


def pictures(count):
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=(24, 24), mode="bicubic").clamp(0, 1)


def gradients(world, reversible):
    """Of one step with two pairs over the world, and what the step tells; NumPy arrays need no shared memory."""
    torch.manual_seed(world.rank)  # parameters come from the first process
    # float64: in float32, how many pictures are convolved at once changes the last bits, and the streams' rounding.
    step = build_step(config(), loss_features()).double()
    step.network.reversible = reversible
    degraded, reference = (world.share(images) for images in pictures(4).double().chunk(2))
    averaging = world.averaging(step)
    outcome = averaging(degraded, reference, torch.Generator().manual_seed(1))
    sum(outcome.losses.values()).backward()
    losses = {name: value.item() for name, value in outcome.losses.items()}
    return losses, {name: parameter.grad.numpy() for name, parameter in step.named_parameters()}


def test_an_option_of_one_process_is_refused_once():
    World().refuse_company("--profile")
    with pytest.raises(UserError, match="--profile takes one process, got 2: leave torchrun out") as first:
        World(rank=0, size=2).refuse_company("--profile")
    assert not isinstance(first.value, ReportedError)
    with pytest.raises(ReportedError, match="--profile takes one process"):
        World(rank=1, size=2).refuse_company("--profile")


@pytest.mark.parametrize(("rank", "error"), [(0, TrainingDivergedError), (1, ReportedError)])
def test_what_all_processes_find_is_reported_by_the_first(tmp_path, rank, error):
    with pytest.raises(error, match="step 3: no use"), _told_in_one_line(tmp_path, World(rank, 2)):
        raise TrainingDivergedError("step 3: no use")


def test_each_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch):
    taken, world, cuda = [], World(rank=3, size=4), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")  # of the second of two machines
    assert world.own_device(cuda) == torch.device("cuda", 1) and taken == [1]
    assert world.own_device(CPU) == CPU and World().own_device(cuda) == cuda
    monkeypatch.setenv("LOCAL_RANK", "2")
    saying = "--nproc_per_node must be at most the number of GPUs here, 2; process 2 has none"
    with pytest.raises(UserError, match=saying):
        world.own_device(cuda)


@pytest.mark.parametrize("reversible", [True, False])
def test_gradients_are_those_of_the_joined_batch(reversible):
    losses, expected = gradients(World(), reversible)
    (first_losses, first), (second_losses, second) = on_processes(2, in_world, gradients, reversible)
    scale = np.sqrt(sum(np.square(gradient).sum() for gradient in expected.values()))
    for name, gradient in expected.items():
        assert np.array_equal(first[name], second[name]), name
        assert np.abs(first[name] - gradient).max() <= 1e-13 * scale, name
    for name, loss in losses.items():
        assert (first_losses[name] + second_losses[name]) / 2 == pytest.approx(loss, rel=1e-13), name


def skipped(world):
    """Whether a step is whose streams leave their range in the second process alone."""
    optimise = Optimisation(world.averaging(build_step(config(), loss_features())), config(), CPU)
    degraded, reference = pictures(2).chunk(2)
    outcome = optimise(0, degraded, reference * 1_000.0 if world.rank == 1 else reference)
    return outcome.numbers[outcome.names.index("skipped")].item()


def test_a_step_out_of_range_in_one_process_is_skipped_by_all():
    assert on_processes(2, in_world, skipped) == [1, 1]


def test_batches_do_not_depend_on_the_number_of_processes():
    whole = list(World().batches(3, 6, 4))
    assert whole == [range(12, 16), range(16, 20), range(20, 24)]
    for size in (2, 4):
        parts = [World(rank, size).batches(3, 6, 4) for rank in range(size)]
        assert [[number for part in step for number in part] for step in zip(*parts, strict=True)] == list(
            map(list, whole)
        )
    with pytest.raises(UserError, match="--batch must be divisible by the number of processes, 3, got 4"):
        World(0, 3).batches(0, 1, 4)


def test_a_joined_record_tells_of_the_whole_batch():
    def record(loss, stream, fallbacks, file):
        numbers = {"style": loss, "largest_stream": stream, "ridge_fallbacks": fallbacks, "skipped": 1.0}
        return StepRecord(5, numbers, [file])

    joined_numbers = {"style": 2.0, "largest_stream": 8.0, "ridge_fallbacks": 3.0, "skipped": 1.0}
    assert joined_record([record(1.0, 8.0, 1.0, "a"), record(3.0, 2.0, 2.0, "b")]) == StepRecord(
        5, joined_numbers, ["a", "b"]
    )
    poisoned = joined_record([record(1.0, 8.0, 0.0, "a"), record(float("nan"), float("nan"), 0.0, "b")])
    assert np.isnan(poisoned.numbers["style"]) and np.isnan(poisoned.numbers["largest_stream"])


def largest_of_two(world):
    return world.largest(15), world.largest(world.rank)


def test_the_largest_number_is_no_sum():
    assert on_processes(2, in_world, largest_of_two) == [(15, 1)] * 2


def train_without_writing(world, paintings, run):
    """Of any process but the first."""
    writes = ("save_training", "save_weights", "write_json", "remove_old_checkpoints")
    refused = {f"restoration.train.{name}": AssertionError(name) for name in writes if world.rank > 0}
    with contextlib.ExitStack() as patches:
        for name, error in refused.items():
            patches.enter_context(mock.patch(name, side_effect=error))
        return train_on(world, paintings, run, {"keep_checkpoints": 1, "checkpoint_every": 1})


def test_one_process_writes(paintings, tmp_path):
    found = on_processes(2, in_world, train_without_writing, paintings, tmp_path / "run")
    assert found == [tmp_path / "run" / "checkpoint-0000004.safetensors"] * 2
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


def train_on(world, paintings, run, options, resume=False):
    return train(paintings, run, config(**options), device=CPU, world=world, resume=resume)


def tensors(path):
    return load_checkpoint(path).tensors


def test_a_run_goes_on_with_another_number_of_processes(paintings, tmp_path):
    whole = on_processes(2, in_world, train_on, paintings, tmp_path / "whole", {})
    assert whole == [tmp_path / "whole" / "checkpoint-0000004.safetensors"] * 2
    assert len(list((tmp_path / "whole").glob("events*"))) == 1

    parts, alone = tmp_path / "parts", tmp_path / "alone"
    on_processes(2, in_world, train_on, paintings, parts, {"iterations": 2})
    shutil.copytree(parts, alone)
    resumed, _ = on_processes(2, in_world, train_on, paintings, parts, {}, True)
    expected, found = tensors(whole[0]), tensors(resumed)
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name

    single = tensors(train_on(World(), paintings, alone, {}, resume=True))
    rates = 2 * config().learning_rate  # the most that two steps of Adam move a parameter
    for name, tensor in expected.items():
        if name.startswith("network."):
            assert (tensor - single[name]).abs().max() <= 2 * rates, name


def stop_one(world, paintings, run):
    if world.rank == 1:
        real, steps = TrainingStep.forward, itertools.count()

        def forward(module, *arguments):
            if next(steps) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(module, *arguments)

        TrainingStep.forward = forward
    train_on(world, paintings, run, {"iterations": 1_000, "checkpoint_every": 1_000})


def test_a_stop_request_to_one_process_stops_all_after_the_same_step(paintings, tmp_path):
    stops = on_processes(2, in_world, stop_one, paintings, tmp_path / "run")
    assert [type(stop) for stop in stops] == [InterruptedError] * 2
    assert {str(stop) for stop in stops} == {str(stops[0])}
    assert load_checkpoint(newest_checkpoint(tmp_path / "run")).description["step"] == 2


def fail_in_one(world, paintings, run, failure):
    if world.rank == 1:

        def forward(module, *arguments):
            if failure == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("broken")

        TrainingStep.forward = forward
    train_on(world, paintings, run, {})


@pytest.mark.parametrize("failure", ["killed", "raised"])
def test_the_others_leave_when_one_fails(paintings, tmp_path, failure):
    # Far below the time that collectives wait for a living peer.
    first, _ = on_processes(2, in_world, fail_in_one, paintings, tmp_path / "run", failure, timeout=60)
    assert type(first) is LostPeerError


def test_the_group_is_taken_down_in_order_only_where_nothing_failed(monkeypatch):
    taken_down = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **options: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: taken_down.append(True))
    with pytest.raises(MemoryError), joined():
        raise MemoryError
    assert not taken_down
    with joined():
        pass
    assert taken_down


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        ("RuntimeError('broken')", 1, "RuntimeError: broken"),
        ("MemoryError('full')", 2, "error: memory does not suffice"),
        ("errors.UserError('--crop')", 2, "error: --crop"),
        ("SystemExit(0)", 0, ""),
        ("SystemExit", 0, ""),
    ],
)
def test_a_process_among_others_leaves_at_once_whatever_the_end(failure, code, message):
    script = f"""
import atexit
from restoration import cli, errors

def app():
    raise {failure}

cli.app = app
atexit.register(print, "taken down in order")
cli.main()
"""
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2"}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert ended.stderr.splitlines()[-1:] == [message] * bool(message)


def report(world, question):
    answers = []
    for ask in (world.decide, world.together):
        try:
            answers.append(ask(lambda: question(world.rank)))
        except UserError as error:
            answers.append((type(error), str(error)))
    return answers


def answered(rank):
    return 10 + rank


def refused_by_second(rank):
    if rank == 1:
        raise UserError("cannot")
    return rank


def refused_by_first(rank):
    if rank == 0:
        raise UserError("cannot")
    return rank


def test_decisions_and_errors_are_common_and_reported_once():
    assert on_processes(2, in_world, report, answered) == [[10, 10], [10, 11]]
    said, heard = (UserError, "cannot"), (ReportedError, "cannot")
    assert on_processes(2, in_world, report, refused_by_first) == [[said, said], [heard, heard]]
    assert on_processes(2, in_world, report, refused_by_second) == [[0, heard], [0, said]]


def test_a_run_is_refused_by_all_before_it_starts(paintings, tmp_path):
    errors = on_processes(2, in_world, train_on, paintings, tmp_path / "run", {"batch": 3})
    assert [type(error) for error in errors] == [UserError, ReportedError]
    assert str(errors[0]) == str(errors[1]) and "--batch must be divisible" in str(errors[0])
    assert not (tmp_path / "run").exists()


def command(*arguments):
    """Exit code, standard output and standard error of a command."""
    sys.argv = ["restoration", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    # A process with peers leaves by it, whatever the end, or the threads of the group might abort it: here to send what
    # it has said.
    leaving = mock.patch("os._exit", side_effect=sys.exit)
    with redirect_stdout(out), redirect_stderr(err), leaving as leave, suppress(SystemExit):
        main()
    (code,) = leave.call_args.args
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def folders(tmp_path):
    """Three black pictures to recolour after as many, and weights that only black ones survive."""
    network = ReversibleNetwork(Architecture(4, 1, 1))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.mul_(0.0 if name.endswith("bias") else 1e4)
    save_network(tmp_path / "weights.safetensors", network, {})
    for name in ("faded", "kept"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (16, 16)).save(tmp_path / name / f"{number}.png")
    return tmp_path


def test_processes_share_the_files_of_a_folder(folders):
    order = ("reconstruct", folders / "faded", folders / "kept", "-o", folders / "out", "--device", "cpu")
    order += ("--checkpoint", folders / "weights.safetensors")
    (first_code, first, first_error), (second_code, second, second_error) = on_processes(2, command, *order)
    assert (first_code, second_code, first_error, second_error) == (0, 0, "", "")
    assert [line.split(":")[0] for line in first.splitlines()] == [str(folders / "out" / f"{n}.png") for n in (0, 2)]
    assert [line.split(":")[0] for line in second.splitlines()] == [str(folders / "out" / "1.png")]
    assert sorted(path.name for path in (folders / "out").iterdir()) == ["0.png", "1.png", "2.png"]

    (first_code, _, first_error), (second_code, _, second_error) = on_processes(2, command, *order)
    assert (first_code, second_code) == (2, 2) and second_error == ""
    assert "exists already" in first_error and first_error.count("\n") == 1

    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for name in ("faded", "kept"):
        Image.fromarray(noise).save(folders / name / "1.png")
    (first_code, first, first_error), (second_code, _, second_error) = on_processes(2, command, *order, "--force")
    assert (first_code, second_code) == (2, 2)
    assert "do not suit this picture" in second_error and second_error.count("\n") == 1
    assert first_error == "error: 1 of 3 pictures could not be recoloured, for the reasons above\n"
    assert len(first.splitlines()) == 2  # the first process did its share all the same


@pytest.fixture
def torchrun(paintings, tmp_path):
    """A run on two processes that goes on and on, when it has begun: torchrun, and the two by rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "restoration", "train", "--preset", "small", "--crop", "24", "--blocks", "1", "--device", "cpu"]
    command += ["--data", str(paintings), "--out", str(tmp_path / "run"), "--checkpoint-every", "1000"]
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("events*")) and launcher.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    ranks = {}
    for child in map(int, children):
        variables = dict(entry.partition("=")[::2] for entry in Path(f"/proc/{child}/environ").read_text().split("\0"))
        ranks[int(variables["RANK"])] = child
    yield launcher, ranks
    for process in (launcher.pid, *ranks.values()):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    launcher.wait()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_ends_in_seconds_when_one_process_is_killed(torchrun, victim):
    launcher, ranks = torchrun
    os.kill(ranks[victim], signal.SIGKILL)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert not any(Path(f"/proc/{process}").exists() for process in ranks.values())
    assert "forcefully" not in errors  # what torchrun says when it kills a process that has not left by itself


@pytest.mark.slow
def test_torchrun_passes_on_a_request_to_stop(torchrun, tmp_path):
    launcher, ranks = torchrun
    launcher.send_signal(signal.SIGINT)
    _, errors = launcher.communicate(timeout=60)
    assert errors.count("stopped by signal") == 1
    assert not any(Path(f"/proc/{process}").exists() for process in ranks.values())
    assert load_checkpoint(newest_checkpoint(tmp_path / "run")).description["step"] >= 1
