"""The peak of memory of this process since a moment: torch's on CUDA, the resident size on a CPU under Linux."""

from contextlib import suppress
from pathlib import Path

import torch

from ...bridge.mcore import cpu

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The peak since this object was made.

    On CUDA these are the bytes that torch has allocated at most. On a CPU it is the highest resident size of the
    process less that at the beginning, which includes what libraries and files take.
    """

    def __init__(self) -> None:
        self.is_of_gpu = cpu.cuda_is_real()
        self.before: int | None = None
        if self.is_of_gpu:
            torch.cuda.reset_peak_memory_stats()
            return
        with suppress(OSError):  # not Linux, or it does not let a process reset its peak
            CLEAR.write_text("5")
            self.before = _size("VmRSS")

    def bytes(self) -> int | None:
        """The peak until now; None where it cannot be measured."""
        if self.is_of_gpu:
            return torch.cuda.max_memory_allocated()
        return None if self.before is None else max(_size("VmHWM") - self.before, 0)


def _size(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
