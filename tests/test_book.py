"""The committed files are what the notebooks make of themselves."""
import ast
import filecmp
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A copy of what nbdev reads and writes."
    folder = tmp_path_factory.mktemp("book") / "mmie"
    folder.mkdir()
    for name in ("settings.ini", "README.md", "pyproject.toml", "_quarto.yml"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("nbs", "mmie"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    return folder


def nbdev(command: str, folder: Path) -> None:
    "Run an nbdev command on a copy, which has to be found before the installed package."
    script = Path(sys.executable).parent / command
    subprocess.run([script], cwd=folder, check=True, timeout=300, env={**os.environ, "PYTHONPATH": str(folder)})


def changed(ours: Path, copied: Path) -> list[str]:
    "Files that differ, or exist on one side only."
    def files(folder: Path) -> set[str]:
        return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts and ".ipynb_checkpoints" not in p.parts}
    both = files(ours) & files(copied)
    _, differ, errors = filecmp.cmpfiles(ours, copied, sorted(both), shallow=False)
    return sorted([*differ, *errors, *(files(ours) ^ files(copied))])


def test_export_changes_nothing(copy: Path) -> None:
    nbdev("nbdev_export", copy)
    assert changed(ROOT / "mmie", copy / "mmie") == [], "run nbdev_export and commit mmie/"


def test_clean_changes_nothing(copy: Path) -> None:
    nbdev("nbdev_clean", copy)
    ours, copied = ROOT / "nbs", copy / "nbs"
    assert [name for name in changed(ours, copied) if name.endswith(".ipynb")] == [], "run nbdev_clean and commit nbs/"


def test_readme_says_what_the_index_says() -> None:
    subprocess.run([sys.executable, ROOT / "tools" / "readme.py", "--check"], check=True, timeout=60)


def test_a_stale_readme_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "tools" / "readme.py", tmp_path / "tools")
    shutil.copy(ROOT / "nbs" / "index.ipynb", tmp_path / "nbs")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(text.replace("make run", "make walk"), encoding="utf-8")
    result = subprocess.run([sys.executable, tmp_path / "tools" / "readme.py", "--check"], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1 and "make readme" in result.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_whole(path: Path) -> None:
    "Every notebook was run from top to bottom, without an error, and holds no machine's path."
    notebook = nbformat.read(path, as_version=4)
    ids = [cell["id"] for cell in notebook.cells]
    assert len(ids) == len(set(ids))
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error", cell.source
    if path.name != "index.ipynb" and any(cell.cell_type == "code" for cell in notebook.cells):
        assert any(cell.get("outputs") for cell in notebook.cells)
    assert not re.search(r"/(?:home|root|Users|work)/\w", path.read_text(encoding="utf-8")), "a machine's path"


LINK = re.compile(r"\]\(([^)#\s]+\.ipynb)(#[^)]*)?\)")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_between_chapters_lead_somewhere(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            for target, _ in LINK.findall(cell.source):
                assert target.startswith("http") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_hold_no_symbols(path: Path) -> None: # the site makes a link of each symbol in backticks, and links don't nest
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            assert not re.findall(r"\[[^\[\]\n]*`\w[^\[\]\n]*\]\(\d\d_", cell.source)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_hold_imports_or_code(path: Path) -> None:
    "The documentation runs the cells that import, and only those: a mixed one would meet names that don't exist."
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and "#| export" not in cell.source and not cell.source.lstrip().startswith(("%", "!")):
            body = ast.parse(cell.source).body
            imports = [isinstance(statement, ast.Import | ast.ImportFrom) for statement in body]
            assert all(imports) or not any(imports), cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_figures_say_what_they_show(path: Path) -> None: # to readers who can't see them, on the site
    for cell in nbformat.read(path, as_version=4).cells:
        if any({"image/png", "image/svg+xml"} & set(output.get("data", {})) for output in cell.get("outputs", [])):
            assert re.search(r'^#\| fig-alt: "[^"]{20,}"$', cell.source, re.MULTILINE), cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_title_and_promise_stand_alone(path: Path) -> None: # what else is in their cell doesn't reach the site
    first = next((cell.source for cell in nbformat.read(path, as_version=4).cells if cell.source.startswith("# ")), "")
    assert all(line.startswith(("# ", ">")) for line in first.splitlines() if line.strip()), first
