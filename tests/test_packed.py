"""Four-bit layers on shapes nobody chose: round trips, bounds, files that move between machines, and machines without the kernel."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

import mmie.quantization.packed as packed
from mmie.core import InputError
from mmie.quantization.affine import Granularity, QuantParams, choose_params, dequantize_affine, fake_quantize, quantize_affine
from mmie.quantization.linear import QuantizedLinear
from mmie.quantization.packed import (
    NF4_LEVELS,
    Int4Linear,
    Int4Support,
    NF4Linear,
    double_quantize,
    int4_params,
    int4_support,
    pack_nibbles,
    storable_params,
    undouble,
    unpack_nibbles,
)

KERNEL = int4_support().block > 0
quick = settings(max_examples=40, deadline=None)


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, int]:
    "A matrix with outliers, zeros and an odd scale, and a group that divides it."
    group = draw(st.sampled_from([2, 6, 16, 32, 64, 128]))
    rows, groups = draw(st.sampled_from([1, 3, 16, 33, 64, 80, 128, 144])), draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(rows, group * groups) * 10.0 ** draw(st.integers(-12, 8)) + draw(st.sampled_from([0.0, 0.1, -3.0]))
    weight[torch.rand(weight.shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = 0
    weight[0, 0] *= draw(st.sampled_from([1.0, 100.0]))
    return weight, group


def without_kernel(device: str = "cpu") -> Int4Support:
    return Int4Support(0, False, 0)


@quick
@given(st.lists(st.integers(0, 15), max_size=40).filter(lambda codes: len(codes) % 2 == 0))
def test_nibbles_round_trip(codes: list[int]) -> None:
    one = torch.tensor(codes, dtype=torch.uint8)
    assert unpack_nibbles(pack_nibbles(one)).equal(one)
    assert pack_nibbles(one).numel() * 2 == len(codes)


@quick
@given(st.integers(1, 300), st.integers(1, 9), st.sampled_from([32, 64]), st.integers(0, 99))
def test_kernel_order_round_trip(rows: int, half: int, block: int, seed: int) -> None:
    stored = torch.randint(0, 256, (16 * (rows // 16 + 1), half), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert packed._in_order(unpack_nibbles(packed._to_kernel(stored, block)), block).equal(unpack_nibbles(stored))


@pytest.mark.skipif(not KERNEL, reason="no int4 kernel on this machine")
@quick
@given(st.integers(1, 20), st.integers(1, 4), st.integers(0, 99))
def test_kernel_order_is_torchs(sixteens: int, groups: int, seed: int) -> None:
    codes = torch.randint(0, 16, (16 * sixteens, 32 * groups), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    assert packed._to_kernel(pack_nibbles(codes), int4_support().block).equal(theirs)


@quick
@given(weights(), st.booleans())
def test_int4_stays_within_half_a_step(case: tuple[Tensor, int], symmetric: bool) -> None:
    weight, group = case
    params = int4_params(weight, group, symmetric)
    layer = Int4Linear.from_weight(weight, group=group, symmetric=symmetric)
    error = (layer.dense(torch.float64) - weight).abs().reshape(-1, group)
    assert (error <= params.scale.double() / 2 * (1 + 1e-6)).all()
    assert layer.dense().equal(fake_quantize(weight, params))
    assert (layer.dense()[weight == 0] == 0).all()


@quick
@given(weights(), st.booleans())
def test_storable_grids_are_exact_and_hardly_wider(case: tuple[Tensor, int], symmetric: bool) -> None:
    weight, group = case
    exact = choose_params(weight, bits=4, symmetric=symmetric, granularity=Granularity(group=group))
    params = storable_params(exact)
    shift = params.scale * params.zero_point
    assert params.scale.bfloat16().float().equal(params.scale) and shift.bfloat16().float().equal(shift)
    assert (params.scale >= exact.scale).all() and (params.scale <= exact.scale * (1 + 1 / 16)).all()
    assert storable_params(params).scale.equal(params.scale)


@quick
@given(weights(), st.booleans())
def test_nf4_takes_the_nearest_level(case: tuple[Tensor, int], double: bool) -> None:
    weight, group = case
    layer = NF4Linear.from_weight(weight, group=group, double=double)
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float64) * layer.scales.double().unsqueeze(-1)
    nearest = (weight.double().reshape(*layer.scales.shape, group, 1) - levels.unsqueeze(-2)).abs().amin(-1).reshape(weight.shape)
    error = (layer.dense(torch.float64) - weight).abs()
    assert (error <= nearest + 1e-6 * weight.abs().double()).all()
    assert (layer.dense()[weight == 0] == 0).all()


@quick
@given(st.lists(st.floats(2.0**-126, 1e30), min_size=1, max_size=700))
def test_double_quantization_is_off_by_half_a_step_at_most(values: list[float]) -> None:
    scale = torch.tensor(values, dtype=torch.float64)
    codes, grid = double_quantize(scale)
    off = (undouble(codes, grid) / scale).log().abs()
    steps = grid.double()[:, 1].repeat_interleave(256)[: len(scale)]
    assert codes.dtype == torch.uint8 and (off <= steps / 2 + 1e-9).all()


@quick
@given(weights(), st.booleans())
def test_whole_words_unpack_to_the_same_bits(case: tuple[Tensor, int], symmetric: bool) -> None:
    weight, group = case
    ours, plain = (Int4Linear.from_weight(weight, group=group, symmetric=symmetric, backend=name) for name in ("auto", "plain"))
    assert ours.dense(torch.bfloat16).equal(plain.dense(torch.bfloat16)) # the plain one looks bytes up, in their simple order
    assert copy.deepcopy(ours).float().dense(torch.bfloat16).equal(plain.dense(torch.bfloat16)) # its grids in a wider type


@quick
@given(weights(), st.sampled_from([0, 1, 5, 200]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_way_to_multiply_agrees(case: tuple[Tensor, int], rows: int, dtype: torch.dtype) -> None:
    weight, group = case
    if not 1e-6 < weight.abs().max() < 1e6:
        return
    x = torch.randn(rows, weight.shape[1])
    for kind in (Int4Linear, NF4Linear):
        auto, plain = (kind.from_weight(weight, group=group, backend=name) for name in ("auto", "plain"))
        exact = F.linear(x.double(), plain.dense(torch.float64))
        assert torch.allclose(plain(x.double()), exact, rtol=1e-10, atol=1e-10 * float(weight.abs().max()))
        bound = 2.0**-6 * F.linear(x.abs().double(), plain.dense(torch.float64).abs())
        assert ((auto(x.to(dtype)).double() - exact).abs() <= bound).all() and auto(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("kind", [Int4Linear, NF4Linear])
def test_files_move_between_machines(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(176, 128), torch.randn(3, 128)
    here = kind.from_weight(weight, torch.randn(176))
    file = save(here.state_dict())
    monkeypatch.setattr(packed, "int4_support", without_kernel)
    there = kind.empty(here.record())
    there.bias = copy.deepcopy(here.bias)
    there.load_state_dict(load(file))
    assert there.dense().equal(here.dense()) and save(there.state_dict()) == file
    assert torch.allclose(there(x), F.linear(x, here.dense(), here.bias), atol=1e-4)
    monkeypatch.undo()
    back = kind.empty(there.record())
    back.bias = copy.deepcopy(here.bias)
    back.load_state_dict(there.state_dict(), assign=True)
    assert back(x).equal(here(x)) and back.dense().equal(here.dense())


def test_a_layer_that_loses_its_kernel_still_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Int4Linear.from_weight(torch.randn(80, 64)), torch.randn(2, 64)
    for support in (without_kernel(), Int4Support(32, True, 9), Int4Support(64, True, 0)):
        monkeypatch.setattr(packed, "int4_support", lambda device="cpu", support=support: support)
        assert torch.allclose(layer(x), F.linear(x, layer.dense()), atol=0.2)


def test_a_kernel_that_is_missing_or_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = packed._kernel4
    monkeypatch.setattr(packed, "_kernel4", lambda *args: real(*args) + 1)
    assert packed._kernel_block() == 0

    def missing(*_: object) -> Tensor:
        raise NotImplementedError
    monkeypatch.setattr(packed, "_kernel4", missing)
    assert packed._kernel_block() == 0


@pytest.mark.parametrize("kind", [Int4Linear, NF4Linear])
def test_any_shape_of_input_and_gradients(kind: type[Any]) -> None:
    layer = kind.from_weight(torch.randn(32, 64), torch.randn(32))
    for shape in ((64,), (0, 64), (2, 3, 64), (200, 64)):
        assert layer(torch.randn(shape)).shape == (*shape[:-1], 32)
    wide = torch.randn(5, 65)[:, 1:]
    assert torch.allclose(layer(wide), layer(wide.contiguous())) and torch.allclose(layer(wide.T.contiguous().T), layer(wide))
    leaf = torch.randn(4, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer.double(), (leaf,))
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 32))


@pytest.mark.parametrize("kind", [Int4Linear, NF4Linear])
def test_values_survive_casts_copies_and_wrong_files(kind: type[Any]) -> None:
    layer = kind.from_weight(torch.randn(48, 64))
    before = layer.dense(torch.float64)
    cast = copy.deepcopy(layer).double().bfloat16().float()
    assert cast.dense(torch.float64).equal(before) and cast.state_dict()["weight"].equal(layer.state_dict()["weight"])
    with pytest.raises(RuntimeError, match="load before quantizing"):
        layer.load_state_dict({**layer.state_dict(), "weight": torch.randn(48, 64)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict({**layer.state_dict(), "weight": torch.zeros(48, 16, dtype=torch.uint8)})
    assert layer.dense(torch.float64).equal(before)
    assert QuantizedLinear.KINDS[layer.kind] is kind


def test_inside_a_model_files_stay_simple() -> None:
    weight = torch.randn(64, 64)
    first, second = Int4Linear.from_weight(weight), Int4Linear.from_weight(weight, backend="plain")
    model = torch.nn.Sequential(first, torch.nn.ReLU(), second)
    state = model.state_dict()
    assert state["0.weight"].equal(state["2.weight"])
    before = first.dense()
    model.load_state_dict(state)
    assert first.dense().equal(before) and second.dense().equal(before)


def test_from_codes_is_from_weight_and_refuses_other_grids() -> None:
    weight = torch.randn(32, 64) + 0.5
    params = int4_params(weight, 32)
    codes = quantize_affine(weight, params)
    layer = Int4Linear.from_codes(codes, params)
    assert layer.dense().equal(dequantize_affine(codes, params)) and layer.dense().equal(Int4Linear.from_weight(weight, group=32).dense())
    exact = choose_params(weight, bits=4, symmetric=False, granularity=Granularity(group=32))
    with pytest.raises(InputError, match="storable_params"):
        Int4Linear.from_codes(codes, exact)
    with pytest.raises(InputError, match="grids for"):
        Int4Linear.from_codes(codes[:16], params)
    with pytest.raises(InputError, match="each group"):
        Int4Linear.from_codes(codes, dataclasses.replace(params, granularity=Granularity(axis=0)))
    with pytest.raises(InputError, match="codes"):
        Int4Linear.from_codes(codes.int(), params)
    bad = QuantParams(torch.full((4, 1), 1e38), torch.zeros(4, 1, dtype=torch.int32), 4, True, Granularity(group=16))
    with pytest.raises(InputError, match="too wide"):
        storable_params(dataclasses.replace(bad, scale=bad.scale.double() * 1e10))


def test_nf4_codes_are_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes").functional
    torch.manual_seed(0)
    weight = torch.randn(64, 128).bfloat16().float() # so that the largest of each group is a scale that we store exactly
    theirs, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    layer = NF4Linear.from_weight(weight, double=False)
    assert torch.tensor(NF4_LEVELS).equal(state.code.cpu())
    swapped = theirs.view(64, 64) >> 4 | theirs.view(64, 64) << 4 # its first code is in the high half
    assert swapped.equal(layer.weight) and layer.dense().equal(bnb.dequantize_4bit(theirs, state))


def test_double_quantization_costs_no_more_than_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes").functional
    torch.manual_seed(0)
    weight = torch.randn(256, 1024)
    theirs = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True))
    assert (NF4Linear.from_weight(weight).dense() - weight).norm() <= (theirs - weight).norm() * 1.001


def test_int4_codes_are_torchaos() -> None:
    theirs = pytest.importorskip("torchao.quantization.quant_primitives")
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    params = int4_params(weight, 64)
    scale, zero = params.scale.view(64, 2), params.zero_point.view(64, 2)
    codes = theirs.quantize_affine(weight, (1, 64), scale, zero, torch.int8, -8, 7)
    dense = theirs.dequantize_affine(codes, (1, 64), scale, zero, torch.int8, -8, 7)
    assert codes.equal(quantize_affine(weight, params)) and dense.equal(Int4Linear.from_weight(weight).dense())
