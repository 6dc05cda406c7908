"""What is free counts what this process has freed, and a container's limit."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from foldgpt import system_memory as module
from foldgpt.free_memory import free_memory

_KEPT = """
import sys, psutil, torch
from foldgpt.allocator import keep_freed_memory
from foldgpt.free_memory import free_memory
if not keep_freed_memory():
    sys.exit(3)
tensors = [torch.ones(2**20) for _ in range(256)]
end = torch.ones(2**18)  # holds the end of the heap
del tensors
before = psutil.Process().memory_info().rss
free_memory(torch.device("cpu"))
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="mallopt and malloc_trim are glibc's")
def test_memory_that_was_freed_and_is_kept_counts_as_free() -> None:
    done = subprocess.run([sys.executable, "-c", _KEPT], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip("the C library is not glibc")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0.8 * 2**30


def _group(folder: Path, limit: str, usage: int, files: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\nfile 7\ninactive_file {files}\n")


def _own(tmp_path: Path, lines: str) -> Path:
    (tmp_path / "own").write_text(lines)
    return tmp_path / "own"


@pytest.mark.parametrize(("limit", "expected"), [("2000000", [1_100_000]), ("max", []), ("1000", [0])])
def test_a_container_s_limit_is_kept(
    limit: str, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, own = tmp_path / "cgroup", _own(tmp_path, "0::/\n")
    _group(root, limit, 1_200_000, 300_000)
    assert module._left_to_groups(root, own) == expected
    monkeypatch.setattr(module, "_CGROUPS", root)
    monkeypatch.setattr(module, "_OWN_GROUPS", own)
    free = free_memory(torch.device("cpu"))
    assert free == expected[0] if expected else free > 2_000_000


def test_the_limits_of_all_groups_above_count(tmp_path: Path) -> None:
    """A batch job's limit stands above its step's."""
    root, own = tmp_path / "cgroup", _own(tmp_path, "0::/slurm/job_7/step_0\n")
    _group(root / "slurm" / "job_7" / "step_0", "max", 10, 0)
    _group(root / "slurm" / "job_7", "9000", 5000, 100)
    _group(root / "slurm", "20000", 19000, 0)
    assert sorted(module._left_to_groups(root, own)) == [1000, 4100]


def test_the_older_layout_of_control_groups_is_read(tmp_path: Path) -> None:
    own = _own(tmp_path, "7:cpu,cpuacct:/\n4:memory:/docker/ab\n1:name=systemd:/\n")
    folder = tmp_path / "memory"  # as a container sees it: its own group alone
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("5000\n")
    (folder / "memory.usage_in_bytes").write_text("3000\n")
    (folder / "memory.stat").write_text("cache 1\ntotal_inactive_file 500\n")
    assert module._left_to_groups(tmp_path, own) == [2500]


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert module._left_to_groups(tmp_path, tmp_path / "none") == []
    assert module._left_to_groups(tmp_path, _own(tmp_path, "0::/\n")) == []
    (tmp_path / "memory.max").write_text("what\n")
    (tmp_path / "memory.stat").write_text("")
    assert module._left_to_groups(tmp_path, _own(tmp_path, "0::/\n")) == []
