"""``metrics.jsonl`` of a run, read as it grows."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
OF_SOURCE = "loss_source_"
"""Before the name of a source, in the name of the loss of its tokens."""


@dataclass
class Metrics:
    """The values of each step; of a step that was computed twice, the last ones.

    Attributes:
        folder: of the run.
        steps: by step, the values that were logged.
        validation: by step, the loss of the validation data.
        test: by step, the loss of the test data.
        unreadable: lines that a killed run has left incomplete.
    """

    folder: Path
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    validation: dict[int, float | None] = field(default_factory=dict)
    test: dict[int, float | None] = field(default_factory=dict)
    unreadable: int = 0
    _read: int = 0

    def update(self) -> None:
        """Read the lines that were added since the last call."""
        file = self.folder / METRICS
        if not file.exists():
            return
        with file.open("rb") as opened:
            opened.seek(self._read)
            for line in opened:
                if line.endswith(b"\n"):
                    self._read += len(line)
                    self._add(line)

    def series(self, name: str) -> list[tuple[int, float]]:
        """Step and value, in the order of the steps, where there is one."""
        found = ((step, values.get(name)) for step, values in sorted(self.steps.items()))
        return [(step, value) for step, value in found if value is not None]

    def sources(self) -> list[str]:
        """The names of the sources whose losses were logged, in their order."""
        names = (name for values in self.steps.values() for name in values if name.startswith(OF_SOURCE))
        return [name.removeprefix(OF_SOURCE) for name in dict.fromkeys(names)]

    def last(self, name: str) -> float | None:
        """The value of the last step that has one."""
        series = self.series(name)
        return series[-1][1] if series else None

    def seconds(self) -> float:
        """Seconds of training, by those of a step in each interval; without evaluations, saving and pauses."""
        total, before = 0.0, 0
        for step, seconds in self.series("seconds_per_step"):
            total, before = total + (step - before) * seconds, step
        return total

    def _add(self, line: bytes) -> None:
        try:
            values = json.loads(line)
        except ValueError:
            self.unreadable += 1
            return
        step = values.pop("step")
        if "validation_loss" in values:
            self.validation[step] = values["validation_loss"]
        elif "test_loss" in values:
            self.test[step] = values["test_loss"]
        else:
            self.steps[step] = values
