"""The site builds without Quarto: every chapter has its page, every link and image leads somewhere, no markup is left raw."""
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


class Page(HTMLParser):
    "What the tests need to know of a page."

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.words: list[str] = []
        self._quiet = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids.update(filter(None, [found.get("id")]))
        self.links += [link for link in (found.get("href"), found.get("src")) if link]
        self._quiet += tag in ("script", "style", "pre", "code", "annotation")

    def handle_endtag(self, tag: str) -> None:
        self._quiet -= tag in ("script", "style", "pre", "code", "annotation")

    def handle_data(self, data: str) -> None:
        if self._quiet <= 0:
            self.words.append(data)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    copy = tmp_path_factory.mktemp("site") / "mmie"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "_docs", "_proc", "__pycache__", ".*_cache", "build"))
    bins = [folder for folder in os.environ["PATH"].split(os.pathsep) if not (Path(folder) / "quarto").exists()]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PATH": os.pathsep.join([str(Path(sys.executable).parent), *bins]), "OMP_NUM_THREADS": "1"}
    built = subprocess.run([sys.executable, "tools/site.py"], cwd=copy, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    return {path.name: Page(path.read_text(encoding="utf-8")) for path in sorted((copy / "_docs").glob("*.html"))} | {"": Page(str(copy / "_docs"))}


def test_every_chapter_has_a_page(pages: dict[str, Page]) -> None:
    chapters = {path.stem.split("_", 1)[1] + ".html" for path in (ROOT / "nbs").glob("[0-9]*.ipynb")}
    assert chapters | {"index.html", ""} == set(pages)


def test_no_markup_is_left_raw(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        text = "".join(page.words)
        assert not re.findall(r"\$\$|^:::|^#\| ?\w+|\]\((?:http|\w+\.html)", text, re.MULTILINE), name


def test_every_link_leads_somewhere(pages: dict[str, Page]) -> None:
    folder = Path("".join(pages[""].words))
    for name, page in pages.items():
        for link in page.links:
            if link.startswith(("http:", "https:", "data:", "mailto:")):
                continue
            target, _, anchor = link.partition("#")
            assert not target or (folder / target).exists(), f"{name}: {link}"
            if anchor and (target or name) in pages:
                assert anchor in pages[target or name].ids, f"{name}: {link}"
