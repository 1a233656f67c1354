"""The command line as a person meets it: one line for mistakes, exit codes, every command end to end."""

import contextlib
import errno
import inspect
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import restoration
import restoration_kernels
from restoration import cli
from restoration.checkpoints import load_checkpoint, save_checkpoint, save_network
from restoration.cli import main
from restoration.config import OVERRIDABLE, make_config, option
from restoration.dataset import TEST_SHARE, UNIFORM_SHARE
from restoration.distributed import World
from restoration.errors import UserError
from restoration.flow import Architecture, ReversibleNetwork
from restoration.imaging import write_image
from restoration.process import VARIABLES, one_line_errors
from restoration.progress import LastingConsole
from restoration.recolouring import recolour
from restoration.train import _progress_bar


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, paintings):
    """Paintings of two styles, small weights, and some files that are not what they seem."""
    root = tmp_path_factory.mktemp("workshop")
    torch.manual_seed(0)
    save_network(root / "small.safetensors", ReversibleNetwork(Architecture(4, 1, 1)), {})
    shutil.copytree(paintings, root / "paintings")
    picture = root / "paintings" / "ink" / "0.png"
    (root / "text.png").write_text("no picture")
    (root / "cut.png").write_bytes(picture.read_bytes()[:200])
    (root / "empty.png").touch()
    torch.save({"weights": torch.zeros(2)}, root / "pickled.pt")
    other = {"architecture": Architecture(4, 2, 1).to_dict()}
    save_checkpoint(root / "other.safetensors", load_checkpoint(root / "small.safetensors").tensors, other)
    return root


def call(capsys, monkeypatch, *arguments):
    """Runs the command in this process; returns exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["restoration", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    captured = capsys.readouterr()
    return left.value.code or 0, captured.out, captured.err


def test_module_runs_and_helps():
    done = subprocess.run([sys.executable, "-m", "restoration", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for command in ("demo", "reconstruct", "evaluate", "train", "ablate", "dataset"):
        assert command in done.stdout


def test_version(monkeypatch, capsys):
    version = restoration_kernels.__version__
    assert version == restoration.__version__
    assert call(capsys, monkeypatch, "--version") == (0, f"painting-restoration {version}\n", "")


def test_help_does_not_wait_for_pytorch():
    code = "import sys; import restoration.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[madvise]" not in LARGE_PAGES.read_text(), reason="the system gives none when asked"
)
@pytest.mark.parametrize(("wish", "given"), [(None, True), ("0", False)])
def test_commands_work_in_large_pages_unless_told_not_to(wish, given, monkeypatch):
    code = """
import re
from pathlib import Path
from restoration import cli
cli.app = lambda: None
cli.main()
import torch
x = torch.ones(2**24)
print(re.search(r"AnonHugePages: +([0-9]+)", Path("/proc/self/smaps_rollup").read_text())[1])
"""
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    if wish is not None:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", wish)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (int(done.stdout) >= 2**15) == given  # kB, of twice as many


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_that_asks_in_vain_is_told_in_one_line(capsys, name):
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise ValueError(f"{name} must be another")
    assert ended.value.code == 2 and capsys.readouterr().err == f"error: {name} must be another\n"


@pytest.mark.parametrize(("wish", "message"), [("nonsense", "got 'nonsense'"), ("triton", "got 'triton'")])
def test_a_backend_that_the_environment_asks_for_in_vain_is_one_line(
    workshop, tmp_path, capsys, monkeypatch, wish, message
):
    monkeypatch.setenv("RESTORATION_BACKEND", wish)
    ink = workshop / "paintings" / "ink"
    arguments = (ink / "0.png", ink / "1.png", "-o", tmp_path / "out.png", "--device", "cpu")
    code, _, err = call(capsys, monkeypatch, "reconstruct", *arguments, "--checkpoint", workshop / "small.safetensors")
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert f"{message} from the environment variable RESTORATION_BACKEND" in err


def test_a_name_that_the_terminal_cannot_show_is_written_all_the_same(workshop, tmp_path):
    ink = workshop / "paintings" / "ink"
    out = tmp_path / "墨\udcff.png"
    command = [sys.executable, "-m", "restoration", "reconstruct", ink / "0.png", ink / "1.png", "-o", out]
    command += ["--checkpoint", workshop / "small.safetensors", "--device", "cpu"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0 and out.exists()
    assert b"\\u58a8\\udcff.png" in done.stdout


def test_a_full_disk_behind_standard_output_is_one_line(workshop, tmp_path, capsys, monkeypatch):
    ink = workshop / "paintings" / "ink"
    arguments = (ink / "0.png", ink / "1.png", "-o", tmp_path / "out.png", "--device", "cpu")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code, _, err = call(
            capsys, monkeypatch, "reconstruct", *arguments, "--checkpoint", workshop / "small.safetensors"
        )
        with contextlib.suppress(OSError):
            full.close()  # what it could not write
    assert code == 2 and err == "error: [Errno 28] No space left on device\n"


def test_sigterm_ends_imports_that_swallow_exceptions(tmp_path):
    (tmp_path / "swallows.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGTERM)\nexcept BaseException:\n    print('went on')"
    )
    program = "from restoration.process import end_at_sigterm\nwith end_at_sigterm():\n    import swallows"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": f"{tmp_path}:."}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")


def test_sigterm_cleans_up_as_ctrl_c_does():
    code = """
import os, signal
from restoration import cli

def app():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        print("cleaned up")

cli.app = app
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "cleaned up\n")


def test_reconstruct(workshop, tmp_path, capsys, monkeypatch):
    ink = workshop / "paintings" / "ink"
    code, out, _ = call(
        capsys, monkeypatch, "reconstruct", ink / "0.png", ink / "1.png", "-o", tmp_path / "out.png",
        "--checkpoint", workshop / "small.safetensors", "--device", "cpu", "--precision", "bf16",
    )  # fmt: skip
    assert code == 0
    assert "SSIM" in out and "Gram loss" in out and "seconds" in out
    assert Image.open(tmp_path / "out.png").size == (80, 60)


def test_progress_is_shown_on_a_terminal_alone(workshop, tmp_path):
    ink = workshop / "paintings" / "ink"
    command = [sys.executable, "-m", "restoration", "reconstruct", ink / "0.png", ink / "1.png", "--device", "cpu"]
    command += ["-o", tmp_path / "out.png", "--checkpoint", workshop / "small.safetensors"]
    terminal, program_side = pty.openpty()
    able = {**os.environ, "TERM": "xterm"}  # on a dumb terminal nothing can be drawn
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=program_side, text=True, env=able) as program:
        os.close(program_side)
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
            while piece := os.read(terminal, 4096):
                shown += piece
        printed = program.stdout.read()
    os.close(terminal)
    assert program.returncode == 0 and b"0.png" in shown and b"100%" in shown
    assert printed.startswith(f"{tmp_path / 'out.png'}: SSIM") and printed.count("\n") == 1


def test_a_warning_is_said_once_however_often_a_picture_is_read(workshop, tmp_path):
    pages = [Image.new("RGB", (30, 20), colour) for colour in ("tan", "navy")]
    pages[0].save(tmp_path / "album.tif", save_all=True, append_images=pages[1:])
    command = [sys.executable, "-m", "restoration", "reconstruct", *[tmp_path / "album.tif"] * 2, "--device", "cpu"]
    command += ["-o", tmp_path / "out.png", "--checkpoint", workshop / "small.safetensors"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    assert done.stderr == f"WARNING: {tmp_path / 'album.tif'}: holds 2 pictures, of which only the first is read\n"


def test_reconstruct_goes_on_where_nobody_reads_what_it_prints(workshop, tmp_path):
    ink, out = workshop / "paintings" / "ink", tmp_path / "out"
    command = [sys.executable, "-m", "restoration", "reconstruct", ink, ink, "-o", out, "--device", "cpu"]
    command += ["--checkpoint", workshop / "small.safetensors"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*map(str, command)], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(list(out.iterdir())) == len(list(ink.iterdir()))


def test_what_prints_of_training_goes_on_where_nobody_reads():
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as file:
        console = LastingConsole(file=file)
        console.print("nobody reads this")
        console.print("nor this")
    assert isinstance(_progress_bar().console, LastingConsole)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate")])
def test_too_little_memory_is_told_in_one_line(capsys, error):
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise error
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: memory does not suffice\n"


def test_reconstruct_goes_on_past_a_picture_that_cannot_be_treated(workshop, tmp_path, capsys, monkeypatch):
    ink, out = workshop / "paintings" / "ink", tmp_path / "out"
    arguments = (ink, ink, "-o", out, "--checkpoint", workshop / "small.safetensors", "--device", "cpu")
    names = sorted(path.name for path in ink.iterdir())
    fails_once = mock.Mock(wraps=recolour, side_effect=[UserError("too strange"), mock.DEFAULT, mock.DEFAULT])
    with mock.patch("restoration.reconstruct.recolour", fails_once):
        code, said, err = call(capsys, monkeypatch, "reconstruct", *arguments)
    assert code == 2 and err.splitlines() == [
        f"error: {ink / names[0]}: too strange",
        f"error: 1 of {len(names)} pictures could not be recoloured, for the reasons above",
    ]
    assert sorted(path.name for path in out.iterdir()) == names[1:]
    assert len(said.splitlines()) == len(names) - 1

    faded = tmp_path / "faded"
    faded.mkdir()
    for name in names:
        (faded / name).write_bytes((ink / name).read_bytes()[: 100 if name == names[1] else None])
    code, said, err = call(capsys, monkeypatch, "reconstruct", faded, ink, "-o", tmp_path / "new", *arguments[4:])
    damaged, counted = err.splitlines()
    assert code == 2 and len(said.splitlines()) == len(names) - 1
    assert damaged.startswith(f"error: {faded / names[1]}: is damaged or truncated")
    assert counted == f"error: 1 of {len(names)} pictures could not be recoloured, for the reasons above"

    written = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    code, said, err = call(capsys, monkeypatch, "reconstruct", *arguments, "--skip-existing")
    assert (code, err) == (0, "") and said.startswith(f"{out / names[0]}: SSIM") and said.count("\n") == 1
    assert written.items() <= {path: path.stat().st_mtime_ns for path in out.iterdir()}.items()

    code, said, err = call(capsys, monkeypatch, "reconstruct", *arguments, "--skip-existing")
    assert (code, said, err) == (0, "nothing to do: every output is there\n", "")
    code, said, err = call(capsys, monkeypatch, "reconstruct", *arguments, "--skip-existing", "--force")
    assert code == 2 and "take one of them" in err


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("missing.png", "{ink}", "-o", "{out}/o.png"), "missing.png"),
        (("mis\nsing.png", "{ink}", "-o", "{out}/o.png"), "mis\\nsing.png"),
        (("{root}/text.png", "{ink}", "-o", "{out}/o.png"), "text.png"),
        (("{root}/cut.png", "{ink}", "-o", "{out}/o.png"), "cut.png"),
        (("{root}/empty.png", "{ink}", "-o", "{out}/o.png"), "empty.png"),
        (("{ink}", "{ink}", "-o", "{out}/no/o.png"), "does not exist"),
        (("{ink}", "{ink}", "-o", f"{{out}}/{'long' * 100}.png"), "File name too long"),
        (("{ink}", "{ink}", "-o", "{out}/o.png", "--checkpoint", "{root}/pickled.pt"), "never loaded"),
        (("{ink}", "{ink}", "-o", "{out}/o.png", "--checkpoint", "{root}/other.safetensors"), "another architecture"),
        # Before pictures are read: those of a folder take their time.
        (("missing.png", "{ink}", "-o", "{out}/o.png", "--device", "tpu"), "--device"),
        (("missing.png", "{ink}", "-o", "{out}/o.png", "--strength", "2"), "--strength"),
        (("missing.png", "{ink}", "-o", "{out}/o.png", "--precision", "fp16"), "--precision"),
        (("missing.png", "{ink}", "-o", "{out}/o.png", "--vgg", "{root}/text.png"), "text.png"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(workshop, tmp_path, capsys, monkeypatch, arguments, message):
    names = {"root": workshop, "ink": workshop / "paintings" / "ink" / "0.png", "out": tmp_path}
    if "--checkpoint" not in arguments:
        arguments += ("--checkpoint", "{root}/small.safetensors")
    code, out, err = call(capsys, monkeypatch, "reconstruct", *(text.format(**names) for text in arguments))
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_evaluate(workshop, tmp_path, capsys, monkeypatch):
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("degraded,reference\nink/0.png,ink/1.png\ngreen/0.png,green/2.png\n")
    arguments = ("--data", workshop / "paintings", "--pairs", pairs, "--checkpoint", workshop / "small.safetensors")
    code, out, _ = call(capsys, monkeypatch, "evaluate", *arguments, "--out", tmp_path / "out", "--device", "cpu")
    assert code == 0 and "ink" in out and "green" in out
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["summary"]["all"]["network"]["pairs"] == 2
    assert {"ssim", "gram", "relative_gram", "tint", "clipped"} == report["pairs"][0]["scores"]["network"].keys()
    assert report["pairs"][0]["scores"]["untouched"]["ssim"] == 1
    assert (tmp_path / "out" / "table.md").read_text().splitlines()[0] in out
    assert Image.open(tmp_path / "out" / "contact_sheet.png").width > 500
    code, _, err = call(capsys, monkeypatch, "evaluate", *arguments, "--out", tmp_path / "out", "--device", "cpu")
    assert code == 2 and "exists already" in err
    assert call(capsys, monkeypatch, "evaluate", *arguments, "--force", "--out", tmp_path / "out")[0] == 0


def test_scores_that_cannot_be_written_are_printed(workshop, tmp_path, capsys, monkeypatch):
    """Nor is what has appeared meanwhile in their place overwritten."""
    monkeypatch.setattr("restoration.evaluation_report.check_output", lambda *_, **__: None)
    (tmp_path / "table.md").write_text("of another")
    arguments = ("--data", workshop / "paintings", "--checkpoint", workshop / "small.safetensors", "--count", "1")
    code, out, err = call(capsys, monkeypatch, "evaluate", *arguments, "--out", tmp_path, "--device", "cpu")
    assert code == 2 and "exists already" in err and "| network " in out
    assert (tmp_path / "table.md").read_text() == "of another"


def test_scores_are_kept_where_nobody_reads_the_table(workshop, tmp_path, capsys, monkeypatch):
    def fail(*text, **options):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", fail)
    arguments = ("--data", workshop / "paintings", "--checkpoint", workshop / "small.safetensors", "--size", 32)
    with pytest.raises(BrokenPipeError):
        call(capsys, monkeypatch, "evaluate", *arguments, "--count", 1, "--device", "cpu", "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["summary"]


def test_synthetic_evaluation_needs_no_data(workshop, tmp_path, capsys, monkeypatch):
    options = ("--checkpoint", workshop / "small.safetensors", "--size", 64, "--device", "cpu", "--precision", "bf16")
    code, out, _ = call(
        capsys, monkeypatch, "evaluate", "--synthetic", "--baselines", *options, "--out", tmp_path / "out"
    )
    assert code == 0 and "CIEDE2000" in out and "Monge-Kantorovich" in out and "ochre" in out
    code, _, err = call(capsys, monkeypatch, "evaluate", *options, "--out", tmp_path / "other")
    assert code == 2 and "--data must be given" in err and not (tmp_path / "other").exists()
    code, _, err = call(
        capsys, monkeypatch, "evaluate", "--synthetic", "--precision", "tf32", "--out", tmp_path / "other"
    )
    assert code == 2 and err == "error: --precision must be one of fp32, bf16, got 'tf32'\n"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--pairs", "pairs.csv"), "--pairs pairs.csv chooses among the paintings of --data"),
        (("--count", 20), "--count 20 chooses among the paintings of --data"),
        (("--size", 63), "--size must be at least 64 where paintings are drawn, got 63"),
        (("--vgg", "vgg.pt"), "--vgg vgg.pt is for Gram losses, which --synthetic does not measure"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(tmp_path, capsys, monkeypatch, option, message):
    code, _, err = call(capsys, monkeypatch, "evaluate", "--synthetic", *option, "--out", tmp_path / "out")
    assert code == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_advice_to_programmers_is_not_shown(workshop, tmp_path, capsys, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # a warning from here on, an error from twice as many
    Image.new("RGB", (20, 20), (90, 80, 70)).save(tmp_path / "large.png")
    arguments = (tmp_path / "large.png", tmp_path / "large.png", "-o", tmp_path / "out.png", "--device", "cpu")
    assert call(capsys, monkeypatch, "reconstruct", *arguments, "--checkpoint", workshop / "small.safetensors")[0] == 0
    assert not [warning for warning in recwarn if "bomb" in str(warning.message)]


@pytest.mark.parametrize(
    ("command", "place", "given", "passed"),
    [
        (
            ("dataset", "build", "{paintings}", "{out}", "--crop", 32, "--stride", 16, "--small", "skip"),
            "restoration.dataset.build_dataset",
            ("--style", "ink", "--uniform-share", 0.1, "--test-share", 0.2, "--force"),
            {"crop": 32, "stride": 16, "small": "skip", "styles": ["ink"], "uniform_share": 0.1, "test_share": 0.2}
            | {"force": True},
        ),
        (
            ("evaluate", "--data", "{paintings}", "--out", "{out}", "--device", "cpu"),
            "restoration.vgg.metric_features",
            ("--vgg", "own.pth"),
            {"first": Path("own.pth")},
        ),
    ],
    ids=["dataset", "evaluate"],
)
def test_options_reach_what_they_are_for(workshop, tmp_path, capsys, monkeypatch, command, place, given, passed):
    called = {}

    def record(*arguments, **options):
        called.update(options | {"first": arguments[0]})
        raise UserError("seen")

    monkeypatch.setattr(place, record)
    names = {"paintings": workshop / "paintings", "out": tmp_path / "out"}
    code, _, err = call(capsys, monkeypatch, *(str(text).format(**names) for text in (*command, *given)))
    assert code == 2 and err.endswith("error: seen\n")
    assert {name: called[name] for name in passed} == passed


@pytest.mark.parametrize(
    "command",
    [
        "ablate --data {paintings} --out {out}",
        "evaluate --data {paintings} --out {out}",
        "dataset build {paintings} {out}",
        "demo --out {out}",
    ],
)
def test_several_processes_are_refused_to_commands_of_one(workshop, tmp_path, capsys, monkeypatch, command):
    several = contextlib.nullcontext(World(rank=0, size=2))
    monkeypatch.setattr("restoration.distributed.joined", lambda: several)
    names = {"paintings": workshop / "paintings", "out": tmp_path / "out"}
    code, _, err = call(capsys, monkeypatch, *(part.format(**names) for part in command.split()))
    name = command.split(" {")[0].split(" --")[0]
    assert code == 2 and f"{name} takes one process, got 2: leave torchrun out" in err
    assert not (tmp_path / "out").exists()


def test_dataset_and_train(workshop, tmp_path, capsys, monkeypatch):
    code, out, _ = call(
        capsys,
        monkeypatch,
        "dataset",
        "build",
        workshop / "paintings",
        tmp_path / "crops",
        "--crop",
        32,
        "--stride",
        32,
    )
    assert code == 0 and "crops" in out
    arguments = ("--data", tmp_path / "crops", "--out", tmp_path / "run", "--device", "cpu")
    tiny = ("--preset", "small", "--crop", 24, "--batch", 1, "--blocks", 1)
    assert call(capsys, monkeypatch, "train", *arguments, *tiny, "--iterations", 2)[0] == 0
    assert call(capsys, monkeypatch, "train", *arguments, "--resume", "--iterations", 3)[0] == 0
    assert (tmp_path / "run" / "checkpoint-0000003.safetensors").is_file()
    elsewhere = ("--data", tmp_path / "crops", "--out", tmp_path / "elsewhere", "--style", "oil")
    code, _, err = call(capsys, monkeypatch, "train", *elsewhere)
    assert code == 2 and "unknown style 'oil'" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "defaults"),
    [
        (cli.reconstruct, {"strength": 1.0, "precision": "fp32", "device": "auto"}),
        (cli.evaluate, {"size": 512, "precision": "fp32"}),
        (cli.ablate, {"iterations": 500, "seeds": 2, "count": 20, "size": 512}),
        (cli.demo, {"out": Path("demo"), "palette": "blue_green"}),
        (cli.dataset_build, {"crop": 512, "stride": 512, "small": "enlarge"}),
    ],
)
def test_defaults_are_those_of_the_documents(command, defaults):
    found = inspect.signature(command).parameters
    assert {name: found[name].default for name in defaults} == defaults


def test_defaults_of_a_data_set_are_those_of_its_help():
    assert (UNIFORM_SHARE, TEST_SHARE) == (0.01, 0.1)


def test_every_setting_of_training_is_an_option(tmp_path, capsys, monkeypatch):
    paper, given = make_config("paper").to_dict(), []
    wanted = {"schedule": "cosine", "precision": "bf16", "style_distance": "l2", "pairing": "nearest"}
    for name in set(OVERRIDABLE) - wanted.keys():
        wanted[name] = not paper[name] if isinstance(paper[name], bool) else 2 * paper[name] or 1
    options = []
    for name, value in wanted.items():
        options += [f"--no-{name}"] if value is False else [option(name), value]
    monkeypatch.setattr("restoration.train.train", lambda data, out, config, **_: given.append(config.to_dict()))
    assert call(capsys, monkeypatch, "train", "--data", tmp_path, "--out", tmp_path / "run", *options)[0] == 0
    assert given == [paper | wanted]


def test_a_preset_is_of_a_run_that_starts(tmp_path, capsys, monkeypatch):
    arguments = ("--data", tmp_path, "--out", tmp_path / "run", "--resume", "--preset", "small")
    code, _, err = call(capsys, monkeypatch, "train", *arguments)
    assert code == 2 and err.startswith("error: --preset is chosen when a run starts") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_demo(workshop, tmp_path, capsys, monkeypatch):
    out = tmp_path / "demo"
    arguments = ("demo", "--out", out, "--checkpoint", workshop / "small.safetensors", "--device", "cpu")
    code, text, _ = call(capsys, monkeypatch, *arguments)
    assert code == 0 and str(out) in text
    assert sorted(path.name for path in out.iterdir()) == [
        "degraded.png",
        "reference.png",
        "result.png",
        "side_by_side.png",
    ]
    before = (out / "result.png").read_bytes()
    assert call(capsys, monkeypatch, *arguments)[0] == 2
    assert (out / "result.png").read_bytes() == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--palette", "purple"), "--palette must be one of blue_green, ochre, got 'purple'"),
        (("--checkpoint", "missing.safetensors"), "missing.safetensors: no such checkpoint"),
    ],
)
def test_demo_refuses_before_it_draws(tmp_path, capsys, monkeypatch, option, message):
    code, _, err = call(capsys, monkeypatch, "demo", "--out", tmp_path / "demo", *option)
    assert (code, err) == (2, f"error: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_demo_that_fails_leaves_no_picture(workshop, tmp_path, capsys, monkeypatch):
    out = tmp_path / "demo"
    arguments = ("demo", "--out", out, "--checkpoint", workshop / "small.safetensors", "--device", "cpu")
    with monkeypatch.context() as context:
        context.setenv("RESTORATION_BACKEND", "nonsense")
        assert call(capsys, context, *arguments)[0] == 2
    assert list(out.iterdir()) == []

    def write_until(full):
        def write(path, *arguments, **options):
            if path.name == full:
                raise OSError(errno.ENOSPC, "No space left on device")
            write_image(path, *arguments, **options)

        return write

    for full in ("reference.png", "side_by_side.png"):
        monkeypatch.setattr("restoration.demo.write_image", write_until(full))
        code, _, err = call(capsys, monkeypatch, *arguments)
        assert code == 2 and "No space left on device" in err
        assert list(out.iterdir()) == []


def test_a_demo_that_fails_removes_no_picture_of_another(tmp_path, capsys, monkeypatch):
    out = tmp_path / "demo"

    def draw_while_another_writes(palette):
        for name in ("degraded", "reference"):
            (out / f"{name}.png").write_bytes(b"another's")
        return [np.zeros((64, 64, 3), np.uint8)] * 2

    monkeypatch.setattr("restoration.demo.sample_pair", draw_while_another_writes)
    code, _, err = call(capsys, monkeypatch, "demo", "--out", out, "--device", "cpu")
    assert code == 2 and "degraded.png: exists already" in err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        "degraded.png": b"another's",
        "reference.png": b"another's",
    }
