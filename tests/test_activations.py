"Int8 layers, observers and watchers: every shape, every dtype, every way back."
import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mmie.quantization.activations as activations
from mmie.core import InputError
from mmie.models.decoder import DecoderLM, ModelConfig
from mmie.quantization.activations import (
    OBSERVERS,
    Int8DynamicLinear,
    Int8StaticLinear,
    OutlierLinear,
    ValueCounts,
    integer_product,
    make_observer,
    outlier_columns,
    quantize_tokens,
    watch_inputs,
)
from mmie.quantization.affine import PER_ROW, Granularity, QuantParams, choose_params, fake_quantize, quantize_affine
from mmie.quantization.linear import QuantizedLinear
from mmie.quantization.packed import Int4Linear

LAYERS = {
    "dynamic": Int8DynamicLinear.from_weight,
    "dynamic, one scale": lambda w, b, **o: Int8DynamicLinear.from_weight(w, b, per_channel=False, **o),
    "static": lambda w, b, **o: Int8StaticLinear.from_weight(w, b, input_params=choose_params(torch.tensor([-3.0, 2.0])), **o),
    "static, zero point": lambda w, b, **o: Int8StaticLinear.from_weight(
        w, b, input_params=choose_params(torch.tensor([-0.2, 3.0]), symmetric=False), **o),
    "outliers": lambda w, b, **o: OutlierLinear.from_weight(w, b, threshold=2.0, **o),
    "known outliers": lambda w, b, **o: OutlierLinear.from_weight(w, b, columns=torch.tensor([0, 2]), **o),
}

@pytest.fixture(params=LAYERS, name="make")
def layer_maker(request):
    return LAYERS[request.param]

def no_kernel(monkeypatch):
    monkeypatch.setattr(activations, "integer_kernel", lambda device="cpu": False)

def weights(outputs: int = 24, inputs: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, generator=g) / inputs**0.5, torch.randn(outputs, generator=g)

def tokens(rows: int = 7, inputs: int = 40, seed: int = 1) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))

# --- whole numbers

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(1, 300), st.integers(1, 90), st.integers(0, 2**31), st.booleans(), st.booleans())
def test_integer_product_is_exact(rows, inputs, outputs, seed, turned_x, turned_w):
    g = torch.Generator().manual_seed(seed)
    a = torch.randint(-128, 128, (rows, inputs), generator=g, dtype=torch.int8)
    b = torch.randint(-128, 128, (outputs, inputs), generator=g, dtype=torch.int8)
    a = a.t().contiguous().t() if turned_x else a
    b = b.t().contiguous().t() if turned_w else b
    assert integer_product(a, b).equal(a.long() @ b.long().t())

@pytest.mark.parametrize(("outputs", "inputs"), [(700, 1536), (3000, 1024), (1, 4096), (5000, 2559), (260, 2560), (2, 2_000_000)])
@pytest.mark.parametrize("kernel", [True, False])
def test_large_matrices_in_portions(outputs, inputs, kernel, monkeypatch):
    if not kernel:
        no_kernel(monkeypatch)
    g = torch.Generator().manual_seed(0)
    a = torch.randint(-127, 128, (1, inputs), generator=g, dtype=torch.int8)
    b = torch.randint(-127, 128, (outputs, inputs), generator=g, dtype=torch.int8)
    expected = sum(F.linear(x.double(), y.double()) for x, y in zip(a.split(1 << 16, 1), b.split(1 << 16, 1), strict=True))
    assert integer_product(a, b).double().equal(expected)

def test_plain_product_is_exact_under_autocast(monkeypatch):
    no_kernel(monkeypatch)
    a, b = torch.randint(-127, 128, (3, 999), dtype=torch.int8), torch.randint(-127, 128, (5, 999), dtype=torch.int8)
    with torch.autocast("cpu", torch.bfloat16):
        assert integer_product(a, b).equal(a.long() @ b.long().t())

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]), st.floats(-20, 4))
def test_tokens_are_quantized_as_by_the_formula(seed, dtype, exponent):
    x = (torch.randn(4, 33, generator=torch.Generator().manual_seed(seed)) * 10**exponent).to(dtype)
    x[1] = 0
    codes, steps = quantize_tokens(x)
    wide = x.to(torch.promote_types(dtype, torch.float32))
    assert codes.equal(quantize_affine(wide, choose_params(wide, granularity=PER_ROW)))
    assert ((codes * steps - wide).abs() <= steps / 2 * (1 + 1e-5)).all() and steps.dtype == wide.dtype

# --- layers

@pytest.mark.parametrize("rows", [0, 1, 2, 33])
@pytest.mark.parametrize("kernel", [True, False])
def test_fast_equals_plain(make, rows, kernel, monkeypatch):
    if not kernel:
        no_kernel(monkeypatch)
    weight, bias = weights()
    x = tokens(rows)
    fast, plain = make(weight, bias), make(weight, bias, backend="plain")
    assert torch.allclose(fast(x), plain(x), atol=2e-6, rtol=1e-5)
    assert torch.allclose(fast(x).double(), plain(x.double()), atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_shape_are_the_input_s(make, dtype):
    weight, bias = weights()
    layer = make(weight, bias)
    x = tokens(6).to(dtype)
    y = layer(x.view(2, 3, 40))
    assert y.dtype == dtype and y.shape == (2, 3, 24)
    assert torch.allclose(y.view(6, 24).double(), layer(x.double()), atol=0.05 if dtype.itemsize == 2 else 1e-5)

def test_input_scale(make):
    weight, bias = weights()
    factors = torch.rand(40) + 0.5
    layer = make(weight, bias, input_scale=factors)
    assert torch.allclose(layer(tokens()), make(weight, bias)(tokens() * factors), atol=1e-6)
    assert torch.allclose(layer.dense(), layer.packed_dense() * factors)

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_casts_change_nothing_but_the_bias(make, dtype):
    weight, _ = weights()
    layer = make(weight, None)
    moved = copy.deepcopy(layer).to(dtype).to(torch.float32)
    assert moved(tokens()).equal(layer(tokens())) and moved.weight.dtype == torch.int8

def test_file_and_back(make):
    weight, _ = weights()
    layer = make(weight, None, backend="plain")
    again = QuantizedLinear.KINDS[layer.kind].empty(layer.record())
    again.load_state_dict(layer.state_dict())
    assert again(tokens()).equal(layer(tokens())) and repr(again) == repr(layer) and again.record() == layer.record()
    with pytest.raises(RuntimeError, match="load before quantizing"):
        again.load_state_dict({**layer.state_dict(), "weight": weight})

def test_gradients_reach_input_and_bias(make):
    weight, bias = weights()
    layer = make(weight, bias.requires_grad_())
    x = (tokens() / 4).clamp(-0.19).double().requires_grad_() # nothing is clipped
    layer.double()(x).square().sum().backward()
    expected = 2 * layer(x.detach()).detach() @ layer.dense(torch.float64)
    assert torch.allclose(x.grad, expected) and layer.bias.grad is not None and layer.weight.grad is None

def test_clipped_inputs_get_no_gradient():
    weight, _ = weights()
    layer = Int8StaticLinear.from_weight(weight, input_params=choose_params(torch.tensor([-1.0, 1.0])))
    x = torch.zeros(1, 40, dtype=torch.float64)
    x[0, 3] = 5
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad[0, 3] == 0 and (x.grad[0, :3] != 0).all()

def test_codes_from_elsewhere(make):
    weight, _ = weights()
    params = choose_params(weight, granularity=PER_ROW)
    layer = Int8DynamicLinear.from_codes(quantize_affine(weight, params), params, backend="plain")
    assert layer.dense(torch.float64).equal(fake_quantize(weight, params).double()) or torch.allclose(layer.dense(), fake_quantize(weight, params))
    four = choose_params(weight, granularity=PER_ROW, bits=4)
    assert torch.allclose(Int8DynamicLinear.from_codes(quantize_affine(weight, four), four).dense(), fake_quantize(weight, four))
    for bad in (choose_params(weight, symmetric=False, granularity=PER_ROW), choose_params(weight, granularity=Granularity(group=8))):
        with pytest.raises(InputError, match="groups or zero points"):
            Int8DynamicLinear.from_codes(quantize_affine(weight, bad), bad)

def test_a_token_s_answer_is_its_own():
    weight, bias = weights()
    x = tokens(9)
    x[4] *= 100
    for name in ("dynamic", "static", "known outliers"):
        layer = LAYERS[name](weight, bias)
        assert torch.allclose(torch.cat([layer(row[None]) for row in x]), layer(x), atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_isn_t_a_number_stays_visible(bad):
    weight, _ = weights()
    for rows in (1, 3):
        x = tokens(rows)
        x[0, 5] = bad
        for name in ("dynamic", "outliers"):
            y = LAYERS[name](weight, None)(x)
            assert not y[0].isfinite().any() or not y[0].isfinite().all()
            assert y[1:].isfinite().all() or name == "outliers"

def test_mistakes(make):
    weight, _ = weights()
    with pytest.raises(InputError, match="unknown backend"):
        make(weight, None, backend="kernel")
    with pytest.raises(InputError, match="NaN"):
        make(weight * float("nan"), None)
    with pytest.raises(InputError, match="rows and columns"):
        make(weight[0], None)

def test_outliers_are_found():
    x = torch.zeros(5, 9)
    x[2, 3], x[4, 8] = -6.0, 7.0
    assert outlier_columns(x).tolist() == [3, 8] and outlier_columns(x, 6.5).tolist() == [8]
    assert OutlierLinear.from_weight(torch.randn(4, 9), columns=torch.tensor([8, 3, 8])).columns.tolist() == [3, 8]
    with pytest.raises(InputError, match="outlier columns"):
        OutlierLinear.from_weight(torch.randn(4, 9), columns=torch.tensor([-1]))

# --- observers

@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_observers_cover_ordinary_values(name, symmetric, bits):
    observer = make_observer(name)
    x = tokens(400, 50)
    for part in x.split(40):
        observer.see(part)
    params = observer.params(bits, symmetric)
    assert params.bits == bits and params.symmetric == symmetric and params.scale.shape == (1, 1)
    signal, noise = x.square().mean(), (fake_quantize(x, params) - x).square().mean()
    assert noise < signal / (1000 if bits == 8 else 15)

@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("values", [torch.zeros(3, 4), torch.full((3, 4), 2.5), torch.full((3, 4), -1e-30), torch.tensor([[1e30, -1.0]])])
def test_observers_of_odd_values(name, values):
    observer = make_observer(name)
    observer.see(values)
    params = observer.params()
    assert params.scale.isfinite().all() and (params.scale > 0).all()

@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-10**6, 10**6).map(lambda n: n / 1024), min_size=1, max_size=40), st.randoms())
def test_tally_knows_no_order(values, random):
    shuffled = values.copy()
    random.shuffle(shuffled)
    a, b = ValueCounts(64), ValueCounts(64)
    for value in values:
        a.see(torch.tensor([value]))
    b.see(torch.tensor(shuffled))
    assert a.limit == b.limit and a.counts.sum() == len(values) and a.counts.equal(b.counts)

def test_observers_agree_with_torch_s():
    observers = pytest.importorskip("torch.ao.quantization.observer")
    x = tokens(64, 64).split(8)
    for ours, theirs in [("minmax", observers.MinMaxObserver(qscheme=torch.per_tensor_affine, dtype=torch.qint8)),
                         ("moving_average", observers.MovingAverageMinMaxObserver(averaging_constant=0.1, dtype=torch.qint8))]:
        mine = make_observer(ours)
        for part in x:
            mine.see(part)
            theirs(part)
        scale, zero = theirs.calculate_qparams()
        params = mine.params(symmetric=False)
        assert torch.allclose(params.scale.flatten(), scale) and params.zero_point.flatten().equal(zero.int())

# --- watching

class Keep:
    def __init__(self):
        self.parts = []
    def see(self, x):
        self.parts.append(x.clone())

def test_watching_a_decoder_leaves_it_as_it_was():
    model = DecoderLM(ModelConfig(vocab_size=50, d_model=32, n_layers=2, n_heads=2)).train()
    model.blocks[0].eval()
    ids = torch.randint(0, 50, (2, 6))
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    keeps = {name: Keep() for name in names}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    watch_inputs(model, keeps, [ids, ids[:1]])
    assert all(torch.cat(keep.parts).shape[0] == 18 for keep in keeps.values())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert model.training and not model.blocks[0].training
    assert not any(module._forward_pre_hooks for module in model.modules())
    torch.cat(keeps[names[0]].parts).add_(1) # no mark of inference mode on it

def test_watching_quantized_layers_and_embeddings():
    model = DecoderLM(ModelConfig(vocab_size=50, d_model=32, n_layers=1, n_heads=2))
    block = model.blocks[0]
    block.mlp.down_proj = Int4Linear.from_weight(block.mlp.down_proj.weight[:, :64].detach(), group=32) if block.mlp.down_proj.in_features == 64 \
        else Int8DynamicLinear.from_weight(block.mlp.down_proj.weight)
    keep = Keep()
    watch_inputs(model, {"blocks.0.mlp.down_proj": keep}, [torch.zeros(1, 3, dtype=torch.long)])
    assert len(keep.parts[0]) == 3

def test_watching_a_hugging_face_model():
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2, n_positions=16))
    keep, ids = Keep(), torch.randint(0, 60, (2, 5))
    watch_inputs(model, {"transformer.h.0.mlp.c_fc": keep}, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids])
    assert torch.cat(keep.parts).shape == (20, 32)
    with pytest.raises(InputError, match="id 60"):
        watch_inputs(model, {}, [{"input_ids": ids.clamp(min=60)}])

def test_hooks_go_when_the_watcher_fails():
    class Breaks:
        def see(self, x):
            raise ZeroDivisionError
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    with pytest.raises(ZeroDivisionError):
        watch_inputs(net, {"1": Breaks()}, [torch.zeros(1, 2, dtype=torch.long)])
    assert not net[1]._forward_pre_hooks and net.training

@pytest.mark.parametrize(("batch", "message"), [
    (torch.zeros(3, dtype=torch.long), "whole numbers"), (torch.zeros(0, 3, dtype=torch.long), "whole numbers"), ("text", "a str"), (None, "a NoneType"),
    (torch.tensor([[-1]]), "id -1")])
def test_batches_that_can_t_be_read(batch, message):
    model = DecoderLM(ModelConfig(vocab_size=50, d_model=32, n_layers=1, n_heads=2))
    with pytest.raises(InputError, match=message):
        watch_inputs(model, {}, [torch.zeros(1, 2, dtype=torch.long), batch])

# --- a whole model

def test_a_decoder_of_bytes_writes_the_same_words(monkeypatch):
    torch.manual_seed(0)
    model = DecoderLM(ModelConfig(vocab_size=64, d_model=64, n_layers=2, n_heads=2)).eval()
    quantized = copy.deepcopy(model)
    for block in quantized.blocks:
        for owner in (block.attention, block.mlp):
            for name, module in list(owner.named_children()):
                if type(module) is nn.Linear:
                    setattr(owner, name, Int8DynamicLinear.from_weight(module.weight, module.bias))
    ids = torch.randint(0, 64, (3, 12))
    with torch.no_grad():
        truth, ours = model(ids), quantized(ids)
        assert (ours - truth).norm() < 0.02 * truth.norm()
        no_kernel(monkeypatch)
        assert torch.allclose(quantized(ids), ours, atol=1e-4)
    assert len(quantized.generate(ids[:1, :4], max_new_tokens=6, temperature=0)[0]) == len(model.generate(ids[:1, :4], max_new_tokens=6, temperature=0)[0])

def test_codes_of_torchao():
    torchao = pytest.importorskip("torchao.quantization")
    weight, _ = weights(32, 64)
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    model[0].weight.data = weight
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    theirs = model[0].weight
    if not hasattr(theirs, "qdata"):
        pytest.skip("another layout than torchao 0.18's")
    params = QuantParams(theirs.scale.view(-1, 1), torch.zeros(32, 1, dtype=torch.int32), symmetric=False, granularity=PER_ROW)
    apart = (theirs.qdata.int() - quantize_affine(weight, params)).abs() # on their grid: max / 127.5, down to -128
    assert apart.max() <= 1 and apart.sum() <= 4 # they multiply by 1 / scale, which rounds some ties the other way
    assert theirs.qdata.equal((weight * (1 / params.scale)).round().clamp(-128, 127).to(torch.int8))
    layer = Int8DynamicLinear.from_codes(theirs.qdata, params)
    assert layer.dense().equal(theirs.dequantize())
