"""Draw nbs/images/life.png, the picture on the landing page, from the report of a finished `make run`.

    python tools/picture.py [runs/tiny]

Every number in it is the run's own.
"""
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from mmie.figures import GRID, INK, PALETTE, PAPER, figure

ROOT = Path(__file__).resolve().parent.parent
BLUE, ORANGE, GREEN, *_ = PALETTE
TINTS = ("#dbe6fb", "#fde8d4", "#d9efe2")


def tokens(ax: Axes, report: dict[str, Any]) -> None:
    "A held-out text, a box for each token."
    ax.set(xlim=(0, 30), ylim=(0, 8))
    ax.axis("off")
    x, y = 0.0, 7.2
    for n, (piece, number) in enumerate(zip(report["tokens"]["pieces"], report["tokens"]["ids"], strict=True)):
        text = piece.replace("\n", "⏎").replace(" ", "·") or " "
        wide = 0.72 * max(len(text), len(str(number)) * 0.8) + 0.6
        if x + wide > 30:
            x, y = 0.0, y - 1.55
        if y < 0:
            return
        ax.add_patch(Rectangle((x, y - 0.62), wide - 0.2, 1.3, facecolor=TINTS[n % 3]))
        ax.text(x + wide / 2 - 0.1, y + 0.2, text, ha="center", va="center", fontsize=7.5, family="monospace")
        ax.text(x + wide / 2 - 0.1, y - 0.38, str(number), ha="center", va="center", fontsize=5, alpha=0.7)
        x += wide


def learning(ax: Axes, report: dict[str, Any]) -> None:
    "Held-out bits per byte while it trains, beside what a compressor and counting can do."
    curve, others = report["pretraining"], report["compression"]
    ax.plot(curve["heldout_steps"], curve["heldout_bits_per_byte"], color=BLUE, marker="o", markersize=3)
    for name, key, color, shift in (("counting 5-grams", "ngram_tokens", ORANGE, 3),
                                   ("lzma, given the same text", "lzma_given_train", GREEN, -10)):
        ax.axhline(others[key], color=color, linestyle="--", linewidth=1)
        ax.annotate(name, (0, others[key]), xytext=(0, shift), textcoords="offset points", fontsize=8)
    ax.set(xlabel="training steps", ylabel="bits per byte, unseen text", ylim=(1.5, None))


def bars(ax: Axes, values: dict[str, float], colors: list[str], form: str) -> None:
    "A bar for each name, its value on top."
    drawn = ax.bar(list(values), list(values.values()), color=colors, width=0.62)
    ax.bar_label(drawn, [form.format(value) for value in values.values()], fontsize=8, padding=2)
    ax.grid(axis="x", visible=False)
    ax.tick_params(axis="x", length=0)


def share(tallies: list[dict[str, Any]], measure: str, version: str) -> float:
    "Per cent over all categories."
    counts = [tally["counts"][version] for tally in tallies if tally["measure"] == measure]
    return 100 * sum(n for n, _ in counts) / sum(of for _, of in counts)


def draw(report: dict[str, Any]) -> Any:
    fig, grid = figure(3, 2, width=12, height=6.3)
    (text, learn, exam), (harm, size, still) = grid
    names = {"before": "before", "fine-tuned": "revised", "aligned": "aligned"}
    tallies, shrunk = report["alignment"]["tallies"], report["shrunk"]

    tokens(text, report)
    learning(learn, report)
    asked = report["exam"]["questions"]
    given = {"pretrained": "pretrained_answer", "fine-tuned": "answer"}
    right = {name: 100 * sum(q[key] == q["expected"] for q in asked) / len(asked) for name, key in given.items()}
    bars(exam, right, [GRID, BLUE], "{:.0f} %")
    exam.set(ylim=(0, 112), ylabel="exam questions right, %")
    bars(harm, {label: share(tallies, "helps with harm", name) for name, label in names.items()}, [ORANGE, BLUE, BLUE], "{:.0f} %")
    harm.set(ylim=(0, 115), ylabel="helps with harm, %")
    bars(size, {v["name"]: v["disk_bytes"] / 1e6 for v in report["variants"]}, [GRID, BLUE, BLUE], "{:.1f} MB")
    size.set(ylabel="on disk, MB", ylim=(0, 1.18 * max(v["disk_bytes"] for v in report["variants"]) / 1e6))
    bars(still, {label: share(shrunk, "helps with harm", label) for label in ("aligned", "int8", "int4")}, [GRID, BLUE, BLUE], "{:.0f} %")
    still.set(ylim=(0, 115), ylabel="helps with harm, %")
    titles = ("text becomes tokens", "a model learns what comes next", "it learns to answer",
              "a constitution corrects it", "it shrinks to four bits", "and is asked again")
    for n, (ax, title) in enumerate(zip(grid.flat, titles, strict=True), 1):
        ax.set_title(f"{n}  {title}", fontsize=12)
    seconds = sum(stage["seconds"] for stage in report["stages"])
    cores = report["reproduction"]["machine"]["cores"]
    title = f"One small language model, its whole life: {seconds / 60:.0f} minutes on {cores} CPU cores"
    fig.suptitle(title, x=0.01, ha="left", fontsize=15, fontweight="bold", color=INK)
    fig.set_facecolor(PAPER)
    return fig


def main(run: Path) -> None:
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    target = ROOT / "nbs" / "images" / "life.png"
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(draw(report)._repr_png_())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs" / "tiny")
