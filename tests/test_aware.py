"""Quantization-aware training beyond the chapter: other people's models, files, resumed runs, hostile settings."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmie.core import InputError
from mmie.models.decoder import DecoderLM, ModelConfig, is_plain, next_token_loss
from mmie.quantization.affine import PER_ROW, PER_TENSOR, Granularity, QuantParams, choose_params, fake_quantize, from_blocks, to_blocks
from mmie.quantization.aware import AwareConfig, AwareLinear, convert_aware, fake_quantize_ste, first_log_steps, prepare_aware, straight_through
from mmie.quantization.linear import QuantizedLinear
from mmie.quantization.post_training import load_quantized, restore, save_quantized, size_report
from mmie.training.optim import build_optimizer, inner_matrices
from mmie.training.trainer import TrainConfig, Trainer

WAYS = {"int4": "int4_weight", "3 bits": AwareConfig(bits=3, group=16), "2 bits": AwareConfig(bits=2, group=None), "int8": "int8_weight",
        "fixed steps": AwareConfig(learn_steps=False), "dynamic": "int8_dynamic", "static": "int8_static"}


def decoder(seed: int = 0, **options: object) -> DecoderLM:
    torch.manual_seed(seed)
    return DecoderLM(ModelConfig(**{"vocab_size": 40, "d_model": 32, "n_layers": 2, "n_heads": 4, "hidden": 64, "max_length": 32} | options))


def some_ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(40, (3, 12), generator=torch.Generator().manual_seed(seed))


def prepared(model: nn.Module, way: str, ids: torch.Tensor) -> nn.Module:
    return prepare_aware(model, WAYS[way], [ids] if way == "static" else None)


def learn(model: nn.Module, ids: torch.Tensor, steps: int = 4) -> list[float]:
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(ids)
        loss = next_token_loss((logits if isinstance(logits, torch.Tensor) else logits.logits)[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ---- the lie itself

@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.integers(2, 8), symmetric=st.booleans(), kind=st.sampled_from(["tensor", "row", "column", "group"]),
       clip=st.floats(0.05, 1.0), size=st.sampled_from([1e-6, 1.0, 1e6]))
def test_values_and_both_gradients(seed: int, bits: int, symmetric: bool, kind: str, clip: float, size: float) -> None:
    granularity = {"tensor": PER_TENSOR, "row": PER_ROW, "column": Granularity(axis=1), "group": Granularity(group=8)}[kind]
    g = torch.Generator().manual_seed(seed)
    x, upstream = size * torch.randn(6, 16, generator=g, dtype=torch.float64), torch.randn(6, 16, generator=g, dtype=torch.float64)
    params = choose_params(x, bits=bits, symmetric=symmetric, granularity=granularity, clip=clip)
    leaf, scale = x.clone().requires_grad_(), params.scale.clone().requires_grad_()
    y = fake_quantize_ste(leaf, QuantParams(scale, params.zero_point, bits, symmetric, granularity))
    assert y.detach().equal(fake_quantize(x, params))
    y.backward(upstream)
    low, high = params.int_range
    u, up = to_blocks(x, granularity) / params.scale, to_blocks(upstream, granularity)
    places = u.round() + params.zero_point
    inside = (places >= low) & (places <= high)
    assert torch.allclose(leaf.grad, from_blocks(up * inside, x.shape, granularity), rtol=1e-12, atol=1e-12)
    slope = torch.where(inside, u.round() - u, places.clamp(low, high) - params.zero_point)
    assert torch.allclose(scale.grad, (slope * up).sum(1, keepdim=True), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_straight_through_keeps_bits_and_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(50).to(dtype).requires_grad_()
    instead = (1000 * torch.randn(50)).to(dtype)
    y = straight_through(x, instead)
    assert y.dtype == dtype and y.detach().equal(instead) and y.data_ptr() != instead.data_ptr()
    y.sum().backward()
    assert x.grad.equal(torch.ones_like(x))


def test_nothing_flows_into_what_stands_in() -> None:
    x, instead = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    straight_through(x, instead).sum().backward()
    assert instead.grad is None and x.grad is not None


def test_first_steps_never_exceed_the_range() -> None:
    weight = torch.randn(8, 64)
    weight[3] = 0
    for bits in range(2, 9):
        steps = first_log_steps(weight, bits, Granularity(group=32)).exp()
        assert (steps <= choose_params(weight, bits=bits, granularity=Granularity(group=32)).scale[:, 0] * (1 + 1e-6)).all()


# ---- layers

@pytest.mark.parametrize("way", WAYS)
def test_every_learning_parameter_gets_a_gradient(way: str) -> None:
    ids = some_ids()
    model = prepared(decoder(), way, ids)
    learn(model, ids, 1)
    missing = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)]
    assert missing == []


def test_static_needs_its_grid_and_others_refuse_one() -> None:
    grid = choose_params(torch.randn(10), symmetric=False)
    with pytest.raises(InputError):
        AwareLinear(nn.Linear(4, 4), AwareConfig(bits=8, group=None, inputs="static"))
    with pytest.raises(InputError):
        AwareLinear(nn.Linear(4, 4), AwareConfig(bits=8, group=None), grid)


def test_steps_are_neither_decayed_nor_orthogonalized() -> None:
    model = prepare_aware(decoder(), "int4_weight")
    steps = {id(p) for name, p in model.named_parameters() if "log_step" in name}
    assert steps and not steps & {id(p) for p in inner_matrices(model).values()}
    for kind in ("adamw", "muon"):
        for part in build_optimizer(model, TrainConfig(optimizer=kind)).parts.values():
            for group in part.param_groups:
                assert not group["weight_decay"] or not steps & {id(p) for p in group["params"]}


@pytest.mark.parametrize("frozen_part", ["weight", "bias"])
def test_what_is_frozen_stays_frozen(frozen_part: str) -> None:
    linear = nn.Linear(32, 8)
    getattr(linear, frozen_part).requires_grad_(False)
    aware = prepare_aware(nn.Sequential(linear))
    assert not getattr(aware[0], frozen_part).requires_grad
    assert convert_aware(aware)[0].bias.requires_grad == (frozen_part != "bias")


# ---- models

@pytest.mark.parametrize("way", WAYS)
def test_converted_generates_what_was_trained(way: str) -> None:
    ids = some_ids()
    model = prepared(decoder(), way, ids)
    learn(model, ids)
    model.double().eval()
    packed = convert_aware(model, backend="plain")
    assert not is_plain(model)
    assert torch.allclose(packed(ids), model(ids), atol=1e-9)
    assert packed.generate(ids[:2, :4], 12, temperature=0.0) == model.generate(ids[:2, :4], 12, temperature=0.0)


@pytest.mark.parametrize("way", WAYS)
def test_the_fast_way_is_close(way: str) -> None:
    ids = some_ids()
    model = prepared(decoder(d_model=64, hidden=128), way, ids)
    learn(model, ids)
    with torch.inference_mode():
        a, b = model.eval()(ids), convert_aware(model)(ids)
    assert (a - b).norm() < 0.03 * a.norm()


@pytest.mark.parametrize("way", WAYS)
def test_saved_loaded_restored(way: str, tmp_path) -> None:
    ids = some_ids()
    model = prepared(decoder(), way, ids)
    learn(model, ids)
    packed = convert_aware(model.eval(), backend="plain")
    save_quantized(packed, tmp_path / "packed")
    again = load_quantized(tmp_path / "packed")
    with torch.inference_mode():
        assert again(ids).equal(packed(ids))
        if way not in ("dynamic", "static"): # their inputs are rounded as well, which a float model's aren't
            assert torch.allclose(restore(packed)(ids), packed(ids), atol=1e-4)
    assert size_report(packed).memory < size_report(decoder()).memory


def test_the_original_is_untouched_and_inplace_is_not_a_copy() -> None:
    model = decoder()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    aware = prepare_aware(model)
    learn(aware, some_ids())
    assert all(before[name].equal(p) for name, p in model.state_dict().items())
    frozen = {name: p.clone() for name, p in aware.state_dict().items()}
    packed = convert_aware(aware)
    assert any(isinstance(m, AwareLinear) for m in aware.modules()) and not any(isinstance(m, AwareLinear) for m in packed.modules())
    assert all(frozen[name].equal(p) for name, p in aware.state_dict().items())
    own = decoder()
    assert prepare_aware(own, inplace=True) is own and convert_aware(own, inplace=True) is own
    assert sum(isinstance(m, QuantizedLinear) for m in own.modules()) == 10


def test_a_float_checkpoint_loads_into_a_prepared_model() -> None:
    model, other = decoder(0), decoder(1)
    aware = prepare_aware(model)
    missing = aware.load_state_dict(other.state_dict(), strict=False)
    assert not missing.unexpected_keys and all("log_step" in key for key in missing.missing_keys)
    with_steps = prepare_aware(decoder(2))
    with_steps.load_state_dict(aware.state_dict())
    assert with_steps.eval()(some_ids()).equal(aware.eval()(some_ids()))


def test_training_mode_survives_both_ways() -> None:
    model = decoder().eval()
    assert not any(m.training for m in prepare_aware(model).modules()) and not any(m.training for m in convert_aware(prepare_aware(model)).modules())


class Repeating:
    "The same small text without end, as the trainer wants it."
    def __init__(self) -> None:
        from mmie.training.data import Batch
        rows = some_ids(3)
        self.batch, self.taken = Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()), 0

    def next_batch(self):
        self.taken += 1
        return self.batch

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_trainer_resumes_exactly(optimizer: str, tmp_path) -> None:
    config = TrainConfig(steps=8, optimizer=optimizer, checkpoint_every=4, precision="float32", keep_last=9)
    def fresh() -> DecoderLM: return prepare_aware(decoder(), AwareConfig(bits=2))
    whole = fresh()
    losses = Trainer(whole, Repeating(), config=config, folder=tmp_path / "whole").fit().losses
    halfway = sorted(p for p in (tmp_path / "whole").iterdir() if p.is_dir())[0]
    resumed = fresh()
    Trainer(resumed, Repeating(), config=config, folder=tmp_path / "resumed").fit(resume=halfway)
    assert all(a.equal(b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))
    assert losses[-1] < losses[0]


def test_training_recovers_what_rounding_breaks() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
    x = torch.randn(256, 32)
    with torch.no_grad():
        y = teacher(x)
    model = prepare_aware(teacher, AwareConfig(bits=2))
    before = float(F.mse_loss(model(x), y))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * 0.5 * (1 + math.cos(math.pi * step / 150))
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        assert float(F.mse_loss(convert_aware(model, backend="plain")(x), y)) < before / 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_convert_to_what_they_trained_with(dtype: torch.dtype) -> None:
    model = prepare_aware(nn.Sequential(nn.Linear(32, 16)).to(dtype), AwareConfig(bits=3))
    assert convert_aware(model, backend="plain")[0].dense(dtype).equal(model[0].dense())
    assert model(torch.randn(2, 32, dtype=dtype)).dtype == dtype


def test_under_autocast_it_trains() -> None:
    ids = some_ids()
    model = prepared(decoder(), "static", ids)
    with torch.autocast("cpu", torch.bfloat16):
        losses = learn(model, ids, 6)
    assert losses[-1] < losses[0]


# ---- transformers' models

@pytest.mark.parametrize("way", WAYS)
def test_gpt2_of_transformers(way: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_positions=32, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    model, ids = transformers.GPT2LMHeadModel(config).eval(), some_ids()
    with torch.no_grad():
        float_logits = model(ids).logits
    aware = prepared(model, way, ids)
    with torch.no_grad():
        assert (aware(ids).logits - float_logits).norm() < (2 if way == "2 bits" else 0.5) * float_logits.norm()
    losses = learn(aware, ids, 6)
    aware.double().eval()
    with torch.no_grad():
        assert torch.allclose(convert_aware(aware, backend="plain")(ids).logits, aware(ids).logits, atol=1e-9)
    assert losses[-1] < losses[0] and sum(isinstance(m, AwareLinear) for m in aware.modules()) == 8
    assert aware.lm_head.weight is aware.transformer.wte.weight


# ---- what can't be done is said

def test_hostile_models() -> None:
    with pytest.raises(InputError, match="NaN"):
        bad = decoder()
        bad.blocks[0].mlp.up_proj.weight.data[0, 0] = float("nan")
        prepare_aware(bad)
    with pytest.raises(InputError, match="hooks"):
        hooked = decoder()
        hooked.blocks[0].mlp.up_proj.register_forward_hook(lambda *_: None)
        prepare_aware(hooked)
    with pytest.raises(InputError, match="no layer"):
        prepare_aware(nn.Sequential(nn.ReLU()))
    with pytest.raises(InputError, match="skip it"):
        prepare_aware(nn.Sequential(nn.Linear(33, 4)))
    model = prepare_aware(nn.Sequential(nn.Linear(33, 4), nn.Linear(32, 4)), AwareConfig(skip=("0",)))
    assert [type(m).__name__ for m in model] == ["Linear", "AwareLinear"]


def test_every_setting_matters() -> None:
    ids, base = some_ids(), AwareConfig(bits=4, group=None, inputs="static")
    def out(config: AwareConfig) -> torch.Tensor:
        torch.manual_seed(0)
        return prepare_aware(decoder(), config, [ids] if config.inputs == "static" else None).eval()(ids)
    first = out(base)
    for change in ({"bits": 2}, {"inputs": "float"}, {"inputs": "dynamic"}, {"observer": "mse"}, {"skip": ("blocks.0.*",)}):
        assert not out(base.replace(**change)).equal(first), change
    assert not out(AwareConfig(group=16)).equal(out(AwareConfig(group=32)))
    assert not out(AwareConfig(bits=2, learn_steps=False)).equal(out(AwareConfig(bits=2)))


def test_deepcopy_of_a_prepared_model_is_independent() -> None:
    model = prepare_aware(decoder())
    twin = copy.deepcopy(model)
    learn(twin, some_ids(), 2)
    assert not twin.blocks[0].mlp.up_proj.weight.equal(model.blocks[0].mlp.up_proj.weight)
