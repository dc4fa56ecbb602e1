"""How much host memory a process in a container can still have (Linux; 0 where that cannot be told)."""

from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def free_host_memory() -> int:
    """Bytes: what the machine has available, up to what the container's limit leaves.

    Cached pages of files count as free, as the kernel drops them before it refuses memory.
    """
    try:
        available = _table(MEMINFO)["MemAvailable:"] * 1024
    except (OSError, KeyError):
        return 0
    return max(0, min([available, *_left_by_limits()]))


def _left_by_limits() -> list[int]:
    """Of the container's memory limit, if it has one; cgroup 2, else 1."""
    for limit, used, stat, prefix in (
        ("memory.max", "memory.current", "memory.stat", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
    ):
        try:
            most, taken = (int((CGROUP / name).read_text()) for name in (limit, used))
            table = _table(CGROUP / stat)
        except (OSError, ValueError):  # no such file, or no limit: "max"
            continue
        cached = table.get(f"{prefix}active_file", 0) + table.get(f"{prefix}inactive_file", 0)
        return [most - taken + cached]
    return []


def _table(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}
