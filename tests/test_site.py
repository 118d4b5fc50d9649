"""The site builds without Quarto, is whole, and works in a browser: from disk, on a phone, in the dark, with the keyboard."""
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


class Page(HTMLParser):
    "What the tests need to know of a page."

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = [] # what the browser fetches by itself
        self.ids: list[str] = []
        self.sources: dict[str, str] = {} # of each symbol
        self.pictures: list[str] = [] # what they show, in words
        self.words: list[str] = []
        self._quiet, self._symbol = 0, ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.ids += [found["id"]] if "id" in found else []
        link = found.get("href", found.get("src", ""))
        (self.loads if tag in ("link", "img", "script", "iframe") and found.get("rel") != "alternate" else self.links).append(link)
        self.pictures += [found.get("alt", "")] if tag == "img" and "_files/" in link else []
        if tag == "span" and "symbol" in found.get("class", ""):
            self._symbol = found["id"]
        elif tag == "a" and "/blob/" in link and self._symbol:
            self.sources[self._symbol], self._symbol = link, ""
        self._quiet += tag in ("script", "style", "pre", "code", "annotation")

    def handle_endtag(self, tag: str) -> None:
        self._quiet -= tag in ("script", "style", "pre", "code", "annotation")

    def handle_data(self, data: str) -> None:
        if self._quiet <= 0:
            self.words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The folder of the site, built without Quarto from a copy of the repository."
    copy = tmp_path_factory.mktemp("site") / "mmie"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "_docs", "_proc", "__pycache__", ".*_cache", "build"))
    bins = [folder for folder in os.environ["PATH"].split(os.pathsep) if not (Path(folder) / "quarto").exists()]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PATH": os.pathsep.join([str(Path(sys.executable).parent), *bins]), "OMP_NUM_THREADS": "1"}
    built = subprocess.run([sys.executable, "tools/site.py"], cwd=copy, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    assert "Could not convert TeX" not in built.stderr, built.stderr[-3000:]
    return copy / "_docs"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {path.name: Page(path.read_text(encoding="utf-8")) for path in sorted(site.glob("*.html"))}


def sidebar() -> list[str]:
    contents = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    return [name for entry in contents for name in ([entry] if isinstance(entry, str) else entry["contents"])]


def test_every_chapter_has_a_page(pages: dict[str, Page]) -> None:
    assert {re.sub(r"^\d\d_", "", Path(name).stem) + ".html" for name in sidebar()} == set(pages)
    assert {path.name for path in (ROOT / "nbs").glob("[0-9]*.ipynb")} <= set(sidebar())


def test_no_markup_is_left_raw(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        text = "".join(page.words)
        assert not re.findall(r"\$\$|\$\\|^:::|^#\| ?\w+|\]\((?:http|\w+\.html)", text, re.MULTILINE), name


def test_every_link_leads_somewhere(site: Path, pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        for link in {*page.links, *page.loads} - {""}:
            if link.startswith(("http:", "https:", "data:", "mailto:")):
                continue
            target, _, anchor = re.sub(r"\?[^#]*", "", link).partition("#")
            assert not target or (site / target).exists(), f"{name}: {link}"
            if anchor and (target or name) in pages:
                assert anchor in pages[target or name].ids, f"{name}: {link}"


def test_nothing_comes_from_elsewhere(site: Path, pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        assert not [link for link in page.loads if link.startswith(("http", "//"))], name
    for path in [*site.glob("*.css"), *site.glob("site.js"), *site.glob("theme.js")]:
        assert not re.search(r"https?:|@import|fetch\(", path.read_text(encoding="utf-8")), path.name


def test_symbols_link_to_their_definitions(pages: dict[str, Page]) -> None:
    found = {(page, name): link for page, read in pages.items() for name, link in read.sources.items()}
    assert len(found) > 500
    for (page, name), link in found.items():
        path, line = re.search(r"/blob/[^/]+/(.*)#L(\d+)$", link).groups()
        text = (ROOT / path).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        plain = re.sub(r"-\d+$", "", name) # where a class and a function differ only in their case
        assert re.search(rf"^(?:def |class |[\w, ]*)\b{plain}\b", text, re.IGNORECASE), (page, name, text)


def test_every_address_is_of_one_thing(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        assert len(page.ids) == len(set(page.ids)), (name, sorted({one for one in page.ids if page.ids.count(one) > 1}))


def test_pictures_keep_their_words(pages: dict[str, Page]) -> None:
    for source in sidebar():
        cells = json.loads((ROOT / "nbs" / source).read_text(encoding="utf-8"))["cells"]
        said = [json.loads(found[1]) for cell in cells if (found := re.search(r'^#\| fig-alt: (".*")$', "".join(cell["source"]), re.MULTILINE))
                and any({"image/png", "image/svg+xml"} & set(output.get("data", {})) for output in cell["outputs"])]
        page = pages[re.sub(r"^\d\d_", "", Path(source).stem) + ".html"]
        assert set(said) <= set(page.pictures), source


def test_search_knows_every_public_name(site: Path) -> None:
    rows = json.loads((site / "sections.js").read_text(encoding="utf-8").removeprefix("window.SECTIONS = ").rstrip().removesuffix(";"))
    known = {heading for _, heading, _, page in rows if page == "symbol"}
    for path in (ROOT / "mmie").rglob("*.py"):
        if "AUTOGENERATED" in (code := path.read_text(encoding="utf-8")) and path.name != "_modidx.py":
            public = re.search(r"^__all__ = \[(.*?)\]", code, re.MULTILINE | re.DOTALL)
            assert set(re.findall(r"'(\w+)'", public[1])) <= known, path


def test_machines_get_markdown(site: Path, pages: dict[str, Page]) -> None:
    index = (site / "llms.txt").read_text(encoding="utf-8")
    assert index.startswith("# ") and "\n> " in index
    for name in pages:
        assert f"({name}.md)" in index and (site / f"{name}.md").read_text(encoding="utf-8").startswith("# "), name


def test_markdown_that_only_quarto_has(tmp_path: Path) -> None:
    "Callouts, tabs and figures come out as HTML that needs no script."
    import pypandoc
    text = "::: {.callout-note}\n## Mind\n\nthe *gap*\n:::\n\n::: {.callout-tip collapse=true}\nfolded\n:::\n\n" \
        "::: {.panel-tabset}\n## One\n\nfirst\n\n## Two\n\nsecond\n:::\n\n![](a.png){fig-alt=\"two words\" fig-cap=\"Below\"}\n\nSaid.[^1]\n\n[^1]: By whom.\n"
    made = pypandoc.convert_text(text, "html5", format="markdown-implicit_figures", extra_args=[f"--lua-filter={ROOT / 'tools' / 'site.lua'}", "--wrap=none"])
    flat = re.sub(r"\s*\n\s*", "", made)
    assert '<div class="callout callout-note"><p class="callout-title">Mind</p><p>the <em>gap</em></p></div>' in flat
    assert '<details class="callout callout-tip"><summary class="callout-title">Tip</summary><p>folded</p></details>' in flat
    assert '<section><p class="tab">One</p><p>first</p></section><section><p class="tab">Two</p>' in flat
    assert re.search(r'<figure><img src="a.png"[^>]*alt="two words"[^>]*/?><figcaption>Below</figcaption></figure>', flat)
    assert 'role="doc-noteref"' in flat


def test_chapters_are_polished_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Imports fold, nbdev's directives go and Quarto's stay, and no output is left for which Quarto would fetch a script."
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from polish import polish
    view = {"output_type": "display_data", "metadata": {}, "data": {"application/vnd.jupyter.widget-view+json": {}, "text/plain": ["Box()"]}}
    table = {"output_type": "display_data", "metadata": {}, "data": {"text/html": ["<b>1</b>"], "text/plain": ["1"]}}
    drawing = {"output_type": "display_data", "metadata": {}, "data": {"image/svg+xml": ['<svg role="img" ', 'aria-label="A &amp; B"/>']}}
    printed = [{"output_type": "stream", "name": "stdout", "text": [line]} for line in ("a\n", "b\n")]
    code = {"cell_type": "code", "metadata": {}, "execution_count": None}
    cells = [{"cell_type": "raw", "id": "0", "metadata": {}, "source": "---\noutput-file: nowhere.html\n---"},
             {**code, "id": "1", "source": "#| default_exp nowhere", "outputs": []},
             {**code, "id": "2", "source": "#| export\nimport torch", "outputs": []},
             {**code, "id": "3", "source": "from a import (b,\n    c)", "outputs": []},
             {**code, "id": "4", "source": '#| fig-alt: "two words"\nshow()', "outputs": [*printed, view, table]},
             {**code, "id": "5", "source": "draw()", "outputs": [drawing]},
             {"cell_type": "markdown", "id": "6", "metadata": {}, "source": '![Three "words", said](a.svg)\n\n[line](../mmie/core.py#L3)'}]
    path = tmp_path / "nowhere.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {"widgets": {}}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    polish(tmp_path, {})
    once = path.read_text(encoding="utf-8")
    polish(tmp_path, {})
    assert path.read_text(encoding="utf-8") == once and "widget" not in once and "text/html" not in once
    _, imports, shown, drawn, text = json.loads(once)["cells"]
    assert imports["source"] == '#| code-fold: true\n#| code-summary: "Imports"\nimport torch\nfrom a import (b,\n    c)'
    assert shown["source"].startswith('#| fig-alt: "two words"') and shown["outputs"][0]["text"] == ["a\n", "b\n"]
    assert "<b>1</b>" in shown["outputs"][2]["data"]["text/markdown"]
    assert drawn["source"] == '#| fig-alt: "A & B"\ndraw()'
    assert text["source"].startswith('![](a.svg){fig-alt="Three \\"words\\", said"}') and re.search(r"\]\(https://\S+/mmie/core\.py#L3\)", text["source"])


def test_a_heading_leaves_its_name_to_the_symbol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from polish import beside
    given = {"## prove": "## prove {#on-prove}", "### [`Prove`](evidence.html#prove)": "### [`Prove`](evidence.html#prove) {#on-prove}", "## To prove": "## To prove"}
    assert {heading: beside(re.fullmatch(".*", heading), {"prove"}) for heading in given} == given


def test_long_lines_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    "What doesn't fit stands further in than its line began; tables keep their columns."
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location("site_builder", ROOT / "tools" / "site.py")
    assert spec and spec.loader
    builder = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "site_builder", builder)
    spec.loader.exec_module(builder)
    anchor = '<a href="#cb1-2" aria-hidden="true" tabindex="-1"></a>'
    assert builder.hang(f'<span id="cb1-2">{anchor}    x</span>') == f'<span id="cb1-2" style="--in: 4ch">{anchor}    x</span>'
    def printed(*lines: str) -> list[str]:
        page = builder.hang('<div class="cell-output stdout">\n<pre><code>' + "\n".join(lines) + "</code></pre>")
        return re.fullmatch(r".*<code>(.*)</code></pre>", page, re.DOTALL)[1].split("\n")
    assert printed("✓ <i>one</i>   max", "✓ two   max", "  a &lt; b") == [
        "<span>✓ <i>one</i>   max</span>", "<span>✓ two   max</span>", '<span style="--in: 2ch">  a &lt; b</span>']
    long = "loss " * 30 + "!"
    assert printed("name   size", "a         1", "", long) == [
        "<span class=row>name   size</span>", "<span class=row>a         1</span>", "<span class=row></span>", f"<span>{long}</span>"]


def test_quarto_needs_no_package_to_polish() -> None:
    "It runs polish.py with whichever Python it finds."
    done = subprocess.run([sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import polish"],
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_sidebar_is_read_as_yaml_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from reference import sidebar as read
    contents = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    assert read(ROOT) == [pair for entry in contents for pair in ([(entry, "")] if isinstance(entry, str) else [(name, entry["section"]) for name in entry["contents"]])]


# In the browser


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1440, "height": 900}, reduced_motion="reduce", permissions=["clipboard-read", "clipboard-write"])
    yield context.new_page()
    context.close()


SIDEWAYS = """() => {
  const wide = document.documentElement.scrollWidth, here = innerWidth;
  const cut = [...document.querySelectorAll("pre.sourceCode")].filter(e => e.scrollWidth > e.clientWidth + 1);
  if (cut.length) return cut.slice(0, 3).map(e => "cut: " + e.innerText.slice(0, 160));
  if (wide <= here) return [];
  return [...document.querySelectorAll("main *")].filter(e => e.getBoundingClientRect().right > here + 1 && !e.closest("pre, .scroll, .html-output, .equation, .formula"))
    .slice(0, 3).map(e => e.outerHTML.slice(0, 160)).concat(`${wide} px`);
}"""
BROKEN = """async () => {
  const all = [...document.images];
  all.forEach(image => { image.loading = "eager"; });
  await Promise.allSettled(all.map(image => image.decode()));
  return all.filter(image => !image.naturalWidth).map(image => image.src);
}"""
SAMPLE = """() => { // what repeats a thousand times is looked at a few times
  for (const body of document.querySelectorAll("tbody")) [...body.rows].slice(4).forEach(row => row.remove());
  [...document.querySelectorAll("main > :not(nav, footer)")].slice(50).forEach(node => node.remove());
}"""


def test_every_page_opens_from_disk_on_a_phone(browser: Any, site: Path, pages: dict[str, Page]) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append((page.url, message.text)) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append((page.url, str(error))))
    aborted = "net::ERR_ABORTED" # an icon still on its way when the next page opens
    page.on("requestfailed", lambda request: complaints.append((page.url, request.url)) if request.failure != aborted else None)
    page.on("request", lambda request: complaints.append((page.url, request.url)) if not request.url.startswith(("file:", "data:", "about:")) else None)
    for name in pages:
        page.goto((site / name).as_uri())
        complaints += [(name, what) for script in (SIDEWAYS, BROKEN) for what in page.evaluate(script)]
    context.close()
    assert not complaints


def test_search_finds_symbols_and_sections_with_the_keyboard(page: Any, site: Path) -> None:
    page.goto((site / "index.html").as_uri())
    page.keyboard.press("/")
    page.keyboard.type("repeat_kv")
    first = page.locator("#hits a").first
    first.wait_for()
    assert first.locator("code").inner_text() == "repeat_kv"
    page.keyboard.press("Enter")
    page.wait_for_url("**/attention.dot_product.html#repeat_kv")
    assert page.locator("#repeat_kv").is_visible()
    page.keyboard.press("Control+k")
    page.keyboard.type("perplexity")
    page.locator("#hits a").nth(2).wait_for()
    page.keyboard.press("ArrowDown")
    assert page.locator("#hits [aria-selected=true]").get_attribute("id") == "hit-1"
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()


def test_the_theme_follows_the_system_until_it_is_chosen(page: Any, site: Path) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    page.goto((site / "core.html").as_uri())
    light = page.evaluate(paper)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(paper)
    assert light != dark and page.locator(".theme").get_attribute("aria-pressed") == "true"
    page.click(".theme")
    assert page.evaluate(paper) == light
    page.goto((site / "evidence.html").as_uri())
    assert page.evaluate(paper) == light and page.locator(".theme").get_attribute("aria-pressed") == "false"


def test_code_is_copied_without_its_markup(page: Any, site: Path) -> None:
    page.goto((site / "core.html").as_uri())
    block = page.locator("main > div.sourceCode").first
    block.hover()
    block.locator(".copy").click()
    page.wait_for_function("document.querySelector('.copy').textContent === 'Copied' || [...document.querySelectorAll('.copy')].some(b => b.textContent === 'Copied')")
    assert page.evaluate("navigator.clipboard.readText()") == block.locator("code").inner_text().rstrip()


def test_the_keyboard_reaches_the_text_first(page: Any, site: Path) -> None:
    page.goto((site / "core.html").as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_pages_read_without_javascript(browser: Any, site: Path) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, java_script_enabled=False)
    page = context.new_page()
    page.goto((site / "core.html").as_uri())
    assert page.locator("h1").is_visible() and not page.locator(".search-open").is_visible()
    page.click(".menu")
    assert page.locator(".chapters [aria-current=page]").is_visible()
    context.close()


@pytest.mark.parametrize("name", ["index.html", "evidence.html", "proofs.html", "api.html", "hour.html"])
@pytest.mark.parametrize(("scheme", "rules"), [("light", {}), ("dark", {"runOnly": ["color-contrast", "link-in-text-block"]})], ids=["light", "dark"])
def test_nothing_shuts_readers_out(page: Any, site: Path, name: str, scheme: str, rules: dict[str, Any]) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core is not installed")
    if not (site / name).exists():
        pytest.skip(f"the site has no {name}")
    page.emulate_media(color_scheme=scheme)
    page.goto((site / name).as_uri())
    page.evaluate(SAMPLE)
    found = axe.Axe().run(page, options=rules).response["violations"]
    assert not [(v["id"], v["nodes"][0]["html"][:200], v["nodes"][0]["failureSummary"][:200]) for v in found if v["impact"] in ("serious", "critical")]
