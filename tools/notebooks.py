"""Run notebooks from a fresh kernel, in the order of the book, and store their outputs.

    python tools/notebooks.py [NAME…]       all of them, or those whose file name contains one of the words
"""
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 900 # seconds for one cell


def drop_widgets(notebook: nbformat.NotebookNode) -> None:
    "A widget lives as long as its kernel: where an output has HTML too, only that is stored."
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            for kind in [kind for kind in data if kind.startswith("application/vnd.jupyter.widget-") and "text/html" in data]:
                del data[kind]


def run(path: Path) -> float:
    "Execute one notebook in its own folder; the file is written only when every cell ran."
    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    if not any(cell.cell_type == "code" for cell in notebook.cells):
        return 0.0
    NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    drop_widgets(notebook)
    nbformat.write(notebook, path)
    return time.perf_counter() - started


def main(words: list[str]) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    paths = [p for p in sorted((ROOT / "nbs").glob("*.ipynb")) if not words or any(w in p.name for w in words)]
    if not paths:
        sys.exit(f"no notebook's name contains {' or '.join(words)}")
    for path in (bar := tqdm(paths)):
        bar.set_description(path.stem)
        bar.write(f"{path.stem:40} {run(path):6.1f} s")
    for command in (["nbdev_clean"], ["nbdev_export"], [sys.executable, "tools/reference.py"]):
        subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
