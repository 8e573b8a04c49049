"""Free memory: of the machine, and within the limits of containers."""

from __future__ import annotations

import pytest

from puzzle.base.machine import available_memory, resident_memory

GB = 10**9
FREE = 16 * 10**6 * 1024  # what the machine has, in meminfo's kB


@pytest.mark.parametrize(
    ("cgroup", "files", "wanted"),
    [
        ("", {}, FREE),
        ("0::/", {}, FREE),
        ("0::/", {"memory.max": "max", "memory.current": GB}, FREE),
        ("0::/", {"memory.max": 3 * GB, "memory.current": 2 * GB}, GB),
        ("0::/", {"memory.max": 3 * GB, "memory.current": 2 * GB, "memory.stat": f"anon 1\ninactive_file {GB}"}, 2 * GB),
        ("0::/", {"memory.max": GB, "memory.current": 2 * GB}, 0),
        ("0::/a/b", {"a/memory.max": 5 * GB, "a/memory.current": GB, "a/b/memory.max": 9 * GB, "a/b/memory.current": GB}, 4 * GB),
        ("0::/seen/from/the/host", {"memory.max": 3 * GB, "memory.current": GB}, 2 * GB),
        ("0::/", {"memory.max": "gone"}, FREE),
        ("4:memory:/a\n1:cpu:/", {"memory/memory.limit_in_bytes": 2**63 - 4096, "memory/memory.usage_in_bytes": GB}, FREE),
        ("4:memory:/a\n0::/", {"memory/a/memory.limit_in_bytes": 3 * GB, "memory/a/memory.usage_in_bytes": 2 * GB,
                               "memory/a/memory.stat": f"inactive_file 5\ntotal_inactive_file {GB}"}, 2 * GB),
        ("5:cpu,memory:/", {"cpu,memory/memory.limit_in_bytes": 3 * GB, "cpu,memory/memory.usage_in_bytes": GB}, 2 * GB),
    ],
)  # fmt: skip
def test_a_container_has_no_more_than_its_limit(tmp_path, cgroup, files, wanted):
    contents = {"proc/meminfo": "MemTotal: 1 kB\nMemAvailable: 16000000 kB\n", "proc/self/cgroup": cgroup}
    contents |= {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(str(content))
    assert available_memory(tmp_path) == wanted


def test_this_machine():
    assert resident_memory() > 10**6
    assert available_memory() > 0
