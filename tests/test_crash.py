"""Runs that are killed at any moment, and disks that fill up: what is left can be read and gone on with."""

import errno
import fcntl
import io
import multiprocessing
import os
import random
import resource
import signal
import time
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch

from restoration.checkpoints import load_checkpoint, load_network, save_checkpoint
from restoration.config import make_config
from restoration.errors import UserError
from restoration.files import LOCK_FILE, PARTIAL_SUFFIX, sole_writer, write_whole
from restoration.runs import newest_checkpoint
from restoration.train import train

# Its children are forked from a process that has imported what they need, and computed nothing: they start at once.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["restoration.train"])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def save_for_ever(folder, step, saved):
    """Checkpoints as fast as they can be written; tells through the pipe which ones it is done with."""
    with sole_writer(folder):
        while True:
            step += 1
            tensors = {"network.value": torch.full((500_000,), float(step))}
            save_checkpoint(folder / f"checkpoint-{step:07d}.safetensors", tensors, {"step": step})
            (folder / f"checkpoint-{step - 1:07d}.safetensors").unlink(missing_ok=True)
            saved.send(step)


def test_a_writer_killed_at_any_moment_leaves_its_last_checkpoint(tmp_path):
    generator = random.Random(0)
    step, kills, interrupted = 0, 0, 0
    # About half of them fall into the writing of a checkpoint; fewer where other processes keep the cores.
    while kills < 12 or (interrupted == 0 and kills < 60):
        kills += 1
        receiver, sender = PROCESSES.Pipe(duplex=False)
        writer = PROCESSES.Process(target=save_for_ever, args=(tmp_path, step, sender))
        writer.start()
        sender.close()
        told = receiver.recv()  # it is at work
        time.sleep(generator.uniform(0, 0.02))  # some checkpoints' worth
        writer.kill()
        writer.join()
        while receiver.poll():
            try:
                told = receiver.recv()
            except EOFError:
                break
        interrupted += any(name.endswith(PARTIAL_SUFFIX) for name in names(tmp_path))
        checkpoints = [load_checkpoint(path) for path in sorted(tmp_path.glob("checkpoint-*"))]
        step = checkpoints[-1].description["step"]
        assert step >= told
        for checkpoint in checkpoints:
            assert (checkpoint.tensors["network.value"] == checkpoint.description["step"]).all()
    assert interrupted > 0, "no kill fell into the writing of a checkpoint"
    with sole_writer(tmp_path):
        assert not any(name.endswith(PARTIAL_SUFFIX) for name in names(tmp_path))


def save_on_a_full_disk(path, answer):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # what a full disk does to a write, without its rights
    try:
        save_checkpoint(path, {"network.value": torch.ones(5_000)}, {"step": 2})
    except UserError as error:
        answer.send(str(error))


def test_a_full_disk_is_reported_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "checkpoint-0000001.safetensors"
    save_checkpoint(path, {"network.value": torch.zeros(5)}, {"step": 1})
    before = path.read_bytes()
    receiver, sender = PROCESSES.Pipe(duplex=False)
    writer = PROCESSES.Process(target=save_on_a_full_disk, args=(path, sender))
    writer.start()
    message = receiver.recv()
    writer.join()
    assert str(path) in message and "File too large" in message and "\n" not in message
    assert path.read_bytes() == before and names(tmp_path) == [path.name]


def train_to(answer, run, paintings, iterations, largest_file=resource.RLIM_INFINITY, checkpoint_every=1):
    """Starts or resumes a run; tells when it is at work, and what it complains of."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    torch.set_num_threads(1)
    tiny = {"crop": 24, "batch": 1, "blocks": 1, "iterations": iterations, "keep_checkpoints": 1}
    answer.send("begun")
    settings = make_config("small", **tiny, checkpoint_every=checkpoint_every, sample_every=1)
    resume = newest_checkpoint(run) is not None
    with redirect_stderr(io.StringIO()) as printed:
        try:
            train(paintings, run, settings, device=torch.device("cpu"), resume=resume)
        except UserError as error:
            answer.send(f"{error}{printed.getvalue()}")


def started_training(*arguments):
    receiver, sender = PROCESSES.Pipe(duplex=False)
    trainer = PROCESSES.Process(target=train_to, args=(sender, *arguments))
    trainer.start()
    sender.close()
    assert receiver.recv() == "begun"
    return trainer, receiver


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_like_an_undisturbed_one(tmp_path, paintings):
    undisturbed, _ = started_training(tmp_path / "undisturbed", paintings, 12)
    undisturbed.join()
    expected = load_checkpoint(newest_checkpoint(tmp_path / "undisturbed")).tensors

    run, generator, kills = tmp_path / "run", random.Random(0), 0
    while True:
        trainer, _ = started_training(run, paintings, 12)
        reached = newest_checkpoint(run) or run
        while (newest_checkpoint(run) or run) == reached and trainer.is_alive():
            time.sleep(0.001)
        trainer.join(generator.uniform(0, 0.3))  # some steps, one of whose checkpoints may be half written by then
        if trainer.exitcode is not None:
            break
        trainer.kill()
        trainer.join()
        kills += 1
        assert newest_checkpoint(run) > reached
    assert trainer.exitcode == 0 and kills > 1
    found = load_checkpoint(newest_checkpoint(run)).tensors
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert not any(name.endswith(PARTIAL_SUFFIX) for name in names(run))
    assert load_network(run / "network.safetensors") is not None


def test_a_run_on_a_full_disk_says_so_and_keeps_its_last_checkpoint(tmp_path, paintings):
    run = tmp_path / "run"
    trainer, _ = started_training(run, paintings, 1)
    trainer.join()
    before = newest_checkpoint(run)
    content = before.read_bytes()
    # A checkpoint is too large; so is what TensorBoard has to write, while a checkpoint is far.
    for largest, saving in ((100_000, 1), (2_000, 1_000)):
        trainer, answer = started_training(run, paintings, 200, largest, saving)
        message = answer.recv()
        trainer.join()
        assert "File too large" in message and str(run) in message and "\n" not in message
        assert newest_checkpoint(run) == before and before.read_bytes() == content
        assert not any(name.endswith(PARTIAL_SUFFIX) for name in names(run))


def hold(folder, held):
    with sole_writer(folder):
        if os.fork() == 0:  # as loader processes, which live some seconds longer
            time.sleep(10)
            os._exit(0)
        held.send(True)
        signal.pause()


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    folder = tmp_path / "run"
    receiver, sender = PROCESSES.Pipe(duplex=False)
    holder = PROCESSES.Process(target=hold, args=(folder, sender))
    holder.start()
    receiver.recv()
    unfinished, foreign = (folder / f".{name}{PARTIAL_SUFFIX}" for name in ("0123456789abcdef", "checkpoint"))
    unfinished.touch()
    foreign.touch()
    with pytest.raises(UserError, match="run: another process is writing there"), sole_writer(folder):
        pass
    assert unfinished.exists()
    holder.kill()
    holder.join()
    with sole_writer(folder):
        assert names(folder) == [foreign.name, LOCK_FILE]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"), sole_writer(tmp_path / "file"):
        pass


def test_where_nothing_can_be_locked_another_may_be_writing(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    unfinished = tmp_path / f".0123456789abcdef{PARTIAL_SUFFIX}"
    unfinished.touch()
    monkeypatch.setattr(fcntl, "lockf", refuse)
    with sole_writer(tmp_path):
        assert unfinished.exists()
    assert f"{tmp_path}: cannot be locked against a second writer (No locks available)" in caplog.text


def test_contents_reach_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    done = []

    def recorded(name, real):
        def call(target, *more):
            done.append((name, Path(os.readlink(f"/proc/self/fd/{target}")) if isinstance(target, int) else target))
            return real(target, *more)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, recorded(name, getattr(os, name)))
    write_whole(tmp_path / "settings", b"content")
    (first, written), (second, renamed), (third, folder) = done
    assert (first, second, third) == ("fsync", "replace", "fsync")
    assert written == renamed and folder == tmp_path.resolve()
    assert (tmp_path / "settings").read_bytes() == b"content"
