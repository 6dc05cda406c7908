"""What tests of artefacts have in common: scripts that die, and a disk that is full."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

needs_sigkill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")


def names(folder: Path) -> list[str]:
    """What a folder holds, hidden entries too."""
    return sorted(entry.name for entry in folder.iterdir())


def killed(code: str) -> None:
    """Run a script that kills itself with SIGKILL (as `die()`), so that no handler and no `finally` runs."""
    script = "import os, signal\ndef die(*_, **__):\n    os.kill(os.getpid(), signal.SIGKILL)\n" + textwrap.dedent(code)
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
