"""What the scripts print, and where: closed, full and old terminals; signals; torchrun's names."""

import errno
import importlib
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml

import sample
import train
from pipeline.checkpoint import load_checkpoint
from tests.toys import tiny
from utils.command import (
    InputError,
    StopRequest,
    Terminal,
    handled,
    printable,
    run_command,
    safe_streams,
    say,
    stop_requests,
    warn,
)
from utils.processes import join_world
from utils.progress import progress_bar

ROOT = Path(__file__).parents[1]
ONE_STEP = ROOT / "pretrained" / "mnist-1-step.safetensors"


def shell(command, **variables):
    return subprocess.run(
        ["bash", "-c", command.format(python=sys.executable)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# --- the work's result decides the exit code ------------------------------------------------


@pytest.mark.parametrize("streams", ["2>&-", "2>/dev/full", ">/dev/full", ">&- 2>&- <&-", "| true"])
def test_a_terminal_that_is_gone_changes_nothing(tmp_path, streams):
    picture = tmp_path / "x.png"
    sampling = "set -o pipefail; {python} sample.py"
    done = shell(f"{sampling} --checkpoint {ONE_STEP} --output {picture} {streams}")
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG"), "nothing that was printed is in the file"
    assert shell(f"{sampling} --checkpoint nowhere {streams}").returncode == 2
    assert shell(f"{sampling} --help {streams}").returncode == 0


def test_an_ascii_terminal_is_told_what_it_can_show(tmp_path):
    picture = tmp_path / "é中.png"
    command = f"{{python}} sample.py --checkpoint {ONE_STEP} --output {picture}"
    done = shell(command, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stdout.rstrip().endswith(r"\xe9\u4e2d.png")
    assert picture.exists()


class Broken(io.StringIO):
    """A stream of a full disk."""

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self):
        raise ValueError("I/O operation on closed file")


@pytest.mark.parametrize("stream", [Broken(), None])
def test_messages_and_bars_never_raise(monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)

    def work():
        say("done")
        warn("careful")
        with progress_bar(2, "bar", "step") as bar:
            bar.update()
            bar.refresh()

    assert run_command(work) == 0

    def fail():
        raise InputError("no")

    assert run_command(fail) == 2
    assert sys.stdout is stream, "as it was before"


def test_a_broken_stream_is_given_up(tmp_path):
    full = open("/dev/full", "w")  # noqa: SIM115
    terminal = Terminal(full)
    assert terminal.write("x" * 10) == 10
    terminal.flush()
    full.flush()  # as the interpreter does at its end
    assert os.readlink(f"/proc/self/fd/{full.fileno()}") == os.devnull
    full.close()


def test_a_closed_stream_gives_its_number_to_no_file(tmp_path):
    code = (
        "import os, sys; from utils.command import safe_streams\n"
        "with safe_streams():\n"
        "    file = open(sys.argv[1], 'w'); print('not mine', file=sys.stderr)\n"
        "    os.write(2, b'nor mine')"
    )
    done = shell(f'{{python}} -c "{code}" {tmp_path / "file"} 2>&- >&- <&-')
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == ""


def test_control_characters_are_escaped(monkeypatch, capsys):
    assert printable("a\x1b[31m\r\x07\udc80|±中\nb") == "a\\x1b[31m\\r\\x07\\udc80|±中\nb"
    name = "no\x1b[2J.pt"
    assert sample.main(["--checkpoint", name]) == 2
    say(name)
    warn(name)
    with progress_bar(1, name, "step") as bar:
        bar.refresh()
    said = capsys.readouterr()
    for line in (said.out, *filter(None, said.err.splitlines())):
        assert r"no\x1b[2J.pt" in line
        assert "\x1b[2J" not in line


def test_an_address_space_too_small_for_torch_is_one_line(tmp_path):
    """Where C++ code is the first to find no memory, it aborts: that is beyond a script."""
    for limit in (500_000, 1_500_000):
        done = shell(f"ulimit -v {limit}; {{python}} sample.py --checkpoint {ONE_STEP}")
        assert done.returncode == 2
        assert done.stderr.startswith("error: out of memory; take a ")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("unable to mmap 8 bytes from file <a.pt>: Cannot allocate memory (12)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        MemoryError(),
    ],
)
def test_a_lack_of_memory_is_one_line(capsys, error):
    def work():
        raise error

    assert run_command(work) == 2
    assert capsys.readouterr().err.startswith("error: out of memory; take a ")


def test_other_import_errors_are_no_lack_of_memory():
    def work():
        raise ImportError("no module of that name")

    with pytest.raises(ImportError, match="of that name"):
        run_command(work)


def test_a_path_in_bytes_is_named_as_text(capsys):
    def work():
        raise OSError(errno.ENOSPC, "No space left on device", b"/full/events")

    assert run_command(work) == 2
    assert capsys.readouterr().err == "error: /full/events: No space left on device\n"


# --- signals --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGXCPU])
def test_a_closed_terminal_and_a_spent_limit_save(tmp_path, number, monkeypatch, capsys):
    """Twice, as a shell and the system both tell of a closed terminal; and the first one saves."""
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny(training={"updates": 1000, "checkpoint_every": 1000})))
    from training.loop import backward

    def stopped(trainee, *arguments):
        if trainee.update == 2:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        return backward(trainee, *arguments)

    monkeypatch.setattr("training.loop.backward", stopped)
    out = tmp_path / "out"
    before = signal.signal(number, signal.SIG_DFL)  # nohup may have started the tests
    try:
        assert train.main(["--config_path", str(config), "--output", str(out)]) == 130
    finally:
        signal.signal(number, before)
    assert "stopped and saved at update 3" in capsys.readouterr().err
    assert load_checkpoint(out / "diffusion-3.pt").update == 3


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGXCPU])
def test_an_ignored_signal_stays_ignored(number):
    """nohup has SIGHUP ignored before the program begins."""
    with handled(number, signal.SIG_IGN), stop_requests() as stop:
        os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.SIG_IGN
        assert not stop.requested


def test_ctrl_c_is_heard_where_a_shell_has_it_ignored():
    before = signal.getsignal(signal.SIGINT)
    with handled(signal.SIGINT, signal.SIG_IGN), stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
    assert signal.getsignal(signal.SIGINT) is before


def test_only_people_insist():
    stop = StopRequest()
    for number in (signal.SIGHUP, signal.SIGXCPU, signal.SIGHUP, signal.SIGTERM, signal.SIGXCPU):
        stop._handle(number, None)
    assert stop.requested
    with pytest.raises(KeyboardInterrupt):
        stop._handle(signal.SIGINT, None)
    stop = StopRequest()
    stop.urgent = True
    with pytest.raises(KeyboardInterrupt):
        stop._handle(signal.SIGHUP, None)


def test_signals_are_left_alone_outside_the_main_thread():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run_command(lambda: None)))
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_request_to_stop_survives_a_terminal_that_is_gone(monkeypatch):
    def gone(number, text):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", gone)
    stop = StopRequest()
    stop._handle(signal.SIGHUP, None)
    assert stop.requested


# --- several processes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "hint"),
    [
        ({"RANK": "x"}, "RANK: 'x' is no whole number"),
        ({"RANK": "1"}, "WORLD_SIZE: not set, though RANK is"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT: not set"),
        (
            {"RANK": "0", "WORLD_SIZE": "abc", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "WORLD_SIZE: 'abc' is no whole number",
        ),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "RANK: 2 of 2",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "70000"},
            "the processes cannot connect",
        ),
    ],
)
def test_half_of_torchruns_variables_are_one_line(monkeypatch, variables, hint):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=hint) as caught, join_world("cpu"):
        pass
    assert "\n" not in str(caught.value)


def test_one_process_needs_none_of_them(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with join_world("cpu") as world:
        assert (world.device, world.size) == (torch.device("cpu"), 1)


def test_streams_are_as_before_after_an_error():
    before = sys.stdout, sys.stderr
    with pytest.raises(KeyError), safe_streams():
        raise KeyError
    assert (sys.stdout, sys.stderr) == before


# --- numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("sample", ["--count", "--batch_size", "--seed", "--steps"]),
        ("evaluate", ["--count", "--batch_size", "--seed", "--steps", "--max_calls"]),
        ("evaluation.digits", ["--epochs"]),
        ("benchmarks.cost", ["--gpus"]),
        ("benchmarks.sweep", ["--seconds", "--count"]),
        ("benchmarks.steps", ["--count"]),
        ("benchmarks.throughput", ["--rounds", "--steps"]),
    ],
)
def test_every_whole_number_has_a_range(capsys, script, options):
    for option in options:
        for value in (10**19, -(10**19), "x"):
            assert importlib.import_module(script).main([f"{option}={value}"]) == 2
            said = capsys.readouterr().err
            assert said.startswith(f"error: {option} {value}: take a whole number from ")
            assert said.count("\n") == 1
