"""Processes of their own that begin with torch, transformers and foldgpt imported, which takes each seconds otherwise.

They are forked from a server that has done nothing but import, so that nothing of the tests' process is in them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

import foldgpt

_IMPORTED = ["foldgpt.pipeline", "foldgpt.recovery.recover", "foldgpt.side_by_side", "transformers.trainer", "peft"]


def environment() -> dict[str, str]:
    """What a child gets: the tests' own modules, and foldgpt from where it is here, if another is installed or not."""
    paths = (Path(foldgpt.__file__).parents[1], Path(__file__).parent)
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "HF_HUB_OFFLINE": "1",
    }


def start(said: Path, work: Callable[..., object], *arguments: object, **variables: str) -> BaseProcess:
    """Start a function of a module in a process of its own.

    Args:
        said: the file that takes what it writes to stderr.
        work: the function.
        arguments: what it is given.
        variables: of its environment, beside those of `environment`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    # The server has the environment in which it was started.
    told = (said, environment() | variables, work, arguments)
    # What a test leaves behind ends with the tests.
    process = context.Process(target=_told, args=told, daemon=True)
    process.start()
    return process


def _told(said: Path, variables: dict[str, str], work: Callable[..., object], arguments: tuple[object, ...]) -> None:
    """What a child does."""
    os.environ.update(variables)
    with said.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 2)
    work(*arguments)


def together(said: Path, num_processes: int, work: Callable[..., object], *arguments: object, **variables: str) -> None:
    """Run a function in one process or, as `torchrun` does it, in several that know of each other.

    Raises:
        AssertionError: one of them failed; says what they said.
    """
    if num_processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(num_processes)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_processes > 1 else {} for rank in range(num_processes)]
    processes = [start(said, work, *arguments, **variables, **rank) for rank in ranks]
    deadline = time.monotonic() + 300
    # Where one has failed the others would wait for it.
    while (running := [process for process in processes if process.is_alive()]) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            break
        wait([process.sentinel for process in running], 1)
    for process in processes:
        process.kill()
        process.join()
    assert not any(process.exitcode for process in processes), said.read_text(encoding="utf-8")[-3000:]


def run_script(code: str, *arguments: str) -> None:
    """Run Python as a script is run; a function for `start`."""
    sys.argv = ["script", *arguments]
    exec(compile(code, "script", "exec"), {"__name__": "__main__"})


def assert_killed(process: BaseProcess) -> None:
    """Wait for one that kills itself."""
    process.join(300)
    if process.is_alive():
        process.terminate()
    assert process.exitcode == -signal.SIGKILL
