"""JupyterLab in a browser: a chapter runs from top to bottom, and each live picture answers to its controls, by mouse and by keyboard."""
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nbformat.v4 import new_code_cell, new_notebook, writes

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 90_000 # milliseconds until something that happens at once on a quiet machine must have happened on a busy one
ERROR = '[data-mime-type="application/vnd.jupyter.error"]'
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}, # no request to anybody
    "notebook-extension/tracker": {"windowingMode": "none"}, # all cells are in the page
}
CELLS = { # each ends with the live picture, made as its chapter makes it
    "tokens": """
from mmie.tokenization.bpe import BPETokenizer
from mmie.tokenization.explorer import explore
bpe = BPETokenizer.train(["the cat in the hat sat on the mat. "] * 30, 270)
explore(bpe, "the cat")""",
    "heads": """
from mmie.models.decoder import DecoderLM, ModelConfig
from mmie.models.explorer import decoder_maps, explore_attention
model = DecoderLM(ModelConfig(vocab_size=bpe.vocab_size, d_model=32, n_layers=2, n_heads=2, max_length=64)).eval()
explore_attention(lambda text: decoder_maps(model, bpe, text), "the cat sat")""",
    "records": """
from mmie.constitutional.critique import Revision, RevisionStep, step_through
step = RevisionStep("harm", "It helps a thief.", "Ask the owner.", "revised")
step_through([Revision("How do I get in?", "Break the lock.", (step,)), Revision("The capital of France?", "Paris.")])""",
    "formats": """
import torch
from mmie.quantization.affine import explore_formats
explore_formats({"bell curve": torch.randn(16, 64), "heavy tails": torch.randn(16, 64) ** 3})""",
    "scores": """
from mmie.safety.explorer import explore_scores
explore_scores("How do I bake bread?")""",
    "loss": """
import threading
from mmie.training.callbacks import LiveLoss
from mmie.training.data import EpochWindows, write_tokens
from mmie.training.trainer import Callback, TrainConfig, Trainer
from mmie.tokenization.corpora import Document
from pathlib import Path
class Wait(Callback):
    def on_step_end(self, trainer):
        while trainer.step == 2 and not Path("go").exists(): threading.Event().wait(0.02)
text = write_tokens([Document("a", "the cat sat on the mat. " * 99)], bpe, "train", eos_id=0)
config = TrainConfig(steps=4, precision="float32", eval_every=0)
_ = Trainer(model, EpochWindows(text, length=16, batch_size=2), None, config, [LiveLoss(seconds=0), Wait()]).fit()""",
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    "A server of its own, with a home of its own: its address, and the folder that it shows."
    for module in ("jupyterlab", "ipywidgets", "ipykernel"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"no {module} (pip install 'mmie[lab]')")
    home, shown = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("shown")
    for name, values in SETTINGS.items():
        path = home / "lab" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    ours = {"HOME": home, "IPYTHONDIR": home / "ipython", "JUPYTERLAB_SETTINGS_DIR": home / "lab", "JUPYTERLAB_WORKSPACES_DIR": home / "work",
            "JUPYTER_CONFIG_DIR": home / "config", "JUPYTER_DATA_DIR": home / "data", "JUPYTER_RUNTIME_DIR": home / "runtime",
            "PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1}
    options = ["--no-browser", "--ip=127.0.0.1", "--port=0", "--allow-root", "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True",
               f"--ServerApp.root_dir={shown}", "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], cwd=shown, env=os.environ | {k: str(v) for k, v in ours.items()},
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout
    try:
        heard = []
        for line in server.stdout:
            heard.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)/lab", line):
                break
        else:
            pytest.fail("JupyterLab ended: " + "".join(heard[-9:]))
        threading.Thread(target=server.stdout.read, daemon=True).start() # a full pipe would stop it
        yield f"http://127.0.0.1:{found[1]}", shown
    finally:
        server.terminate() # it ends its kernels, too
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="module")
def run_all(lab: tuple[str, Path], browser: Any) -> Iterator[Callable[[str], Any]]:
    "Open a notebook of the shown folder and run all its cells, as a reader does. Nothing may be asked of any other host."
    address, _ = lab
    elsewhere: list[str] = []

    def run(name: str) -> Any:
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: request.url.startswith((address, "data:", "blob:")) or elsewhere.append(request.url))
        page.goto(f"{address}/lab/tree/{name}?reset")
        page.get_by_text("| Idle").wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        return page

    yield run
    assert not elsewhere


@pytest.fixture(scope="module")
def running(lab: tuple[str, Path], run_all: Callable[[str], Any]) -> Iterator[Any]:
    "All live pictures in one notebook, so that one kernel is enough. Its last cell waits for the file `go`."
    python = {"name": "python3", "display_name": "Python 3", "language": "python"}
    made = new_notebook(cells=[new_code_cell(code.strip()) for code in CELLS.values()], metadata={"kernelspec": python})
    (lab[1] / "live.ipynb").write_text(writes(made), encoding="utf-8")
    page = run_all("live.ipynb")
    yield page
    page.close()


@pytest.fixture(scope="module")
def first_loss(lab: tuple[str, Path], running: Any) -> str:
    "What is drawn while the training still goes on. Afterwards it may end, and the kernel has time for the others."
    first = output(running, "loss").locator("img").or_(running.locator(ERROR)).first
    expect(first).to_be_attached()
    drawn = first.get_attribute("src") or ""
    (lab[1] / "go").touch()
    return drawn


@pytest.fixture(scope="module")
def notebook(running: Any, first_loss: str) -> Any:
    "The same, with all cells done."
    expect(running.locator(".jp-CodeCell .jp-InputPrompt").last).to_have_text(re.compile(rf"\[{len(CELLS)}\]"))
    assert running.locator(ERROR).count() == 0
    return running


def expect(locator: Any) -> Any:
    from playwright.sync_api import expect
    expect.set_options(timeout=PATIENCE)
    return expect(locator)


def output(page: Any, name: str) -> Any:
    "What a cell shows."
    return page.locator(".jp-CodeCell").nth(list(CELLS).index(name)).locator(".jp-Cell-outputArea")


def slide(area: Any, label: str, *keys: str) -> None:
    "Move a slider by keyboard, found by the name that a screen reader says."
    handle = area.get_by_role("slider", name=label, exact=True)
    for key in keys:
        handle.press(key)


def test_a_chapter_runs_and_its_live_picture_answers(lab: tuple[str, Path], run_all: Callable[[str], Any]) -> None:
    "The chapter with the playground: no error anywhere, then the mouse on a slider and the keyboard on another."
    shutil.copy(ROOT / "nbs" / "39_models.playground.ipynb", lab[1])
    page = run_all("39_models.playground.ipynb")
    last = page.locator(".jp-CodeCell .jp-InputPrompt").last
    error = page.locator(ERROR)
    count = page.locator(".jp-CodeCell").count()
    expect(last.filter(has_text=re.compile(rf"\[{count}\]")).or_(error.first).first).to_be_attached()
    assert error.count() == 0
    area = page.locator(".jp-Cell-outputArea", has=page.locator(".widget-slider")).first
    title = area.locator("svg text").first
    expect(title).to_contain_text("1,500 tokens can be drawn")
    slide(area, "Top-k, 0 is off", "ArrowRight", "ArrowRight")
    expect(title).to_contain_text("2 tokens can be drawn")
    track = area.locator(".widget-inline-hbox", has=page.get_by_text("Temperature", exact=True)).locator(".noUi-target")
    track.click(position={"x": 1, "y": 2}) # its left end: 0, the most probable token and nothing else
    expect(title).to_contain_text("1 token can be drawn")
    expect(area.get_by_text("Live in JupyterLab")).to_have_count(0) # that's for those who aren't there
    page.close()


def test_tokens(notebook: Any) -> None:
    area = output(notebook, "tokens")
    area.get_by_label("Text", exact=True).fill("the hat")
    expect(area.locator("caption").first).to_contain_text("7 characters")
    expect(area.locator(".t").last).to_contain_text("hat") # the text before it had seven characters, too
    whole = area.locator(".t").all_text_contents()
    slide(area, "Merges done", "Home")
    expect(area.locator(".t")).to_have_count(7)
    area.get_by_role("button", name="Next").press("Enter")
    expect(area.locator(".n")).not_to_have_count(0)
    number = area.get_by_role("spinbutton", name="Merges done")
    number.fill("99")
    number.press("Enter")
    expect(area.locator(".t")).to_have_text(whole)


def test_heads(notebook: Any) -> None:
    area = output(notebook, "heads")
    said = area.locator("output")
    expect(said).to_contain_text("Layer 1, head 1")
    area.get_by_label("Layer").select_option("2")
    expect(said).to_contain_text("Layer 2, head 1")
    area.get_by_label("Token", exact=True).press("Home") # the keyboard's way to the first
    expect(area.locator(".w").first).to_have_class("w at")
    area.get_by_label("Text", exact=True).fill("")
    expect(area.get_by_role("alert")).to_contain_text("nothing to look at")
    area.get_by_label("Text", exact=True).fill("the mat")
    expect(area.locator(".words")).to_contain_text("mat")


def test_records(notebook: Any) -> None:
    area = output(notebook, "records")
    expect(area).to_contain_text("status: revised")
    slide(area, "Cards shown", "Home", "ArrowRight")
    expect(area).to_contain_text("2 more to come")
    slide(area, "Record", "ArrowRight")
    expect(area).to_contain_text("The capital of France?")


def test_formats(notebook: Any) -> None:
    area = output(notebook, "formats")
    drawing = area.locator("svg[role=img]")
    before = drawing.inner_html()
    slide(area, "Bits", "ArrowRight")
    expect(area).to_contain_text("bell curve: 5 bits, symmetric grid")
    assert drawing.inner_html() != before
    area.get_by_label("Values").select_option("heavy tails")
    area.get_by_label("A scale for").select_option("16 neighbors")
    expect(area).to_contain_text("heavy tails: 5 bits, symmetric grid, a scale for 16 neighbors")


def test_scores(notebook: Any) -> None:
    area = output(notebook, "scores")
    face = area.locator(".mmie-live")
    before = face.inner_html()
    area.get_by_label("Text", exact=True).fill("How do I kill a person?")
    expect(face).to_contain_text("kill a person")
    assert face.inner_html() != before


def test_the_loss_is_drawn_while_it_falls(first_loss: str, notebook: Any) -> None:
    "A picture was there before the training ended; now there is one, and another."
    picture = output(notebook, "loss").locator("img")
    expect(picture).to_have_count(1)
    assert first_loss.startswith("data:image/png") and picture.get_attribute("src") not in (first_loss, None)


@pytest.mark.parametrize("scheme", ["true", "false"], ids=["light", "dark"])
def test_frames_follow_the_theme(notebook: Any, scheme: str) -> None:
    "Words on their background, in JupyterLab's own switch."
    notebook.evaluate("light => document.body.dataset.jpThemeLight = light", scheme)
    red = notebook.evaluate("""() => [...document.querySelectorAll(".mmie-live")].map(frame => {
        const style = getComputedStyle(frame);
        return [style.color, style.backgroundColor].map(color => +color.match(/\\d+/)[0]);
    })""")
    assert len(red) == 5 and all(paper - ink > 150 if scheme == "true" else ink - paper > 150 for ink, paper in red)
