"What a step keeps, whatever its shape; and a loss in chunks that learns the same as the one that holds everything."
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmie.core import InputError, seed_everything
from mmie.evidence import prove
from mmie.models.decoder import IGNORE, DecoderLM, ModelConfig, next_token_loss
from mmie.training.costs import (
    activation_bytes, chunked_next_token_sum, film_figure, memory_curve, memory_figure, memory_plan, product_speed, saved_bytes, step_cost,
    step_flops,
)
from mmie.training.data import Batch, EpochWindows, TokenFile
from mmie.training.trainer import LossFunction, TrainConfig, Trainer, next_token_sum, recomputing

TINY = ModelConfig(vocab_size=50, d_model=16, n_layers=2, n_heads=2, hidden=24, max_length=40)


def model(**changes: object) -> DecoderLM:
    seed_everything(0)
    return DecoderLM(TINY.replace(**changes))


def batch(rows: int, length: int, seed: int = 0, ignored: float = 0.0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(50, (rows, length + 1), generator=rng)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].masked_fill(torch.rand(rows, length, generator=rng) < ignored, IGNORE))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 4), length=st.integers(2, 40), heads=st.sampled_from([1, 2, 4]), shared=st.booleans(), layers=st.integers(1, 3),
       mlp=st.sampled_from(["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh"]), norm=st.sampled_from(["rmsnorm", "layernorm"]),
       positions=st.sampled_from(["rope", "none"]), tied=st.booleans(), twice=st.booleans(), chunked=st.booleans())
def test_the_formula_counts_every_shape(rows: int, length: int, heads: int, shared: bool, layers: int, mlp: str, norm: str, positions: str,
                                        tied: bool, twice: bool, chunked: bool) -> None:
    changes = {"n_heads": heads, "n_kv_heads": 1 if shared else None, "n_layers": layers, "mlp": mlp, "norm": norm, "positions": positions,
               "tie_embeddings": tied}
    whole, some = model(**changes), batch(rows, length)
    loss: LossFunction = chunked_next_token_sum if chunked else next_token_sum
    def count() -> int:
        return saved_bytes(lambda: loss(whole, some), whole, [some.inputs, some.targets])
    if twice:
        with recomputing(whole):
            counted = count()
    else:
        counted = count()
    assert counted == activation_bytes(whole.config, rows, length, recompute=twice, chunked=chunked)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 100), ignored=st.sampled_from([0.0, 0.4, 1.0]), tied=st.booleans(), cap=st.sampled_from([None, 3.0]), seed=st.integers(0, 99))
def test_chunks_learn_the_same(rows: int, ignored: float, tied: bool, cap: float | None, seed: int) -> None:
    whole, some = model(tie_embeddings=tied, logit_softcap=cap).double(), batch(2, 17, seed, ignored)
    results = []
    for loss in (partial(chunked_next_token_sum, rows=rows), next_token_sum):
        value = loss(whole, some)
        grads = torch.autograd.grad(value * 0.37, list(whole.parameters()))
        results.append([value, *grads])
    prove("in chunks", *results)


def test_chunks_of_packed_rows() -> None:
    whole, some = model().double(), batch(2, 20)
    packed = Batch(some.inputs, some.targets, torch.arange(20).expand(2, -1) // 7)
    prove("packed rows in chunks", chunked_next_token_sum(whole, packed, rows=9), next_token_sum(whole, packed))
    assert chunked_next_token_sum(whole, packed) != chunked_next_token_sum(whole, some)


def test_a_second_backward_pass_gives_the_same() -> None:
    whole = model().double()
    value = chunked_next_token_sum(whole, batch(2, 9), rows=4)
    first, again = (torch.autograd.grad(value, whole.embedding.weight, retain_graph=True)[0] for _ in range(2))
    assert first.equal(again)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_run_with_all_levers_ends_where_the_plain_one_ends(precision: str) -> None:
    ids = torch.randint(50, (4000,), generator=torch.Generator().manual_seed(3)).numpy().astype("uint16")
    ends = torch.tensor([4000]).numpy()
    def losses(loss: LossFunction, **changes: object) -> list[float]:
        data = EpochWindows(TokenFile(ids, ends, ends, 0, "numbers"), length=20, batch_size=4)
        config = TrainConfig(**{"steps": 6, "precision": precision, "device": "cpu", **changes})
        return Trainer(model(), data, config=config, loss=loss).fit().losses
    plain = losses(next_token_sum)
    frugal = losses(partial(chunked_next_token_sum, rows=16), recompute=True)
    assert frugal == pytest.approx(plain, rel=1e-5 if precision == "float32" else 1e-2)


def test_what_runs_without_gradients_keeps_nothing() -> None:
    whole, some = model(), batch(2, 9)
    with torch.no_grad():
        assert saved_bytes(lambda: next_token_sum(whole, some)) == 0
        assert not chunked_next_token_sum(whole, some).requires_grad


def test_a_curve_ends_where_it_began() -> None:
    whole, some = model(), batch(2, 9)
    def step() -> None:
        torch.autograd.grad(next_token_sum(whole, some), list(whole.parameters()))
    assert memory_curve(step).bytes[-1] > 0, "the first time, RoPE's tables stay"
    curve = memory_curve(step)
    assert curve.bytes[-1] == 0 < curve.peak and min(curve.bytes) >= 0
    assert step_cost(whole, some, pieces=2, repeats=1).peak < step_cost(whole, some, repeats=1).peak + 4 * whole.n_parameters


@pytest.mark.parametrize("changes", [{"window": 8}, {"experts": 2}, {"qk_norm": True}, {"attention": "linear", "positions": "none"},
                                     {"attention_backend": "reference"}, {"norm": "centered_rmsnorm"}])
def test_no_formula_is_said(changes: dict[str, object]) -> None:
    config = TINY.replace(**changes)
    for formula in (activation_bytes, memory_plan, step_flops):
        with pytest.raises(InputError, match="no formula for"):
            formula(config, 1, 8)


def test_steps_that_cannot_be() -> None:
    for rows, length in ((0, 8), (2, 0), (-1, 8)):
        for formula in (activation_bytes, memory_plan, step_flops):
            with pytest.raises(InputError, match=f"no step has {rows} rows of {length} tokens"):
                formula(TINY, rows, length)
    for pieces in (0, 3, -1):
        with pytest.raises(InputError, match="2 rows can't be cut"):
            memory_plan(TINY, 2, 8, pieces=pieces)
        with pytest.raises(InputError, match="2 rows can't be cut"):
            step_cost(model(), batch(2, 8), pieces=pieces)


@pytest.mark.parametrize("rows", [0, -3, 2.5, None])
def test_chunks_that_cannot_be(rows: object) -> None:
    with pytest.raises(InputError, match="a chunk can't have"):
        chunked_next_token_sum(model(), batch(2, 8), rows=rows) # type: ignore[arg-type]


def test_nothing_to_draw_or_to_film() -> None:
    for picture in (film_figure, memory_figure):
        with pytest.raises(InputError, match="to draw"):
            picture({})
    with pytest.raises(InputError, match="doesn't follow the memory of 'tpu'"):
        memory_curve(lambda: torch.ones(3), "tpu")
    with pytest.raises(InputError, match="no matrix"):
        product_speed(size=0)


def test_weights_spread_over_processes_are_refused() -> None:
    from torch import distributed as dist
    from torch.distributed.fsdp import fully_shard
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(InputError, match="spread over processes"):
            chunked_next_token_sum(fully_shard(model()), batch(2, 8)) # type: ignore[arg-type]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_loss_may_be_asked_again(dtype: torch.dtype) -> None:
    logits, targets = torch.randn(2, 9, 50, dtype=dtype, requires_grad=True), torch.randint(50, (2, 9))
    twice = next_token_loss(logits, targets) * 0.37 + next_token_loss(logits, targets.flip(1)) * 2 # two losses, one graph
    grads = [torch.autograd.grad(twice, logits, retain_graph=keep)[0] for keep in (True, True, False)]
    assert grads[0].equal(grads[1]) and grads[0].equal(grads[2])
    with pytest.raises(RuntimeError, match="second time"):
        twice.backward() # type: ignore[no-untyped-call]


def test_the_loss_scales_in_place_only_when_nobody_asks_again() -> None:
    logits, targets = torch.randn(2, 9, 50, requires_grad=True), torch.randint(50, (2, 9))
    kept: list[torch.Tensor] = []
    for keep in (True, False):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            loss = next_token_loss(logits, targets)
        stored = max(kept, key=torch.Tensor.numel)
        before = stored.clone()
        torch.autograd.grad(loss, logits, retain_graph=keep)
        assert stored.equal(before) == keep
        kept.clear()


def test_gradients_for_several_factors_at_a_time() -> None:
    logits, targets = torch.randn(2, 9, 50, dtype=torch.float64, requires_grad=True), torch.randint(50, (2, 9))
    several = torch.autograd.grad(next_token_loss(logits, targets), logits, torch.tensor([1.0, -2.0]), is_grads_batched=True)[0]
    one = torch.autograd.grad(next_token_loss(logits, targets), logits)[0]
    prove("two factors", several, torch.stack([one, -2 * one]))
