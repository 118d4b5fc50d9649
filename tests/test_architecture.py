"""The order of the book is the architecture: a module imports only modules with a smaller number."""
import ast
import re
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))


def module_of(path: Path) -> str:
    "12_tokenization.bpe.ipynb → mmie.tokenization.bpe"
    return "mmie." + path.stem.split("_", 1)[1]


NUMBER = {module_of(path): int(path.stem[:2]) for path in CHAPTERS}


def file_of(module: str) -> Path:
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


def imported(module: str) -> set[str]:
    "The modules of the book that a module imports, inside functions too."
    package = module.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(file_of(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[:len(package) - node.level + 1], *([node.module] if node.module else [])]) if node.level else node.module or ""
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        found.update(name for name in names if name in NUMBER)
    return found


def test_numbers_are_unique() -> None:
    assert CHAPTERS and len({path.stem[:2] for path in CHAPTERS}) == len(CHAPTERS)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_the_file_name_is_the_module_name(path: Path) -> None:
    first = nbformat.read(path, as_version=4).cells[0].source
    declared = re.search(r"^#\|\s*default_exp\s+(\S+)", first, re.MULTILINE)
    assert declared and f"mmie.{declared[1]}" == module_of(path)
    assert file_of(module_of(path)).exists()


@pytest.mark.parametrize("module", NUMBER)
def test_imports_only_go_back(module: str) -> None:
    later = {name: NUMBER[name] for name in imported(module) if NUMBER[name] >= NUMBER[module]}
    assert not later, f"{module} is number {NUMBER[module]} and imports {later}"


def test_every_module_has_a_notebook() -> None:
    generated = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT / "mmie").rglob("*.py") if not p.name.startswith("_")}
    assert generated == set(NUMBER)


def test_the_sidebar_names_every_page_once_and_the_chapters_in_order() -> None:
    contents = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    listed = [name for entry in contents for name in ([entry] if isinstance(entry, str) else entry["contents"])]
    assert [name for name in listed if name[0].isdigit()] == [path.name for path in CHAPTERS]
    assert sorted(listed) == sorted(path.name for path in (ROOT / "nbs").glob("*.ipynb"))


def test_public_names_are_unique() -> None:
    "`from mmie import X` finds X by its name alone."
    owners: dict[str, list[str]] = {}
    for module in NUMBER:
        tree = ast.parse(file_of(module).read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                for name in ast.literal_eval(node.value):
                    owners.setdefault(name, []).append(module)
    assert owners and not {name: modules for name, modules in owners.items() if len(modules) > 1}
