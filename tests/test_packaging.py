"""A wheel with everything in it, which works where nothing else is installed."""
import configparser
import re
import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, tracked): # what a clone would hold
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", folder, source], check=True, capture_output=True, timeout=300)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / "mmie").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert "mmie/py.typed" in ours and ours <= inside
    assert not [name for name in inside if name.startswith(("tests/", "tools/", "nbs/"))]


FRESH = """
import importlib, json, pkgutil, sys
import mmie
light = "torch" not in sys.modules
modules = [m.name for m in pkgutil.walk_packages(mmie.__path__, "mmie.") if not m.name.endswith("_modidx")]
for name in modules:
    importlib.import_module(name)
from mmie import BPETokenizer
tokenizer = BPETokenizer.train(["low lower lowest " * 20], 262)
print(json.dumps({"light": light, "modules": len(modules), "version": mmie.__version__, "where": mmie.__file__,
                  "round": tokenizer.decode(tokenizer.encode("lowest")), "nbdev": [m for m in sys.modules if m.split(".")[0] in ("nbdev", "fastcore", "IPython")]}))
"""


def test_a_clean_environment_needs_only_the_run_time_dependencies(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "env"
    venv.create(home, with_pip=True)
    python = home / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt", wheel],
                   check=True, timeout=1200)
    result = subprocess.run([python, "-c", FRESH], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(result.stdout)
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    assert found["light"] and found["round"] == "lowest" and not found["nbdev"]
    assert found["version"] == config["DEFAULT"]["version"] and Path(found["where"]).is_relative_to(home.resolve())
    assert found["modules"] >= len(list((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb")))
    helped = subprocess.run([python.parent / "mmie", "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert "tokenizer" in helped.stdout


def test_the_address_is_written_once() -> None:
    "Owner and address live in settings.ini; what nbdev derives from it is generated."
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    owner = config["DEFAULT"]["user"]
    tracked = subprocess.run(["git", "grep", "-l", "--untracked", owner], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    assert set(tracked) <= {"settings.ini", "mmie/_modidx.py"}


def test_constraints_pin_what_settings_ask_for() -> None:
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line}
    asked = f"{config['DEFAULT']['requirements']} {config['DEFAULT']['dev_requirements']}".split()
    names = {re.split(r"[\[<>=]", word)[0].lower().replace("_", "-") for word in asked}
    assert names <= pinned
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
