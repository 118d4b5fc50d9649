"""Write README.md from nbs/index.ipynb: through Quarto where it is installed, with nbconvert elsewhere.

    python tools/readme.py            write it
    python tools/readme.py --check    exit 1 when README.md and the notebook say different things

The two writers break lines differently, so the check compares what a reader would see, not the bytes.
"""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from markdown_it import MarkdownIt
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
INDEX, README = ROOT / "nbs" / "index.ipynb", ROOT / "README.md"
NOTE = "<!-- Written from nbs/index.ipynb by `make readme`: edit the notebook. -->"


def plain_markdown() -> str:
    "The index as Markdown, without Quarto."
    notebook = nbformat.read(INDEX, as_version=4)
    notebook.metadata.language_info = {"name": "python"} # the fence of each cell
    text, _ = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True).from_notebook_node(notebook)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def from_root(text: str) -> str:
    "The notebook lies in nbs/, the README one level up: relative links get the folder in front."
    return re.sub(r"\]\((?!https?:|#|mailto:)(?:\./)?((?:\.\./)?)([^)]+)\)", lambda m: f"]({'' if m[1] else 'nbs/'}{m[2]})", text)


def words(text: str) -> list[str]:
    "What the reader sees: the text, the code and the targets of the links, without the layout."
    seen: list[str] = []
    for block in MarkdownIt("commonmark").enable("table").parse(text):
        for token in block.children or [block]:
            if token.type not in ("html_block", "html_inline"):
                seen += re.findall(r"\w+", f"{token.content} {token.attrs.get('href', '')} {token.attrs.get('src', '')}")
    return seen


def main(check: bool) -> None:
    if check:
        current = README.read_text(encoding="utf-8") if README.exists() else ""
        if words(current) != words(from_root(plain_markdown())):
            sys.exit("README.md does not say what nbs/index.ipynb says: run `make readme` and commit both")
        return
    if shutil.which("quarto"):
        subprocess.run(["nbdev_readme"], cwd=ROOT, check=True)
        text = README.read_text(encoding="utf-8")
        text = re.sub(r"\A(\s*<!--.*?-->\s*)+", "", text, flags=re.DOTALL)
    else:
        text = plain_markdown()
    README.write_text(f"{NOTE}\n\n{from_root(text)}", encoding="utf-8")


if __name__ == "__main__":
    main("--check" in sys.argv[1:])
