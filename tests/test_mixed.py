"Mixed precision and the int8 cache: what would clutter the chapter."
import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmie.attention.multihead import KVCache
from mmie.core import InputError, inference
from mmie.measure import tensor_bytes
from mmie.models.decoder import DecoderLM, ModelConfig
from mmie.models.search import beam_search
from mmie.quantization import mixed
from mmie.quantization.mixed import (
    Int8CacheLM, Int8KVCache, choose_layers, layer_sensitivity, make_int8_cache, quantize_along, spend_exactly, spend_greedily, swap_divergence,
)
from mmie.quantization.post_training import QuantConfig, load_quantized, prediction_drift, quantize, save_quantized

KINDS = ("per_token", "centered", "per_channel")


def tiny(**changes: object) -> DecoderLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_length": 96}
    return DecoderLM(ModelConfig(**(shape | changes))).eval()


@pytest.fixture(scope="module")
def model() -> DecoderLM:
    return tiny()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(61, (4, 24), generator=torch.Generator().manual_seed(1))


# ---- the cache


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), pieces=st.lists(st.integers(1, 9), min_size=1, max_size=8), group=st.integers(1, 7), seed=st.integers(0, 99))
def test_pieces_make_no_difference(kind: str, pieces: list[int], group: int, seed: int) -> None:
    torch.manual_seed(seed)
    n = sum(pieces)
    k, v = torch.randn(2, 2, 3, n, 8, dtype=torch.float64)
    whole, parts = (Int8KVCache(2, 3, n, 8, torch.float64, keys=kind, group=group) for _ in range(2))
    parts.append(k[:, :, :pieces[0]], v[:, :, :pieces[0]])
    whole.append(k, v)
    if kind == "centered": # the average is that of the first piece
        whole = Int8KVCache(2, 3, n, 8, torch.float64, keys=kind)
        whole.append(k[:, :, :pieces[0]], v[:, :, :pieces[0]])
        if n > pieces[0]:
            whole.append(k[:, :, pieces[0]:], v[:, :, pieces[0]:])
    start = pieces[0]
    for size in pieces[1:]:
        parts.append(k[:, :, start:start + size], v[:, :, start:start + size])
        start += size
    for ours, theirs, real in zip(parts.contents(), whole.contents(), (k, v), strict=True):
        assert torch.equal(ours, theirs)
        assert (ours - real).abs().max() < real.abs().max() / 50


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), length=st.integers(1, 40), cut=st.integers(0, 40), group=st.integers(1, 9))
def test_going_back_and_on(kind: str, length: int, cut: int, group: int) -> None:
    cut = min(cut, length)
    k, v = torch.randn(2, 1, 2, 60, 4)
    cache = Int8KVCache(1, 2, 60, 4, keys=kind, group=group)
    cache.append(k[:, :, :length], v[:, :, :length])
    before = [x[:, :, :cut] for x in cache.contents()]
    cache.truncate(cut)
    assert cache.length == cut and all(torch.equal(a, b) for a, b in zip(cache.contents(), before, strict=True))
    held = cache.append(k[:, :, cut:], v[:, :, cut:])
    assert all((a - b).abs().max() < 0.1 for a, b in zip(held, (k, v), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    k, v = torch.randn(2, 1, 2, 40, 16).to(dtype)
    k, v = Int8KVCache(1, 2, 40, 16, dtype, keys=kind).append(k, v)
    assert k.dtype == v.dtype == dtype and k.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_broken_numbers_stay_visible(kind: str) -> None:
    for bad in (torch.nan, torch.inf):
        k = torch.randn(1, 1, 4, 8)
        k[0, 0, 2, 3] = bad
        held, _ = Int8KVCache(1, 1, 4, 8, keys=kind, group=2).append(k, k)
        assert not held[0, 0, 2].isfinite().all()


def test_extremes() -> None:
    for x in (torch.zeros(1, 4), torch.full((1, 4), 1e-38), torch.full((1, 4), 1e30), torch.tensor([[1.0, -1.0, 0.0, 0.5]])):
        codes, scale = quantize_along(x, -1)
        assert (codes * scale.float() - x).abs().max() <= scale.float().max() / 2 * 1.01


def test_filled_inside_and_outside_of_inference_mode() -> None:
    cache, k = Int8KVCache(1, 1, 9, 4), torch.randn(1, 1, 3, 4)
    with torch.inference_mode():
        cache.append(k, k)
    with torch.no_grad():
        cache.append(k, k)
    with torch.inference_mode():
        cache.select(torch.tensor([0, 0]))
    assert cache.append(k.expand(2, 1, 3, 4), k.expand(2, 1, 3, 4))[0].shape == (2, 1, 9, 4)
    with pytest.raises(InputError, match="don't fit"):
        cache.append(k, k)


def test_rows_by_mask() -> None:
    k = torch.randn(3, 1, 5, 4)
    cache = Int8KVCache(3, 1, 5, 4)
    held, _ = cache.append(k, k)
    cache.select(torch.tensor([True, False, True]))
    assert cache.shape[0] == 2 and torch.equal(cache.contents()[0], held[[0, 2]])


@pytest.mark.parametrize("changes", [{}, {"positions": "alibi"}, {"softcap": 20.0}, {"attention": "differential", "d_model": 64}, {"bias": True}, {"qk_norm": True}])
@pytest.mark.parametrize("kind", KINDS)
def test_close_to_the_float_cache(changes: dict[str, object], kind: str, ids: torch.Tensor) -> None:
    model = tiny(**changes)
    drift = prediction_drift(model, Int8CacheLM(model, kind), ids)
    assert drift.kl_bits < 1e-4


def test_kinds_of_attention() -> None:
    hybrid = tiny(window=4, full_every=2)
    layers = Int8CacheLM(hybrid).new_cache(2).layers
    assert [type(layer).__name__ for layer in layers] == ["WindowCache", "Int8KVCache"]
    for changes in ({"attention": "linear", "positions": "none"}, {"attention": "latent", "n_kv_heads": None}, {"window": 4}):
        with pytest.raises(InputError, match="no layer"):
            Int8CacheLM(tiny(**changes))
    with pytest.raises(InputError, match="per_token"):
        Int8CacheLM(tiny(), keys="per_tokens")


def test_generation(model: DecoderLM) -> None:
    frugal = Int8CacheLM(model)
    prompts = [[1, 2, 3, 4, 5], [7], [8, 9]]
    together = frugal.generate(prompts, 12, temperature=0)
    assert [len(row) for row in together] == [12, 12, 12]
    exact = Int8CacheLM(copy.deepcopy(model).double(), "per_token")
    assert exact.generate(prompts, 12, temperature=0) == [exact.generate([p], 12, temperature=0)[0] for p in prompts]
    assert len(beam_search(frugal, prompts, 6, beams=3)) == 3


def test_the_cache_is_smaller_in_the_model(model: DecoderLM) -> None:
    ours, theirs = make_int8_cache(model, 3, 64), model.new_cache(3, 64)
    assert ours.bytes == sum(layer.bytes for layer in ours.layers) < 0.35 * theirs.bytes
    assert tensor_bytes(Int8CacheLM(model)) == tensor_bytes(model)
    assert isinstance(theirs.layers[0], KVCache)


def test_half_precision_and_autocast(model: DecoderLM, ids: torch.Tensor) -> None:
    half = copy.deepcopy(model).bfloat16()
    with inference(half):
        assert Int8CacheLM(half)(ids).dtype == torch.bfloat16
    with inference(model), torch.autocast("cpu", torch.bfloat16):
        assert Int8CacheLM(model)(ids).isfinite().all()


# ---- layers and budgets


@settings(max_examples=60, deadline=None)
@given(data=st.data(), units=st.integers(1, 6), methods=st.integers(1, 3))
def test_exact_is_the_optimum(data: st.DataObject, units: int, methods: int) -> None:
    table = st.lists(st.lists(st.integers(0, 30), min_size=methods, max_size=methods), min_size=units, max_size=units)
    harm, size = torch.tensor(data.draw(table)).double(), torch.tensor(data.draw(table))
    budget = int(size.min(1).values.sum()) + data.draw(st.integers(0, 60))
    def cost(choice: list[int]) -> tuple[float, int]: return harm[range(units), choice].sum().item(), int(size[range(units), choice].sum())
    best = min(cost(list(c))[0] for c in itertools.product(range(methods), repeat=units) if cost(list(c))[1] <= budget)
    exact, greedy = (cost(spend(harm, size, budget)) for spend in (spend_exactly, spend_greedily))
    assert exact[0] == best and exact[1] <= budget
    assert greedy[0] >= best and greedy[1] <= budget


def test_larger_coins_still_fit() -> None:
    torch.manual_seed(0)
    harm, size = torch.rand(9, 3), torch.randint(1, 10_000, (9, 3))
    budget = int(size.min(1).values.sum()) + 9_000
    def cost(choice: list[int]) -> tuple[float, int]: return harm[range(9), choice].sum().item(), int(size[range(9), choice].sum())
    exact = cost(spend_exactly(harm, size, budget))
    for columns in (1, 5, 100):
        coarse = cost(spend_exactly(harm, size, budget, columns=columns))
        assert coarse[1] <= budget and coarse[0] >= exact[0]


def test_swaps_leave_the_model_alone(model: DecoderLM, ids: torch.Tensor) -> None:
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modules = [id(m) for m in model.modules()]
    broken = nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        swap_divergence(model, [{"blocks.0.mlp.up_proj": broken}], ids)
    assert modules == [id(m) for m in model.modules()] and not model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert swap_divergence(model, [{}], ids).tolist() == [0.0]


def test_from_sensitivity_to_a_saved_model(model: DecoderLM, ids: torch.Tensor, tmp_path: object) -> None:
    found = layer_sensitivity(model, ids, config=QuantConfig(method="int4_weight", group=32))
    most, least = (found.total([m] * len(found.units))[1] for m in (1, 0))
    for exact in (True, False):
        small = quantize(model, choose_layers(found, (most + least) // 2, exact=exact))
        assert least <= tensor_bytes(small) <= (most + least) // 2
    save_quantized(small, tmp_path)
    assert torch.equal(load_quantized(tmp_path)(ids), small(ids))
    kinds = {layer.kind for layer in small.modules() if hasattr(layer, "kind")}
    assert {"int4_weight", "int8_weight"} <= kinds
    generous = choose_layers(found, tensor_bytes(model) - 1)
    assert "embedding" in generous.skip and len(generous.layers) == 1 # the one that does the least harm


def test_mistakes(model: DecoderLM, ids: torch.Tensor) -> None:
    with pytest.raises(InputError, match="each once"):
        layer_sensitivity(model, ids, ["int8_weight", "int8_weight"])
    with pytest.raises(InputError, match="two tokens"):
        layer_sensitivity(model, ids[0], ["int8_weight"])
    with pytest.raises(InputError, match="int8_weight"):
        layer_sensitivity(model, ids, ["int8_weigh"])


def test_hugging_face_with_a_tied_head(ids: torch.Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=2, n_positions=32)).eval()
    found = layer_sensitivity(gpt2, ids, ["int8_weight"])
    assert ("transformer.wte", "lm_head") in found.units
    assert found.total([1] * len(found.units))[1] == tensor_bytes(gpt2)
    small = quantize(gpt2, choose_layers(found, found.total([0] * len(found.units))[1]))
    assert found.total([0] * len(found.units))[1] >= tensor_bytes(small)


def test_names() -> None:
    assert all(hasattr(mixed, name) for name in mixed.__all__)
