"""The token explorer: its static twin in a browser, frame by frame, and what notebooks store of its widget."""
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
import torch

from mmie.core import InputError
from mmie.quantization.affine import FormatExplorer, NumberFormat, choose_params, explore_formats, fake_quantize, format_snr, store_as
from mmie.tokenization.base import BaseTokenizer, WordTokenizer
from mmie.tokenization.bpe import BPETokenizer, merge_steps
from mmie.tokenization.splitting import GPT2_PATTERN
from mmie.tokenization.explorer import TokenExplorer, align_tokens, cuts, legible, merges_made, token_ids, token_pieces, token_walk

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
CORPUS = ["the cat in the hat sat on the mat, then the rat returned 1234 times\n    and ate it. "] * 30
NASTY = """</script><script>document.title = "owned"</script><img src=x onerror="document.title='owned'"> & "quotes" 'n' é🙂"""


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train(CORPUS, 290)


@pytest.fixture(scope="module")
def gpt2() -> BPETokenizer:
    return BPETokenizer.train(CORPUS, 284, pattern=GPT2_PATTERN)


@pytest.fixture
def visit(browser: Any, tmp_path: Path) -> Iterator[Any]:
    "Open some HTML; afterwards, there must have been no error and no request."
    opened: list[Any] = []
    trouble: list[str] = []

    def go(html: str, **settings: object) -> Any:
        path = tmp_path / "page.html"
        path.write_text(html, encoding="utf-8")
        page = browser.new_page(**settings)
        opened.append(page)
        page.on("console", lambda message: trouble.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: trouble.append(request.url) if not request.url.startswith((path.as_uri(), "data:")) else None)
        page.goto(path.as_uri())
        return page

    yield go
    for page in opened:
        page.close()
    assert not trouble


def saved(explorer: TokenExplorer, folder: Path) -> str:
    return explorer.save(folder / "saved.html").read_text(encoding="utf-8")


def drawn(page: Any) -> list[list[str]]:
    "What is in each chip: text, id, tooltip."
    return page.eval_on_selector_all(".t", "chips => chips.map(c => [c.querySelector('b').textContent, c.querySelector('i').textContent, c.title])")


def expected(explorer: TokenExplorer) -> list[list[str]]:
    "The same, from Python."
    columns = align_tokens([walk.at(explorer.step) for walk in explorer.walks])
    pieces = [piece for column in columns for cell in column for piece in cell]
    return [[legible(p.data), str(p.id), f"id {p.id}, bytes {p.data.hex(' ')}"] for p in pieces]


@pytest.mark.parametrize("compare", [False, True], ids=["one", "two"])
def test_every_frame_is_pythons(bpe: BPETokenizer, gpt2: BPETokenizer, compare: bool, visit: Any, tmp_path: Path) -> None:
    "From the last frame to the first by keyboard: chips, marks, counts and tables are what Python says."
    explorer = TokenExplorer([bpe, gpt2] if compare else [bpe], "the cat returned 12345 times,\n    naïve 🙂 hats")
    page = visit(saved(explorer, tmp_path))
    slider = page.get_by_role("slider", name="Merges done")
    slider.focus()
    seen = set()
    for step in range(explorer.steps, -1, -1):
        explorer.step = step
        assert slider.input_value() == str(step)
        chips = drawn(page)
        assert chips == expected(explorer)
        seen.add(str(chips))
        rows = [walk.at(step) for walk in explorer.walks]
        assert page.locator(".sum tbody td:nth-of-type(1)").all_text_contents() == [str(len(row)) for row in rows]
        assert page.locator(".all tbody tr").count() == sum(map(len, rows))
        joined = "; ".join(merges_made(walk)[step - 1] for walk in explorer.walks if 0 < step <= walk.steps)
        assert page.locator("output").inner_text() == f"{step} of {explorer.steps} merges" + (f": {joined}" if joined else "")
        if compare:
            own = [{p.end for p in a} - {p.end for p in b} for a, b in (rows, rows[::-1])]
            assert page.locator(".sum tbody td:nth-of-type(3)").all_text_contents() == [str(len(places)) for places in own]
        differ = [column for column in align_tokens(rows) if len(column) == 2 and len({tuple(p.end for p in cell) for cell in column}) == 2]
        assert page.locator(".d").count() == len(differ)
        page.keyboard.press("ArrowLeft")
    assert len(seen) == explorer.steps + 1
    page.keyboard.press("End")
    explorer.step = explorer.steps
    assert drawn(page) == expected(explorer)


def test_the_last_frame_by_script_is_the_page_without_it(bpe: BPETokenizer, gpt2: BPETokenizer, visit: Any, tmp_path: Path) -> None:
    explorer = TokenExplorer([bpe, gpt2], "the hat:\n    12345 <b> & é")
    html = saved(explorer, tmp_path)
    without = visit(html, java_script_enabled=False)
    before = {part: without.locator(part).inner_html() for part in (".board", ".sum", ".all")}
    assert without.locator(".walk").is_hidden() and without.locator(".joins li").count() == sum(walk.steps for walk in explorer.walks)
    page = visit(html)
    page.get_by_role("slider").focus()
    page.keyboard.press("Home")
    page.keyboard.press("End")
    shape = "html => { const e = document.createElement('div'); e.innerHTML = html; return e.innerHTML.replace(/\\s+/g, ' ').replace(/ ?(<[^>]+>) ?/g, '$1'); }"
    for part, html in before.items():
        assert page.evaluate(shape, page.locator(part).inner_html()) == page.evaluate(shape, html), part


def test_a_token_that_is_markup_stays_text(visit: Any, tmp_path: Path) -> None:
    token = "<script>owned=1</script>"
    merges = [(254 + at if at > 1 else ord(token[0]), ord(token[at])) for at in range(1, len(token))] # one more letter each
    whole = BPETokenizer(merges, pattern=r"\S+")
    page = visit(saved(TokenExplorer([whole, whole], token, names=["<i>one</i>", "<script>owned=2</script>"]), tmp_path))
    for key in ("Home", "End"):
        assert page.evaluate("typeof owned") == "undefined"
        page.get_by_role("slider").focus()
        page.keyboard.press(key)
    assert page.locator(".t b").all_text_contents() == [token, token] and page.evaluate("typeof owned") == "undefined"
    assert "<i>one</i>" in page.locator(".sum").inner_text()


def test_typed_markup_stays_text(bpe: BPETokenizer, visit: Any, tmp_path: Path) -> None:
    page = visit(saved(TokenExplorer([bpe, WordTokenizer.train(CORPUS, 50)], NASTY), tmp_path))
    page.get_by_role("slider").focus()
    page.keyboard.press("Home")
    assert page.title().startswith("Tokens: </script>") and page.locator("img").count() == 0
    upper = page.locator(".g > span:nth-of-type(1) b").all_text_contents()
    assert "".join(upper) == "".join(legible(bytes([byte])) for byte in NASTY.encode())


def test_two_twins_on_a_page_move_apart(bpe: BPETokenizer, gpt2: BPETokenizer, visit: Any) -> None:
    twins = [TokenExplorer([tokenizer], "the rat").html() for tokenizer in (bpe, gpt2)]
    page = visit("<!doctype html><meta charset=utf-8>" + "".join(twins))
    assert page.get_by_role("slider").count() == 2 and page.locator("[id]").count() == 0
    before = page.locator(".board").all_inner_texts()
    page.get_by_role("slider").nth(1).focus()
    page.keyboard.press("Home")
    after = page.locator(".board").all_inner_texts()
    assert after[0] == before[0] and after[1] != before[1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_follows_the_theme(bpe: BPETokenizer, scheme: str, visit: Any, tmp_path: Path) -> None:
    text = "the cat returned 12345 times " + "x" * 90 + "\n    et voilà: 早上好 👩🏽\u200d🚀 שלום "
    wide = WordTokenizer.train([*CORPUS, "x" * 90], 60) # with one very long token
    page = visit(saved(TokenExplorer([bpe, wide], text, names=["bpe", "a_name_without_any_space_" * 3]), tmp_path), viewport={"width": 380, "height": 700}, color_scheme=scheme)
    page.locator("summary").first.click()
    for _ in range(2):
        assert page.evaluate("document.documentElement.scrollWidth") <= 380
        page.get_by_role("slider").focus()
        page.keyboard.press("Home")
    red = int(page.evaluate("getComputedStyle(document.querySelector('.mmie-live')).backgroundColor").split("(")[1].split(",")[0])
    assert red > 200 if scheme == "light" else red < 60
    page.evaluate("scheme => document.body.classList.add(scheme === 'light' ? 'quarto-dark' : 'quarto-light')", scheme)
    switched = int(page.evaluate("getComputedStyle(document.querySelector('.mmie-live')).backgroundColor").split("(")[1].split(",")[0])
    assert (switched > 128) != (red > 128), "Quarto's own switch is stronger than the system's"


@pytest.mark.parametrize("text", ["", " ", "\0\n\t", "naïve \u0301e\u0301", "👩🏽\u200d🚀🇨🇭", "x" * 299, NASTY])
def test_walks_end_where_encode_does(bpe: BPETokenizer, text: str) -> None:
    walk = token_walk(bpe, text)
    assert walk.at(walk.steps) == [piece for piece in walk.pieces if piece.died == walk.steps + 1]
    assert [piece.id for piece in walk.at(walk.steps)] == bpe.encode(text)
    for step in range(walk.steps + 1):
        assert b"".join(piece.data for piece in walk.at(step)) == text.encode()
    assert cuts(bpe, text) == {piece.start for piece in token_pieces(bpe, text)} - {0}


def test_a_word_that_is_looked_up_whole_is_one_more_step(bpe: BPETokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    "Imported tokenizers may end elsewhere than their merges do: the last frame is still what `encode` says."
    states = merge_steps(bpe, "the cat")[:-2]
    monkeypatch.setattr("mmie.tokenization.explorer.merge_steps", lambda tokenizer, text: states)
    walk = token_walk(bpe, "the cat")
    assert walk.steps == len(states) and [piece.id for piece in walk.at(walk.steps)] == bpe.encode("the cat")
    assert merges_made(walk)[-1]


def test_a_vocabulary_of_somebody_elses_order(bpe: BPETokenizer) -> None:
    "Ids as tiktoken has them, in any order and without a list of merges: the frames are the same, with those ids."
    theirs = {token: 7 + 3 * (300 - i) for token, i in token_ids(bpe).items()}
    imported = BPETokenizer(None, bpe.pattern, vocabulary=theirs)
    text = "the cat returned 1234 times"
    walk = token_walk(imported, text)
    assert [piece.id for piece in walk.at(walk.steps)] == imported.encode(text)
    assert all(piece.id == theirs[piece.data] for piece in walk.pieces) and walk.at(0)[0].id == theirs[b"t"]


def test_a_vocabulary_with_gaps(bpe: BPETokenizer) -> None:
    class Sparse(BaseTokenizer):
        kind = "sparse"

        def __init__(self) -> None:
            super().__init__({3: b"a", 900: b"b"}, {"<end>": 50})

        def _encode_plain(self, text: str) -> list[int]:
            return [{"a": 3, "b": 900}[character] for character in text]

        def _settings(self) -> dict[str, object]:
            return {}

    try:
        sparse = Sparse()
        assert token_ids(sparse) == {b"a": 3, b"b": 900}
        explorer = TokenExplorer([sparse, bpe], "abba")
        assert [token.id for token in explorer.tokens] == [3, 900, 900, 3] and explorer.steps == token_walk(bpe, "abba").steps
    finally:
        del BaseTokenizer.kinds["sparse"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_notebook_stores_a_widget(path: Path) -> None:
    "A stored widget is dead, and Quarto would prefer it to the twin and load scripts for it. Run tools/notebooks.py."
    notebook = nbformat.read(path, as_version=4)
    assert "widgets" not in notebook.metadata
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert not [kind for kind in output.get("data", {}) if kind.startswith("application/vnd.jupyter.widget-")], cell.source


def test_storing_drops_the_widget_and_keeps_the_twin() -> None:
    import importlib.util
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "tools" / "notebooks.py")
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    widget = "application/vnd.jupyter.widget-view+json"
    outputs = [{"data": {widget: {}, "text/html": "<p>", "text/plain": "x"}}, {"data": {"text/plain": "x"}}, {"text": "printed"}]
    notebook = SimpleNamespace(metadata={"widgets": {}}, cells=[{"outputs": outputs}, {"source": "no outputs"}])
    tool.drop_widgets(notebook)
    assert outputs[0]["data"].keys() == {"text/html", "text/plain"} and not notebook.metadata


@pytest.mark.parametrize("grid", ["symmetric", "asymmetric", "normal"])
@pytest.mark.parametrize("scales", ["tensor", "row", 16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_number_format_keeps_its_promises(grid: str, scales: str | int, bits: int) -> None:
    x = torch.randn(12, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(bits)) ** 3
    fmt = NumberFormat(grid=grid, scales=scales, bits=bits)
    stored = store_as(x, fmt)
    assert store_as(torch.zeros(2, 16), fmt).eq(0).all() and (grid != "symmetric" or store_as(-x, fmt).equal(-stored))
    torch.testing.assert_close(store_as(2 * x, fmt), 2 * stored)
    assert bits == 8 or format_snr(x, fmt) < format_snr(x, fmt.replace(bits=bits + 1))
    if grid != "normal":
        torch.testing.assert_close(stored, fake_quantize(x, choose_params(x, bits=bits, symmetric=grid == "symmetric", granularity=fmt.granularity)))


def test_the_format_explorer_in_a_browser(visit: Any) -> None:
    explorer = FormatExplorer({NASTY: torch.randn(8, 32), "second": torch.randn(4, 64)})
    page = visit("<!doctype html><meta charset=utf-8>" + explorer.html())
    assert page.title() == "" and page.locator("img").count() == 0 and NASTY in page.locator(".mmie-live").inner_text()
    drawing = page.get_by_role("img")
    assert drawing.bounding_box()["width"] > 400 and "places in use" in drawing.get_attribute("aria-label")
    inside = drawing.evaluate("""svg => [...svg.querySelectorAll("text")].every(text => {
        const [a, b] = [svg.getBoundingClientRect(), text.getBoundingClientRect()];
        return a.left <= b.left && b.right <= a.right && a.top <= b.top && b.bottom <= a.bottom;
    })""")
    assert inside, "a word is cut off"


def test_the_format_widget_and_its_mistakes() -> None:
    pytest.importorskip("ipywidgets")
    explorer = explore_formats({"one": torch.randn(8, 32), "two": torch.randn(4, 48)})
    _, _, grid, scales, bits, clip, view = explorer.panel.children # type: ignore[union-attr]
    assert [value for _, value in scales.options] == ["tensor", "row", 16, 8], "only groups that divide the rows of both"
    for control, value in ((grid, "asymmetric"), (bits, 6), (scales, 8), (clip, 0.5)):
        before = view.value
        control.value = value
        assert view.value != before
    assert explorer.format == NumberFormat(grid="asymmetric", bits=6, scales=8, clip=0.5)
    for wrong in ({"bits": 1}, {"bits": 9}, {"clip": 0}, {"scales": 0}, {"scales": 7}, {"tensor": "three"}, {"knob": 1}):
        with pytest.raises(InputError):
            explorer.turn(**wrong)
    assert explorer.format == NumberFormat(grid="asymmetric", bits=6, scales=8, clip=0.5)
    with pytest.raises(InputError, match="NaN"):
        FormatExplorer({"bad": torch.full((2, 2), torch.nan)})
