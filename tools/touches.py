"""Which public names a statement of a notebook touches: it names them, or a variable made by a statement that does."""
import ast
import itertools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

Touched = frozenset[str]
NOTHING: Touched = frozenset()
IN_CODE = "in the code"


def union(sets: Iterable[Touched]) -> Touched:
    "All of them."
    return frozenset(itertools.chain.from_iterable(sets))


def called(node: ast.AST) -> str:
    "The name of the function that an expression calls."
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def tolerance(node: ast.expr | None) -> str:
    "A tolerance as a claim gives it: a number, empty where the dtype decides, or a hint where it is computed."
    if node is None or ast.unparse(node) == "None":
        return ""
    if any(isinstance(n, ast.Name | ast.Call | ast.Attribute) for n in ast.walk(node)):
        return IN_CODE
    value = float(eval(compile(ast.Expression(node), "tolerance", "eval"), {"__builtins__": {}})) # arithmetic of numbers, as 2**-8
    return f"{value:.0e}" if value else "0"


def pattern(node: ast.expr) -> tuple[re.Pattern[str], int]:
    "What a text may be that is put together when the cell runs, and how many characters of it stand in the code."
    pieces = node.values if isinstance(node, ast.JoinedStr) else [node]
    fixed = [str(p.value) if isinstance(p, ast.Constant) else None for p in pieces]
    return re.compile("".join(".*" if p is None else re.escape(p) for p in fixed)), sum(len(p) for p in fixed if p)


@dataclass
class Claim:
    "A call of `prove`."
    sentence: re.Pattern[str]
    by: re.Pattern[str] # the name of the reference
    fixed: int # how many characters of both stand in the code
    allowed: str # see `tolerance`
    touches: Touched
    certain: bool # made whenever its cell runs
    kept: int = 0 # lines that it printed

    def __str__(self) -> str:
        return re.sub(r"\\(.)", r"\1", self.sentence.pattern.replace(".*", "…"))

    @classmethod
    def of(cls, call: ast.Call, touches: Touched, certain: bool) -> "Claim":
        "Read a call."
        named = {k.arg: k.value for k in call.keywords}
        sentence, known = pattern(call.args[0] if call.args else named["claim"])
        by, also = pattern(named.get("by", ast.Constant("")))
        return cls(sentence, by, known + also, tolerance(named.get("tol")), touches, certain)


class Trace:
    "Follows the names of one notebook. A variable touches what made it; in later sections, only what its own statement names."

    def __init__(self, public: Iterable[str], own: Iterable[str]) -> None:
        self.public = frozenset(public) # of the whole book
        self.named = {name: frozenset([name]) for name in own} # public names in scope, and the notebook's own functions
        self.made: dict[str, Touched] = {} # variables
        self.before: dict[str, Touched] = {} # what they will touch in later sections
        self.helpers: list[Claim] = [] # claims inside the notebook's own functions, made when those are called
        self.checked: Counter[str] = Counter() # assertions and refusals by public name
        self.assertions = self.refusals = 0
        self.claims: list[Claim] = [] # of the current cell
        self.here: Touched = NOTHING # everything that the current cell touches

    def section(self) -> None:
        "A heading: what went into variables step by step lies behind us."
        self.made = dict(self.before)

    def cell(self, code: ast.Module) -> None:
        "Follow one cell."
        self.claims, self.here = [], NOTHING
        self.follow(code.body)

    def names(self, *nodes: ast.AST | None, directly: bool = False) -> Touched:
        "What expressions touch. Their own variables and parameters hide names of the notebook."
        inside = [n for node in nodes if node is not None for n in ast.walk(node)]
        hidden = {n.arg for n in inside if isinstance(n, ast.arg)}
        used = [n for n in inside if isinstance(n, ast.Name) and n.id not in hidden]
        read = {n.id for n in used} - {n.id for n in used if isinstance(n.ctx, ast.Store)}
        if directly:
            return union(self.named.get(name, NOTHING) for name in read if name not in self.made)
        return union(self.made.get(name, self.named.get(name, NOTHING)) for name in read)

    def bind(self, target: ast.expr, *values: ast.expr | None, more: bool = False) -> None:
        "Let a target of an assignment touch what the values do, `more`: too."
        if isinstance(target, ast.Tuple | ast.List):
            value, size = values[0], len(target.elts)
            each = value.elts if isinstance(value, ast.Tuple | ast.List) and len(value.elts) == size else [value] * size
            for part, its in zip(target.elts, each, strict=True):
                self.bind(part, its)
        elif isinstance(target, ast.Starred):
            self.bind(target.value, *values)
        elif isinstance(target, ast.Attribute | ast.Subscript): # whoever owns it is touched too
            self.bind(target.value, *values, more=True)
        elif isinstance(target, ast.Name):
            for table, directly in ((self.made, False), (self.before, True)):
                table[target.id] = self.names(*values, directly=directly) | (table.get(target.id, NOTHING) if more else NOTHING)

    def follow(self, body: Iterable[ast.stmt], certain: bool = True, refused: bool = False) -> None:
        "Follow statements in order; `certain`: all of them run, `refused`: one of them must fail."
        for s in body:
            match s:
                case ast.ImportFrom(module=str(module), names=names) if module.split(".")[0] == "mmie":
                    self.named |= {a.asname or a.name: frozenset([a.name]) for a in names if a.name in self.public}
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    self.define(s)
                case ast.For():
                    self.bind(s.target, s.iter)
                    self.follow([*s.body, *s.orelse], certain, refused)
                case ast.With():
                    for item in s.items:
                        if item.optional_vars:
                            self.bind(item.optional_vars, item.context_expr)
                    refusal = any(called(item.context_expr) == "raises" for item in s.items)
                    if refusal and certain:
                        self.refusals += 1
                        self.checked.update(self.names(*s.body))
                    self.follow(s.body, certain, refused or refusal)
                case ast.If() | ast.While():
                    self.follow([*s.body, *s.orelse], False, refused)
                case ast.Try():
                    self.follow([*s.body, *s.orelse, *s.finalbody], certain, refused)
                    self.follow([inner for handler in s.handlers for inner in handler.body], False, refused)
                case _:
                    self.simple(s, certain, refused)

    def simple(self, s: ast.stmt, certain: bool, refused: bool) -> None:
        "Follow a statement without a body."
        touched = self.names(s)
        self.here |= touched
        if isinstance(s, ast.Assert) and certain and not refused:
            self.assertions += 1
            self.checked.update(touched)
        if not refused:
            self.claims += [Claim.of(n, self.names(n), certain) for n in ast.walk(s) if isinstance(n, ast.Call) and called(n) == "prove"]
        if isinstance(s, ast.Assign):
            for target in s.targets:
                self.bind(target, s.value)
        elif isinstance(s, ast.AnnAssign | ast.AugAssign):
            self.bind(s.target, s.value, more=isinstance(s, ast.AugAssign))

    def define(self, s: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        "A function of the notebook's own touches what its body names; what it asserts may never run, and doesn't count."
        inside = list(ast.walk(s))
        if any(called(n) == "prove" for n in inside):
            hidden = {n.arg for n in inside if isinstance(n, ast.arg)}
            inner = Trace(self.public, ())
            inner.named = {name: its for name, its in self.named.items() if name not in hidden}
            inner.made = {name: its for name, its in self.made.items() if name not in hidden}
            inner.follow(s.body, certain=False)
            self.helpers += inner.claims + inner.helpers
        if s.name not in self.public:
            self.named[s.name] = self.names(s, directly=True)
