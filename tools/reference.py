"""Write the book's two reference pages from its notebooks: what was proven (nbs/proofs.ipynb), and every public name (nbs/api.ipynb).

    python tools/reference.py            write them
    python tools/reference.py --check    exit 1 when they and the notebooks say different things

Nothing is run: proofs come from the stored outputs, names and signatures from the exported modules. `link_proofs` connects a built site.
"""
import ast
import hashlib
import html
import itertools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from touches import Claim, Touched, Trace

ROOT = Path(__file__).resolve().parent.parent
MADE = ("proofs.ipynb", "api.ipynb")
LINE = re.compile(r"✓ (?P<claim>.*?)   (?:max \|Δ\| = (?P<difference>\S+)|identical)(?: (?:vs|to) (?P<by>.*))?"
                  r"  \((?P<dtype>\w+), (?P<size>\d+) values?\)")
WITNESSES = frozenset({"prove", "raises", "Proof"}) # every proof goes through these


class Unproven(Exception):
    "A stored output doesn't bear out what its cell claims."


@dataclass(frozen=True)
class Proof:
    "One line that `prove` printed."
    id: str # the same as long as the claim and its chapter's name are
    line: str # as printed
    section: str # the heading that it stands under
    claim: str
    by: str # what it was compared with
    difference: str # as printed, "identical" where nothing else was allowed
    allowed: str
    dtype: str
    size: int
    touches: Touched


@dataclass
class Symbol:
    "One public name."
    name: str
    signature: str
    summary: str
    source: str # "mmie/attention/multihead.py#L22"
    proofs: list[Proof] = field(default_factory=list)
    checks: int = 0 # assertions and refusals


@dataclass
class Chapter:
    "One notebook, and what was found in it."
    file: str # "23_attention.multihead.ipynb"
    part: str # the sidebar's section
    title: str
    cells: list[dict[str, object]]
    symbols: list[Symbol]
    proofs: list[Proof] = field(default_factory=list)
    assertions: int = 0
    refusals: int = 0 # mistakes that must be refused, and were

    @property
    def name(self) -> str: # "attention.multihead"
        return re.sub(r"^\d\d_", "", Path(self.file).stem)


def text(value: object) -> str:
    "Notebooks store text as lines."
    return "".join(value) if isinstance(value, list) else str(value or "")


# Public names

def signature(node: ast.AST) -> str:
    "Parameters without their types, for a class those of its constructor or its fields; a constant's value where it is short."
    if isinstance(node, ast.Assign | ast.AnnAssign):
        value = ast.unparse(node.value) if node.value else ""
        return f" = {value}" if 0 < len(value) <= 40 else ""
    if isinstance(node, ast.ClassDef):
        made = [s for s in node.body if isinstance(s, ast.FunctionDef) and s.name == "__init__"]
        fields = [s for s in node.body if isinstance(s, ast.AnnAssign) and not ast.unparse(s.target).startswith("_")]
        return signature(made[0]) if made else short([given(ast.unparse(s.target), s.value) for s in fields]) if fields else ""
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    values = [None] * (len(plain) - len(a.defaults)) + a.defaults
    parameters = [given(p.arg, v) for p, v in zip(plain, values, strict=True) if p.arg not in ("self", "cls")]
    parameters += [f"*{a.vararg.arg}"] if a.vararg else ["*"] if a.kwonlyargs else []
    parameters += [given(p.arg, v) for p, v in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    return short([*parameters, *([f"**{a.kwarg.arg}"] if a.kwarg else [])])


def given(name: str, value: ast.expr | None) -> str:
    "A parameter and its default."
    written = ast.unparse(value) if value is not None else ""
    return f"{name}={written if len(written) <= 12 else '…'}" if written else name


def short(parameters: list[str], room: int = 64) -> str:
    "As many parameters as fit."
    while len(line := ", ".join(parameters)) > room and len(parameters) > 2:
        parameters = [*parameters[:-2], "…"]
    return f"({line})"


def top_level(code: str) -> dict[str, ast.stmt]:
    "What a module or a cell defines; of `A, B = 1, 2` each by itself."
    found: dict[str, ast.stmt] = {}
    for s in ast.parse(code).body:
        if isinstance(s, ast.FunctionDef | ast.ClassDef):
            found[s.name] = s
        elif isinstance(s, ast.AnnAssign):
            found[s.target.id] = s
        elif isinstance(s, ast.Assign):
            for target in s.targets:
                several = isinstance(target, ast.Tuple) and isinstance(s.value, ast.Tuple)
                for name, value in zip(target.elts, s.value.elts, strict=True) if several else [(target, s.value)]:
                    found |= {n.id: ast.copy_location(ast.Assign([n], value), s) for n in ast.walk(name) if isinstance(n, ast.Name)}
    return found


def public_names(found: dict[str, ast.stmt]) -> list[str]: # what `top_level` found in a module
    return ast.literal_eval(found["__all__"].value) if "__all__" in found else []


def read_symbols(root: Path, module: str) -> list[Symbol]:
    "The public names of a module in the order of its text."
    file = root.joinpath("mmie", *module.split(".")).with_suffix(".py")
    if not file.exists():
        return []
    code = file.read_text(encoding="utf-8")
    lines, found = code.splitlines(), top_level(code)
    symbols = []
    for name in sorted(public_names(found), key=lambda name: found[name].lineno):
        node, where = found[name], f"{file.relative_to(root).as_posix()}#L{found[name].lineno}"
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            summary = (ast.get_docstring(node) or "").split("\n")[0]
        else: # a constant is explained by the comment behind it
            comment = re.search(r"\s# (.*)$", lines[node.end_lineno - 1])
            summary = comment[1] if comment else ""
        symbols.append(Symbol(name, signature(node), summary, where))
    return symbols


# Proofs

def code_of(cell: dict[str, object]) -> ast.Module | None:
    "The cell's program, None where there is none or it wasn't run."
    source = text(cell["source"])
    if cell["cell_type"] != "code" or re.search(r"^#\|\s*eval:\s*false", source, re.MULTILINE):
        return None
    return ast.parse(re.sub(r"^[%!].*", "", source, flags=re.MULTILINE))


def printed(cell: dict[str, object], where: str) -> list[str]:
    "The lines that a cell printed. Raises `Unproven` if it ended in an error."
    for output in cell["outputs"]:
        if output["output_type"] == "error":
            raise Unproven(f"{where} ended in an error: {output['ename']}")
    return "".join(text(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream").splitlines()


def best(claims: Iterable[Claim], sentence: str, by: str) -> Claim | None:
    "The call of `prove` that printed a line: of several, the one that leaves least open, and that printed least so far."
    fitting = [c for c in claims if c.sentence.fullmatch(sentence) and c.by.fullmatch(by)]
    return max(fitting, key=lambda c: (c.fixed, -c.kept), default=None)


def usual_tolerances(root: Path) -> dict[str, str]:
    "What `prove` allows by dtype, read from its module."
    table = top_level((root / "mmie" / "evidence.py").read_text(encoding="utf-8"))["_TOLERANCES"].value
    return {key.attr: f"{value.value:.0e}" for key, value in zip(table.keys, table.values, strict=True)}


def read_proofs(chapter: Chapter, trace: Trace, usual: dict[str, str], taken: set[str]) -> None:
    "Fill in what a notebook proved. Raises `Unproven` where its outputs and its claims don't agree."
    section = ""
    for cell in chapter.cells:
        if cell["cell_type"] == "markdown" and (headings := re.findall(r"^##+ (.+)$", text(cell["source"]), re.MULTILINE)):
            section = headings[-1]
            trace.section()
        if (code := code_of(cell)) is None:
            continue
        where = f"nbs/{chapter.file}, cell {cell['id']}"
        trace.cell(code)
        for line in printed(cell, where):
            if line.startswith("✗") and any(c.sentence.match(line[1:].strip()) and c.fixed for c in trace.claims):
                raise Unproven(f"{where} denies its claim: {line}")
            if line.startswith("✓"):
                found = LINE.fullmatch(line)
                said = (found["claim"], found["by"] or "") if found else ("", "")
                claim = found and (best(trace.claims, *said) or best(trace.helpers, *said))
                if not claim:
                    raise Unproven(f"{where} prints a line that `prove` didn't: {line}")
                claim.kept += 1
                around = claim.touches if claim in trace.claims else claim.touches | trace.here
                exact = found["difference"] is None
                allowed = "0" if exact else claim.allowed or usual[found["dtype"]]
                if not exact and allowed == "0":
                    raise Unproven(f"{where} had to be identical and isn't: {line}")
                chapter.proofs.append(Proof(
                    new_id(chapter.name, said[0], taken), line, section, *said, found["difference"] or "identical",
                    allowed, found["dtype"], int(found["size"]), around - WITNESSES))
        for claim in trace.claims:
            if claim.certain and not claim.kept:
                raise Unproven(f"{where} claims “{claim}”, and its output doesn't: run the notebook")
    for claim in trace.helpers:
        if not claim.kept:
            raise Unproven(f"nbs/{chapter.file} has a function that claims “{claim}”, and no output does")
    chapter.assertions, chapter.refusals = trace.assertions, trace.refusals


def new_id(module: str, claim: str, taken: set[str]) -> str:
    "A claim's name in links. The second proof of the same claim gets -2."
    start = "p-" + hashlib.sha256(f"{module}: {claim}".encode()).hexdigest()[:7]
    name = next(n for n in itertools.chain([start], (f"{start}-{k}" for k in itertools.count(2))) if n not in taken)
    taken.add(name)
    return name


def sidebar(root: Path) -> list[tuple[str, str]]: # each page of `_quarto.yml` and its section
    "Read without a library for YAML: Quarto runs this with a Python that may have none."
    found, part, config = [], "", (root / "_quarto.yml").read_text(encoding="utf-8")
    for indent, section, file in re.findall(r"""^( *)- (?:section: ["']?(.*?)["']?|(\S+\.(?:ipynb|q?md)))$""", config, re.MULTILINE):
        part = section or (part if len(indent) > 6 else "")
        if file:
            found.append((file, part))
    return found


def read_book(root: Path = ROOT) -> list[Chapter]:
    "Every notebook of the sidebar, in its order, with its symbols and proofs. Raises `Unproven`."
    book = []
    for file, part in sidebar(root):
        if file.endswith(".ipynb") and file not in MADE:
            cells = json.loads((root / "nbs" / file).read_text(encoding="utf-8"))["cells"]
            title = re.search(r"^# (.+)$", "\n".join(text(c["source"]) for c in cells if c["cell_type"] == "markdown"), re.MULTILINE)
            chapter = Chapter(file, part, title[1] if title else file, cells, [])
            chapter.symbols = read_symbols(root, chapter.name)
            book.append(chapter)
    everything = {symbol.name: symbol for chapter in book for symbol in chapter.symbols}
    usual, taken = usual_tolerances(root), set()
    for chapter in book:
        trace = Trace(everything, [symbol.name for symbol in chapter.symbols])
        read_proofs(chapter, trace, usual, taken)
        for proof in chapter.proofs:
            for name in proof.touches:
                everything[name].proofs.append(proof)
        for name, count in trace.checked.items():
            everything[name].checks += count
    return book


# The two pages

SPECIAL = re.compile(r"['\"\\`*{}\[\]<>#|$~^@]|(?<![^\W_])_|_(?![^\W_])|:(?=\w+:)")


def plain(words: str) -> str:
    "Text for a table: Markdown's own characters lose their meaning, but code stays code, and an address in angle brackets a link."
    return "".join(p if k % 2 else SPECIAL.sub(r"\\\g<0>", p) for k, p in enumerate(re.split(r"(`[^`|]+`|<https?://[^\s<>|]+>)", words)))


def table(heads: str, widths: Iterable[int], rows: Iterable[Iterable[object]]) -> str:
    "A pipe table."
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([f"| {heads} |", f"|{'|'.join('-' * w for w in widths)}|", *lines])


def parts(book: list[Chapter]) -> dict[str, list[Chapter]]:
    "The chapters of each section of the sidebar."
    return {part: list(chapters) for part, chapters in itertools.groupby(book, lambda chapter: chapter.part)}


def heading(chapter: Chapter) -> str:
    "A chapter's heading, which leads there."
    return f"### [{chapter.title.replace('`', '')}]({chapter.file})"


def number(count: int, one: str) -> str:
    "`1 proof`, `2 proofs`."
    return f"{count:,} {one}{'s' * (count != 1)}"


def proof_rows(chapter: Chapter) -> Iterable[tuple[str, ...]]:
    "A chapter's proofs below the headings that they stand under."
    for section, proofs in itertools.groupby(chapter.proofs, lambda proof: proof.section):
        if section:
            yield (f"*{plain(re.sub('[*`]', '', section))}*", "", "", "", "", "")
        for p in proofs:
            claim = f'<a id="{p.id}" href="{chapter.file}#{p.id}">{plain(p.claim)}</a>'
            touches = ", ".join(sorted(p.touches, key=lambda name: (name.lower(), name)))
            yield (claim, plain(p.by), p.difference, p.allowed, f"{p.size:,} {p.dtype}", plain(touches))


def symbol_rows(chapter: Chapter) -> Iterable[tuple[str, ...]]:
    "A chapter's public names."
    for s in chapter.symbols:
        name = f"[{plain(s.name)}]({chapter.file}#{s.name.lower()}){plain(s.signature)}"
        proofs = f"[{len(s.proofs)}](proofs.ipynb#{s.proofs[0].id})" if s.proofs else ""
        yield name, plain(s.summary), proofs, str(s.checks or ""), f"[{s.source.split('#L')[1]}](../{s.source})"


def closeness(proofs: list[Proof]) -> str:
    "How many proofs there are of each kind, and how close they came."
    rows, measured = [], [p for p in proofs if p.difference != "identical"]
    for dtype, count in Counter(p.dtype for p in measured).most_common():
        values = sorted(float(p.difference) for p in measured if p.dtype == dtype)
        rows.append((f"{dtype}, close", f"{count:,}", f"{values[len(values) // 2]:.0e}"))
    rows.append(("identical", f"{len(proofs) - len(measured):,}", "0"))
    return table("compared | proofs | median of their largest differences", (24, 12, 30), rows)


def counts(book: list[Chapter]) -> str:
    "What each part holds."
    rows = []
    for part, group in parts(book).items():
        held = [sum(len(c.proofs) for c in group), sum(c.assertions for c in group), sum(c.refusals for c in group)]
        rows += [(plain(part), *(f"{count:,}" for count in held))] if any(held) else []
    return table("part | proofs | assertions | refusals", (32, 12, 12, 12), rows)


def proofs_page(book: list[Chapter]) -> list[str]:
    "The cells of nbs/proofs.ipynb."
    proofs = [p for chapter in book for p in chapter.proofs]
    title = """# Proofs

> Every claim that the book proved when its notebooks last ran, what it was compared with, and how close the two came."""
    opening = f"""A chapter proves a claim by computing the same thing in two independent ways. `prove` compares all the numbers, stops
the notebook if they differ by more than rounding, and otherwise prints a line with a ✓. This page collects those lines, all
{len(proofs):,} of them, from the outputs stored in the chapters. Beside them the chapters hold {sum(c.assertions for c in book):,}
plain assertions, and {number(sum(c.refusals for c in book), "mistake")} that must be refused with the right message.

![{picture_says(proofs)}](images/proofs.svg)

Add the same float64 numbers in two different orders, and the sums part ways at about 10⁻¹⁶. That is where most of the
differences lie: what is left is rounding, not error. The light bars are claims that allow another difference than usual, mostly
because single precision or chance takes part in them; their lines say how much. A dark bar beyond the dashed line compares large
numbers, for which the allowance is relative.

{closeness(proofs)}

Where they stand:

{counts(book)}"""
    reading = """## How to read a line

The claim leads to its line in the chapter. *Against* is the other way of computing it: a library, a formula written out, a loop, an
earlier model. *Largest difference* is the greatest among all the numbers compared. *Allowed* is what it may be at most, relative where
the reference is larger than 1, and 0 where both sides must be identical. *Touches* lists the public names behind a claim. They are found
by following variables: a claim touches what its call of `prove` names, and what the statements name that made its variables, back to the
heading above it. A variable from an earlier section brings only what its own statement names. What all these functions call in turn is not
followed, nor what only a test in another file touches.

<div id="filter"></div>"""
    cells, heads = [title, opening, reading], "claim | against | largest difference | allowed | compared | touches"
    for part, group in parts(book).items():
        tables = [f"{heading(c)} · {number(len(c.proofs), 'proof')}\n\n{table(heads, (30, 17, 11, 9, 11, 28), proof_rows(c))}"
                  for c in group if c.proofs]
        cells += ["\n\n".join([f"## {part}", *tables])] if tables else []
    return [*cells, script("touches:attention")]


def api_page(book: list[Chapter]) -> list[str]:
    "The cells of nbs/api.ipynb."
    symbols = [s for chapter in book for s in chapter.symbols]
    proven, checked = sum(bool(s.proofs) for s in symbols), sum(bool(s.checks and not s.proofs) for s in symbols)
    title = f"""# Every public name

> What the book exports, in its order: {len(symbols):,} functions, classes and constants, with documentation, source and proofs."""
    opening = f"""`from mmie import NAME` finds any of them. A name leads to its documentation in the chapter, the number of its proofs
to those on the page of [proofs](proofs.ipynb), which says how the two are matched, and the line number to the source. *Checks* are
plain assertions and refused mistakes, matched in the same way. {proven:,} of the names have proofs and {checked:,} more have checks.
The others are mostly figures, types and constants, or are only reached through a name that has them.

<div id="filter" class="names"></div>"""
    cells, heads = [title, opening], "what it is | proofs | checks | line"
    for part, group in parts(book).items():
        tables = [f"{heading(c)}\n\n{table(f'mmie.{c.name} | {heads}', (40, 44, 8, 8, 7), symbol_rows(c))}"
                  for c in group if c.symbols]
        cells += ["\n\n".join([f"## {part}", *tables])] if tables else []
    return [*cells, script("softmax")]


def script(example: str) -> str:
    "The page's style and its filter."
    return (Path(__file__).parent / "reference.html").read_text(encoding="utf-8").replace("EXAMPLE", example).strip()


def decade(proof: Proof) -> int:
    "The power of ten of its largest difference, -18 for none."
    difference = float(proof.difference)
    return max(-18, math.floor(math.log10(difference))) if difference else -18


def picture_says(proofs: list[Proof]) -> str:
    "The picture in a sentence."
    exact = [p for p in proofs if p.dtype == "float64" and p.difference != "identical" and p.allowed == "1e-10"]
    below = sum(float(p.difference) < 1e-12 for p in exact)
    return (f"Histograms of the proofs' largest differences by number type, on a logarithmic axis: of the {len(exact)} float64 proofs "
            f"that allow 1e-10, {below} differ by less than 1e-12")


def label(x: float, y: float, words: object, **attributes: object) -> str:
    "Text in the picture."
    more = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    return f'<text x="{x:.0f}" y="{y:.0f}"{more}>{words}</text>'


def histogram(proofs: list[Proof], usual: str, floor: float, at: Callable[[float], float]) -> Iterable[str]:
    "The bars of one dtype, light where more than usual is allowed."
    step, bars = at(1) - at(0), Counter(map(decade, proofs))
    loose = Counter(decade(p) for p in proofs if p.allowed != usual)
    for power, count in sorted(bars.items()):
        high, light = (max(1.5, TALL * n / max(bars.values())) if n else 0.0 for n in (count, loose[power]))
        for top, tall, color in ((floor - high, high - light, "#0138a3"), (floor - light, light, "#9db4e0")):
            if tall:
                yield f'<rect x="{at(power) + 1:.0f}" y="{top:.1f}" width="{step - 2:.0f}" height="{tall:.1f}" fill="{color}"/>'
        yield label(at(power + 0.5), floor - high - 4, count, text_anchor="middle", font_size=11)


LEFT, STEP, TALL, ROW = 84, 27, 74, 110


def picture(proofs: list[Proof], usual: dict[str, str]) -> str:
    "Histograms of the largest differences, one for each dtype, with what is usually allowed."
    measured = [p for p in proofs if p.difference != "identical"]
    dtypes = [dtype for dtype, _ in Counter(p.dtype for p in measured).most_common()]
    right, bottom = LEFT + 18 * STEP, ROW * len(dtypes)
    def at(power: float) -> float:
        return LEFT + (power + 18) * STEP
    drawn = [f'<rect width="{right + 14}" height="{bottom + 56}" fill="#fff"/>']
    for k, dtype in enumerate(dtypes):
        floor, line, these = ROW * (k + 1), at(math.log10(float(usual[dtype]))), [p for p in measured if p.dtype == dtype]
        drawn += [label(LEFT - 10, floor - 19, dtype, text_anchor="end", font_weight=600),
                  label(LEFT - 10, floor - 3, number(len(these), "proof"), text_anchor="end"),
                  *histogram(these, usual[dtype], floor, at), f'<path d="M{LEFT} {floor}H{right}" stroke="#1a1a1a"/>',
                  f'<path d="M{line:.0f} {floor}v{-TALL - 14}" stroke="#b84c0f" stroke-width="2" stroke-dasharray="4 3"/>',
                  label(line + (8 if line < right - 160 else -8), floor - TALL - 3, f"usually allowed: {usual[dtype]}",
                        text_anchor="start" if line < right - 160 else "end", fill="#a3420c")]
    for power in range(-16, 1, 4):
        exponent = f'<tspan dy="-5" font-size="10">{str(power).replace("-", "−")}</tspan>'
        drawn.append(label(at(power), bottom + 18, f"10{exponent}", text_anchor="middle"))
    drawn += [label(at(-17.5), bottom + 18, 0, text_anchor="middle"),
              label((LEFT + right) / 2, bottom + 42, "largest difference between the two sides of a proof", text_anchor="middle")]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + 14} {bottom + 56}" width="{right + 14}" role="img" '
            f'font-family="system-ui, sans-serif" font-size="13" fill="#1a1a1a">\n<title>{html.escape(picture_says(proofs))}</title>\n'
            + "\n".join(drawn) + "\n</svg>\n")


def notebook(cells: list[str]) -> str:
    "A notebook of Markdown cells as `nbdev_clean` leaves it."
    made = [{"cell_type": "markdown", "id": hashlib.sha256(f"{k} {source[:20]}".encode()).hexdigest()[:8], "metadata": {},
             "source": source.splitlines(keepends=True)} for k, source in enumerate(cells)]
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    return json.dumps({"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}, ensure_ascii=False, indent=1) + "\n"


def files(book: list[Chapter], root: Path = ROOT) -> dict[str, str]:
    "What this program writes, by path."
    proofs = [p for chapter in book for p in chapter.proofs]
    return {"nbs/proofs.ipynb": notebook(proofs_page(book)), "nbs/api.ipynb": notebook(api_page(book)),
            "nbs/images/proofs.svg": picture(proofs, usual_tolerances(root))}


# The built site

def to_proofs(symbol: Symbol) -> str:
    "Where a symbol's proofs are: its first one, with the page's filter set."
    return f"proofs.html?touches={symbol.name}#{symbol.proofs[0].id}"


def proof_links(book: list[Chapter]) -> dict[str, str]:
    "For each public name that has proofs, a link to them in Markdown."
    return {s.name: f"[{number(len(s.proofs), 'proof')}]({to_proofs(s)})" for chapter in book for s in chapter.symbols if s.proofs}


def link_proofs(docs: Path, book: list[Chapter]) -> None:
    "In a built site, make each ✓ a link to its line on the page of proofs; links from the index of names set that page's filter."
    for chapter in book:
        page = docs / ("index.html" if chapter.file == "index.ipynb" else f"{chapter.name}.html")
        page.write_text(marked(page.read_text(encoding="utf-8"), chapter.proofs), encoding="utf-8")
    symbols = {s.name: s for chapter in book for s in chapter.symbols if s.proofs}
    row = re.compile(r'(<tr[^>]*>\s*<td[^>]*>\s*<a [^>]*>(\w+)</a>(?:(?!</tr>).)*?)href="(?:\./)?proofs\.html#[^"]*"', re.DOTALL)
    page = docs / "api.html"
    linked = row.sub(lambda match: f'{match[1]}href="{to_proofs(symbols[match[2]])}"', page.read_text(encoding="utf-8"))
    page.write_text(linked, encoding="utf-8")


def marked(page: str, proofs: list[Proof]) -> str:
    "A chapter's page whose ✓ have their names and links."
    waiting: dict[str, list[Proof]] = {}
    for proof in proofs:
        waiting.setdefault(proof.line, []).append(proof)
    def mark(match: re.Match[str]) -> str:
        if not (these := waiting.get(html.unescape(match[2]))):
            return match[0]
        name = these.pop(0).id
        return f'{match[1]}<a class="proof" id="{name}" href="proofs.html#{name}">✓</a>{match[2][1:]}'
    return re.sub(r"(?m)(^|<code>)(✓ .*?)(?=</code>|$)", mark, page)


def main(check: bool) -> None:
    try:
        made = files(read_book())
    except Unproven as error:
        sys.exit(str(error))
    stale = [name for name, written in made.items() if not (ROOT / name).exists() or (ROOT / name).read_text(encoding="utf-8") != written]
    if check and stale:
        sys.exit(f"{' and '.join(stale)} don't say what the notebooks say: run `python tools/reference.py` and commit")
    for name in [] if check else stale:
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_text(made[name], encoding="utf-8")


if __name__ == "__main__":
    main("--check" in sys.argv[1:])
