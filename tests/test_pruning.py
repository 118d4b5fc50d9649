"What chapter 88 has no room for: odd shapes, every setting, other people's models, resumed runs."
import copy
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from mmie.core import InputError
from mmie.models.decoder import DecoderLM, ModelConfig
from mmie.pruning import (
    GradualPruning, InputNorms, KeepZeros, PruneConfig, SparseLinear, distillation_loss, head_groups, hidden_units, keep_mask, leftovers,
    pack_pruned, pack_sparse, prunable, prune_model, put_back, refit, sparsegpt, sparsity_report, unit_scores, unpack_sparse, wanda_score,
)
from mmie.quantization.activations import watch_inputs
from mmie.quantization.calibrated import HessianWatcher, row_errors
from mmie.quantization.post_training import load_quantized, quantize, restore, save_quantized
from mmie.training.data import Batch
from mmie.training.trainer import TrainConfig, Trainer

SHAPE = {"vocab_size": 61, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden": 40, "max_length": 32}


def decoder(**changes: object) -> DecoderLM:
    torch.manual_seed(0)
    return DecoderLM(ModelConfig(**{**SHAPE, **changes})).eval()


def reading(n: int = 3, rows: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(61, (rows, 24), generator=generator) for _ in range(n)]


def problem(seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor]: # weight, Hessian
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x.T @ x / len(x)


class Repeat:
    "Batches without end that know where they stand."
    def __init__(self) -> None:
        self.at = 0

    def next_batch(self) -> Batch:
        ids = torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(self.at))
        self.at += 1
        return Batch(ids[:, :-1], ids[:, 1:])

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


@given(st.integers(0, 99), st.integers(1, 9), st.integers(1, 30), st.floats(0, 0.99), st.sampled_from(["row", "layer"]))
@settings(max_examples=40, deadline=None)
def test_a_mask_removes_the_smallest(seed: int, rows: int, columns: int, share: float, scope: str) -> None:
    score = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    keep = keep_mask(score, share, scope=scope)
    for part, stays in zip(score if scope == "row" else score[None], keep if scope == "row" else keep[None], strict=True):
        assert int((~stays).sum()) == round(share * part.numel())
        if stays.any() and not stays.all():
            assert part[stays].min() >= part[~stays].max()


@given(st.integers(0, 99), st.integers(1, 6), st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (3, 5)]))
@settings(max_examples=30, deadline=None)
def test_groups_keep_their_best(seed: int, rows: int, rule: tuple[int, int]) -> None:
    score = torch.rand(rows, 3 * rule[1], generator=torch.Generator().manual_seed(seed))
    groups = keep_mask(score, pattern="{}:{}".format(*rule)).unflatten(1, (-1, rule[1]))
    assert (groups.sum(-1) == rule[0]).all()
    best = score.unflatten(1, (-1, rule[1])).topk(rule[0]).values.sum()
    assert torch.isclose((score.unflatten(1, (-1, rule[1])) * groups).sum(), best)


@pytest.mark.parametrize("pattern", ["", "24", "0:4", "4:4", "-2:4", "2:4:8", "a:b", "2 of 4"])
def test_patterns_that_are_none(pattern: str) -> None:
    with pytest.raises(InputError, match="no pattern"):
        keep_mask(torch.rand(4, 8), pattern=pattern)
    with pytest.raises(InputError):
        PruneConfig(pattern=pattern)


@given(st.integers(0, 99), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64]))
@settings(max_examples=40, deadline=None)
def test_packing_is_exact(seed: int, shape: list[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = (torch.randn(shape, generator=generator) * 9 * (torch.rand(shape, generator=generator) < 0.5)).to(dtype)
    values, bits = pack_sparse(matrix)
    assert unpack_sparse(values, bits, shape).equal(matrix)
    assert values.dtype == dtype and len(values) == matrix.count_nonzero() and len(bits) == -(-matrix.numel() // 8)


@given(st.integers(0, 99), st.integers(1, 5), st.integers(2, 14), st.sampled_from([1, 3, 128]))
@settings(max_examples=25, deadline=None)
def test_the_sweep_is_a_system_for_each_column(seed: int, rows: int, columns: int, block: int) -> None:
    weight, h = problem(seed, rows, columns)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    slow = weight.clone()
    for j in range(columns):
        goes = slow[:, j].masked_fill(keep[:, j], 0)
        slow[:, j] -= goes
        slow[:, j + 1:] += torch.outer(goes, torch.linalg.solve(h[j + 1:, j + 1:], h[j + 1:, j]))
    fast, stays = sparsegpt(weight, h, keep=keep, block=block, damp=0)
    assert stays.equal(keep) and (fast[~keep] == 0).all()
    torch.testing.assert_close(fast, slow, rtol=1e-7, atol=1e-7 * float(slow.abs().max()))


@given(st.integers(0, 99), st.integers(1, 5), st.integers(2, 14))
@settings(max_examples=25, deadline=None)
def test_nothing_with_these_zeros_is_better_than_a_refit(seed: int, rows: int, columns: int) -> None:
    weight, h = problem(seed, rows, columns)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    best = refit(weight, keep, h, damp=0)
    lost = row_errors(weight, best, h)
    nudged = best + 1e-3 * torch.randn(best.shape, generator=torch.Generator().manual_seed(seed), dtype=best.dtype) * keep
    for other in (weight * keep, sparsegpt(weight, h, keep=keep, damp=0)[0], nudged):
        assert (lost <= row_errors(weight, other, h) + 1e-9).all()


def test_damping_holds_where_inputs_are_silent_or_copies() -> None:
    x = torch.randn(50, 6, dtype=torch.float64)
    x[:, 2], x[:, 4] = 0, x[:, 5]
    h, weight = x.T @ x / 50, torch.randn(3, 6, dtype=torch.float64)
    for new in (sparsegpt(weight, h)[0], refit(weight, keep_mask(weight.abs()), h)):
        assert new.isfinite().all()
    for nothing in (sparsegpt(weight, 0 * h)[0], refit(weight, keep_mask(weight.abs()), 0 * h)):
        assert nothing.count_nonzero() == 9
        assert ((nothing == weight) | (nothing == 0)).all()


KNOBS = [
    ("sparsegpt", {"sparsity": 0.6}), ("sparsegpt", {"pattern": "2:4"}), ("sparsegpt", {"pattern": "4:8"}), ("sparsegpt", {"refit": True}),
    ("sparsegpt", {"sequential": False}), ("sparsegpt", {"block": 8}), ("sparsegpt", {"damp": 0.2}), ("sparsegpt", {"skip": ("*down_proj",)}),
    ("sparsegpt", {"layers": {"blocks.0.*": 0.3}}), ("sparsegpt", {"head": True}), ("sparsegpt", {"method": "wanda"}),
    ("magnitude", {"scope": "row"}), ("magnitude", {"scope": "model"}), ("wanda", {"scope": "layer"}), ("wanda", {"pattern": "2:4"}),
    ("structured", {"heads": 0.5}), ("structured", {"sparsity": 0.25}), ("structured", {"refit": True}), ("structured", {"damp": 5.0}),
]


@pytest.mark.parametrize(("method", "knob"), KNOBS)
def test_every_setting_does_something(method: str, knob: dict[str, object]) -> None:
    model, text, start = decoder(tie_embeddings=False), reading(), PruneConfig(method=method)
    if "damp" in knob and method == "structured":
        start = start.replace(refit=True)
    before, after = (prune_model(model, config, text).state_dict() for config in (start, start.replace(**knob)))
    assert any(value.shape != after[name].shape or not value.equal(after[name]) for name, value in before.items())


def test_settings_come_back_from_a_file(tmp_path: Path) -> None:
    for config in (PruneConfig(method="sparsegpt", pattern="4:8"), PruneConfig(scope="row", layers={"a.*": 0.2}, skip=("b",))):
        config.write(tmp_path / "prune.yaml")
        assert PruneConfig.read(tmp_path / "prune.yaml") == config


def test_the_model_is_left_alone() -> None:
    model, text = decoder(), reading()
    before = copy.deepcopy(model.state_dict())
    for method in ("magnitude", "wanda", "sparsegpt", "structured"):
        prune_model(model, PruneConfig(method=method, refit=method != "magnitude"), text)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert prune_model(model, inplace=True) is model
    assert sparsity_report(model).sparsity == pytest.approx(0.5, abs=1e-3)


def test_faults_are_found_before_anything_changes() -> None:
    model, text = decoder(), reading()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.blocks[1].mlp.up_proj.weight[3, 5] = torch.inf
    for config in (PruneConfig(), PruneConfig(method="structured")):
        with pytest.raises(InputError, match="NaN or infinite"):
            prune_model(model, config, text, inplace=True)
    assert model.blocks[0].mlp.up_proj.weight.equal(before["blocks.0.mlp.up_proj.weight"])
    with torch.device("meta"):
        empty = DecoderLM(ModelConfig(**SHAPE))
    with pytest.raises(InputError, match="meta"):
        prune_model(empty)
    for kind, done in {"packed": pack_pruned(prune_model(decoder())), "quantized": quantize(decoder())}.items():
        with pytest.raises(InputError, match="already"):
            prune_model(done, PruneConfig(sparsity=0.7))
        assert kind
    with pytest.raises(InputError, match="no layer is left"):
        prune_model(nn.LayerNorm(4))


@pytest.mark.parametrize("what", ["norm", "mask", "eight bits"])
def test_weights_that_are_not_there_to_be_pruned(what: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    if what == "norm":
        nn.utils.parametrizations.weight_norm(model[0])
    elif what == "mask":
        prune.l1_unstructured(model[0], "weight", 0.5)
    else:
        model[0].weight = nn.Parameter(model[0].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(InputError, match="another library" if what == "eight bits" else "0: its weights are made anew"):
        prune_model(model)


def test_calibration_must_be_readable() -> None:
    model = decoder()
    with pytest.raises(InputError, match="has to see text"):
        prune_model(model, PruneConfig(refit=True))
    with pytest.raises(InputError, match="empty"):
        prune_model(model, "wanda", [])
    with pytest.raises(InputError, match="vocabulary"):
        prune_model(model, "wanda", [torch.full((1, 4), 61)])


def test_shared_modules_and_shared_matrices() -> None:
    class Twice(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.table, self.mix = nn.Embedding(61, 8), nn.Linear(8, 8)
            self.again = nn.Linear(8, 8) if tied else self.mix
            if tied:
                self.again.weight = self.mix.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.again(self.mix(self.table(ids)).relu())

    one = prune_model(Twice(tied=False), "wanda", reading())
    assert one.again is one.mix and (one.mix.weight == 0).sum() == 32
    for method in ("magnitude", "sparsegpt"):
        with pytest.raises(InputError, match="again: it shares its matrix with mix"):
            prune_model(Twice(tied=True), PruneConfig(method=method), reading())


def test_layers_that_others_read_are_left_alone() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32)
    assert set(prunable(model, PruneConfig())) == {"linear1", "linear2"}
    tied = decoder(tie_embeddings=True)
    assert "head" not in prunable(tied, PruneConfig(head=True))
    assert "head" in prunable(decoder(tie_embeddings=False), PruneConfig(head=True))


def test_wanda_is_its_formula_and_later_blocks_hear_pruned_ones() -> None:
    model, text = decoder(), reading()
    new = prune_model(model, "wanda", text)
    halfway = prune_model(model, PruneConfig(method="wanda", layers={"blocks.1.*": 0}), text)
    for source, sequential in ((halfway, True), (model, False)):
        ear = InputNorms(32)
        watch_inputs(source, {"blocks.1.mlp.up_proj": ear}, text)
        weight = model.blocks[1].mlp.up_proj.weight
        expected = weight * keep_mask(wanda_score(weight, ear.rms), scope="row")
        found = (new if sequential else prune_model(model, PruneConfig(method="wanda", sequential=False), text)).blocks[1].mlp.up_proj.weight
        assert found.equal(expected)


@pytest.mark.parametrize("changes", [
    {}, {"mlp": "gelu", "norm": "layernorm", "positions": "learned", "bias": True}, {"qk_norm": True, "n_kv_heads": 4}, {"bias": "qkv"},
    {"head_dim": 12, "n_kv_heads": 1, "mlp": "geglu"}, {"experts": 3}, {"window": 8, "post_norms": True},
])
def test_cutting_is_silencing(changes: dict[str, object]) -> None:
    model = decoder(**changes).double()
    heads = 0.5 if head_groups(model)[0].count > 1 else 0.0
    config = PruneConfig(method="structured", sparsity=0.4, heads=heads)
    small = prune_model(model, config, reading())
    for units in [*hidden_units(model), *(head_groups(model) if heads else [])]:
        reader, cut = model.get_submodule(units.consumer), small.get_submodule(units.consumer)
        stays = torch.tensor([(column == cut.weight.T).all(1).any() for column in reader.weight.T])
        assert int(stays.sum()) == cut.in_features < reader.in_features
        with torch.no_grad():
            reader.weight[:, ~stays] = 0
    ids = reading()[0]
    torch.testing.assert_close(small(ids), model(ids), rtol=0, atol=1e-10)
    assert small.config.hidden == 24
    again = DecoderLM(small.config).double()
    again.load_state_dict(small.state_dict())
    torch.testing.assert_close(again.eval()(ids), small(ids), rtol=0, atol=1e-12)
    assert len(small.generate([[1, 2, 3]], 4, temperature=0)[0]) >= 4


def test_repaired_units_lose_less() -> None:
    weight, h = problem(0, 12, 24)
    scores, cheaper = (unit_scores(weight, h, 3, repaired=repaired) for repaired in (False, True))
    assert (cheaper <= scores + 1e-9).all() and (cheaper > 0).all()
    model, text = decoder(), reading()
    ears = {units.consumer: HessianWatcher(40) for units in hidden_units(model)}
    watch_inputs(model, ears, text)
    first = hidden_units(model)[0].consumer
    h = ears[first].hessian.double()
    old = model.get_submodule(first).weight.double()
    for n in (1, 20, 39):
        keep = torch.zeros(40, dtype=torch.bool).index_fill(0, unit_scores(old, h, repaired=False).topk(40 - n).indices, True).expand_as(old)
        assert row_errors(old, refit(old, keep, h, damp=0.001), h).sum() <= row_errors(old, old * keep, h).sum()


def test_no_heads_to_take() -> None:
    for changes in ({"positions": "alibi"}, {"attention": "latent", "n_kv_heads": None}):
        with pytest.raises(InputError, match="no heads"):
            prune_model(decoder(**changes), PruneConfig(method="structured", sparsity=0, heads=0.5), reading())


def test_a_sparse_layer_in_every_precision() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 10)
    with torch.no_grad():
        linear.weight.mul_(keep_mask(linear.weight.abs(), 0.7))
    packed, x = SparseLinear.from_weight(linear.weight, linear.bias), torch.randn(2, 3, 24, requires_grad=True)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        layer, plain = copy.deepcopy(packed).to(dtype), copy.deepcopy(linear).to(dtype)
        torch.testing.assert_close(layer(x.to(dtype)), plain(x.to(dtype)), rtol=1e-5, atol=1e-2 if dtype == torch.bfloat16 else 1e-6)
        assert layer.bits.dtype == torch.uint8 and layer.weight.dtype == dtype
    (ours,), (theirs,) = (torch.autograd.grad(layer(x).square().sum(), x) for layer in (packed, linear))
    torch.testing.assert_close(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(x).dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        packed.load_state_dict(linear.state_dict())
    assert "kept=72" in repr(packed)


def test_packed_models_come_back_from_files(tmp_path: Path) -> None:
    text = reading()
    for n, (dtype, config) in enumerate(product((torch.float32, torch.bfloat16), (PruneConfig(sparsity=0.7), PruneConfig(pattern="2:4")))):
        model = prune_model(decoder(bias=True), config).to(dtype)
        packed = pack_pruned(model)
        save_quantized(packed, tmp_path / str(n))
        again = load_quantized(tmp_path / str(n), decoder(bias=True).to(dtype))
        for name, value in packed.state_dict().items():
            assert again.state_dict()[name].equal(value)
        assert again(text[0]).equal(packed(text[0]))
        back = restore(packed, dtype)
        assert all(value.equal(back.state_dict()[name]) for name, value in model.state_dict().items())
        assert sparsity_report(packed).sparsity == sparsity_report(model).sparsity


def test_a_packed_model_comes_back_to_a_program_that_never_heard_of_pruning(tmp_path: Path) -> None:
    packed, ids = pack_pruned(prune_model(decoder(), PruneConfig(pattern="2:4"))), reading()[0]
    save_quantized(packed, tmp_path / "packed")
    torch.save(ids, tmp_path / "ids.pt")
    code = """if True:
        import sys, torch
        from mmie.quantization.post_training import load_quantized
        assert "mmie.pruning" not in sys.modules
        with torch.inference_mode():
            torch.save(load_quantized("packed")(torch.load("ids.pt")), "logits.pt")"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    with torch.inference_mode():
        assert torch.load(tmp_path / "logits.pt").equal(packed(ids))


@pytest.mark.parametrize("inplace", [False, True])
def test_inside_of_inference_mode(inplace: bool) -> None:
    "What is pruned there can be trained afterwards."
    for config in (PruneConfig(), PruneConfig(method="sparsegpt", refit=True), PruneConfig(method="structured", heads=0.5, refit=True)):
        model = decoder(bias=True)
        with torch.inference_mode():
            pruned = prune_model(model, config, reading(), inplace=inplace)
            packed = pack_pruned(pruned) if config.method != "structured" else pruned
        for one in (pruned, packed):
            assert not any(p.is_inference() for p in one.parameters()), config
            one(reading()[0]).logsumexp(-1).sum().backward()
        assert all(p.grad is not None for p in pruned.parameters()), config


def test_routers_stay_unless_they_are_named() -> None:
    model = decoder(experts=3)
    gone = lambda config: [name for name, p in prune_model(model, config).named_parameters() if "mlp" in name and (p == 0).any()] # noqa: E731
    assert len(gone(PruneConfig())) == 18 and not any("router" in name for name in gone(PruneConfig(layers={"*": 0.6})))
    assert [name for name in gone(PruneConfig(layers={"blocks.0.*.router": 0.5})) if "router" in name] == ["blocks.0.mlp.router.weight"]


def test_only_what_gets_smaller_is_packed() -> None:
    model = prune_model(decoder(), PruneConfig(sparsity=0.02, layers={"blocks.0.*": 0.6}))
    kinds = {name: isinstance(m, SparseLinear) for name, m in pack_pruned(model).named_modules() if name.endswith("_proj")}
    assert all(packed == name.startswith("blocks.0.") for name, packed in kinds.items())


def test_undoing() -> None:
    model, text = decoder(), reading()
    for config in (PruneConfig(), PruneConfig(method="wanda", pattern="2:4"), PruneConfig(method="sparsegpt", refit=True)):
        pruned = prune_model(model, config, text)
        rest = leftovers(model, pruned)
        put_back(pruned, rest)
        assert all(value.equal(pruned.state_dict()[name]) for name, value in model.state_dict().items())
    assert leftovers(model, model) == {}


def test_zeros_stay_and_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    model = prune_model(decoder(), PruneConfig(sparsity=0.6))
    zeros = {name: p == 0 for name, p in model.named_parameters() if "proj" in name}
    config = TrainConfig(steps=6, lr=1e-2, checkpoint_every=3, precision="float32", device="cpu")
    whole = copy.deepcopy(model)
    Trainer(whole, Repeat(), config=config, callbacks=[KeepZeros()], folder=tmp_path / "run").fit()
    for name, p in whole.named_parameters():
        if name in zeros:
            assert (p[zeros[name]] == 0).all() and not p.equal(dict(model.named_parameters())[name])
    second = decoder()
    checkpoint = sorted((tmp_path / "run").glob("*3"))[0]
    Trainer(second, Repeat(), config=config, callbacks=[KeepZeros()]).fit(resume=checkpoint)
    assert all(p.equal(dict(second.named_parameters())[name]) for name, p in whole.named_parameters())


@pytest.mark.parametrize("scope", [None, "row", "model"])
def test_gradual_pruning_gets_there_and_never_gives_back(scope: str | None, tmp_path: Path) -> None:
    model, seen = decoder(), []

    class Look(KeepZeros):
        def on_fit_start(self, trainer: Trainer) -> None:
            pass

        def on_step_end(self, trainer: Trainer) -> None:
            seen.append({name: p == 0 for name, p in trainer.model.named_parameters() if "proj" in name})

    config = TrainConfig(steps=9, lr=1e-2, precision="float32", device="cpu")
    Trainer(model, Repeat(), config=config, callbacks=[GradualPruning(PruneConfig(sparsity=0.75, scope=scope), 1, 7, 2), Look()]).fit()
    assert sparsity_report(model).sparsity == pytest.approx(0.75, abs=0.01)
    for earlier, later in pairwise(seen):
        assert all((later[name] | ~gone).all() for name, gone in earlier.items())
    assert not any(gone.any() for gone in seen[0].values())


def test_a_student_that_agrees_learns_nothing() -> None:
    teacher = decoder()
    student, batch = copy.deepcopy(teacher).train(), Repeat().next_batch()
    loss = distillation_loss(teacher, share=1.0)(student, batch)
    loss.backward()
    assert loss.abs() < 1e-4 and max(p.grad.abs().max() for p in student.parameters()) < 1e-3
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


# --- other people's models


ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": 61}


def theirs(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    wide = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, **ENDS}
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=32, **ENDS)).eval()
    if kind == "opt":
        wide = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32, **ENDS}
        return transformers.OPTForCausalLM(transformers.OPTConfig(max_position_embeddings=32, **wide)).eval()
    if kind == "neox":
        wide.pop("num_key_value_heads")
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**wide)).eval()
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "gemma": "Gemma"}[kind]
    config = getattr(transformers, f"{name}Config")(**wide, head_dim=8)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize(("kind", "heads"), [
    ("gpt2", 0.0), ("opt", 0.0), ("neox", 0.0), ("llama", 0.5), ("qwen2", 0.5), ("qwen3", 0.5), ("mistral", 0.5), ("gemma", 0.5)])
def test_their_models(kind: str, heads: float) -> None:
    model, text = theirs(kind), reading()
    for config in (PruneConfig(), PruneConfig(method="wanda", pattern="2:4"), PruneConfig(method="sparsegpt", refit=True)):
        pruned = prune_model(model, config, text)
        head = model.get_output_embeddings()
        report = {layer.name: layer for layer in sparsity_report(pruned).layers}
        gone = [layer.zeros / (layer.shape[0] * layer.shape[1]) for name, layer in report.items() if model.get_submodule(name) is not head]
        assert all(share == pytest.approx(0.5, abs=0.01) for share in gone)
        with torch.inference_mode():
            torch.testing.assert_close(pack_pruned(pruned)(text[0]).logits, pruned(text[0]).logits)
    small = prune_model(model, PruneConfig(method="structured", heads=heads, refit=True), text)
    again = type(small)(small.config).eval()
    again.load_state_dict(small.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(again(text[0]).logits, small(text[0]).logits)
    assert small.num_parameters() < model.num_parameters()


def test_a_transposed_layer_is_the_same_layer() -> None:
    model, text = theirs("gpt2"), reading()
    layer = model.transformer.h[0].mlp.c_fc
    ear = InputNorms(32)
    watch_inputs(model, {"transformer.h.0.mlp.c_fc": ear}, text)
    pruned = prune_model(model, PruneConfig(method="wanda", pattern="4:8"), text).transformer.h[0].mlp.c_fc
    expected = layer.weight.T * keep_mask(wanda_score(layer.weight.T, ear.rms), pattern="4:8")
    if len(ear.rms) == 32:
        assert pruned.weight.shape == layer.weight.shape
        assert pruned.weight.T.equal(expected)
    x = torch.randn(3, 32)
    assert torch.allclose(pruned(x), F.linear(x, expected, layer.bias), atol=1e-6)


def test_their_packed_models_come_back(tmp_path: Path) -> None:
    for kind in ("gpt2", "llama"):
        model = theirs(kind)
        packed = pack_pruned(prune_model(model, PruneConfig(pattern="2:4")))
        save_quantized(packed, tmp_path / kind)
        with pytest.raises(InputError, match="same shape"):
            load_quantized(tmp_path / kind)
        again = load_quantized(tmp_path / kind, model)
        with torch.inference_mode():
            assert again(reading()[0]).logits.equal(packed(reading()[0]).logits)
