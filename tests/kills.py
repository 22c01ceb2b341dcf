"""Kills the scripts that train, again and again, and sees that nothing is lost.

python -m tests.kills --kills 200: a run is killed (SIGKILL), started again, killed again, until it
ends by itself; then its files must be those of an undisturbed run: weights, average, optimiser and
metrics (but for timings) bit for bit, the pictures byte for byte, and no file more or less. Some
kills come at a random moment, the others at one of the moments that an undisturbed run passes:
before and after each write, flush and rename, at the beginning and the end of each stage.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import itertools
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from pipeline.checkpoint import digest, load_checkpoint
from tests.processes import end_with
from tests.toys import tiny

ROOT = Path(__file__).parents[1]
# What is watched: where a function is looked up, its name, and what it does.
WATCHED = [
    ("training.stages", "run_stage", "stage"),
    ("training.stages", "save_checkpoint", "save"),
    ("training.stages", "save_png", "grid"),
    ("training.resume", "StageFiles.prune", "prune"),
    ("evaluation.report", "save_png", "grid"),
    ("evaluation.report", "write_table", "table"),
    ("evaluation.report", "draw_pictures", "pictures"),
    ("evaluation.curves", "draw_loss_curve", "loss curve"),
    ("pipeline.sampling", "SampleRequest.sample", "sample"),
    ("torch", "save", "write"),
    ("os", "fsync", "flush"),
    ("pathlib", "Path.replace", "rename"),
    ("pathlib", "Path.unlink", "delete"),
]

# So that a run begins at once.
PRELOADED = [
    "train",
    "distill",
    "training.stages",
    "evaluation.report",
    "evaluation.curves",
    "torch.utils.tensorboard",
    "torchvision.datasets",
    "matplotlib.figure",
    "PIL.PngImagePlugin",
]

WITH_AUTOENCODER = importlib.util.find_spec("diffusers") is not None
if WITH_AUTOENCODER:
    WATCHED.append(("training.autoencoder", "write_autoencoder", "autoencoder"))
    PRELOADED += [
        "tools.train_autoencoder",
        "training.autoencoder",
        "diffusers.models.autoencoders",
    ]


class Watch:
    """Where a process is, in memory that the process which kills it reads; and when to end it.

    Every watched call is a moment before and one after, named by the calls that it is inside of,
    as in "stage > save > write: before".
    """

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 256)
        self.calls: list[str] = []
        self.passed: list[str] = []
        self.fatal: tuple[str, int] | None = None

    def where(self) -> str:
        """The calls that the process was inside of when it last said so."""
        return bytes(self.memory[:256]).rstrip(b"\0").decode()

    def _tell(self) -> None:
        self.memory[:256] = " > ".join(self.calls).encode().ljust(256, b"\0")

    def moment(self, name: str) -> None:
        """Passes a moment, or does not live through it."""
        moment = f"{' > '.join(self.calls)}: {name}"
        self.passed.append(moment)
        if self.fatal is not None and self.fatal == (moment, self.passed.count(moment)):
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, function, name):
        """The function, watched."""

        def watched(*args, **kwargs):
            self.calls.append(name)
            self._tell()
            self.moment("before")
            result = function(*args, **kwargs)
            self.moment("after")
            self.calls.pop()
            self._tell()
            return result

        return watched

    def install(self) -> None:
        """Watches all of WATCHED; half a checkpoint on the disk is a moment too."""
        save = torch.save

        def in_halves(content, file):
            start = file.tell()
            save(content, file)
            end = file.tell()
            file.truncate((start + end) // 2)
            self.moment("half written")
            file.seek(start)
            file.truncate()
            save(content, file)

        torch.save = in_halves
        for module, path, name in WATCHED:
            *classes, attribute = path.split(".")
            owner = functools.reduce(getattr, classes, importlib.import_module(module))
            setattr(owner, attribute, self.wrap(getattr(owner, attribute), name))


def start(watch: Watch, argv: list[str], log: Path, fatal=None, passed: Path | None = None) -> int:
    """Forks a process that runs main(argv[1:]) of the module argv[0], and returns its number."""
    watch.memory[:256] = b"start".ljust(256, b"\0")
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid

    def work() -> int:
        watch.fatal = fatal
        watch.install()
        code = importlib.import_module(argv[0]).main(argv[1:])
        if passed is not None:
            passed.write_text(json.dumps(watch.passed))
        return code

    end_with(work, log)
    raise AssertionError("the process has ended")


def content(path: Path):
    """What must not change, of a file that a run has written."""
    if path.suffix == ".pt":
        return digest(vars(load_checkpoint(path, path.stem.startswith("autoencoder"))))
    if path.suffix == ".safetensors":
        return digest(load_file(path))
    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]
    return path.read_bytes()


def difference(folder: Path, reference: Path) -> str | None:
    """What is not as in the undisturbed run's folder; None if nothing is."""
    names = [
        {str(p.relative_to(f)) for p in f.rglob("*") if p.is_file() and "events.out" not in p.name}
        for f in (folder, reference)
    ]
    if names[0] != names[1]:
        return f"files: {sorted(names[0] ^ names[1])}"
    changed = [n for n in sorted(names[0]) if content(folder / n) != content(reference / n)]
    return f"content of {changed}" if changed else None


def inside_a_save(place: str) -> bool:
    """Whether a moment, or where a kill fell, is in the middle of writing a checkpoint."""
    return "save >" in place or "save: at random" in place


class Torture:
    """The scripts' undisturbed runs, and the kills.

    Raises AssertionError where something was lost.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng, self.watch = folder, random.Random(seed), Watch()
        config = folder / "tiny.yaml"
        training = {"checkpoint_every": 1, "updates": 5, "keep_checkpoints": 2}
        distillation = {"checkpoint_every": 1, "updates_per_stage": 3}
        values = tiny(training=training, distillation=distillation, sampling={"steps": 4})
        values["model"] |= {"channels": 32, "patch_size": 8}  # saved in the time of an update
        config.write_text(yaml.safe_dump(values))
        teacher = folder / "undisturbed-train" / "diffusion-5.pt"
        self.commands = {
            "train": ["train", "--config_path", str(config)],
            "distill": ["distill", "--teacher_model_checkpoint", str(teacher)],
        }
        if WITH_AUTOENCODER:
            recipe = folder / "autoencoder.yaml"
            sizes = {"channels": [8, 8, 8], "latent_channels": 2}
            recipe.write_text(yaml.safe_dump(tiny(training=training, autoencoder=sizes)))
            command = ["tools.train_autoencoder", "--config_path", str(recipe)]
            self.commands["autoencoder"] = command
        self.places: Counter[str] = Counter()
        self.compared = 0
        self.seconds: dict[str, float] = {}
        self.moments: dict[str, Counter[str]] = {}
        for name in self.commands:
            before = time.perf_counter()
            passed = folder / "passed.json"
            pid = start(self.watch, self.argv(name, "undisturbed"), self.log, passed=passed)
            self.require_end(os.waitpid(pid, 0)[1])
            self.seconds[name] = time.perf_counter() - before
            self.moments[name] = Counter(json.loads(passed.read_text()))

    @property
    def log(self) -> Path:
        """What the processes said."""
        return self.folder / "log.txt"

    def argv(self, name: str, run: str) -> list[str]:
        """The command of a run."""
        return [*self.commands[name], "--output", str(self.folder / f"{run}-{name}")]

    def launch(self, command: list[str]) -> int:
        """Starts a script as the shell does; returns the process's number."""
        with self.log.open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},  # as the forked ones: bit for bit
                stdout=log,
                stderr=log,
            ).pid

    def wait_for_training(self, name: str) -> None:
        """Until a run that was just started opens its log, or half a minute."""
        folder = self.folder / f"killed-{name}"
        before = len(list(folder.rglob("events.out*")))
        deadline = time.monotonic() + 30
        while len(list(folder.rglob("events.out*"))) <= before and time.monotonic() < deadline:
            time.sleep(0.02)

    def require_end(self, status: int) -> None:
        """A process that was not killed has ended well."""
        code = os.waitstatus_to_exitcode(status)
        assert code == 0, f"{self.log.read_text()[-3000:]}\nexit code {code}"

    def compare(self, name: str) -> None:
        """The run's files are those of the undisturbed one; the next begins anew."""
        folder = self.folder / f"killed-{name}"
        found = difference(folder, self.folder / f"undisturbed-{name}")
        assert found is None, f"{self.log.read_text()[-3000:]}\n{name}: {found}"
        shutil.rmtree(folder)
        self.log.write_text("")
        self.compared += 1

    def finish(self, name: str) -> None:
        """Lets the killed run end, and compares."""
        if (self.folder / f"killed-{name}").exists():
            pid = start(self.watch, self.argv(name, "killed"), self.log)
            self.require_end(os.waitpid(pid, 0)[1])
            self.compare(name)

    def kill_at(self, name: str, moment: str) -> None:
        """One kill at a moment by its name; the run may have been killed before."""
        fresh = False
        while True:
            occurrence = 1 if fresh else self.rng.randint(1, self.moments[name][moment])
            fatal = (moment, occurrence)
            pid = start(self.watch, self.argv(name, "killed"), self.log, fatal)
            status = os.waitpid(pid, 0)[1]
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                self.places[moment] += 1
                return
            self.require_end(status)
            self.compare(name)  # it has ended before: once more, from the beginning
            fresh = True

    def kill_somewhere(self, name: str, own_process: bool) -> None:
        """One kill at a random moment; own_process: of the script as the shell starts it."""
        while True:
            command = self.argv(name, "killed")
            if own_process:
                pid = self.launch(command)
                self.wait_for_training(name)
                delay = self.rng.uniform(0.0, 0.4) * self.seconds[name]
            else:
                pid = start(self.watch, command, self.log)
                # the first part is the start, and a resumed run does not need the last
                delay = self.rng.uniform(0.1, 0.8) * self.seconds[name]
            time.sleep(delay)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            if os.WIFSIGNALED(status):
                where = "a process of its own" if own_process else self.watch.where()
                self.places[f"{where or 'between'}: at random"] += 1
                return
            self.require_end(status)
            self.compare(name)

    def run(self, kills: int) -> None:
        """So many kills: half at moments by their names, two of three in saves, half anywhere."""
        named = [(name, moment) for name in self.commands for moment in self.moments[name]]
        self.rng.shuffle(named)
        saves = [pair for pair in named if inside_a_save(pair[1])]
        others = [pair for pair in named if pair not in saves]
        in_saves = itertools.cycle(saves)
        mixed = ((next(in_saves), next(in_saves), pair) for pair in itertools.cycle(others))
        plan = list(itertools.islice(itertools.chain.from_iterable(mixed), kills // 2))
        names = itertools.cycle(self.commands)
        anywhere = [(next(names), "") for _ in range(kills - len(plan))]
        own = max(2, len(anywhere) // 10)
        work = [(*pair, False) for pair in plan]
        work += [(*pair, n < own) for n, pair in enumerate(anywhere)]
        self.rng.shuffle(work)
        for name, moment, own_process in work:
            if moment:
                self.kill_at(name, moment)
            else:
                self.kill_somewhere(name, own_process)
        for name in self.commands:
            self.finish(name)

    def report(self) -> str:
        """The histogram of the kills, and what was found."""
        total = self.places.total()
        inside = sum(n for place, n in self.places.items() if inside_a_save(place))
        lines = [f"{n:4d}  {place}" for place, n in sorted(self.places.items())]
        lines += [
            f"{total} kills, {inside} of them ({100 * inside / total:.0f}%) inside a save",
            f"{self.compared} killed runs compared with the undisturbed ones: all the same",
        ]
        return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Kills, compares and prints the histogram."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    # Nothing may be computed here: a fork inherits no threads.
    for module in PRELOADED:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as folder:
        torture = Torture(Path(folder), arguments.seed)
        torture.run(arguments.kills)
        print(torture.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
