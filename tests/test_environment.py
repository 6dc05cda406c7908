"""What a result was measured with."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime, timedelta

import peft
import pytest
import torch
import transformers

import foldgpt
from foldgpt import environment
from foldgpt.environment import describe_environment


def test_versions_are_those_that_run() -> None:
    described = describe_environment()
    assert described["foldgpt"] == foldgpt.__version__
    assert described["torch"] == torch.__version__
    assert described["transformers"] == transformers.__version__
    assert described["peft"] == peft.__version__
    assert described["python"] == platform.python_version()
    assert described["torch_threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(described)) == described, "plain JSON values"


@pytest.mark.parametrize("policy", [None, "passive"])
def test_how_openmp_waits_is_told_where_it_is_set(monkeypatch: pytest.MonkeyPatch, policy: str | None) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    assert describe_environment()["omp_wait_policy"] == policy


def test_hardware_is_what_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    described = describe_environment()
    assert described["num_cores"] == 3, "cores of this process, not of the machine"
    assert described["cpu"]
    # Between a small machine and a large one: bytes or gibibytes by mistake would fall outside.
    assert 0.5 < described["ram_gb"] < 50_000
    assert (described["gpu"] is None) == (not torch.cuda.is_available())


def test_the_date_says_its_time_zone() -> None:
    date = datetime.fromisoformat(describe_environment()["date"])
    assert date.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - date) < timedelta(minutes=1)


def test_a_package_that_is_not_installed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_PACKAGES", ("torch", "no-such-package"))
    described = describe_environment()
    assert described["no-such-package"] is None and described["torch"] is not None
