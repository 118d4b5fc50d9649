"""What several tests need."""
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile("mmie", deadline=None) # how long an example takes depends on what else the machine does
settings.load_profile("mmie")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: # so it is for what a shell runs in the background, and what that starts
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def root() -> Path:
    "The repository."
    return ROOT


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    "Chromium, driven by Playwright: the machine's own, since nothing is downloaded here."
    driver = pytest.importorskip("playwright.sync_api", reason="no browser test without playwright (pip install playwright)")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on the PATH")
    with driver.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found)
        yield chromium
        chromium.close()


def _command(words: list[str], cwd: Path, environment: dict[str, str], streams: list[str]) -> None:
    "What the `mmie` script does, in a process that was forked for it."
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in enumerate(streams):
        os.dup2(os.open(name, os.O_RDWR), number)
    sys.stdin = open(0, encoding="utf-8") # noqa: SIM115 -- multiprocessing had closed it
    sys.argv = ["mmie", *words]
    from mmie.cli import app
    app()


@pytest.fixture(scope="session")
def mmie(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    "Run the command line in a process of its own, as a user does; the processes are forks of one that has imported torch already."
    if os.name == "nt":
        pytest.skip("needs fork")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["mmie.lifecycle", "mmie.cli"])
    folder = tmp_path_factory.mktemp("streams")

    def call(*words: object, cwd: Path | None = None, timeout: float = 300, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        files = [folder / name for name in ("in", "out", "err")]
        for file, text in zip(files, (stdin or "", "", ""), strict=True):
            file.write_text(text, encoding="utf-8")
        command = list(map(str, words))
        process = server.Process(target=_command, args=(command, cwd or Path.cwd(), dict(os.environ), list(map(str, files))))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(["mmie", *command], timeout)
        out, err = (file.read_text(encoding="utf-8") for file in files[1:])
        assert process.exitcode is not None
        return subprocess.CompletedProcess(["mmie", *command], process.exitcode, out, err)
    return call
