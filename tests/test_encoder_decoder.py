"""Encoder and encoder–decoder: any shape is padding-safe, honest about its labels, and the same with and without its caches; the explorer's page says what Python says."""
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmie.core import InputError
from mmie.models.decoder import IGNORE, DecoderLM, ModelConfig
from mmie.models.encoder_decoder import (Encoder, EncoderDecoderConfig, EncoderDecoderLM, WithSource, encoder_decoder_from_hf, encoder_decoder_to_hf, encoder_from_hf,
                                         generate_targets, load_encoder_decoder, maps_while, pad_sources, relative_buckets, save_encoder_decoder, seq2seq_loss,
                                         shift_right)
from mmie.models.explorer import AttentionExplorer, SentenceMaps, decoder_maps, head_habits, heads_figure, minilm_folder
from mmie.models.search import beam_search
from mmie.tokenization.base import CharacterTokenizer

SOURCES = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8]]


@st.composite
def shapes(draw: Any) -> EncoderDecoderConfig:
    heads, positions = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from(["rope", "relative", "sinusoidal", "learned", "none"]))
    return EncoderDecoderConfig(
        vocab_size=12, d_model=12, n_heads=heads, head_dim=draw(st.sampled_from([None, 6])) if heads != 3 else 4, hidden=8, max_length=16,
        encoder_layers=draw(st.integers(1, 2)), decoder_layers=draw(st.integers(1, 2)), mlp=draw(st.sampled_from(["swiglu", "relu", "silu", "gelu"])),
        norm=draw(st.sampled_from(["rmsnorm", "layernorm"])), norm_first=draw(st.booleans()), bias=draw(st.booleans()),
        positions=positions, **({"buckets": 4, "furthest": 8} if positions == "relative" else {}),
        attention_scale=draw(st.sampled_from([None, 1.0])), scale_embeddings=draw(st.booleans()), embedding_norm=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()), scale_logits=draw(st.booleans()), logits_bias=draw(st.booleans()))


def awake(config: EncoderDecoderConfig, seed: int = 0) -> EncoderDecoderLM:
    torch.manual_seed(seed)
    model = EncoderDecoderLM(config).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.3)
    return model


@settings(max_examples=30, deadline=None)
@given(shapes(), st.integers(1, 7))
def test_any_shape_by_any_path(config: EncoderDecoderConfig, cut: int) -> None:
    "Alone, padded left or right, cached in two pieces: the same logits; and no logit depends on its own label."
    model, target = awake(config), torch.randint(0, 12, (3, 8))
    alone = torch.cat([model(torch.tensor([row]), target[i:i + 1]) for i, row in enumerate(SOURCES)])
    assert alone.std() > 1e-3
    for side in ("right", "left"):
        ids, real = pad_sources(SOURCES, 7, side) # type: ignore[arg-type]
        assert torch.allclose(model(ids, target, real), alone, atol=1e-10, rtol=0)
        reader = WithSource(model, model.encode(ids, real))
        cache = reader.new_cache(3, 8)
        with torch.inference_mode():
            pieces = torch.cat([reader(target[:, :cut], cache=cache), reader(target[:, cut:], cache=cache)], 1)
        assert torch.allclose(pieces, alone, atol=1e-10, rtol=0)
    changed = target.clone()
    changed[:, cut] = (changed[:, cut] + 1) % 12
    moved = (model(ids, shift_right(changed), real) - model(ids, shift_right(target), real)).abs().amax((0, 2))
    assert moved[:cut + 1].max() == 0 and (cut == 7 or moved[cut + 1] > 0)


def test_the_source_matters_to_the_last_token_and_both_ways() -> None:
    config = EncoderDecoderConfig(vocab_size=12, d_model=12, n_heads=2)
    model, source, target = awake(config), torch.tensor([SOURCES[0]]), torch.tensor([[0, 1, 2]])
    for place in range(7):
        other = source.clone()
        other[0, place] = (other[0, place] + 1) % 12
        assert (model(other, target) - model(source, target)).abs().amax((0, 2)).min() > 1e-9
        assert (model.encoder(other) - model.encoder(source)).abs().amax((0, 2)).min() > 1e-9


def test_loss_is_a_mean_over_tokens_that_count() -> None:
    model = awake(EncoderDecoderConfig(vocab_size=12, d_model=12, n_heads=2))
    source, labels = torch.randint(0, 12, (2, 5)), torch.randint(0, 12, (2, 6))
    labels[0, 1:] = IGNORE
    logits = model(source, shift_right(labels))
    by_torch = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    assert torch.allclose(seq2seq_loss(model, source, labels), by_torch)
    for positions in ("rope", "relative", "sinusoidal", "learned", "none"):
        torch.manual_seed(0)
        fresh = EncoderDecoderLM(EncoderDecoderConfig(vocab_size=500, positions=positions)) # type: ignore[arg-type]
        loss = seq2seq_loss(fresh, torch.randint(0, 500, (8, 20)), torch.randint(0, 500, (8, 20)))
        assert abs(loss.item() - math.log(500)) < 0.3


def test_generation_of_all_kinds() -> None:
    "Rows of a batch are as alone, whoever ends first; beam search takes the adapter too, and finds at least what greedy finds."
    model = awake(EncoderDecoderConfig(vocab_size=12, d_model=12, n_heads=2, max_length=20))
    for knobs in ({"temperature": 0}, {"temperature": 0, "eos_id": [1, 2, 3, 4]}):
        together = generate_targets(model, SOURCES, 8, **knobs) # type: ignore[arg-type]
        assert together == [generate_targets(model, [row], 8, **knobs)[0] for row in SOURCES] # type: ignore[arg-type]
    reader = WithSource(model, model.encode(torch.tensor(SOURCES[:1])))
    greedy, beam = (beam_search(reader, [[0]], 6, beams=n)[0][0] for n in (1, 4))
    assert greedy.tokens == generate_targets(model, SOURCES[:1], 6, temperature=0)[0]
    assert beam.log_prob >= greedy.log_prob - 1e-9


def test_caches_hold_what_the_formula_says() -> None:
    config = EncoderDecoderConfig(vocab_size=12, d_model=12, n_heads=2, decoder_layers=3)
    reader = WithSource(awake(config), awake(config).encode(torch.tensor(SOURCES[:1])))
    assert reader.new_cache(4, 10).bytes == 2 * 3 * 4 * 12 * (10 + 7) * 8
    two = WithSource(reader.model, reader.model.encode(*pad_sources(SOURCES[:2])))
    with pytest.raises(InputError, match="3 targets for 2 sources"):
        two.new_cache(3, 10)


@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets_are_a_ladder(both_ways: bool) -> None:
    back = relative_buckets(-torch.arange(2000), both_ways)
    assert back.diff().min() >= 0 and back.diff().max() == 1 and back[-1] == (15 if both_ways else 31) == back[128]


def test_saved_folders(tmp_path: Path) -> None:
    for name, changes in {"t5": {"positions": "relative", "attention_scale": 1.0, "scale_logits": True, "mlp": "relu"},
                          "marian": {"positions": "sinusoidal", "norm": "layernorm", "norm_first": False, "bias": True, "logits_bias": True}}.items():
        model = awake(EncoderDecoderConfig(vocab_size=12, d_model=12, n_heads=2, mlp="silu").replace(**changes)).float()
        save_encoder_decoder(model, tmp_path / name)
        again = load_encoder_decoder(tmp_path / name)
        source, target = torch.randint(0, 12, (2, 2, 5))
        assert again(source, target).equal(model(source, target)) and again.config == model.config
        encoder_decoder_to_hf(model, tmp_path / f"{name}-hub")
        back = encoder_decoder_from_hf(tmp_path / f"{name}-hub")
        assert torch.allclose(back(source, target), model(source, target), atol=1e-6)
        with pytest.raises(InputError, match="not a BERT"):
            encoder_from_hf(tmp_path / f"{name}-hub")
        with pytest.raises(InputError, match="belongs to something else"):
            load_encoder_decoder(tmp_path / f"{name}-hub")


def test_what_must_not_load(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="pickle"):
        encoder_decoder_from_hf(tmp_path)
    model = awake(EncoderDecoderConfig(vocab_size=12, d_model=12, n_heads=2, positions="relative", attention_scale=1.0, scale_logits=True, mlp="relu")).float()
    encoder_decoder_to_hf(model, tmp_path)
    record = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for change, message in (({"num_layers": 3}, "the weights have no"), ({"d_ff": 7}, "doesn't fit"), ({"feed_forward_proj": "tanh"}, "no bend 'tanh'")):
        (tmp_path / "config.json").write_text(json.dumps(record | change), encoding="utf-8")
        with pytest.raises(InputError, match=message):
            encoder_decoder_from_hf(tmp_path)


@pytest.mark.parametrize(("call", "message"), [
    (lambda model: model(torch.tensor([1, 2]), torch.tensor([[0]])), "shape"),
    (lambda model: model(torch.ones(1, 600).long(), torch.tensor([[0]])), "max_length=512"),
    (lambda model: generate_targets(model, [], 3), "empty source, or none"),
    (lambda model: maps_while(lambda: None, [model.encoder.embedding]), "no attention maps"),
])
def test_mistakes_are_sentences(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(EncoderDecoderLM(EncoderDecoderConfig(vocab_size=12, d_model=12, n_heads=2)))


def test_hooks_leave_even_when_the_model_fails() -> None:
    encoder = Encoder(EncoderDecoderConfig(vocab_size=12, d_model=12, n_heads=2))
    layers = [block.attention for block in encoder.blocks]
    with pytest.raises(InputError, match="vocabulary"):
        maps_while(lambda: encoder(torch.tensor([[99]])), layers) # type: ignore[arg-type]
    assert not any(layer._forward_pre_hooks for layer in layers)


@pytest.mark.parametrize("positions", ["rope", "relative", "sinusoidal", "learned"])
def test_quantized_models_run_and_are_not_saved_as_what_they_are_not(positions: Any, tmp_path: Path) -> None:
    from mmie.quantization.post_training import quantize
    model = EncoderDecoderLM(EncoderDecoderConfig(vocab_size=12, d_model=32, positions=positions)).eval()
    small, (source, target) = quantize(model), torch.randint(0, 12, (2, 2, 5))
    torch.testing.assert_close(small(source, target), model(source, target), rtol=0, atol=0.05)
    with pytest.raises(InputError, match="save_quantized"):
        save_encoder_decoder(small, tmp_path)
    assert not list(tmp_path.iterdir())


# The explorer

@pytest.fixture(scope="module")
def read() -> Any:
    torch.manual_seed(0)
    tokenizer = CharacterTokenizer.train(["abc <i>&\"'/script"])
    model = DecoderLM(ModelConfig(vocab_size=tokenizer.vocab_size, d_model=24, n_layers=2, n_heads=3, max_length=64))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return lambda text: decoder_maps(model, tokenizer, text)


def test_habits_add_up(read: Any) -> None:
    seen = read("abcabc")
    for row in head_habits(seen):
        for habit in row:
            assert 0 <= habit.previous <= 1 and habit.next == 0 and 0 <= habit.entropy <= math.log2(6)
    uniform = SentenceMaps(tuple("abcd"), torch.full((1, 1, 4, 4), 0.25))
    assert head_habits(uniform)[0][0].distance == pytest.approx((1 + 0 + 1 + 2 + 2 + 1 + 0 + 1 + 3 + 2 + 1 + 0) / 12)
    assert len(heads_figure(seen).axes) == 2


def test_no_package_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install"):
        minilm_folder()


def test_the_page_says_what_python_says(read: Any, browser: Any, tmp_path: Path) -> None:
    "Every head and token by keyboard: the sentence under the words is Python's, nothing is fetched, and markup stays text."
    text = "</script><i>a&b"
    explorer = AttentionExplorer(read, text)
    page_file = explorer.save(tmp_path / "heads.html")
    page, trouble = browser.new_page(), []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: trouble.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
    page.goto(page_file.as_uri())
    assert page.locator(".words b").all_text_contents() == list(explorer.seen.tokens) and page.locator(".all button").count() == 6
    for layer, head in ((1, 1), (2, 3)):
        page.get_by_label("Layer").select_option(index=layer - 1)
        page.get_by_label("Head").select_option(index=head - 1)
        page.locator(".words button").first.focus()
        for token in range(1, len(text) + 1):
            explorer.look(layer, head, token)
            said = page.locator("output").inner_text()
            assert said.split(" looks at ")[0] == f"Layer {layer}, head {head}: “{explorer.seen.tokens[token - 1]}”"
            pressed = page.locator(".words [aria-pressed=true] b").all_text_contents()
            assert pressed == [explorer.seen.tokens[token - 1]]
            shares = explorer.seen.maps[layer - 1, head - 1, token - 1]
            drawn = [float(a) for a in page.eval_on_selector_all(".words button", "all => all.map(e => e.style.getPropertyValue('--a'))")]
            assert torch.allclose(torch.tensor(drawn), shares, atol=0.008)
            page.keyboard.press("ArrowRight")
    assert not trouble
