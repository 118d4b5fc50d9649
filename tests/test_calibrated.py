"Calibrated quantization where a notebook would be dull: every combination, odd shapes, other dtypes, brute force, the shipped model."
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mmie.constitutional.world import Lessons, World, encode_lesson, load_assistant
from mmie.core import InputError
from mmie.quantization.activations import Int8DynamicLinear, watch_inputs
from mmie.quantization.affine import PER_ROW, Granularity, QuantParams, choose_params, dequantize_affine, fake_quantize, quantize_affine
from mmie.quantization.calibrated import (
    HessianWatcher,
    InputSample,
    awq_scale,
    clipped_grid,
    column_figure,
    column_prices,
    gptq,
    inverse_factor,
    channel_figure,
    rescale_hessian,
    row_errors,
    smooth_scale,
    weight_grid,
)
from mmie.quantization.linear import Int8Linear
from mmie.quantization.packed import Int4Linear, storable_params

OPTIONS = [
    {"bits": bits, "group": group, "symmetric": symmetric, "act_order": act_order}
    for bits, group, symmetric, act_order in itertools.product((2, 4, 8), (None, 8, 16), (True, False), (True, False))
]


def problem(seed: int, out: int = 6, width: int = 16, rows: int = 60, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    "A weight and the Hessian of inputs that go together."
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(4, width, generator=g, dtype=torch.float64)
    x = torch.randn(rows, 4, generator=g, dtype=torch.float64) @ mix + 0.3 * torch.randn(rows, width, generator=g, dtype=torch.float64)
    return torch.randn(out, width, generator=g, dtype=torch.float64).to(dtype), (x.T @ x / rows).to(dtype)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_combination(options: dict) -> None:
    weight, hessian = problem(0)
    before = weight.clone(), hessian.clone()
    codes, params = gptq(weight, hessian, **options)
    assert weight.equal(before[0]) and hessian.equal(before[1])
    assert codes.shape == weight.shape and codes.dtype == torch.int8 and codes.is_contiguous()
    low, high = params.int_range
    assert codes.min() >= low and codes.max() <= high
    assert (params.bits, params.symmetric) == (options["bits"], options["symmetric"])
    assert params.granularity == (PER_ROW if options["group"] is None else Granularity(group=options["group"]))
    assert params.zero_point.dtype == torch.int32 and not (options["symmetric"] and params.zero_point.any())
    assert params.scale.equal(params.scale.bfloat16().to(params.scale.dtype))
    shape = {k: v for k, v in options.items() if k != "act_order"}
    rounded = fake_quantize(weight, weight_grid(weight, **shape))
    ours = dequantize_affine(codes, params)
    assert (row_errors(weight, ours, hessian) <= row_errors(weight, rounded, hessian) * (1 + 1e-9) + 1e-15).all()
    for block in (1, 5, 64):
        again, grid = gptq(weight, hessian, block=block, **options)
        assert again.equal(codes) and grid.scale.equal(params.scale) and grid.zero_point.equal(params.zero_point)
    identity, grid = gptq(weight, 7.0 * torch.eye(16, dtype=torch.float64), **options)
    assert identity.equal(quantize_affine(weight, weight_grid(weight, **shape)))
    assert grid.scale.equal(weight_grid(weight, **shape).scale)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), out=st.integers(1, 7), width=st.integers(1, 20), rows=st.integers(1, 40),
    bits=st.integers(2, 8), symmetric=st.booleans(), act_order=st.booleans(), block=st.integers(1, 30), damp=st.sampled_from([1e-4, 0.01, 1.0]),
)
def test_no_row_is_worse_than_rounded(
    seed: int, out: int, width: int, rows: int, bits: int, symmetric: bool, act_order: bool, block: int, damp: float,
) -> None:
    weight, hessian = problem(seed, out, width, rows)
    codes, params = gptq(weight, hessian, bits=bits, symmetric=symmetric, act_order=act_order, block=block, damp=damp)
    rounded = fake_quantize(weight, weight_grid(weight, bits=bits, symmetric=symmetric))
    ours = row_errors(weight, dequantize_affine(codes, params), hessian)
    assert (ours <= row_errors(weight, rounded, hessian) * (1 + 1e-9) + 1e-15).all()


@pytest.mark.parametrize("seed", range(8))
def test_between_rounding_and_the_best_there_is(seed: int) -> None:
    "With four columns all combinations of neighbors can be tried."
    weight, hessian = problem(seed, out=1, width=4)
    grid = weight_grid(weight, bits=3)
    ways = torch.tensor(list(itertools.product(range(-3, 4), repeat=4)), dtype=torch.float64) * grid.scale
    best = row_errors(weight.expand(len(ways), 4), ways, hessian).min()
    rounded = row_errors(weight, fake_quantize(weight, grid), hessian)[0]
    orders = [row_errors(weight, dequantize_affine(*gptq(weight, hessian, params=grid, act_order=o)), hessian)[0] for o in (False, True)]
    assert all(best - 1e-12 <= error <= rounded + 1e-12 for error in orders)


def test_gptq_is_usually_the_best_there_is() -> None:
    hits = 0
    for seed in range(30):
        weight, hessian = problem(seed, out=1, width=2)
        grid = weight_grid(weight, bits=4)
        ways = torch.tensor(list(itertools.product(range(-7, 8), repeat=2)), dtype=torch.float64) * grid.scale
        best = row_errors(weight.expand(len(ways), 2), ways, hessian).min()
        error = row_errors(weight, dequantize_affine(*gptq(weight, hessian, params=grid, damp=0)), hessian)[0]
        hits += bool(error <= best * (1 + 1e-9))
    assert hits >= 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    weight, hessian = problem(3, dtype=dtype)
    codes, params = gptq(weight, hessian, group=8, symmetric=False)
    assert params.scale.dtype == torch.float32
    exact = row_errors(weight.double(), dequantize_affine(codes, params).double(), hessian.double()).sum()
    rounded = fake_quantize(weight.double(), weight_grid(weight, group=8, symmetric=False))
    assert exact < row_errors(weight.double(), rounded, hessian.double()).sum()


def test_an_input_that_is_always_zero() -> None:
    weight, hessian = problem(4)
    hessian[5], hessian[:, 5] = 0, 0
    codes, _ = gptq(weight, hessian)
    assert codes[:, 5].equal(quantize_affine(weight, weight_grid(weight))[:, 5])
    assert gptq(weight, torch.zeros(16, 16))[0].equal(quantize_affine(weight, weight_grid(weight)))
    with pytest.raises(InputError, match="copies or sums"):
        gptq(weight, hessian, damp=0)


def test_inputs_that_are_copies() -> None:
    "Two inputs that are the same: the sum of their weights is what counts, and GPTQ finds that out."
    hessian = torch.ones(2, 2, dtype=torch.float64)
    grid = QuantParams(torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int32), 4, granularity=PER_ROW)
    codes, _ = gptq(torch.tensor([[0.4, 0.45]], dtype=torch.float64), hessian, params=grid, damp=1e-6)
    assert codes.tolist() == [[0, 1]]


def test_fixed_grids() -> None:
    weight, hessian = problem(5)
    for granularity in (Granularity(), PER_ROW, Granularity(group=4), Granularity(axis=1)):
        params = choose_params(weight, bits=5, symmetric=False, granularity=granularity)
        codes, grid = gptq(weight, hessian, params=params, act_order=True)
        assert grid.scale.equal(params.scale) and grid.zero_point.equal(params.zero_point) and grid.granularity == granularity
        error = row_errors(weight, dequantize_affine(codes, grid), hessian).sum()
        assert error < row_errors(weight, fake_quantize(weight, params), hessian).sum()


def test_layers_take_what_comes_out() -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(300, 128, generator=g) @ torch.randn(128, 128, generator=g), torch.randn(64, 128, generator=g)
    hessian = x.T @ x / len(x)
    for group, symmetric, act_order in itertools.product((32, 64, 128), (True, False), (True, False)):
        codes, params = gptq(weight, hessian, group=group, symmetric=symmetric, act_order=act_order)
        assert params.scale.equal(storable_params(params).scale)
        assert Int4Linear.from_codes(codes, params).dense().equal(dequantize_affine(codes, params))
    codes, params = gptq(weight, hessian, bits=8)
    for kind in (Int8Linear, Int8DynamicLinear):
        assert kind.from_codes(codes, params).dense().equal(dequantize_affine(codes, params))
    grid = clipped_grid(weight, hessian, group=64, symmetric=False)
    assert Int4Linear.from_codes(quantize_affine(weight, grid), grid).dense().equal(fake_quantize(weight, grid))


def test_smoothed_layers_compute_the_same() -> None:
    weight, hessian = problem(6, out=64, width=128, rows=300, dtype=torch.float32)
    x = torch.randn(5, 128)
    scale = smooth_scale(hessian.diagonal().sqrt(), weight)
    codes, params = gptq(weight * scale, rescale_hessian(hessian, scale), group=32)
    layer = Int4Linear.from_codes(codes, params, input_scale=1 / scale, backend="plain")
    assert torch.allclose(layer(x), (x / scale) @ dequantize_affine(codes, params).T, atol=1e-4)
    assert torch.allclose(layer.dense(), dequantize_affine(codes, params) / scale, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), silent=st.integers(0, 15), steps=st.integers(1, 6))
def test_awq_is_never_worse_than_rounding(seed: int, silent: int, steps: int) -> None:
    g = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(8, 16, generator=g), torch.randn(30, 16, generator=g) * torch.rand(16, generator=g) ** 4
    x[:, silent] = 0

    def nearest(w: Tensor) -> Tensor:
        return fake_quantize(w, weight_grid(w, group=8))

    scale = awq_scale(weight, x, nearest, steps=steps)
    assert scale.isfinite().all() and (scale > 0).all()
    errors = [row_errors(weight, w, x.T @ x).sum() for w in (nearest(weight * scale) / scale, nearest(weight))]
    assert errors[0] <= errors[1] * (1 + 1e-5)


def test_scales_of_silent_channels() -> None:
    weight, _ = problem(7)
    absmax = torch.rand(16, dtype=torch.float64) + 0.1
    absmax[3], weight[:, 4] = 0, 0
    scale = smooth_scale(absmax, weight)
    assert scale.isfinite().all() and (scale > 0).all()
    assert awq_scale(weight, torch.zeros(4, 16), lambda w: w.round()).eq(1).all()
    for strength in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="from 0 to 1"):
            smooth_scale(absmax, weight, strength)


def test_clipping_never_hurts_its_own_group() -> None:
    weight, hessian = problem(8)
    for group in (None, 4, 16):
        width = group or 16
        blocks = torch.stack([hessian[a : a + width, a : a + width] for a in range(0, 16, width)])
        errors = []
        for grid in (clipped_grid(weight, hessian, bits=3, group=group), weight_grid(weight, bits=3, group=group)):
            delta = (fake_quantize(weight, grid) - weight).reshape(6, -1, width)
            errors.append(torch.einsum("ogi,gij,ogj->og", delta, blocks, delta))
        assert (errors[0] <= errors[1] * (1 + 1e-5)).all()


def test_prices() -> None:
    _, hessian = problem(9)
    for act_order in (False, True):
        alone, repaired = column_prices(hessian, act_order=act_order, damp=0)
        assert (repaired <= alone * (1 + 1e-9)).all() and torch.isclose(alone[-1], repaired[-1])
        assert torch.isclose(repaired.log().sum(), torch.logdet(hessian))
    assert inverse_factor(hessian).equal(inverse_factor(hessian).triu())
    assert len(column_figure(hessian).axes) == 2 and len(channel_figure({"a": torch.rand(4), "b": torch.rand(4)}).axes) == 2


def test_watchers_wherever_they_are_called() -> None:
    x = torch.randn(64, 8)
    hessian, sample = HessianWatcher(8), InputSample(10)
    with torch.inference_mode():
        for part in x[:32].split(5):
            hessian.see(part)
            sample.see(part)
    for part in (x[32:40].requires_grad_(), x[:0], x[40:]):
        hessian.see(part)
        sample.see(part)
    assert hessian.count == sample.count == 64
    assert torch.allclose(hessian.hessian, x.T @ x / 64, atol=1e-5) and not hessian.hessian.requires_grad
    assert sample.absmax.equal(x.abs().amax(0)) and torch.allclose(sample.mean_abs, x.abs().mean(0), atol=1e-6)
    assert sample.rows.shape == (10, 8) and not sample.rows.is_inference()
    hessian.hessian.add_(1)
    with pytest.raises(InputError, match="no inputs were seen"):
        _ = InputSample(4).rows
    half = HessianWatcher(8)
    half.see(x.bfloat16())
    assert half.hessian.dtype == torch.float32


def test_the_sample_is_fair() -> None:
    "Early rows and late ones have the same chance."
    means = []
    for seed in range(60):
        few = InputSample(20, seed=seed)
        for part in torch.arange(1000.0)[:, None].split(97):
            few.see(part)
        means.append(few.rows.mean())
        assert len(few.rows.unique()) == 20
    spread = torch.stack(means)
    assert (spread.mean() - 499.5).abs() < 4 * spread.std() / 60**0.5


@pytest.fixture(scope="module")
def shipped() -> tuple[dict[str, nn.Linear], dict[str, HessianWatcher], dict[str, HessianWatcher]]:
    "The layers of the assistant, and what they see on two different draws of lessons."
    model, tokenizer = load_assistant("mmie-tiny-base")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = []
    for seed in (11, 12):
        lengths: dict[int, list] = {}
        for lesson in Lessons(World(0), seed=seed)(120):
            ids = encode_lesson(lesson, tokenizer).ids
            lengths.setdefault(len(ids), []).append(ids)
        watchers = {name: HessianWatcher(layer.in_features) for name, layer in layers.items()}
        watch_inputs(model, watchers, [torch.tensor(batch) for batch in lengths.values()])
        found.append(watchers)
    return layers, found[0], found[1]


@pytest.mark.parametrize("bits, group, symmetric", [(4, 32, False), (4, 32, True), (4, 16, False), (4, 96, False), (3, 32, False), (2, 32, False)])
def test_better_than_rounding_on_every_layer_of_the_shipped_model(shipped: tuple, bits: int, group: int, symmetric: bool) -> None:
    layers, seen, new = shipped
    for name, layer in layers.items():
        weight, table, judge = layer.weight.detach(), seen[name].hessian, new[name].hessian
        if layer.in_features % group:
            continue
        shape = {"bits": bits, "group": group, "symmetric": symmetric}

        def error(other: Tensor, weight: Tensor = weight, judge: Tensor = judge) -> float:
            return float(row_errors(weight, other, judge).sum())

        rounded = error(fake_quantize(weight, weight_grid(weight, **shape)))
        for act_order in (False, True):
            assert error(dequantize_affine(*gptq(weight, table, act_order=act_order, **shape))) < 0.8 * rounded, (name, shape, act_order)
        assert error(fake_quantize(weight, clipped_grid(weight, table, **shape))) < rounded, (name, shape)


def test_awq_on_every_layer_of_the_shipped_model(shipped: tuple) -> None:
    layers, seen, new = shipped
    shape = {"group": 32, "symmetric": False}

    def nearest(w: Tensor) -> Tensor:
        return fake_quantize(w, weight_grid(w, **shape))

    for name, layer in layers.items():
        weight, table = layer.weight.detach(), seen[name].hessian
        root = torch.linalg.cholesky(table.double() + 1e-6 * torch.eye(len(table), dtype=torch.float64)).T * len(table) ** 0.5 # the same Hessian
        scale = awq_scale(weight, root, nearest)
        scaled = weight * scale
        both = fake_quantize(scaled, clipped_grid(scaled, rescale_hessian(table, scale), **shape)) / scale
        errors = [float(row_errors(weight, w, new[name].hessian).sum()) for w in (both, nearest(weight))]
        assert errors[0] < errors[1], name


def test_eight_bit_rows_of_the_shipped_model(shipped: tuple) -> None:
    layers, seen, new = shipped
    for name, layer in layers.items():
        weight = layer.weight.detach()
        rounded = fake_quantize(weight, weight_grid(weight, bits=8))
        ours = dequantize_affine(*gptq(weight, seen[name].hessian, bits=8, act_order=True))
        errors = [float(row_errors(weight, w, new[name].hessian).sum()) for w in (ours, rounded)]
        assert errors[0] < errors[1], name
