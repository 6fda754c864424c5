"""Resident memory of processes, from /proc where there is one, else from psutil."""

from __future__ import annotations

import os
import threading
from pathlib import Path


MIB = 1024**2
GIB = 1024**3
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def resident_bytes(pid: int | None = None) -> int | None:
    """Resident memory of a process (this one by default) in bytes; None where nothing tells or it has ended."""
    pid = os.getpid() if pid is None else pid
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        pass
    try:
        import psutil

        return psutil.Process(pid).memory_info().rss
    except Exception:  # psutil missing, or the process is gone
        return None


def available_bytes() -> int | None:
    """Memory that can still be used without swapping, container limits included; None where nothing tells."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass
    if not found:
        try:
            import psutil

            found.append(psutil.virtual_memory().available)
        except ImportError:
            return None
    for limit_file, used_file in _CGROUP_FILES:
        try:
            limit, used = int(Path(limit_file).read_text()), int(Path(used_file).read_text())
        except (OSError, ValueError):  # no such group, or "max"
            continue
        found.append(max(limit - used, 0))
    return min(found)


class PeakMemory:
    """The largest resident memory of this process since `reset()`.

    The kernel's own high-water mark is exact and free; where it cannot be reset, a thread samples instead.
    """

    def __init__(self) -> None:
        self._sampled = 0
        self._stop: threading.Event | None = None
        self._thread: threading.Thread | None = None

    def reset(self) -> None:
        """Start anew from the present resident memory."""
        self._end_sampling()
        self._sampled = resident_bytes() or 0
        if not _reset_high_water():
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._sample, args=(self._stop,), daemon=True)
            self._thread.start()

    def read(self) -> int | None:
        """The peak in bytes so far; None where nothing tells."""
        self._sampled = max(self._sampled, resident_bytes() or 0)
        high = None if self._thread is not None else _high_water()
        return max(high or 0, self._sampled) or None

    def _sample(self, stop: threading.Event) -> None:
        while not stop.wait(0.005):
            self._sampled = max(self._sampled, resident_bytes() or 0)

    def _end_sampling(self) -> None:
        if self._stop is not None and self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._stop = self._thread = None


class ResidentMeter:
    """What runs need above the resident memory there was at the start."""

    def __init__(self) -> None:
        self._peak, self._base = PeakMemory(), None

    def start(self) -> int | None:
        """Begin; the bytes there are now."""
        self._peak.reset()
        self._base = resident_bytes()
        return self._base

    def wait(self) -> None:
        """Until what was started has ended."""

    def peak_above(self) -> int | None:
        """Bytes of the peak above those at the start; None where nothing tells."""
        highest = self._peak.read()
        return None if self._base is None or highest is None else max(highest - self._base, 0)


class CudaMeter:
    """The same of torch's current GPU: the memory that torch has given out."""

    def start(self) -> int:
        """As of `ResidentMeter`."""
        import torch

        self.wait()
        torch.cuda.empty_cache()  # what torch keeps of the GPU's memory is for the processes beside this one
        torch.cuda.reset_peak_memory_stats()
        self._base = torch.cuda.memory_allocated()
        return self._base

    def wait(self) -> None:
        """Until the GPU has nothing more to do."""
        import torch

        torch.cuda.synchronize()

    def peak_above(self) -> int:
        """As of `ResidentMeter`."""
        import torch

        return torch.cuda.max_memory_allocated() - self._base


def make_meter(device: str) -> ResidentMeter | CudaMeter:
    """What measures the memory that counts on a device, "cpu" or "cuda"."""
    return CudaMeter() if device == "cuda" else ResidentMeter()


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _high_water() is not None


def _high_water() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, ValueError, StopIteration):
        return None
