"""Quantizing whole models as their users would, wrongly too: every method on many models, files, dtypes, hooks, and what is refused."""
import copy
import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from mmie.core import InputError
from mmie.models.decoder import DecoderLM, ModelConfig
from mmie.models.encoder_decoder import EncoderDecoderConfig, EncoderDecoderLM
from mmie.quantization import activations, linear, packed
from mmie.quantization.activations import Int8DynamicLinear
from mmie.quantization.aware import AwareConfig, prepare_aware
from mmie.quantization.linear import Int8Linear
from mmie.quantization.mixed import choose_layers, layer_sensitivity
from mmie.quantization.packed import Int4Linear
from mmie.quantization.post_training import (
    QuantConfig, check_compatible, is_quantized, load_quantized, prediction_drift, quantizable, quantize, restore, save_quantized, size_report)

CONFIGS = {
    "int8_weight": QuantConfig(), "no tables": QuantConfig(embeddings=False), "dynamic": QuantConfig(method="int8_dynamic"),
    "dynamic, smooth": QuantConfig(method="int8_dynamic", smoothing="smoothquant"),
    "static": QuantConfig(method="int8_static", observer="mse", sequential=True),
    "static, smooth": QuantConfig(method="int8_static", smoothing="smoothquant"), "outliers": QuantConfig(method="llm_int8", outlier_threshold=1.5),
    "int4": QuantConfig(method="int4_weight", group=32), "gptq": QuantConfig(method="int4_weight", rounding="gptq", sequential=True),
    "awq": QuantConfig(method="int4_weight", smoothing="awq"), "awq, gptq": QuantConfig(method="int4_weight", smoothing="awq", rounding="gptq"),
    "nf4": QuantConfig(method="nf4_weight"), "mixed": QuantConfig(method="int4_weight", layers={"blocks.0": "int8_dynamic"})}
SOME = ("static", "dynamic, smooth", "outliers", "awq, gptq", "nf4")
FOUR = {"int4", "gptq", "awq", "awq, gptq", "nf4", "mixed"}
MODELS: dict[str, dict[str, object]] = {
    "tied": {}, "untied": {"tie_embeddings": False, "n_kv_heads": 2}, "biases": {"bias": True, "norm": "layernorm", "positions": "learned"},
    "experts": {"experts": 3}, "odd": {"d_model": 60, "n_heads": 2, "hidden": 90}, "window": {"window": 6, "full_every": 2, "sinks": 1},
    "waves": {"positions": "sinusoidal"}, "alibi": {"positions": "alibi"}}
STATIC = QuantConfig(method="int8_static")
IDS = torch.randint(96, (3, 20), generator=torch.Generator().manual_seed(1))
TEXT = [torch.randint(96, (8, 24), generator=torch.Generator().manual_seed(2)), IDS]


def decoder(dtype: torch.dtype = torch.float32, **options: object) -> DecoderLM:
    torch.manual_seed(0)
    model = DecoderLM(ModelConfig(**{"vocab_size": 96, "d_model": 64, "n_layers": 2, "n_heads": 4, "hidden": 128, "max_length": 64} | options))
    for p in model.parameters():
        if p.ndim == 1:
            nn.init.normal_(p.data, 1.0, 0.1) # norms that need all their digits
    return model.to(dtype).eval()


def says(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids)


def far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).std() / theirs.double().std())


# ---- the whole way, for every method

@pytest.mark.parametrize("name", MODELS)
def test_every_method_on_many_models(name: str, tmp_path: Path) -> None:
    model = decoder(**MODELS[name])
    before, ref = {key: value.clone() for key, value in model.state_dict().items()}, says(model)
    for way, config in CONFIGS.items() if name in ("tied", "untied") else ((way, CONFIGS[way]) for way in SOME):
        small = quantize(model, config, TEXT)
        out = says(small)
        assert far(out, ref) < (0.5 if name == "experts" else 0.25 if way in FOUR else 0.05), (way, far(out, ref))
        save_quantized(small, tmp_path / way)
        for other in (load_quantized(tmp_path / way), load_quantized(tmp_path / way, model), copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
            assert says(other).equal(out) and size_report(other).memory == size_report(small).memory, way
        empty = copy.deepcopy(small)
        empty.load_state_dict(small.state_dict())
        assert says(empty).equal(out)
        assert small.generate(IDS[:1, :4], max_new_tokens=3) and not is_quantized(restore(small))
        assert says(small.to(torch.float64)).dtype == torch.float64
        with pytest.raises(InputError, match="quantized already"):
            quantize(small, config, TEXT)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    "What stays a float keeps its type: in memory, in a file, and on the way back."
    model = decoder(dtype, bias=True)
    for way, config in CONFIGS.items():
        small = quantize(model, config, TEXT)
        out = says(small)
        assert out.dtype == dtype and far(out, says(model)) < (0.25 if way in FOUR else 0.05), way
        save_quantized(small, tmp_path / way)
        assert says(load_quantized(tmp_path / way)).equal(out), way
        assert says(load_quantized(tmp_path / way, decoder(bias=True))).equal(out), way
        back = restore(small)
        assert {p.dtype for p in back.parameters()} == {dtype} and far(says(back), out) < 0.05, way
        assert says(restore(small, torch.float32).float()).dtype == torch.float32


def test_smoothing_in_half_precision_is_as_good_as_in_single() -> None:
    model = decoder()
    model.blocks[1].mlp_norm.weight.data[5] = 60.0 # a loud channel
    for way in ("dynamic, smooth", "awq", "awq, gptq"):
        errors = [far(says(quantize(copy.deepcopy(model).to(dtype), CONFIGS[way], TEXT)), says(model)) for dtype in (torch.float32, torch.float16)]
        assert errors[1] < 1.15 * errors[0], (way, errors)


def test_without_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    "Another machine computes nearly the same with the same files."
    made = {way: quantize(decoder(), config, TEXT) for way, config in CONFIGS.items()}
    here = {way: says(model) for way, model in made.items()}
    for way, model in made.items():
        save_quantized(model, tmp_path / way)
    monkeypatch.setattr(linear, "int8_support", lambda device="cpu": linear.Int8Support(False, False, 0))
    monkeypatch.setattr(packed, "int4_support", lambda device="cpu": packed.Int4Support(0, False, 0))
    monkeypatch.setattr(activations, "integer_kernel", lambda device="cpu": False)
    for way in made:
        there = load_quantized(tmp_path / way)
        assert far(says(there), here[way]) < 0.02, way
        assert all(a.equal(b) for a, b in zip(there.state_dict().values(), made[way].state_dict().values(), strict=True)), way


def test_inside_of_inference_mode() -> None:
    "What is made there can be trained afterwards, like any other model."
    model = decoder(bias=True)
    for way in ("static", "awq, gptq", "outliers", "mixed", "no tables"):
        with torch.inference_mode():
            small = quantize(model, CONFIGS[way], TEXT)
        small(IDS).logsumexp(-1).sum().backward()
        assert not any(p.is_inference() for p in small.parameters()), way
    model(IDS).sum().backward()


def test_back_from_inference_mode(tmp_path: Path) -> None:
    "So can what is restored or loaded there, and a model that was itself made there can be quantized outside."
    small = quantize(decoder(bias=True), CONFIGS["awq"], TEXT)
    save_quantized(small, tmp_path)
    with torch.inference_mode():
        born = decoder(bias=True)
        back, loaded, own = restore(small), load_quantized(tmp_path), load_quantized(tmp_path, decoder(bias=True))
    for model in (back, loaded, own, quantize(born, "int8_static", TEXT)):
        assert not any(p.is_inference() for p in model.parameters())
        model(IDS).logsumexp(-1).sum().backward()
    assert all(p.grad is not None for p in back.parameters())


def test_autocast_and_threads() -> None:
    model = decoder()
    with torch.autocast("cpu", torch.bfloat16):
        under = {way: quantize(model, CONFIGS[way], TEXT) for way in (*SOME, "mixed")}
    for way in under:
        config = CONFIGS[way]
        small, found = quantize(model, config, TEXT), []
        out = says(small)
        assert says(under[way]).equal(out), way
        with torch.autocast("cpu", torch.bfloat16):
            assert far(says(small), out) < 0.05
        threads = [threading.Thread(target=lambda small=small, found=found: found.append(says(small))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(one.equal(out) for one in found) and len(found) == 3, way


# ---- what is where in a model

class Twice(nn.Module):
    "A layer in two places, and a matrix in two layers."
    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.c, self.d, self.out = nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 50)
        self.b, self.d.weight = self.a, self.c.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.d(self.c(self.b(self.a(self.table(ids)).relu()).relu()).relu()))


@pytest.mark.parametrize("way", [way for way in CONFIGS if way != "mixed"])
def test_what_is_used_twice_stays_one(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = Twice().eval(), torch.randint(50, (4, 9))
    small, same = quantize(model, CONFIGS[way], [ids]), quantize(copy.deepcopy(model), CONFIGS[way], [ids], inplace=True)
    save_quantized(small, tmp_path)
    for one in (small, same, load_quantized(tmp_path, Twice())):
        assert one.a is one.b and one.c.weight is one.d.weight and says(one, ids).equal(says(small, ids))
    back = restore(small)
    assert back.a is back.b and back.c.weight is back.d.weight


def test_weights_of_eight_bits_already() -> None:
    eight = nn.Sequential(nn.Linear(64, 64))
    eight[0].weight = nn.Parameter(eight[0].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(InputError, match=r"float8_e4m3fn .*another library"):
        quantize(eight)


def test_a_pattern_means_what_is_inside() -> None:
    model = decoder()
    small = quantize(model, QuantConfig(method="int4_weight", skip=("blocks.0.attention",), layers={"blocks.1": "int8_dynamic", "*.mlp": "int8_weight"}))
    assert {type(m).__name__ for m in small.blocks[0].attention.children() if hasattr(m, "weight")} == {"Linear"}
    assert type(small.blocks[0].mlp.down_proj) is Int8Linear and type(small.blocks[1].mlp.down_proj) is Int8DynamicLinear
    assert not any(name.startswith("blocks.0") for name in quantizable(model, QuantConfig(skip=("blocks.0",))))
    assert not any(isinstance(m, Int4Linear) for m in small.modules())


ROUTER = "blocks.0.mlp.router"


def test_routers_stay_unless_they_are_named(tmp_path: Path) -> None:
    model = decoder(experts=3)
    for config in (QuantConfig(), QuantConfig(method="nf4_weight"), QuantConfig(layers={"*": "int4_weight"}), QuantConfig(layers={"blocks.0": "int4_weight"}),
                   QuantConfig(layers={"blocks.0.mlp.*": "int4_weight"}), QuantConfig(layers={"*": "int4_weight", "blocks.1.*.router": "int8_weight"})):
        if len(config.layers) < 2:
            small = quantize(model, config)
            assert small.get_submodule(ROUTER).weight.equal(model.get_submodule(ROUTER).weight) and is_quantized(small.blocks[0].mlp.experts)
        found = [f for f in check_compatible(model, config) if f.name == ROUTER]
        assert ROUTER not in quantizable(model, config) and not found[0].fatal and "experts" in found[0].what
    for pattern in (ROUTER, "*.router", "*router"):
        small = quantize(model, QuantConfig(layers={pattern: "int8_dynamic"}))
        assert type(small.get_submodule(ROUTER)) is Int8DynamicLinear
        save_quantized(small, tmp_path)
        assert says(load_quantized(tmp_path)).equal(says(small))
    with pytest.raises(InputError, match="matches no linear layer"): # as the first pattern counts
        quantize(model, QuantConfig(layers={"*": "int4_weight", "*.router": "int8_weight"}))
    for named in (None, QuantConfig(layers={"*.router": "int8_weight"})):
        found = layer_sensitivity(model, IDS, ("int8_weight",), named)
        assert not any("router" in name for unit in found.units for name in unit) and found.total([1] * len(found.units))[1] == size_report(model).memory


def test_a_gate_is_a_router_beside_experts_only() -> None:
    class Mixture(nn.Module):
        def __init__(self, experts: bool) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(64, 4), nn.Linear(64, 64)
            if experts:
                self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    assert list(quantizable(Mixture(False))) == ["gate", "up"]
    assert list(quantizable(Mixture(True))) == ["up", *(f"experts.{n}" for n in range(4))]


def test_layers_that_stay() -> None:
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)), nn.Linear(64, 64), nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)))
    assert [f.name for f in check_compatible(normed)] == ["0", "2"] and list(quantizable(normed)) == ["1"]
    patched = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    patched[0].forward = lambda x: x # as accelerate does
    assert list(quantizable(patched)) == ["1"]


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_are_not_lost(hook: str) -> None:
    model = decoder()
    handle = getattr(model.blocks[0].mlp.down_proj, hook)(lambda *_: None)
    with pytest.raises(InputError, match="hooks"):
        quantize(model)
    handle.remove()
    assert is_quantized(quantize(model))


@pytest.mark.parametrize("method", ["int8_weight", "int8_dynamic", "int8_static", "llm_int8", "int4_weight", "nf4_weight"])
def test_what_wanted_a_gradient_still_does(method: str) -> None:
    model = decoder(bias=True).train()
    for p in list(model.parameters())[::2]:
        p.requires_grad_(False)
    wants, small = {name: p.requires_grad for name, p in model.named_parameters()}, quantize(model, method, TEXT)
    assert all(m.training for m in small.modules()) and model.training
    for name, p in small.named_parameters():
        assert p.requires_grad == (wants.get(name, False) if name.endswith("bias") or "norm" in name else False), name
    small(IDS).logsumexp(-1).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in small.parameters())


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("method", ["int8_weight", "int8_dynamic", "llm_int8", "int4_weight", "nf4_weight"])
def test_weights_of_any_size(method: str, size: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64, bias=False)), torch.randn(5, 64)
    model[0].weight.data.mul_(size)
    ours, theirs = says(quantize(model, method), x), says(model, x)
    assert ours.isfinite().all() and float((ours - theirs).abs().max()) <= 0.2 * float(theirs.abs().max())


# ---- what is refused

BAD: dict[str, tuple[Callable[[], object], str]] = {
    "no calibration": (lambda: quantize(decoder(), STATIC), "has to see inputs"), "an empty one": (lambda: quantize(decoder(), STATIC, []), "is empty"),
    "which layers": (lambda: quantize(decoder(), QuantConfig(layers={"blocks.0": "int8_static"})), "int8_static"),
    "floats": (lambda: quantize(decoder(), STATIC, [IDS.float()]), "whole numbers"), "a row": (lambda: quantize(decoder(), STATIC, [IDS[0]]), "batch"),
    "strangers": (lambda: quantize(decoder(), STATIC, [IDS + 96]), "vocabulary"), "too long": (lambda: quantize(decoder(), STATIC, [IDS.repeat(1, 9)]), "max_length"),
    "one tensor": (lambda: quantize(decoder(), STATIC, IDS), "list of batches"), "a generator": (lambda: quantize(decoder(), STATIC, (x for x in TEXT)), "list of"), # type: ignore[arg-type]
    "a mapping": (lambda: quantize(decoder(), STATIC, {"ids": IDS}), "list of batches"), "bytes": (lambda: quantize(decoder(), STATIC, [IDS.byte()]), "uint8"), # type: ignore[arg-type]
    "names": (lambda: quantize(decoder(), STATIC, [{"input_ids": IDS}]), "its forward"),
    "lists": (lambda: quantize(decoder(), STATIC, [IDS.tolist()]), "a list"), "a string": (lambda: quantize(decoder(), STATIC, ["text"]), "a str"), # type: ignore[list-item]
    "skip": (lambda: quantize(decoder(), QuantConfig(skip=("blokcs",))), "matches no module"),
    "layers": (lambda: quantize(decoder(), QuantConfig(layers={"norm": "int4_weight"})), "matches no linear layer"),
    "all skipped": (lambda: quantize(decoder(), QuantConfig(skip=("*",))), "no layer is left"),
    "learning": (lambda: quantize(prepare_aware(decoder()), "int4_weight"), "convert_aware"),
    "prepare": (lambda: prepare_aware(decoder(), QuantConfig()), "AwareConfig"), # type: ignore[arg-type]
    "twice": (lambda: prepare_aware(prepare_aware(decoder())), "already"), "bits": (lambda: AwareConfig(bits=9), "bits"),
    "a list of ids": (lambda: layer_sensitivity(decoder(), [IDS]), "rows of"), "drift": (lambda: prediction_drift(decoder(), decoder(), [IDS]), "rows of"), # type: ignore[arg-type]
    "budget": (lambda: choose_layers(layer_sensitivity(decoder(), IDS), float("nan")), "too few"), "meta": (lambda: quantize(decoder().to("meta")), "meta device"),
    "packed inputs": (lambda: quantize(decoder(), "int4_weight").blocks[0].mlp.down_proj(torch.zeros(2, 128, dtype=torch.uint8)), "cast")}


@pytest.mark.parametrize("what", BAD)
def test_refused_with_a_reason(what: str) -> None:
    with pytest.raises(InputError, match=BAD[what][1]):
        BAD[what][0]()


def test_the_check_says_what_quantize_would() -> None:
    for config, text in ((STATIC, None), (STATIC, []), (QuantConfig(layers={"norm": "int8_dynamic"}), None), (QuantConfig(skip=("x",)), None)):
        fatal = [f for f in check_compatible(decoder(), config, text) if f.fatal]
        assert len(fatal) == 1
        with pytest.raises(InputError, match=fatal[0].what.split("(")[0].replace("'", ".")):
            quantize(decoder(), config, text)


def test_any_budget() -> None:
    model = decoder(tie_embeddings=False)
    found, whole = layer_sensitivity(model, IDS, ("int4_weight", "int8_weight")), size_report(model).memory
    for share in (0.25, 0.5, 0.9):
        for exact in (True, False):
            assert size_report(quantize(model, choose_layers(found, share * whole, exact=exact))).memory <= share * whole
    for exact in (True, False):
        assert size_report(quantize(model, choose_layers(found, whole - 1, exact=exact))).memory < whole
        for enough in (whole, float("inf")):
            with pytest.raises(InputError, match=f"as it is .*less than {whole:,} bytes"): # not a plan that quantize would refuse
                choose_layers(found, enough, exact=exact)


def test_a_layer_that_hears_nothing() -> None:
    "Inputs that are all zero leave nothing to choose by."
    model = decoder()
    for block in model.blocks:
        block.mlp_norm.weight.data.zero_()
    for way in ("awq", "awq, gptq", "dynamic, smooth", "static, smooth"):
        assert far(says(quantize(model, CONFIGS[way], TEXT)), says(model)) < 0.25, way


# ---- files

def _without(key: str) -> Callable[[dict[str, object]], object]:
    return lambda record: record.pop(key)


DAMAGE: Mapping[str, Callable[[dict], object]] = {
    "no format": _without("format"), "no model": _without("model"), "another format": lambda r: r.update(format=99), "model null": lambda r: r.update(model=None),
    "layers null": lambda r: r.update(layers=None), "layers list": lambda r: r.update(layers=[1]), "aliases null": lambda r: r.update(aliases=None),
    "an alias": lambda r: r["aliases"].update({"a.b": "c"}), "class": lambda r: r["model"].update({"class": "X"}),
    "shape": lambda r: r["layers"]["blocks.0.mlp.up_proj"].update(shape=[1, 2]), "kind": lambda r: r["layers"]["blocks.0.mlp.up_proj"].update(kind="x"),
    "other kind": lambda r: r["layers"]["blocks.0.mlp.up_proj"].update(kind="nf4_weight"), "dtype": lambda r: r["layers"]["embedding"].update(dtype="nope"),
    "larger": lambda r: r["model"]["config"].update(n_layers=3), "impossible": lambda r: r["model"]["config"].update(n_heads=7)}


def test_damaged_files(tmp_path: Path) -> None:
    save_quantized(quantize(decoder(), "int8_dynamic"), tmp_path / "good")
    for name, change in DAMAGE.items():
        shutil.copytree(tmp_path / "good", tmp_path / name)
        record = json.loads((tmp_path / name / "quantized.json").read_text(encoding="utf-8"))
        change(record)
        (tmp_path / name / "quantized.json").write_text(json.dumps(record), encoding="utf-8")
        with pytest.raises(InputError):
            load_quantized(tmp_path / name)
    with pytest.raises(InputError, match=r"no format is called 'x'.*Import the module"):
        load_quantized(tmp_path / "kind")
    for at in (0, 100, -1):
        data = bytearray((tmp_path / "good" / "quantized.safetensors").read_bytes())
        data[at] ^= 1
        (tmp_path / "good" / "quantized.safetensors").write_bytes(data)
        with pytest.raises(InputError, match="damaged"):
            load_quantized(tmp_path / "good")
    os.remove(tmp_path / "good" / "quantized.safetensors")
    with pytest.raises(InputError, match="missing"):
        load_quantized(tmp_path / "good")


@pytest.mark.parametrize("method", ["int8_weight", "int8_static", "int4_weight", "nf4_weight"])
def test_another_models_file(method: str, tmp_path: Path) -> None:
    save_quantized(quantize(decoder(), method, TEXT), tmp_path)
    for other in (decoder(d_model=32, n_heads=2), decoder(n_layers=1), decoder(n_layers=3), nn.Linear(4, 4), Twice()):
        with pytest.raises(InputError):
            load_quantized(tmp_path, other)


# ---- an encoder and a decoder, and other people's models

def test_encoder_and_decoder(tmp_path: Path) -> None:
    "Calibration reaches the cross-attention, too, which takes its matrix apart otherwise."
    torch.manual_seed(0)
    model = EncoderDecoderLM(EncoderDecoderConfig(vocab_size=96, d_model=64, n_heads=4, hidden=128, encoder_layers=1, decoder_layers=2)).eval()
    batch = {"source": IDS, "ids": IDS[:, :7]}
    with torch.inference_mode():
        real = model(**batch)
        for way in (*SOME, "static"):
            small = quantize(model, CONFIGS[way], [batch])
            assert far(small(**batch), real) < (0.25 if way in FOUR else 0.05), way
            save_quantized(small, tmp_path / way)
            assert load_quantized(tmp_path / way, model)(**batch).equal(small(**batch)), way
    with pytest.raises(InputError, match="its forward"):
        quantize(model, STATIC, [IDS])



def _hf(name: str) -> nn.Module:
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    llama = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 64}
    t5 = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    return {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**llama)), "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**llama, tie_word_embeddings=True)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)),
        "bert": lambda: t.BertModel(t.BertConfig(**{k: v for k, v in llama.items() if k != "num_key_value_heads"})),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**t5)),
        "gated t5": lambda: t.T5EncoderModel(t.T5Config(**t5, feed_forward_proj="gated-gelu"))}[name]().eval()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "bert", "t5", "gated t5"])
def test_transformers(name: str, tmp_path: Path) -> None:
    model, batch = _hf(name), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    batch |= {"decoder_input_ids": IDS[:, :7]} if name == "t5" else {}

    @torch.inference_mode()
    def answer(one: nn.Module) -> torch.Tensor:
        out = one(**batch)
        return getattr(out, "logits", None) if hasattr(out, "logits") else out.last_hidden_state
    real = answer(model)
    for way, config in CONFIGS.items():
        if way not in (*SOME, "int4", "no tables"):
            continue
        small = quantize(model, config, [batch])
        out = answer(small)
        assert far(out, real) < (0.35 if way in FOUR else 0.08), (way, far(out, real))
        save_quantized(small, tmp_path / way)
        assert answer(load_quantized(tmp_path / way, _hf(name))).equal(out), way
    if "t5" in name: # which casts inputs to the type of these weights
        found = [f for f in check_compatible(model, "int4_weight") if "cast" in f.what]
        assert found and all(f.name.endswith(".wo") and not f.fatal for f in found)
        assert all(type(m) is Int8Linear for n, m in quantize(model, "nf4_weight").named_modules() if n.endswith(".wo"))
