"""Build the documentation site into _docs/.

With Quarto on the PATH this is `nbdev_docs`. Without it the same notebooks, as nbdev and polish.py process them, go
through pandoc (the PyPI package pypandoc_binary carries it) into the same pages with the sidebar of `_quarto.yml`.
"""
import base64
import html
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import groupby, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import jinja2
import nbformat
import pypandoc
import yaml
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from polish import polish
from reference import link_proofs, proof_links, read_book, sidebar

ROOT = Path(__file__).resolve().parent.parent
DOCS, PROC, TOOLS = ROOT / "_docs", ROOT / "_proc", ROOT / "tools"
MARKDOWN = "markdown+emoji-implicit_figures" # what Quarto reads, so that both see the same lists
COLUMNS = re.compile(r"(?![✓✗]).*?(?:\S {3,}\S|\S {2,}\S.*\S {2,}\S)") # in a line that was printed
ASSETS = ("site.css", "site.js", "theme.js", "vendor/minisearch.js", "vendor/minisearch.LICENSE.txt")


@dataclass
class Page:
    source: str # "20_attention.dot_product.ipynb"
    part: str # the sidebar's section, empty for the landing page
    title: str = ""
    description: str = ""
    target: str = "" # "attention.dot_product.html"
    markdown: str = ""
    body: str = ""
    toc: str = ""


def image(data: dict[str, str], file: Path, options: dict[str, str]) -> str:
    "A picture among the outputs becomes a file; its size is written down, so that nothing jumps when it arrives."
    about = {"fig-alt": options.get("fig-alt", ""), "fig-cap": options.get("fig-cap", "")}
    if "image/png" in data:
        raw, file = base64.b64decode(data["image/png"]), file.with_suffix(".png")
        about["width"], about["height"] = struct.unpack(">II", raw[16:24])
    else:
        raw, file = "".join(data["image/svg+xml"]).encode("utf-8"), file.with_suffix(".svg")
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(raw)
    described = " ".join(f'{key}="{html.escape(str(value))}"' for key, value in about.items() if value)
    return f"![]({file.parent.name}/{file.name}){{{described}}}"


def cell_markdown(cell: nbformat.NotebookNode, file: Path) -> str:
    "One processed cell as pandoc's Markdown."
    if cell.cell_type != "code":
        return cell.source if cell.cell_type == "markdown" else ""
    parts = []
    options = yaml.safe_load("\n".join(re.findall(r"^#\| ?(.*)$", cell.source, re.M))) or {}
    source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
    if source.strip() and options.get("echo", True):
        code = f"``````python\n{source}\n``````"
        folded = f"<details class=\"code-fold\">\n<summary>{options.get('code-summary', 'Code')}</summary>\n\n{code}\n\n</details>"
        parts.append(folded if options.get("code-fold") else code)
    for k, output in enumerate(cell.get("outputs", [])):
        data = output.get("data", {})
        if "image/png" in data or "image/svg+xml" in data:
            parts.append(image(data, file.with_name(f"{file.name}-{k}"), options))
        elif "text/markdown" in data:
            parts.append(f"::: {{.cell-output}}\n{data['text/markdown']}\n:::")
        elif text := output.get("text") or data.get("text/plain"):
            kind = "stderr" if output.get("name") == "stderr" else "stdout"
            parts.append(f"::: {{.cell-output .{kind}}}\n``````\n{text.rstrip()}\n``````\n:::")
    return "\n\n".join(parts)


def load(page: Page, folder: Path) -> None:
    "Fill in a page from its processed notebook, or from a file that is Markdown already; pictures go into the folder."
    stem = Path(page.source).stem
    if page.source.endswith(".ipynb"):
        cells = nbformat.read(PROC / page.source, as_version=4).cells
        matter = next((cell.source for cell in cells if cell.cell_type == "raw" and cell.source.startswith("---")), "")
    else:
        cells, text = [], (PROC / page.source).read_text(encoding="utf-8")
        matter, page.markdown = re.fullmatch(r"(---\n.*?\n---\n)?(.*)", text, re.S).groups(default="")
    front = yaml.safe_load(matter.strip().strip("-")) or {}
    page.title, page.description = front.get("title", stem), front.get("description") or ""
    page.target = front.get("output-file", f"{stem}.html")
    files = folder / f"{Path(page.target).stem}_files"
    page.markdown += "\n\n".join(cell_markdown(cell, files / f"figure-{n}") for n, cell in enumerate(cells))


def convert(page: Page) -> None:
    "The page's Markdown as HTML, with its table of contents."
    toc, _, page.body = pypandoc.convert_text(
        page.markdown, "html5", format=MARKDOWN,
        extra_args=["--mathml", "--toc", "--toc-depth=3", "--standalone", f"--template={TOOLS / 'pandoc.html'}", "--wrap=preserve",
                    "--syntax-highlighting=kate", f"--lua-filter={TOOLS / 'site.lua'}", "--metadata=title:x"],
    ).partition("<!--body-->")
    page.toc = re.sub(r' id="toc-[^"]*"', "", toc) # a page has it twice


def write_for_machines(pages: list[Page]) -> None:
    "llms.txt, and each page once more as Markdown (https://llmstxt.org)."
    config = get_config()
    lines = [f"# {config.title}\n\n> {config.description}"]
    for part, group in groupby(pages, key=lambda page: page.part):
        lines.append(f"\n## {part or 'Start'}\n")
        for page in group:
            text = re.sub(r"^:::.*\n?|^<!--.*?-->\n?", "", page.markdown, flags=re.M)
            text = re.sub(r"^!\[\]\(.*?\)\{(?:fig-alt=\"(.*?)\")?.*\}$", r"*Figure. \1*", text, flags=re.M)
            (DOCS / f"{page.target}.md").write_text(f"# {page.title}\n\n> {page.description}\n\n{text.strip()}\n", encoding="utf-8")
            lines.append(f"- [{page.title}]({page.target}.md): {' '.join(page.description.split())}")
    (DOCS / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


class Sections(HTMLParser):
    "What the search knows of a page: its sections with their words, and each symbol for itself."

    def __init__(self, page: Page) -> None:
        super().__init__()
        self.found: list[list[str]] = [[page.target, page.title, page.description + " "]] # address, heading, text
        self.symbols: list[list[str]] = []
        self._page, self._inside = page, "" # a heading, a symbol's name, or what isn't searched
        self.feed(page.body)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag in ("h1", "h2", "h3") and found.get("id"):
            self._inside = tag
            self.found.append([f"{self._page.target}#{found['id']}", "", ""])
        elif tag == "span" and "symbol" in (found.get("class") or "").split():
            self._inside = "a"
            self.symbols.append([f"{self._page.target}#{found['id']}", "", self._page.title])
        elif tag in ("script", "style", "annotation", "pre") and not self._inside:
            self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "a":
            self.symbols[-1][1] += data
        elif self._inside.startswith("h"):
            self.found[-1][1] += data
        elif not self._inside:
            self.found[-1][2] += data


def search_index(pages: list[Page]) -> str:
    "A script, since a page that was opened from disk may load one but may not fetch data."
    found = [Sections(page) for page in pages]
    rows = [[*symbol, "symbol"] for page in found for symbol in page.symbols]
    for page, read in zip(pages, found, strict=True):
        rows += [[where, heading, " ".join(text.split()), page.title] for where, heading, text in read.found]
    return f"window.SECTIONS = {json.dumps(rows, ensure_ascii=False)};\n"


def relink(body: str, pages: list[Page]) -> str:
    "Links to notebooks become links to their pages."
    targets = {page.source: page.target for page in pages}
    return re.sub(r'href="(?:\./)?([^"#:]+\.(?:ipynb|q?md))(#[^"]*)?"', lambda m: f'href="{targets.get(m[1], m[1])}{m[2] or ""}"', body)


def hang(page: str) -> str:
    "Each line of code, and each that was printed, as an element, so that what doesn't fit on it can stand further in than it began."
    def code(line: re.Match[str]) -> str:
        return f'{line[1]} style="--in: {len(line[3])}ch"{line[2]}{line[3]}'
    def printed(said: re.Match[str]) -> str: # no line of a table is broken, unless it's a sentence
        lines = said[2].split("\n")
        texts = [html.unescape(re.sub(r"<.*?>", "", line)) for line in lines]
        columns = [bool(COLUMNS.match(text)) for text in texts]
        rows = [sum(columns) > 1 and len(text) < (180 if column else 90) for text, column in zip(texts, columns, strict=True)]
        starts = [" class=row" if row else f' style="--in: {n}ch"' if (n := len(text) - len(text.lstrip(" "))) else ""
                  for text, row in zip(texts, rows, strict=True)]
        return said[1] + "\n".join(f"<span{start}>{line}</span>" for start, line in zip(starts, lines, strict=True)) + said[3]
    page = re.sub(r'(<span id="cb\d+-\d+")(><a [^>]*></a>)( +)', code, page)
    return re.sub(r'(<div class="cell-output (?:stdout|stderr)">\s*<pre><code>)(.*?)(</code></pre>)', printed, page, flags=re.S)


def build_without_quarto(proofs: Mapping[str, str]) -> None: # name → its proofs, as a link
    config = get_config()
    refresh_quarto_yml()
    proc_nbs(force=True)
    polish(PROC, proofs)
    shutil.rmtree(DOCS, ignore_errors=True)
    for folder in ("images", "fonts"):
        shutil.copytree(ROOT / "nbs" / folder, DOCS / folder)
    pages = [Page(*entry) for entry in sidebar(ROOT)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda page: (load(page, DOCS), convert(page)), pages))
    parts = [(part, list(group)) for part, group in groupby(pages, key=lambda page: page.part)]
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(TOOLS), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    for (before, page), (_, after) in zip(pairwise([None, *pages]), pairwise([*pages, None]), strict=True):
        text = templates.get_template("page.html.j2").render(
            page=page, parts=parts, before=before, after=after, config=config, home=config.doc_host + config.doc_baseurl,
            lead=re.sub("`(.+?)`", r"<code>\1</code>", html.escape(page.description)), body=relink(page.body, pages))
        (DOCS / page.target).write_text(text, encoding="utf-8")
    for asset in ASSETS:
        shutil.copy(TOOLS / asset, DOCS)
    (DOCS / "sections.js").write_text(search_index(pages), encoding="utf-8")
    write_for_machines(pages)


def build_with_quarto() -> None:
    (ROOT / "README.md").touch() # nbdev would write one older than index.ipynb anew, with links that start in nbs/
    subprocess.run(["nbdev_docs"], cwd=ROOT, check=True, env={**os.environ, "QUARTO_PYTHON": sys.executable}) # the one that runs polish.py
    pages = [Page(*entry) for entry in sidebar(ROOT)]
    with TemporaryDirectory() as folder: # Quarto has its own pictures
        for page in pages:
            load(page, Path(folder))
    write_for_machines(pages)


def main() -> None:
    book, quarto = read_book(ROOT), shutil.which("quarto")
    if quarto:
        build_with_quarto()
    else:
        build_without_quarto(proof_links(book))
    link_proofs(DOCS, book)
    if not quarto:
        for path in DOCS.glob("*.html"):
            path.write_text(hang(path.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"open {(DOCS / 'index.html').relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
