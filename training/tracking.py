"""Trackers: the curves of a run on trackio or Weights & Biases, beside TensorBoard."""

import importlib
import json
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.command import warn
from utils.files import require_regular_file, write_text

PROJECT = "progressive-distillation"
ID_FILE = "tracking.json"
_ID = re.compile(r"[\w.-]{1,100}", re.ASCII)  # what both trackers accept


class Tracker:
    """Sends the curves of a run to a tracker.

    tool: trackio or wandb, imported with the first value. folder: of the run, which keeps the id
    that a resumed run continues under. name: of the run. config: its values, shown beside the
    curves. As in TensorBoard, every stage is a tracked run of its own, <id>-stage-<number>, with
    updates as its steps. After a kill, updates that are done again are sent again, with the same
    values.

    No failure of a tracker stops a training: the first one is a warning, and nothing more is sent.
    """

    def __init__(self, tool: str, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        self.tool, self.folder, self.name, self.config = tool, folder, name, config
        self.run: Any = None
        self.failed = False

    def log(self, stage: int, update: int, values: Mapping[str, float]) -> None:
        """Sends the values of an update; begins or continues the stage's run if none is open."""

        def send() -> None:
            if self.run is None:
                self.run = self._open(stage)
            self.run.log({key: float(value) for key, value in values.items()}, step=update)

        self._attempt(send)

    def finish(self) -> None:
        """Ends the stage's run, if one is open."""
        run, self.run = self.run, None
        if run is not None:
            self._attempt(run.finish)

    def _open(self, stage: int) -> Any:
        module = importlib.import_module(self.tool)
        run_id = read_or_make_id(self.folder, self.name)
        name = f"{run_id}-stage-{stage}"
        # trackio knows a run by its name
        own = {"id": name, "dir": str(self.folder)} if self.tool == "wandb" else {}
        return module.init(
            project=PROJECT,
            name=name,
            group=run_id,
            config=dict(self.config),
            resume="allow",
            **own,
        )

    def _attempt(self, work: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            work()
        except Exception as error:
            self.failed = True
            said = " ".join(str(error).split()) or type(error).__name__
            warn(f"--track {self.tool}: {said[:200]}; the run goes on without it")


def open_tracker(
    tool: str | None, folder: Path, name: str, config: Mapping[str, Any]
) -> Tracker | None:
    """Returns the Tracker of that name, or None if no tool is named."""
    return None if tool is None else Tracker(tool, folder, name, config)


def read_or_make_id(folder: Path, name: str) -> str:
    """Returns the id in the folder's tracking.json; makes and writes a new one if there is none."""
    path = folder / ID_FILE
    with suppress(FileNotFoundError, ValueError, RecursionError):
        require_regular_file(path)
        stored = json.loads(path.read_text())
        known = stored.get("id") if isinstance(stored, dict) else None
        if isinstance(known, str) and _ID.fullmatch(known):
            return known
    plain = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)[:60]
    made = f"{plain}-{secrets.token_hex(4)}"
    write_text(path, json.dumps({"id": made}) + "\n")
    return made
