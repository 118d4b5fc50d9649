"""The pages before and behind the chapters: what they link to is there, and says what they say it does."""
import functools
import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
WAYS_IN = ["reading.ipynb", "hour.ipynb", "align_yours.ipynb", "quantize_yours.ipynb", "contribute.ipynb"]
ENTRY = re.compile(r"^\*\*(.+?)\*\*: (.+) \(\[[^\]]+\]\((\d\d_[\w.]+\.ipynb)\)\)$", re.MULTILINE)


@functools.cache
def cells(name: str) -> list[tuple[str, str]]:
    "Kind and source of each cell of a page."
    return [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads((NBS / name).read_text(encoding="utf-8"))["cells"]]


def markdown(name: str) -> str:
    "All the prose of a page."
    return "\n\n".join(source for kind, source in cells(name) if kind == "markdown")


def plain(text: str) -> str:
    "Text in which case, hyphens, dashes and underscores make no difference."
    return re.sub(r"[\s\-–_]+", " ", text).casefold()


@pytest.fixture(scope="module")
def glossary() -> list[tuple[str, str, str]]:
    "Terms, what is said of them, and the chapter linked to."
    return ENTRY.findall(markdown("glossary.ipynb"))


def test_every_entry_of_the_glossary_has_the_same_form(glossary: list[tuple[str, str, str]]) -> None:
    assert len(glossary) >= 120
    assert len(glossary) == len(re.findall(r"^\*\*", markdown("glossary.ipynb"), re.MULTILINE))
    for term, said, _ in glossary:
        assert said.endswith(".") and 20 < len(said) < 400, term


def test_the_glossary_is_sorted_and_says_nothing_twice(glossary: list[tuple[str, str, str]]) -> None:
    terms = [term.casefold() for term, _, _ in glossary]
    assert terms == sorted(set(terms))
    headings = re.findall(r"^## (.)$", markdown("glossary.ipynb"), re.MULTILINE)
    assert headings == sorted({term[0].upper() for term in terms})


def test_the_glossary_leads_to_chapters_that_use_the_word(glossary: list[tuple[str, str, str]]) -> None:
    texts: dict[str, str] = {}
    for term, _, chapter in glossary:
        assert (NBS / chapter).exists(), f"{term}: there is no {chapter}"
        if chapter not in texts:
            texts[chapter] = plain("\n".join(source for _, source in cells(chapter)))
        assert plain(term) in texts[chapter], f"{chapter} doesn't say {term!r}"


def test_the_ways_in_come_first_and_each_is_titled() -> None:
    contents = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    assert contents[0] == "index.ipynb" and contents[1]["section"] == "Start here" and contents[1]["contents"] == WAYS_IN
    for name in [*WAYS_IN, "glossary.ipynb"]:
        assert re.match(r"# .+\n\n> .+", markdown(name)), name


@pytest.mark.parametrize("name", WAYS_IN)
def test_links_into_a_page_lead_to_a_heading(name: str) -> None:
    text = markdown(name)
    headings = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


@pytest.mark.parametrize("path", sorted(NBS.glob("[0-9][0-9]_*.ipynb")), ids=lambda path: path.stem)
def test_every_chapter_has_exercises_with_folded_answers(path: Path) -> None:
    text = markdown(path.name).partition("\n## Exercises")[2]
    exercises = re.split(r"^## ", text, flags=re.MULTILINE)[0]
    asked = re.sub(r"<details.*?</details>", "", exercises, flags=re.DOTALL)
    assert len(re.findall(r"^(?:\*\*)?\d+\.", asked, re.MULTILINE)) >= 2
    assert 1 <= exercises.count("<details>") == exercises.count("</details>")


def test_exercises_name_checks_that_exist() -> None:
    for path in sorted(NBS.glob("[0-9][0-9]_*.ipynb")):
        for line in re.findall(r"^\*To check\*: (.+)$", markdown(path.name), re.MULTILINE):
            code = "\n".join(source for kind, source in cells(path.name) if kind == "code").casefold()
            for claim in re.findall(r"“([^”]+)”", line):
                assert claim.strip("… ").casefold() in code, f"{path.name}: {claim}"


def test_the_guide_at_the_root_points_to_the_page() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / target).exists(), target
    assert "nbs/contribute.ipynb" in text
