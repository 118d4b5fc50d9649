"""What several tests need."""
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile("mmie", deadline=None) # how long an example takes depends on what else the machine does
settings.load_profile("mmie")


@pytest.fixture(scope="session")
def root() -> Path:
    "The repository."
    return ROOT


@pytest.fixture(scope="session")
def mmie() -> Callable[..., subprocess.CompletedProcess[str]]:
    "Run the command line in a process of its own, as a user does."
    def call(*words: object, cwd: Path | None = None, timeout: float = 300, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "mmie"), *map(str, words)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=timeout, input=stdin, check=False)
    return call
