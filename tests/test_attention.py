"""Every backend of attention against the loop, over shapes, heads, rules, biases and precisions drawn at random."""
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmie.attention.dot_product import attention, attention_loop, attention_weights, repeat_kv
from mmie.attention.masks import (
    Mask, additive_mask, causal, document, everything, flex_block_mask, padding, prefix, sinks, window,
)
from mmie.core import InputError

quick = settings(max_examples=60, deadline=None)
BATCH = 2


def _row_lengths(draw: st.DrawFn, keys: int) -> list[int]:
    return draw(st.lists(st.integers(0, keys), min_size=BATCH, max_size=BATCH))


@st.composite
def rules(draw: st.DrawFn, keys: int, depth: int = 2) -> tuple[Mask, Callable[[int, int, int], bool]]:
    "A mask composed at random, and its meaning for one pair: (row, i, j) → bool, in plain Python."
    kind = draw(st.sampled_from(["and", "or", "not"] if depth and draw(st.booleans()) else
                                ["causal", "window", "symmetric", "sinks", "prefix", "prefixes", "document", "documents", "left", "lengths", "everything"]))
    if kind == "not":
        mask, means = draw(rules(keys, depth - 1))
        return ~mask, lambda r, i, j: not means(r, i, j)
    if kind in ("and", "or"):
        (a, means_a), (b, means_b) = draw(rules(keys, depth - 1)), draw(rules(keys, depth - 1))
        if kind == "and":
            return a & b, lambda r, i, j: means_a(r, i, j) and means_b(r, i, j)
        return a | b, lambda r, i, j: means_a(r, i, j) or means_b(r, i, j)
    n = draw(st.integers(1, keys + 2))
    limits = _row_lengths(draw, keys)
    if kind in ("document", "documents"):
        ids = draw(st.lists(st.lists(st.integers(-1, 2), min_size=keys, max_size=keys), min_size=BATCH, max_size=BATCH))
        if kind == "document":
            return document(ids[0]), lambda r, i, j: i >= 0 and ids[0][i] == ids[0][j] >= 0
        return document(ids), lambda r, i, j: i >= 0 and ids[r][i] == ids[r][j] >= 0
    simple: dict[str, tuple[Mask, Callable[[int, int, int], bool]]] = {
        "causal": (causal(), lambda r, i, j: j <= i),
        "window": (window(n), lambda r, i, j: i - n < j <= i),
        "symmetric": (window(n, symmetric=True), lambda r, i, j: abs(i - j) < n),
        "sinks": (sinks(n), lambda r, i, j: j < n and j <= i),
        "prefix": (prefix(n), lambda r, i, j: j < n),
        "prefixes": (prefix(limits), lambda r, i, j: j < limits[r]),
        "left": (padding(left=limits), lambda r, i, j: j >= limits[r]),
        "lengths": (padding(lengths=torch.tensor(limits)), lambda r, i, j: j < limits[r]),
        "everything": (everything(), lambda r, i, j: True),
    }
    return simple[kind]


def written_out(means: Callable[[int, int, int], bool], queries: int, keys: int) -> Tensor:
    "(BATCH, 1, queries, keys)"
    pairs = [[[means(r, i, j) for j in range(keys)] for i in range(keys - queries, keys)] for r in range(BATCH)]
    return torch.tensor(pairs).reshape(BATCH, 1, queries, keys)


def loop(q: Tensor, k: Tensor, v: Tensor, may: Tensor, **options: object) -> Tensor:
    "The bottom rung for every row and head."
    groups = q.shape[1] // k.shape[1]
    bias = options.pop("bias")
    bias = None if bias is None else bias.expand(*q.shape[:3], k.shape[2])
    may = may.expand(*q.shape[:3], k.shape[2])
    return torch.stack([torch.stack([
        attention_loop(q[b, h], k[b, h // groups], v[b, h // groups], may[b, h], bias=None if bias is None else bias[b, h], **options)
        for h in range(q.shape[1])]) for b in range(BATCH)])


@st.composite
def questions(draw: st.DrawFn, longest: int = 6) -> tuple[list[Tensor], Tensor, dict[str, object]]:
    "Queries, keys, values; who may look, by plain Python; and the options that say so."
    queries, keys = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    kv_heads, groups = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2), (1, 3)]))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    heads, d = kv_heads * groups, draw(st.sampled_from([2, 4]))
    x = [torch.randn(s, generator=rng, dtype=torch.float64) for s in ((BATCH, heads, queries, d), (BATCH, kv_heads, keys, d), (BATCH, kv_heads, keys, 3))]
    may = torch.ones(BATCH, 1, queries, keys, dtype=torch.bool)
    mask: Mask | Tensor | None = None
    form = draw(st.sampled_from(["none", "matrix", "rule", "rule"]))
    if form == "matrix":
        shape = draw(st.sampled_from([(keys,), (queries, keys), (BATCH, 1, 1, keys), (BATCH, heads, queries, keys), (1, heads, queries, 1)]))
        mask = torch.rand(shape, generator=rng) < 0.5
        may = may & mask
    elif form == "rule":
        mask, means = draw(rules(keys))
        may = written_out(means, queries, keys)
    is_causal = draw(st.booleans())
    if is_causal:
        may = may & written_out(lambda r, i, j: j <= i, queries, keys)
    bias: Tensor | Callable[[Tensor, Tensor], Tensor] | None = None
    if draw(st.booleans()):
        bias = torch.randn(draw(st.sampled_from([(queries, keys), (heads, queries, keys), (BATCH, 1, 1, keys)])), generator=rng, dtype=torch.float64)
        if draw(st.booleans()):
            slopes = torch.rand(heads, 1, 1, generator=rng, dtype=torch.float64)
            bias = lambda i, j: -slopes * (i - j).abs()  # noqa: E731
    softcap, scale = draw(st.sampled_from([None, None, 0.7, 30.0])), draw(st.sampled_from([None, 1.0]))
    return x, may, {"mask": mask, "causal": is_causal, "bias": bias, "softcap": softcap, "scale": scale}


def answer(x: list[Tensor], may: Tensor, options: dict[str, object]) -> Tensor:
    "The loop's, with a rule of biases written out."
    bias, (queries, keys) = options["bias"], (x[0].shape[2], x[1].shape[2])
    if callable(bias):
        bias = bias(torch.arange(keys - queries, keys)[:, None], torch.arange(keys)[None])
    return loop(*x, may, bias=bias, softcap=options["softcap"], scale=options["scale"])


@quick
@given(questions())
def test_values_and_gradients_are_the_loops(question: tuple[list[Tensor], Tensor, dict[str, object]]) -> None:
    x, may, options = question
    leaves = [t.clone().requires_grad_() for t in x]
    truth = answer(leaves, may, options)
    direction = torch.randn_like(truth)
    slopes = torch.autograd.grad(truth, leaves, direction, allow_unused=True, materialize_grads=True) if truth.requires_grad else [torch.zeros_like(t) for t in x]
    for backend in ("reference", "explicit", "sdpa", "auto"):
        leaves = [t.clone().requires_grad_() for t in x]
        ours = attention(*leaves, backend=backend, **options)
        torch.testing.assert_close(ours, truth, atol=1e-10, rtol=0, msg=lambda m, backend=backend: f"{backend}: {m}")
        ours_slopes = torch.autograd.grad(ours, leaves, direction, allow_unused=True, materialize_grads=True) if ours.requires_grad else slopes
        for a, b in zip(ours_slopes, slopes, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0, msg=lambda m, backend=backend: f"gradient, {backend}: {m}")
        assert ours[~may.any(-1).expand(ours.shape[:3])].eq(0).all()


@quick
@given(questions(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_other_precisions_are_close_and_never_nan(question: tuple[list[Tensor], Tensor, dict[str, object]], dtype: torch.dtype) -> None:
    x, may, options = question
    x = [t.to(dtype) for t in x]
    if isinstance(options["bias"], Tensor):
        options = options | {"bias": options["bias"].to(dtype)}
    truth = answer([t.double() for t in x], may, options | ({"bias": options["bias"].double()} if isinstance(options["bias"], Tensor) else {}))
    for backend in ("reference", "explicit", "sdpa", "auto"):
        ours = attention(*x, backend=backend, **options)
        assert ours.dtype == dtype and ours.isfinite().all()
        torch.testing.assert_close(ours.double(), truth, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0)
        assert ours[~may.any(-1).expand(ours.shape[:3])].eq(0).all()


@settings(max_examples=12, deadline=None)
@given(questions())
def test_flex_attention_is_the_loop(question: tuple[list[Tensor], Tensor, dict[str, object]]) -> None:
    x, may, options = question
    with warnings.catch_warnings(action="ignore"):
        torch.testing.assert_close(attention(*x, backend="flex", **options), answer(x, may, options), atol=1e-10, rtol=0)


@quick
@given(questions())
def test_maps_times_values_are_the_answer(question: tuple[list[Tensor], Tensor, dict[str, object]]) -> None:
    (q, k, v), may, options = question
    maps = attention_weights(q, k, **options)
    torch.testing.assert_close(maps @ repeat_kv(v, q.shape[1] // k.shape[1]), answer([q, k, v], may, options), atol=1e-10, rtol=0)
    sees = may.any(-1).expand(maps.shape[:3])
    torch.testing.assert_close(maps.sum(-1), sees.double(), atol=1e-12, rtol=0)
    assert maps[~may.expand(maps.shape)].eq(0).all()


@quick
@given(st.data(), st.integers(1, 12), st.integers(1, 12), st.integers(1, 5))
def test_rules_mean_what_they_say(data: st.DataObject, queries: int, keys: int, block: int) -> None:
    mask, means = data.draw(rules(keys, depth=3))
    may = written_out(means, queries, keys)
    dense = mask.dense(queries, keys)
    assert dense.shape[-2:] == (queries, keys) and dense.expand(may.shape).equal(may)
    assert additive_mask(mask, queries, keys).eq(0).equal(dense)
    assert mask == pickle.loads(pickle.dumps(mask)) and (~mask).dense(queries, keys).equal(~dense)
    for start in range(0, queries, block):
        some, every = may[:, 0, start:start + block].flatten(0, 1).any(0), may[:, 0, start:start + block].flatten(0, 1).all(0)
        first, last = keys - queries + start, keys - queries + min(start + block, queries) - 1
        outer, inner = ([any(a <= j < b for a, b in spans) for j in range(keys)] for spans in (mask.spans(first, last, keys), mask.sure(first, last, keys)))
        assert not (some & ~torch.tensor(outer)).any() and not (torch.tensor(inner) & ~every).any()


LONG = [window(40) | sinks(3), causal(), window(100, symmetric=True), causal() & document(torch.arange(300) // 70),
        (causal() | prefix([50, 200])) & padding(lengths=[300, 170]), causal() & padding(left=[0, 130]), ~window(64),
        window(17) & document([0] * 100 + [-1] * 100 + [1] * 100), ~everything()]


@pytest.mark.parametrize("mask", LONG, ids=repr)
@pytest.mark.parametrize("queries", [300, 129, 1])
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["", "capped"])
def test_many_blocks_are_one(mask: Mask, queries: int, softcap: float | None) -> None:
    rng = torch.Generator().manual_seed(queries)
    q, k, v = (torch.randn(BATCH, h, n, 8, dtype=torch.float64, generator=rng, requires_grad=True) for h, n in ((4, queries), (2, 300), (2, 300)))
    truth = attention(q, k, v, mask=mask.dense(queries, 300), softcap=softcap, backend="reference")
    direction = torch.randn(truth.shape, dtype=torch.float64, generator=rng)
    slopes = torch.autograd.grad(truth, (q, k, v), direction, materialize_grads=True, allow_unused=True)
    for backend in ("explicit", "sdpa"):
        ours = attention(q, k, v, mask=mask, softcap=softcap, backend=backend)
        torch.testing.assert_close(ours, truth, atol=1e-10, rtol=0)
        if ours.requires_grad:
            torch.testing.assert_close(torch.autograd.grad(ours, (q, k, v), direction, materialize_grads=True, allow_unused=True), slopes, atol=1e-10, rtol=0)


@pytest.mark.parametrize("mask", LONG[:6], ids=repr)
def test_flex_blocks_hold_all_that_is_seen(mask: Mask) -> None:
    tiles = flex_block_mask(mask, 300).to_dense()[0, 0].bool()
    seen = torch.nn.functional.pad(mask.dense(300).reshape(-1, 300, 300).any(0), (0, 84, 0, 84)).unflatten(1, (3, 128)).unflatten(0, (3, 128))
    assert not (seen.any(3).any(1) & ~tiles).any()


@pytest.mark.parametrize("backend", ["explicit", "sdpa"])
def test_a_window_saves_nothing_the_size_of_the_square(backend: str) -> None:
    "What the way back needs grows with the length: measured by the tensors that autograd keeps."
    def kept(n: int) -> int:
        sizes: dict[int, int] = {}
        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x
        q, k, v = (torch.randn(1, h, n, 16, requires_grad=True) for h in (2, 1, 1))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = attention(q, k, v, mask=window(128) | sinks(4), backend=backend)
        assert out.requires_grad
        return sum(sizes.values())
    short, long = kept(2048), kept(4096)
    assert long < 2.2 * short


def test_second_derivatives_pass_through_the_blocks() -> None:
    x = [torch.randn(1, 1, 70, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    def penalty(mask: Mask | Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(attention(*x, mask=mask, backend="explicit").square().sum(), x, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), x)
    torch.testing.assert_close(penalty(window(9)), penalty(window(9).dense(70)), atol=1e-10, rtol=0)


def test_a_learned_bias_learns() -> None:
    q, k, v = (torch.randn(1, 2, 90, 4, dtype=torch.float64) for _ in range(3))
    table = torch.randn(2, 90, dtype=torch.float64, requires_grad=True)
    def relative(i: Tensor, j: Tensor) -> Tensor:
        return table[:, (i - j).clamp(min=0)]
    slopes = [torch.autograd.grad(attention(q, k, v, mask=window(20), bias=relative, backend=b).square().sum(), table)[0]
              for b in ("reference", "explicit", "sdpa")]
    torch.testing.assert_close(slopes[1], slopes[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(slopes[2], slopes[0], atol=1e-10, rtol=0)
    assert slopes[0][:, 1:20].ne(0).all() and slopes[0][:, 20:].eq(0).all()


@pytest.mark.parametrize(("make", "says"), [
    (lambda: window(0), "at least 1"), (lambda: window(2.5), "whole number"), (lambda: sinks(-1), "at least 0"),
    (padding, "neither side"), (lambda: prefix([[1]]), "one for each row"), (lambda: padding(left=[1], lengths=[1, 2]), "rows"),
    (lambda: document([]), "whole numbers"), (lambda: document([True]), "whole numbers"), (lambda: causal() | 3, "combined"),
    (lambda: prefix([1, 2]) & prefix([1, 2, 3]), "same batch"), (lambda: document([0, 0]).dense(3), "covers 2"),
])
def test_mistakes_are_said_in_a_sentence(make: Callable[[], object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()
