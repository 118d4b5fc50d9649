"""Build the documentation site into _docs/.

With Quarto on the PATH this is `nbdev_docs`. Without it the same notebooks, as nbdev processes them, go through
pandoc (the PyPI package pypandoc_binary carries it) into the same pages with the sidebar of `_quarto.yml`.
"""
import base64
import html
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jinja2
import nbformat
import pypandoc
import yaml
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parent.parent
DOCS, PROC = ROOT / "_docs", ROOT / "_proc"
MARKDOWN = "markdown+emoji+lists_without_preceding_blankline-implicit_figures"


@dataclass
class Page:
    source: str # "20_attention.dot_product.ipynb"
    part: str # the sidebar's section, empty for the landing page
    title: str = ""
    description: str = ""
    target: str = "" # "attention.dot_product.html"
    body: str = ""
    toc: str = ""


def sidebar() -> list[Page]:
    "The pages in the order of `_quarto.yml`."
    contents = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    pages: list[Page] = []
    for entry in contents:
        if isinstance(entry, str):
            pages.append(Page(entry, ""))
        else:
            pages += [Page(name, entry["section"]) for name in entry["contents"]]
    return pages


def cell_markdown(cell: nbformat.NotebookNode, stem: str, number: int) -> str:
    "One processed cell as pandoc's Markdown; images become files beside the page."
    if cell.cell_type == "markdown":
        return cell.source
    if cell.cell_type == "raw":
        return ""
    parts = []
    directives = re.findall(r"^#\|\s*(\S+):\s*(\S+)", cell.source, re.MULTILINE)
    source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE).strip("\n")
    if source.strip() and ("echo", "false") not in directives:
        parts.append(f"``````python\n{source}\n``````")
    for k, output in enumerate(cell.get("outputs", [])):
        data = output.get("data", {})
        if "image/png" in data or "image/svg+xml" in data:
            kind = "png" if "image/png" in data else "svg"
            raw = data.get("image/png") or data["image/svg+xml"]
            file = DOCS / f"{stem}_files" / f"figure-{number}-{k}.{kind}"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(base64.b64decode(raw) if kind == "png" else "".join(raw).encode("utf-8"))
            parts.append(f"::: {{.cell-output-display}}\n![]({file.relative_to(DOCS).as_posix()})\n:::")
        elif "text/html" in data:
            parts.append(f"::: {{.cell-output-display}}\n``````{{=html}}\n{data['text/html']}\n``````\n:::")
        elif "text/markdown" in data:
            parts.append(data["text/markdown"])
        elif text := output.get("text") or data.get("text/plain"):
            parts.append(f"::: {{.cell-output}}\n``````\n{text.rstrip()}\n``````\n:::")
    return "\n\n".join(parts)


def convert(page: Page) -> None:
    "Fill in a page from its processed notebook."
    notebook = nbformat.read(PROC / page.source, as_version=4)
    front: dict[str, str] = {}
    for cell in notebook.cells:
        if cell.cell_type == "raw" and cell.source.startswith("---"):
            front |= yaml.safe_load(cell.source.strip().strip("-"))
    stem = Path(page.source).stem
    page.title, page.description = front.get("title", stem), front.get("description", "")
    page.target = front.get("output-file", f"{stem}.html")
    text = "\n\n".join(cell_markdown(c, Path(page.target).stem, n) for n, c in enumerate(notebook.cells))
    if not front: # the landing page keeps its own heading
        heading = re.search(r"^# (.+)$", text, re.MULTILINE)
        page.title = heading.group(1) if heading else stem
        text = text.replace(heading.group(0), "", 1) if heading else text
    template = ROOT / "tools" / "pandoc.html"
    page.toc, _, page.body = pypandoc.convert_text(
        text, "html5", format=MARKDOWN,
        extra_args=["--mathml", "--toc", "--toc-depth=3", "--standalone", f"--template={template}", "--syntax-highlighting=kate",
                    "--wrap=preserve", "--metadata=title:x"],
    ).partition("<!--body-->")


def relink(body: str, targets: dict[str, str], home: str, ids: dict[str, set[str]]) -> str:
    "Links to notebooks, and those that nbdev makes to the published site, become links to the pages beside this one."
    def symbol(match: re.Match[str]) -> str: # private names and methods have no heading of their own
        return f'href="{match[1]}{match[2] if match[2][1:] in ids.get(match[1], ()) else ""}"'
    body = re.sub(rf'href="{re.escape(home)}/([^"#]+)(#[^"]*)"', symbol, body)
    return re.sub(r'href="(?:\./)?([^"#:]+\.ipynb)(#[^"]*)?"', lambda m: f'href="{targets.get(m[1], m[1])}{m[2] or ""}"', body)


def build_without_quarto() -> None:
    config = get_config()
    refresh_quarto_yml()
    proc_nbs(force=True)
    shutil.rmtree(DOCS, ignore_errors=True)
    DOCS.mkdir()
    pages = sidebar()
    for page in pages:
        convert(page)
    targets, home = {page.source: page.target for page in pages}, config.doc_host + config.doc_baseurl
    ids = {page.target: set(re.findall(r'id="([^"]+)"', page.body)) for page in pages}
    shell = jinja2.Environment(autoescape=True).from_string((ROOT / "tools" / "page.html.j2").read_text(encoding="utf-8"))
    for before, page, after in zip([None, *pages[:-1]], pages, [*pages[1:], None], strict=True):
        source = f"{config.git_url}/blob/{config.branch}/nbs/{page.source}"
        text = shell.render(page=page, pages=pages, before=before, after=after, site=config.title, version=config.version, source=source,
                            body=relink(page.body, targets, home, ids), toc=page.toc, lead=html.unescape(page.description))
        (DOCS / page.target).write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "nbs" / "styles.css", DOCS / "styles.css")
    shutil.copy(ROOT / "tools" / "site.css", DOCS / "site.css")
    if (images := ROOT / "nbs" / "images").exists():
        shutil.copytree(images, DOCS / "images")


def main() -> None:
    if shutil.which("quarto"):
        readme = (ROOT / "README.md").read_bytes()
        subprocess.run(["nbdev_docs"], cwd=ROOT, check=True)
        (ROOT / "README.md").write_bytes(readme) # nbdev may have written its own, whose links start in nbs/
    else:
        build_without_quarto()
    sys.stdout.write(f"open {(DOCS / 'index.html').relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
