"""Every backend of attention, and every layer with all its options, against loops: shapes, heads, rules and precisions drawn at random."""
import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmie.attention.dot_product import attention, attention_loop, attention_weights, repeat_kv
from mmie.attention.latent import LatentAttention
from mmie.attention.linear import LinearAttention
from mmie.attention.masks import (
    Mask, additive_mask, causal, document, everything, flex_block_mask, padding, prefix, sinks, window,
)
from mmie.attention.multihead import Attention, KVCache
from mmie.attention.positions import ALiBi, RotaryEmbedding
from mmie.attention.variants import DifferentialAttention
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


@st.composite
def layers(draw: st.DrawFn, differential: bool = False) -> tuple[Attention, bool]:
    "A layer with options drawn at random, and whether rows may be padded on the left."
    kv_heads, groups, d = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3])), draw(st.sampled_from([4, 6]))
    heads = kv_heads * groups
    size = d // 2 if differential else d
    rope = RotaryEmbedding(size, rotary_dim=2) if size > 3 else None
    positions = draw(st.sampled_from([None, rope, ALiBi(heads)]))
    window_of = draw(st.none() | st.integers(1, 5))
    sinks_of = draw(st.integers(0, 2)) if window_of is not None else 0
    options = {"softcap": draw(st.sampled_from([None, 1.5])), "scale": draw(st.sampled_from([None, 0.3])), "bias": draw(st.sampled_from([True, False, "qkv"])),
               "qk_norm": draw(st.booleans()), "backend": draw(st.sampled_from(["reference", "explicit", "sdpa", "auto"]))}
    kind = DifferentialAttention if differential else Attention
    layer = kind(12, heads, kv_heads, head_dim=d, positions=positions, window=window_of, sinks=sinks_of, **options).double()
    for norm in (layer.q_norm, layer.k_norm):
        if norm is not None:
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return layer, sinks_of == 0


def layer_by_loops(layer: Attention, x: Tensor, may: Tensor, places: Tensor) -> Tensor:
    "The same layer from its weights, head by head and pair by pair: x (batch, n, width), may (batch, heads, n, n), places (batch, n)."
    h, g, d, n = layer.n_heads, layer.n_kv_heads, layer.head_dim, x.shape[1]
    heads = layer.qkv_proj(x).unflatten(-1, (h + 2 * g, d)).transpose(1, 2)
    q, k, v = heads[:, :h], heads[:, h:h + g], heads[:, h + g:]
    if layer.q_norm is not None:
        q, k = (t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight for t, norm in ((q, layer.q_norm), (k, layer.k_norm)))
    at = torch.arange(n)
    bias = layer.positions(at[:, None], at[None]).double() if isinstance(layer.positions, ALiBi) else None
    if isinstance(layer.positions, RotaryEmbedding):
        q, k = layer.positions(q, places), layer.positions(k, places)
    near = at[None] <= at[:, None]
    if layer.window is not None:
        near = near & ((at[:, None] - at[None] < layer.window) | (at[None] < layer.sinks))
    found = [[attention_loop(q[b, i], k[b, i // (h // g)], v[b, i // (h // g)], near & may[b, i], scale=layer.scale,
                             bias=None if bias is None else bias[i], softcap=layer.softcap) for i in range(h)] for b in range(len(x))]
    return layer.o_proj(torch.stack([torch.cat(row, dim=-1) for row in found]))


@st.composite
def padded_words(draw: st.DrawFn, heads: int, padding_allowed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | Mask]:
    "Words, who may look, positions; and the mask that says so: of rows, of heads, or as a rule."
    n, rng = draw(st.integers(1, 9)), torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    left = [0, draw(st.integers(0, n)) if padding_allowed else 0]
    x = torch.randn(2, n, 12, generator=rng, dtype=torch.float64)
    real = torch.arange(n) >= torch.tensor(left)[:, None]
    may = real[:, None, None].expand(2, heads, n, n)
    mask: Tensor | Mask = real[:, None, None]
    form = draw(st.sampled_from(["rows", "heads", "rule"]))
    if form == "rule":
        mask = padding(left=left)
    if form == "heads":
        mask = may & (torch.rand(1, heads, n, n, generator=rng) < 0.7)
        may = mask
    return x, may, (torch.arange(n) - torch.tensor(left)[:, None]).clamp(min=0), mask


def cut(mask: Tensor | Mask, start: int, stop: int) -> Tensor | Mask:
    "What a mask says to queries start … stop - 1 about the keys up to there."
    if isinstance(mask, Mask):
        return mask
    return (mask if mask.shape[2] == 1 else mask[:, :, start:stop])[..., :stop]


@quick
@given(st.data(), layers())
def test_a_layer_with_everything_is_its_loops(data: st.DataObject, drawn: tuple[Attention, bool]) -> None:
    layer, padding_allowed = drawn
    x, may, places, mask = data.draw(padded_words(layer.n_heads, padding_allowed))
    ids = places if padding_allowed else None
    truth = layer_by_loops(layer, x, may, places)
    torch.testing.assert_close(layer(x, mask=mask, position_ids=ids), truth, atol=1e-10, rtol=0)
    x.requires_grad_()
    direction = torch.randn_like(x)
    ours, theirs = (torch.autograd.grad((y * direction).sum(), [x, layer.qkv_proj.weight], allow_unused=True, materialize_grads=True)
                    for y in (layer(x, mask=mask, position_ids=ids), layer_by_loops(layer, x, may, places)))
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@quick
@given(st.data(), st.booleans())
def test_a_layer_with_everything_remembers(data: st.DataObject, differential: bool) -> None:
    layer, padding_allowed = data.draw(layers(differential))
    x, _, places, mask = data.draw(padded_words(layer.n_heads, padding_allowed))
    ids, n, stop = places if padding_allowed else None, x.shape[1], 0
    whole, cache, order = layer(x, mask=mask, position_ids=ids), layer.new_cache(2, n, torch.float64), torch.arange(2)
    if data.draw(st.booleans()):
        cache = KVCache(2, layer.n_kv_heads, n, layer.head_dim, torch.float64)
    with torch.inference_mode():
        while stop < n:
            start, stop = stop, data.draw(st.integers(stop + 1, n))
            given_mask = cut(mask, start, stop)
            if isinstance(given_mask, Mask):
                given_mask = given_mask.dense(stop - start, stop)
            here = given_mask[order] if given_mask.shape[0] == 2 else given_mask
            out = layer(x[order, start:stop], mask=here, cache=cache, position_ids=None if ids is None else ids[order, start:stop])
            torch.testing.assert_close(out, whole[order, start:stop], atol=1e-10, rtol=0)
            action = data.draw(st.sampled_from(["none", "none", "reorder", "select", "truncate"]))
            if action == "reorder":
                rows = torch.tensor(data.draw(st.permutations(range(len(order)))))
                cache.reorder(rows)
                order = order[rows]
            elif action == "select":
                rows = torch.tensor(data.draw(st.lists(st.integers(0, len(order) - 1), min_size=1, max_size=3)))
                cache.select(rows)
                order = order[rows]
            elif action == "truncate" and (isinstance(cache, KVCache) or cache.length <= cache.k.shape[2]):
                stop = data.draw(st.integers(0, stop))
                cache.truncate(stop)


@pytest.mark.parametrize("layer", [
    Attention(32, 4, 2, positions=RotaryEmbedding(8), qk_norm=True), Attention(32, 4, 1, positions=ALiBi(4), window=3, sinks=2, softcap=5.0),
    DifferentialAttention(32, 4, 2, positions=RotaryEmbedding(4), window=3), LatentAttention(32, 4, positions=RotaryEmbedding(4)),
    LinearAttention(32, 4, 2, features="none", positions=RotaryEmbedding(8))], ids=lambda layer: type(layer).__name__)
def test_layers_survive_what_programs_do_with_them(layer: Attention) -> None:
    x = torch.randn(2, 7, 32)
    assert copy.deepcopy(layer)(x).equal(layer(x)) and pickle.loads(pickle.dumps(layer))(x).equal(layer(x))
    for shape in ((0, 7, 32), (2, 0, 32), (2, 1, 32)):
        assert layer(torch.randn(shape)).shape == shape
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings(action="error"):
        for given in (x, x.bfloat16()):
            rough = layer(given)
            assert rough.dtype == torch.bfloat16 and (rough - layer(x)).abs().max() < 0.05
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    cache = layer.new_cache(2, 9)
    with torch.inference_mode():
        layer(x, cache=cache)
        for rows in ([1], [0, 2]):
            with pytest.raises(InputError, match="rows"):
                cache.reorder(torch.tensor(rows))
        for batch in (1, 3):
            with pytest.raises(InputError, match="batch"):
                layer(torch.randn(batch, 1, 32), cache=cache)
        cache.select(torch.tensor([1]))
    with torch.no_grad():  # what was selected in inference mode serves outside of it, too
        torch.testing.assert_close(layer(x[1:, :1], cache=cache).shape, torch.Size((1, 1, 32)))


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"window": 3, "sinks": 1}], ids=repr)
@pytest.mark.parametrize(("mask", "says"), [
    (torch.ones(2, 1, 1, 9).bool(), "broadcast to"), (torch.ones(2, 1, 1, 5).bool(), "broadcast to"), (torch.zeros(7, 7), "boolean"),
    (torch.ones(2, 3, 1, 7).bool(), "broadcast to"), (document([0, 0, 1]), "covers 3"), (padding(left=[0, 1, 2]), "rows"), ([True] * 7, "a list")])
def test_masks_that_do_not_fit(options: dict[str, int], mask: object, says: str) -> None:
    for kind in (Attention, DifferentialAttention):
        layer, x = kind(32, 4, 2, **options), torch.randn(2, 7, 32)
        with pytest.raises(InputError, match=says):
            layer(x, mask=mask)
        with pytest.raises(InputError, match=says), torch.inference_mode():
            cache = layer.new_cache(2, 9)
            layer(x[:, :6], cache=cache)
            layer(x[:, 6:], mask=mask, cache=cache)
