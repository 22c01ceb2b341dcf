"""Metrics as JSON lines, one object an update."""

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

from utils.files import write_text


class MetricsLog:
    """Appends to a file of JSON lines; begins by dropping what a resumed run will do again.

    stage, update: where the run goes on; lines of that stage from that update on, and of later
    stages, are dropped, as is a last line that a kill left half written.
    """

    def __init__(self, path: Path, stage: int, update: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            entries = [(json.loads(line), line) for line in lines]
            kept = [
                f"{line}\n"
                for entry, line in entries
                if (entry["stage"], entry["update"]) <= (stage, update)
            ]
            write_text(path, "".join(kept))
        self.file = path.open("a")

    def write(self, **values: Any) -> None:
        """One line; JSON knows no NaN and no infinity, which become null."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self.file.write(json.dumps(finite, allow_nan=False) + "\n")

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.file.close()
