"""Make chapters readable as pages: run on the notebooks that nbdev has processed, before they're rendered.

Quarto runs this file as its pre-render step with a Python of its choice, site.py imports it: so it needs nothing but the
standard library. The source of the library stays in the text, headed by the names it defines with links to the
repository and to what's proven of them; imports are folded; links between chapters stay within the site; pictures have
words instead of captions; and no output asks a page to load a script from somewhere else.
"""
import configparser
import html
import json
import re
import sys
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

if sys.version_info < (3, 10): # noqa: UP036 - Quarto may have found another Python than the one that mmie is installed for
    sys.exit(f"The pages need Python 3.10 or newer, and Quarto runs {sys.executable}. Name another: QUARTO_PYTHON=.venv/bin/python")
from reference import proof_links, public_names, read_book, top_level

ROOT = Path(__file__).resolve().parent.parent
FOLDED = '#| code-fold: true\n#| code-summary: "Imports"\n'
Cell = dict[str, Any]


@cache
def settings() -> Mapping[str, str]:
    "What settings.ini says: the addresses of the repository and of the site."
    parser = configparser.ConfigParser()
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def module_file(target: str) -> Path: # of the page "attention.masks.html", mmie/attention/masks.py
    return ROOT / settings()["lib_path"] / (target.removesuffix(".html").replace(".", "/") + ".py")


def page_name(notebook: dict[str, Any]) -> str:
    "The name of a notebook's page, which nbdev has written into its first cell."
    return next((found[1] for cell in notebook["cells"] if (found := re.search(r"^output-file: (\S+)", "".join(cell["source"]), re.M))), "")


def only_imports(source: str) -> bool:
    lines = re.sub(r"\(.*?\)", "", source, flags=re.S).strip().splitlines()
    return bool(lines) and all(re.match(r"\s*(import|from|#)\s|if TYPE_CHECKING:|\s*$", line) for line in lines)


def symbol_bar(names: list[str], target: str, lines: dict[str, int], proofs: Mapping[str, str], met: list[str]) -> Cell:
    "The line above an exported cell: each name is an anchor, with links to its code in the repository and to its proofs."
    path, bars = module_file(target), []
    for name in names:
        source = f"{settings()['git_url']}/blob/{settings()['branch']}/{path.relative_to(ROOT).as_posix()}#L{lines[name]}"
        met.append(name.lower())
        anchor = name.lower() + (f"-{count}" if (count := met.count(name.lower())) > 1 else "") # a class and its function, said twice
        bars.append(f"[[{name}](#{anchor})]{{#{anchor} .symbol}} [source]({source}) {proofs.get(name, '')}".rstrip())
    return {"cell_type": "markdown", "id": f"names-{names[0]}", "metadata": {}, "source": "::: {.symbols}\n" + "\n\n".join(bars) + "\n:::"}


def in_words(found: re.Match[str]) -> str:
    "A picture by itself, whose words Quarto would print below it as a caption."
    words = found[1].replace("\\", "\\\\").replace('"', '\\"')
    return f'![]({found[2]}){{fig-alt="{words}"}}'


def beside(heading: re.Match[str], taken: set[str]) -> str:
    "A heading that is a symbol's name, with an address of its own: the name itself leads to the symbol."
    name = re.sub(r"\]\(.*?\)|[^\w. -]", "", heading[0]).strip().lower()
    return f"{heading[0]} {{#on-{name}}}" if name in taken else heading[0]


def quiet(output: Cell) -> Cell:
    "An output without widget views, and with HTML as part of the text: Quarto would fetch scripts for either."
    data = output.get("data", {})
    data.pop("application/vnd.jupyter.widget-view+json", None)
    if "text/html" in data and "image/png" not in data:
        data["text/markdown"] = "::: {.html-output}\n``````{=html}\n" + "".join(data.pop("text/html")) + "\n``````\n:::"
    return output


def merged(outputs: list[Cell]) -> list[Cell]:
    "Outputs with what was printed in several pieces in one."
    kept: list[Cell] = []
    for output in map(quiet, outputs):
        if kept and "name" in output and kept[-1].get("name") == output["name"]:
            kept[-1]["text"] = [*kept[-1]["text"], *output["text"]]
        else:
            kept.append(output)
    return kept


def described(source: str, outputs: list[Cell]) -> str:
    "A cell whose drawing says what it shows, with these words as the picture's alternative text."
    drawings = ["".join(output.get("data", {}).get("image/svg+xml", "")) for output in outputs]
    said = next((found[1] for drawing in drawings if (found := re.search(r'<svg[^>]* aria-label="([^"]+)"', drawing))), "")
    return f"#| fig-alt: {json.dumps(html.unescape(said), ensure_ascii=False)}\n{source}" if said and "#| fig-alt" not in source else source


def polish_cell(cell: Cell, target: str, ids: set[str], lines: dict[str, int], proofs: Mapping[str, str], met: list[str]) -> list[Cell]:
    "A cell as the site shows it: none, one, or two with the line that names what it defines."
    source = re.sub(r"^#\|(?! *\S+:).*\n?", "", "".join(cell["source"]), flags=re.M) # nbdev's directives; Quarto's have a colon
    if cell["cell_type"] != "code":
        return [{**cell, "source": source}]
    if not source.strip():
        return []
    if only_imports(source):
        source = FOLDED + source
    names = [name for name in top_level(source) if name in lines] if cell.get("id") in ids else []
    bar = [symbol_bar(names, target, lines, proofs, met)] if names else []
    return [*bar, {**cell, "source": described(source, cell["outputs"]), "outputs": merged(cell["outputs"])}]


def polish(proc: Path, proofs: Mapping[str, str]) -> None: # name → its proofs, as a link
    "Rewrite the notebooks in a folder, once."
    notebooks = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(proc.glob("*.ipynb"))}
    home, repository = settings()["doc_host"] + settings()["doc_baseurl"], f"{settings()['git_url']}/blob/{settings()['branch']}"
    anchors: dict[str, set[str]] = {}
    for notebook in notebooks.values():
        target, cells, met = page_name(notebook), [], []
        code = module_file(target).read_text(encoding="utf-8") if module_file(target).is_file() else ""
        defined = top_level(code)
        lines = {name: defined[name].lineno for name in public_names(defined)}
        anchors[target] = {name.lower() for name in lines}
        if notebook["metadata"].get("polished"):
            continue
        ids = set(re.findall(r"^# %% .*#(\w+)$", code, re.M))
        for cell in notebook["cells"]:
            for new in polish_cell(cell, target, ids, lines, proofs, met):
                if cells and all("".join(one["source"]).startswith(FOLDED) and not one["outputs"] for one in (cells[-1], new)):
                    cells[-1]["source"] += "\n" + new["source"].removeprefix(FOLDED)
                else:
                    cells.append(new)
        notebook["cells"] = cells

    def local(match: re.Match[str]) -> str: # what has no anchor leads to its page
        return f"]({match[1]}{'#' + match[2] if match[2] in anchors.get(match[1], ()) else ''})"

    for path, notebook in notebooks.items():
        if not notebook["metadata"].pop("polished", False):
            for cell in notebook["cells"]:
                if cell["cell_type"] == "markdown":
                    text = re.sub(rf"\]\({re.escape(home)}/([^)#\s]+)(?:#([^)\s]*))?\)", local, "".join(cell["source"]))
                    text = re.sub(r"^#+ .*$", partial(beside, taken=anchors[page_name(notebook)]), text, flags=re.M)
                    text = text.replace("](../", f"]({repository}/") # what lies outside the book
                    cell["source"] = re.sub(r"^!\[(.+)\]\(([^)\s]+)\)$", in_words, text, flags=re.M)
        notebook["metadata"]["polished"] = True
        notebook["metadata"].pop("widgets", None)
        path.write_text(json.dumps(notebook, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__" and Path.cwd().name == "_proc": # Quarto runs this in its project's folder; the book itself stays as it is
    polish(Path.cwd(), proof_links(read_book(ROOT)) if Path("proofs.ipynb").exists() else {})
