"""Translation: data that can't leak, batches that lose nothing, a model that can't peek, readers that drop nothing, a translator that survives a folder and a stop."""
import datetime
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmie.core import InputError
from mmie.models.decoder import IGNORE
from mmie.models.encoder_decoder import EncoderDecoderConfig, EncoderDecoderLM, encoder_decoder_to_hf, generate_targets
from mmie.tokenization.base import ByteTokenizer
from mmie.training.data import BatchSource, EpochSource
from mmie.training.trainer import TrainConfig, Trainer, evaluate
from mmie.training.translation import (END_MARK, SAYINGS, START_MARK, HeldOutTexts, PairBatch, TextPair, TextPairBatches, Translated, TranslationReport, align_words, alignment_figure, cldr_pairs,
                                       collate_texts, encode_texts, erase_words, is_held_out, load_translator, pair_logits, pair_loss, peeks, read_aligned, read_jsonl,
                                       read_parallel, read_po, read_tsv, save_translator, score_translations, shared_tokenizer, token_words, translate, worst_translations)

TOKENIZER = ByteTokenizer([START_MARK, END_MARK])


def a_model(seed: int = 0, **shape: object) -> EncoderDecoderLM:
    torch.manual_seed(seed)
    fields = {"d_model": 16, "n_heads": 2, "encoder_layers": 1, "decoder_layers": 1, "hidden": 16} | shape
    return EncoderDecoderLM(EncoderDecoderConfig(vocab_size=258, max_length=96, start_id=256, **fields)) # type: ignore[arg-type]


# --- the data

@pytest.mark.parametrize(("source", "target"), [("en", "fr"), ("de", "hu"), ("ja", "ar"), ("pt_BR", "zh-Hant"), ("hi", "sw"), ("fa", "en")])
def test_pairs_of_any_languages(source: str, target: str) -> None:
    "Both sides non-empty, no name of a unit or currency where a word should be, training and exam apart, one call like the other."
    taught, exam = (cldr_pairs(source, target, 300, held_out=held_out) for held_out in (False, True))
    assert taught == cldr_pairs(source, target, 300)
    assert not {p.value for p in taught} & {p.value for p in exam}
    assert all(is_held_out(p.value) for p in exam) and not any(is_held_out(p.value) for p in taught)
    for pair in taught + exam:
        assert pair.source.strip() and pair.target.strip()
        assert not any(hole in text for text in (pair.source, pair.target) for hole in ("duration-", "length-", "mass-", "volume-", "digital-", "temperature-"))


def test_a_held_out_day_is_never_taught() -> None:
    "In none of its formats, for any seed, number of pairs or language; and its ISO date decides."
    taught = {text for seed in range(5) for target in ("fr", "hu") for p in cldr_pairs("en", target, 400, ["date"], seed) for text in (p.source, p.target)}
    for seed in range(3):
        for pair in cldr_pairs("en", "fr", 100, ["date"], seed, held_out=True):
            assert pair.source not in taught and pair.target not in taught
            assert is_held_out(datetime.date.fromisoformat(pair.value).isoformat())


def test_limits_are_kept() -> None:
    for pair in cldr_pairs("en", "fr", 200, ["date"], years=(1850, 1852)):
        assert pair.value[:4] in ("1850", "1851")
    assert max(float(p.value) for p in cldr_pairs("en", "fr", 500, ["number"], digits=2)) < 100
    assert {len(p.value.split(".")[0]) for p in cldr_pairs("en", "fr", 800, ["number"], digits=6)} == {1, 2, 3, 4, 5, 6}
    assert [p.kind for p in cldr_pairs("en", "fr", 12)] == [*SAYINGS] * 2


@pytest.mark.parametrize(("arguments", "message"), [
    (("en", "frr_XX", 1), "there is no locale"), (("English", "fr", 1), "did you mean 'en'"), (("", "fr", 1), "there is no locale"), ((None, "fr", 1), "there is no locale"),
    (("en", "fr", 1, []), "can't say 'nothing'"), (("en", "fr", 1, ["dates"]), "did you mean 'date'")])
def test_unknown_names(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cldr_pairs(*arguments)


def test_without_babel_and_sacrebleu() -> None:
    "The chapter imports, trains and translates without its optional companions, and names them where they're needed."
    program = """
import sys
sys.modules["babel"] = sys.modules["sacrebleu"] = None
from mmie.core import InputError
from mmie.training.translation import *
report = TranslationReport((Translated(TextPair("a", "b"), "b"),))
assert report.exact.rate == 1
for call in (lambda: cldr_pairs("en", "fr", 1), lambda: report.bleu):
    try: call()
    except InputError as error: print(error)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120).stdout
    assert said.count("pip install 'mmie[translation]'") == 2


# --- batches

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=20), st.integers(64, 200), st.integers(1, 30), st.integers(0, 99))
def test_every_pair_once_an_epoch(texts: list[tuple[str, str]], max_tokens: int, stretch: int, seed: int) -> None:
    "Nothing lost, nothing twice, the budget kept, what's padded is what was; every stop is invisible."
    pairs = [TextPair(*both) for both in texts]
    source = TextPairBatches(pairs, TOKENIZER, max_tokens=max_tokens, seed=seed, stretch=stretch)
    assert isinstance(source, BatchSource) and isinstance(source, EpochSource)
    found = []
    for n in range(len(source.batches)):
        if n == len(source.batches) // 2:
            state, source = json.loads(json.dumps(source.state_dict())), TextPairBatches(pairs, TOKENIZER, max_tokens=max_tokens, seed=seed, stretch=stretch)
            source.load_state_dict(state)
        batch = source.next_batch()
        assert batch.source.numel() <= max_tokens and batch.labels.numel() <= max_tokens
        for ids, real, labels in zip(batch.source, batch.real, batch.labels, strict=True):
            written = labels[labels != IGNORE].tolist()
            assert written[-1] == 257
            found.append((TOKENIZER.decode(ids[real].tolist()), TOKENIZER.decode(written[:-1])))
    assert sorted(found) == sorted(texts) and source.epoch == 0
    source.next_batch()
    assert source.epoch == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12))
def test_split(rows: int, parts: int) -> None:
    batch = collate_texts([([1] * (i + 1), [2] * (9 - i)) for i in range(rows)], 256)
    pieces = batch.split(parts)
    assert len(pieces) == min(rows, parts) and max(map(len, pieces)) - min(map(len, pieces)) <= 1
    assert torch.cat([p.source for p in pieces]).equal(batch.source) and sum(p.n_tokens for p in pieces) == batch.n_tokens
    assert all(isinstance(p, PairBatch) and p.start_id == 256 for p in pieces)


def test_too_long_or_empty_is_an_error() -> None:
    with pytest.raises(InputError, match="pair 1"):
        encode_texts([TextPair("a", "b"), TextPair("a" * 99, "b")], TOKENIZER, 96)
    with pytest.raises(InputError, match="pair 0"):
        encode_texts([TextPair("", "b")], TOKENIZER, 96)


# --- a loss that can't cheat

@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["rope", "relative", "sinusoidal", "learned", "none"]), st.booleans(), st.integers(0, 9))
def test_no_shape_can_peek(positions: str, norm_first: bool, seed: int) -> None:
    model = a_model(seed, positions=positions, norm_first=norm_first).double()
    batch = collate_texts(encode_texts([TextPair("one", "un deux"), TextPair("three", "x")], TOKENIZER, 96), 256)
    assert peeks(lambda b: pair_logits(model, b), batch) < 1e-12
    for own, _ in model.looks:
        own.causal = False
    assert peeks(lambda b: pair_logits(model, b), batch) > 1e-6
    assert peeks(lambda b: model(b.source, b.labels.clamp(min=0), b.real), batch) > 1e-6


def test_accumulated_is_one_large_batch() -> None:
    "Gradients of pieces, each padded by itself, add up to the large batch's."
    model, rows = a_model().double(), encode_texts(cldr_pairs("en", "fr", 24), TOKENIZER, 96)
    def grads(batches: list[PairBatch]) -> torch.Tensor:
        model.zero_grad()
        total = sum(b.n_tokens for b in batches)
        for batch in batches:
            (pair_loss(model, batch) / total).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    large = grads([collate_texts(rows, 256)])
    assert large.abs().max() > 1e-3
    assert torch.allclose(large, grads([collate_texts(rows[at:at + 5], 256) for at in range(0, 24, 5)]), atol=1e-12, rtol=0)
    assert torch.allclose(large, grads(collate_texts(rows, 256).split(7)), atol=1e-12, rtol=0)


# --- training

def test_stopped_and_resumed_is_never_stopped(tmp_path: Path) -> None:
    pairs = cldr_pairs("en", "fr", 60, ["relative"])
    def trainer(folder: Path | None, steps: int) -> Trainer:
        config = TrainConfig(steps=8, lr=1e-2, device="cpu", precision="float32", checkpoint_every=steps)
        return Trainer(a_model(), TextPairBatches(pairs, TOKENIZER, max_tokens=300), HeldOutTexts(pairs[:9], TOKENIZER), config, folder=folder, loss=pair_loss)
    whole = trainer(None, 8)
    whole.fit()
    stopped = trainer(tmp_path, 3)
    stopped.fit()
    (resumed := trainer(tmp_path / "again", 8)).fit(resume=next(p for p in sorted(tmp_path.iterdir()) if "3" in p.name or "6" in p.name))
    assert resumed.history.losses == whole.history.losses
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_handful_is_learned_by_heart(tmp_path: Path) -> None:
    "Overfit, then: translate, score, point, save, load."
    pairs = cldr_pairs("en", "fr", 8, ["relative"], seed=1)
    tokenizer = shared_tokenizer(cldr_pairs("en", "fr", 300, ["relative"]), 300)
    torch.manual_seed(0)
    model = EncoderDecoderLM(EncoderDecoderConfig(vocab_size=300, d_model=32, n_heads=2, max_length=32, start_id=298, encoder_layers=1, decoder_layers=1))
    held_out = HeldOutTexts(pairs, tokenizer)
    first, _ = evaluate(model, held_out, loss=pair_loss)
    assert abs(first - np.log(300)) < 1
    config = TrainConfig(steps=150, optimizer="muon", lr=5e-3, weight_decay=0.0, device="cpu", precision="float32")
    Trainer(model, TextPairBatches(pairs, tokenizer), None, config, loss=pair_loss).fit()
    report = score_translations(model, tokenizer, pairs)
    assert report.exact.rate == 1 and report.chrf == pytest.approx(100) and not worst_translations(report)
    assert score_translations(model, tokenizer, pairs, beams=3).exact.rate == 1
    texts = [p.source for p in pairs]
    assert translate(model, tokenizer, texts, batch_size=3) == [translate(model, tokenizer, [text])[0] for text in texts]
    assert [tokenizer.decode(ids) for ids in generate_targets(model, [tokenizer.encode(t) for t in texts], 30, temperature=0.0, eos_id=299)] == [p.target for p in pairs]
    for align in (align_words, erase_words):
        one = align(model, tokenizer, pairs[0].source, pairs[0].target)
        assert one.weights.shape == (len(one.target), len(one.source)) and bool(((one.weights >= 0) & (one.weights <= 1 + 1e-5)).all())
    save_translator(tmp_path, model, tokenizer)
    again, words = load_translator(tmp_path)
    assert translate(again, words, texts) == [p.target for p in pairs]
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError):
        load_translator(tmp_path)


def test_marks_in_a_text_are_text() -> None:
    model = a_model()
    assert translate(model, TOKENIZER, [f"x{END_MARK}y"], max_new_tokens=3) != []
    assert all(i < 256 for i in encode_texts([TextPair(f"a{END_MARK}", f"{START_MARK}b")], TOKENIZER, 96)[0][0])


@settings(max_examples=60, deadline=None)
@given(TEXT)
def test_words_hold_every_token(text: str) -> None:
    ids = TOKENIZER.encode(text)
    words = token_words(TOKENIZER, ids)
    places = [place for _, held in words for place in held]
    assert places == sorted(set(places)) and (not words or places == list(range(len(ids))))


def test_a_report_without_kinds() -> None:
    report = TranslationReport((Translated(TextPair("a", "b"), "b"), Translated(TextPair("c", "d e f"), "")))
    assert list(report.by_kind) == [""] and report.exact.correct == 1
    assert [item.pair.source for item in worst_translations(report)] == ["c"]


# --- files

@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6))
def test_files_there_and_back(tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str]]) -> None:
    "Whatever is written is read: line separators, form feeds, spaces at the ends."
    texts = [(a, b) for a, b in texts if not set("\n\r\t") & set(a + b) and not a.startswith("\ufeff") and not b.startswith("\ufeff")]
    if not texts:
        return
    folder, pairs = tmp_path_factory.mktemp("files"), tuple(TextPair(*both) for both in texts)
    (folder / "a.tsv").write_bytes("".join(f"{a}\t{b}\n" for a, b in texts).encode())
    (folder / "a.jsonl").write_bytes("".join(json.dumps({"source": a, "target": b}) + "\n" for a, b in texts).encode())
    for side, name in enumerate(("a.en", "a.fr")):
        (folder / name).write_bytes("\n".join(both[side] for both in texts).encode())
    assert read_tsv(folder / "a.tsv").pairs == read_jsonl(folder / "a.jsonl").pairs == read_aligned(folder / "a.en", folder / "a.fr").pairs == pairs


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5), st.sampled_from(["", " ", "\u3000"]), st.booleans())
def test_a_blank_on_either_side_names_its_line(tmp_path_factory: pytest.TempPathFactory, at: int, blank: str, left: bool) -> None:
    folder, sides = tmp_path_factory.mktemp("blank"), [[f"{side}{n}" for n in range(6)] for side in "ab"]
    sides[not left][at] = blank
    for name, lines in zip(("a.en", "a.fr"), sides, strict=True):
        (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(InputError, match=f"line {at + 1}\\b"):
        read_parallel(folder / "a.en", folder / "a.fr")


def po_text(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r") + '"'


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text("ab %\"\\\tä漢n", min_size=1, max_size=8).filter(str.strip), st.text("xy %\"\\\tß字n", min_size=1, max_size=8).filter(str.strip)),
                min_size=1, max_size=5, unique_by=lambda both: both[0]))
def test_po_there_and_back(tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str]]) -> None:
    path = tmp_path_factory.mktemp("po") / "a.po"
    path.write_text("\n".join(f"msgid {po_text(a)}\nmsgstr {po_text(b)}\n" for a, b in texts), encoding="utf-8")
    read = read_po(path)
    assert {(p.source, p.target) for p in read.pairs} == set(texts) and not read.skipped


@pytest.mark.parametrize(("content", "message"), [
    ('msgid "a"\nmsgstr "b\n', "line 2"), ('msgid "a\nmsgstr "b"\n', "line 1"), ('msgstr "b"\n', "line 1"), ('msgid "a"\nmsgid "c"\nmsgstr "b"\n', "line 2"),
    ('msgid "a"\nmsgstr "b"\nmsgstr "c"\n', "line 3"), ('msgid "a"\nmsgid_plural "as"\nmsgstr[1] "b"\n', "line 3"), ('msgid "a" "b"\nmsgstr "c"\n', "line 1"),
    ('msgid "a"\nmsgstr "b"\nhello\n', "line 3"), ('msgctxt "x"\nmsgstr "b"\n', "line 2"), ('msgid "a"\nmsgstr "b"\n\nmsgid "a"\nmsgstr "b"\n', "second entry"),
    ("", "empty")])
def test_bad_po(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.po").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_po(tmp_path / "a.po")


@pytest.mark.parametrize(("rule", "forms", "pairs"), [
    ("nplurals=1; plural=0", ["日"], [("day", "日"), ("days", "日")]),
    ("nplurals=2; plural=(n != 1)", ["Tag", "Tage"], [("day", "Tag"), ("days", "Tage")]),
    ("nplurals=2; plural=(n > 1)", ["jour", "jours"], [("day", "jour"), ("days", "jours")]),
    ("nplurals=3; plural=(n==1 ? 0 : n>=2 && n<=4 ? 1 : 2)", ["den", "dny", "dnů"], [])])
def test_plurals(tmp_path: Path, rule: str, forms: list[str], pairs: list[tuple[str, str]]) -> None:
    lines = [f'msgid ""\nmsgstr ""\n"Plural-Forms: {rule};\\n"\n\nmsgid "day"\nmsgid_plural "days"', *(f'msgstr[{i}] "{form}"' for i, form in enumerate(forms))]
    (tmp_path / "a.po").write_text("\n".join(lines) + "\n", encoding="utf-8")
    read = read_po(tmp_path / "a.po")
    assert [(p.source, p.target) for p in read.pairs] == pairs and len(read.skipped) == (not pairs)


# --- wrong inputs: each gets one sentence

BAD_PAIRS = {
    "n=-1": {"n": -1}, "n='5'": {"n": "5"}, "n=None": {"n": None}, "n=2.5": {"n": 2.5}, "n=nan": {"n": float("nan")}, "seed=-1": {"seed": -1}, "seed=None": {"seed": None},
    "one kind": {"kinds": "date"}, "no kinds": {"kinds": None}, "kinds of numbers": {"kinds": [3]}, "one year": {"years": (1900,)}, "years=None": {"years": None},
    "no year": {"years": (2000, 2000)}, "year 0": {"years": (0, 5)}, "half years": {"years": (1900.5, 1901.5)}, "digits=0": {"digits": 0}, "digits=13": {"digits": 13}, "digits=2.5": {"digits": 2.5}}


@pytest.mark.parametrize("wrong", BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_wrong_limits_of_pairs(wrong: dict) -> None:
    with pytest.raises(InputError):
        cldr_pairs("en", "fr", **{"n": 3} | wrong)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"max_tokens": 0}, "max_tokens is 0"), ({"max_tokens": None}, "max_tokens is None"), ({"max_length": 0}, "max_length is 0"), ({"stretch": 0}, "stretch is 0"),
    ({"stretch": -1}, "stretch is -1"), ({"seed": -1}, "seed is -1"), ({"seed": None}, "seed is None"), ({"pairs": []}, "no pairs"), ({"pairs": [("a", "b")]}, "of type tuple"),
    ({"pairs": [TextPair("a", None)]}, "expected a text"), ({"max_length": 2}, "the model takes 2"), ({"max_tokens": 2}, "max_tokens=2"), # type: ignore[arg-type]
    ({"tokenizer": ByteTokenizer()}, "no special token")])
def test_wrong_batches(wrong: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TextPairBatches(**{"pairs": [TextPair("one", "un")], "tokenizer": TOKENIZER} | wrong)


def test_held_out_texts_are_checked_at_once() -> None:
    for wrong in ({"pairs": []}, {"max_tokens": 0}, {"max_length": 2}, {"pairs": [TextPair("a", "")]}):
        with pytest.raises(InputError):
            HeldOutTexts(**{"pairs": [TextPair("one", "un")], "tokenizer": TOKENIZER} | wrong)
    with pytest.raises(InputError, match="needs a row"):
        collate_texts([], 256)
    with pytest.raises(InputError, match="changed since"):
        TextPairBatches([TextPair("one", "un")], TOKENIZER).load_state_dict({})
    with pytest.raises(InputError, match="too little text"):
        shared_tokenizer([], 700)


@pytest.mark.parametrize("wrong", [
    {"texts": None}, {"texts": "one"}, {"texts": [None]}, {"texts": ["a", "  "]}, {"texts": ["a" * 97]}, {"beams": 0}, {"beams": 1.5}, {"batch_size": 0}, {"batch_size": -1},
    {"max_new_tokens": 0}, {"max_new_tokens": 96}, {"tokenizer": ByteTokenizer()}, {"tokenizer": ByteTokenizer([START_MARK, END_MARK, "<more>"])}], ids=str)
def test_wrong_questions(wrong: dict) -> None:
    with pytest.raises(InputError):
        translate(**{"model": a_model(), "tokenizer": TOKENIZER, "texts": ["one"]} | wrong)


def test_no_questions_no_answers() -> None:
    assert translate(a_model(), TOKENIZER, []) == []


@pytest.mark.parametrize("tokenize", ["chars", None, "ja-mecab"])
def test_wrong_cuts_show_before_the_work(tokenize: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if tokenize == "ja-mecab" and importlib.util.find_spec("MeCab"):
        pytest.skip("MeCab is installed")
    monkeypatch.setattr("mmie.training.translation.translate", lambda *_, **__: pytest.fail("it was translated first"))
    with pytest.raises(InputError, match="BLEU can't cut text"):
        score_translations(a_model(), TOKENIZER, [TextPair("a", "b")], tokenize=tokenize)


def test_reports_of_nothing() -> None:
    with pytest.raises(InputError, match="nothing to grade"):
        TranslationReport(())
    with pytest.raises(InputError, match="no questions"):
        score_translations(a_model(), TOKENIZER, [])
    with pytest.raises(InputError, match="n is -1"):
        worst_translations(TranslationReport((Translated(TextPair("a", "b"), "c"),)), -1)
    with pytest.raises(InputError, match="nothing to show"):
        alignment_figure({})


@pytest.mark.parametrize("align", [align_words, erase_words])
@pytest.mark.parametrize(("source", "target", "message"), [
    ("", "x", "no words"), (" ", "x", "no words"), ("x y", "", "no words"), ("x y", " ", "no words"), ("x " * 60, "x", "max_length"), ("x y", "x" * 96, "max_length")])
def test_nothing_to_align(align: Callable[..., object], source: str, target: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        align(a_model(), TOKENIZER, source, target)


def test_wrong_layers_and_words() -> None:
    for layer in (1, -2, None, 0.5):
        with pytest.raises(InputError, match="the decoder has 1"):
            align_words(a_model(), TOKENIZER, "x y", "z", layer=layer) # type: ignore[arg-type]
    with pytest.raises(InputError, match="one word"):
        erase_words(a_model(), TOKENIZER, "240", "240")
    with pytest.raises(InputError, match="don't belong together"):
        align_words(a_model(), ByteTokenizer([START_MARK, END_MARK, "<more>"]), "x y", "z")


@pytest.mark.parametrize("path", [None, 7, ["a.tsv"]])
@pytest.mark.parametrize("read", [read_tsv, read_jsonl, read_po, read_parallel, load_translator])
def test_not_a_path(read: Callable[..., object], path: object) -> None:
    with pytest.raises(InputError, match="a path is of type"):
        read(path)


@pytest.mark.parametrize("read", [read_tsv, read_jsonl, read_po])
def test_not_a_file(read: Callable[..., object], tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="cannot read the file"):
            read(path)
    with pytest.raises(InputError, match=r"there is no config\.json"):
        load_translator(tmp_path / "nowhere")


@pytest.mark.parametrize(("content", "message"), [
    (b"one\tun\n\ntwo\tdeux\n", "line 2"), (b"one\tun\textra\n", "3 columns"), (b"", "the file is empty"), (b"one\tun\ncaf\xe9\tcaf\xe9\n", "line 2"), (b" \tun\n", "source is empty"), (b"\t\n", "the source and the target are")])
def test_bad_tsv(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.tsv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_tsv(tmp_path / "a.tsv")


@pytest.mark.parametrize(("content", "message"), [
    (b'{"source": "one", "target": "un"}\n\n', "line 2"), (b'{"en": "one", "fr": "un"}\n', "names="), (b'{"source": "\\ud800", "target": "un"}\n', "half a character"), (b"[1]\n", "no object"),
    (b'{"translation": null}\n', "no object"), (b'{"source": "a", "target": NaN}\n', "float"), (b"[" * 100_000 + b"\n", "not JSON"), (b'{"source": "a", "target": ""}\n', "target is empty")])
def test_bad_jsonl(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_jsonl(tmp_path / "a.jsonl")


def test_names_of_fields(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"s": "a", "t": "b"}\n', encoding="utf-8")
    assert read_parallel(tmp_path / "a.jsonl", names=("s", "t")).pairs == (TextPair("a", "b"),)
    for names in ("st", ("s",), None, (1, 2)):
        with pytest.raises(InputError, match="give two"):
            read_jsonl(tmp_path / "a.jsonl", names) # type: ignore[arg-type]


def test_which_files_go_together(tmp_path: Path) -> None:
    (tmp_path / "A.TSV").write_text("a\tb\n", encoding="utf-8")
    assert read_parallel(tmp_path / "A.TSV").pairs == (TextPair("a", "b"),)
    for paths in ((tmp_path / "A.TSV", tmp_path / "A.TSV"), (), ("a", "b", "c"), ("words.csv",)):
        with pytest.raises(InputError):
            read_parallel(*paths)


@pytest.mark.parametrize("rule", ["nplurals=2; plural=(n +", "nplurals=2; plural=(n % 0)", "nplurals=2; plural=(n > 1 ? n / 0 : 0)", "nplurals=2; plural=5", "nplurals=2; plural=os", "nplurals=x; plural=0"])
def test_a_plural_rule_that_cannot_be_computed(tmp_path: Path, rule: str) -> None:
    text = f'msgid ""\nmsgstr ""\n"Plural-Forms: {rule};\\n"\n\nmsgid "d"\nmsgid_plural "ds"\nmsgstr[0] "a"\nmsgstr[1] "b"\n'
    (tmp_path / "a.po").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.po"):
        read_po(tmp_path / "a.po")


def test_russian_has_three_forms(tmp_path: Path) -> None:
    rule = "nplurals=3; plural=(n%10==1 && n%100!=11 ? 0 : n%10>=2 && n%10<=4 && (n%100<10 || n%100>=20) ? 1 : 2)"
    entry = 'msgid "%d file"\nmsgid_plural "%d files"\nmsgstr[0] "%d файл"\nmsgstr[1] "%d файла"\nmsgstr[2] "%d файлов"'
    (tmp_path / "ru.po").write_text(f'msgid ""\nmsgstr ""\n"Plural-Forms: {rule};\\n"\n\n{entry}\n', encoding="utf-8")
    assert not read_po(tmp_path / "ru.po").pairs and "3 plural forms" in read_po(tmp_path / "ru.po").skipped[0].reason


def test_a_folder_with_another_tokenizer(tmp_path: Path) -> None:
    save_translator(tmp_path, a_model(), TOKENIZER)
    shared_tokenizer(cldr_pairs("en", "fr", 200), 300).save(tmp_path)
    with pytest.raises(InputError, match="don't belong together"):
        load_translator(tmp_path)
    with pytest.raises(InputError, match="no such model"):
        encoder_decoder_to_hf(a_model(), tmp_path / "hf") # rotary positions: transformers has none
