"""Every kind of attention with its memory, in pieces drawn at random; latent attention's two forms; linear attention's chunks."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmie.attention.costs import VARIANTS, AnyAttention, cache_numbers
from mmie.attention.latent import LatentAttention, absorbing_pays
from mmie.attention.linear import LinearAttention, linear_attention
from mmie.attention.masks import padding
from mmie.attention.positions import RotaryEmbedding
from mmie.core import InputError

quick = settings(max_examples=25, deadline=None)
pieces = st.lists(st.integers(1, 5), min_size=1, max_size=6)
latents = st.fixed_dictionaries({
    "kv_lora_rank": st.integers(1, 12), "qk_nope_head_dim": st.integers(0, 6), "v_head_dim": st.integers(1, 9),
    "q_lora_rank": st.none() | st.integers(1, 8), "norm_eps": st.sampled_from([None, 1e-6]), "bias": st.booleans(),
    "positions": st.sampled_from([2, 4]).map(lambda dim: RotaryEmbedding(dim, layout="interleaved")),
})
linears = st.fixed_dictionaries({
    "n_kv_heads": st.sampled_from([1, 2, 4]), "features": st.sampled_from(["elu", "none"]), "decay": st.booleans(),
    "chunk": st.integers(1, 9), "head_dim": st.integers(1, 6),
})


def words(length: int, width: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


def with_memory(layer: AnyAttention, x: Tensor, sizes: list[int], mask: Tensor | None = None) -> Tensor:
    cache, out, start = layer.new_cache(x.shape[0], x.shape[1], x.dtype), [], 0
    with torch.inference_mode():
        for size in sizes:
            seen = None if mask is None else mask[..., :start + size]
            out.append(layer(x[:, start:start + size], cache=cache, mask=seen))
            start += size
    assert cache.length == x.shape[1]
    return torch.cat(out, dim=1)


@quick
@given(latents, pieces, st.sampled_from([None, True, False]))
def test_latent_with_memory(options: dict[str, object], sizes: list[int], absorb: bool | None) -> None:
    layer, x = LatentAttention(16, 4, **options, absorb=absorb).double(), words(sum(sizes))
    torch.testing.assert_close(with_memory(layer, x, sizes), layer(x), rtol=0, atol=1e-12)


@quick
@given(latents, st.integers(1, 9), st.sampled_from(["sdpa", "explicit", "reference"]))
def test_latent_forms_agree_with_gradients(options: dict[str, object], length: int, backend: str) -> None:
    layer, x, results = LatentAttention(16, 4, **options, backend=backend).double(), words(length), []
    mask = padding(left=[0, length // 2])
    for layer.absorb in (True, False):
        out = layer(x, mask=mask)
        results.append([out, *torch.autograd.grad(out.sin().sum(), list(layer.parameters()))])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-10)


@quick
@given(linears, pieces, st.integers(0, 4))
def test_linear_with_memory_and_padding(options: dict[str, object], sizes: list[int], pad: int) -> None:
    layer, x = LinearAttention(16, 4, **options).double(), words(sum(sizes))
    pad = min(pad, sum(sizes) - 1)
    real = (torch.arange(x.shape[1]) >= torch.tensor([0, pad])[:, None])[:, None, None]
    whole = layer(x, mask=real)
    torch.testing.assert_close(with_memory(layer, x, sizes, real), whole, rtol=0, atol=1e-9)
    torch.testing.assert_close(whole[1, pad:], layer(x[1:, pad:])[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(layer(x, mask=padding(left=[0, pad])), whole, rtol=0, atol=0)
    assert whole[1, :pad].eq(0).all()


@quick
@given(st.integers(1, 40), st.integers(1, 50), st.sampled_from([1.0, 0.9, 1e-3]))
def test_chunks_do_not_matter(length: int, chunk: int, decay: float) -> None:
    q, k, v = (words(length, 8).unflatten(-1, (2, 4)).transpose(1, 2) + shift for shift in (0.0, 0.5, -0.5))
    fade = torch.tensor([decay, 1.0], dtype=torch.float64)
    ours, other = (linear_attention(q, k, v, decay=fade, chunk=size) for size in (chunk, 1))
    torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_with_memory(name: str) -> None:
    layer, sizes = VARIANTS[name](32, 8).double(), [140, 1, 1, 5, 1]
    x = words(sum(sizes), 32)
    torch.testing.assert_close(with_memory(layer, x, sizes), layer(x), rtol=0, atol=1e-12)
    assert layer.new_cache(3, 500, torch.float64).bytes == 3 * 8 * cache_numbers(layer, 500)


def test_absorbing_pays_for_few_queries_only() -> None:
    sizes = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "v_head_dim": 128}
    answers = [absorbing_pays(n, 4096, **sizes) for n in range(1, 4097)]
    assert answers == sorted(answers, reverse=True) and answers[0] and not answers[-1]


def test_a_sum_takes_nothing_back() -> None:
    layer = LinearAttention(16, 4)
    cache = layer.new_cache(2)
    with torch.inference_mode():
        layer(words(5).float(), cache=cache)
    with pytest.raises(InputError, match="forgets no single words"):
        cache.truncate(3)
