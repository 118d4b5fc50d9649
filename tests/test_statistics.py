"""Intervals hold what they promise, tests don't care who is called first, and every statistic equals another library's."""
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mmie.core import InputError
from mmie.safety.statistics import (
    Estimate,
    PairedRates,
    auroc,
    bootstrap_interval,
    calibration,
    clopper_pearson,
    cohen_kappa,
    confusion,
    corrected_rate,
    coverage,
    difference_over_seeds,
    holm,
    interval_figure,
    krippendorff_alpha,
    mcnemar,
    mean_over_seeds,
    paired_difference,
    rate_difference,
    rate_estimate,
    rate_over_seeds,
    reliability_figure,
    roc_curve,
    roc_figure,
)
from mmie.training.finetune import Score, wilson_interval

FEW = settings(max_examples=60, deadline=None)
COUNT = st.integers(0, 60)
TABLE = st.builds(PairedRates, COUNT, COUNT, COUNT, st.integers(1, 60))
SCORE = st.integers(1, 300).flatmap(lambda n: st.builds(Score, st.integers(0, n), st.just(n)))
LABELS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=2, max_size=40)
SCORED = st.lists(st.tuples(st.booleans(), st.integers(0, 8).map(lambda x: x / 8)), min_size=2, max_size=60)


def mixed(rows):
    "Columns of scored items that have both kinds."
    truth, scores = map(list, zip(*rows, strict=True))
    assume(any(truth) and not all(truth))
    return truth, scores


# --- estimates and rates

@given(SCORE, st.floats(0.5, 0.999))
@FEW
def test_rate_estimate_grows_with_level(score, level):
    narrow, wide = rate_estimate(score, level=0.5), rate_estimate(score, level=level)
    assert wide.low <= narrow.low <= narrow.value <= narrow.high <= wide.high
    assert score.rate in wide and wide.n == score.total and wide.level == level


@given(SCORE)
@FEW
def test_clopper_pearson_mirrors_and_contains(score):
    low, high = clopper_pearson(score.correct, score.total)
    assert 0 <= low <= score.rate <= high <= 1
    assert clopper_pearson(score.total - score.correct, score.total) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@given(st.integers(1, 60), st.floats(0.001, 0.999))
@settings(max_examples=15, deadline=None)
def test_clopper_pearson_keeps_its_promise(total, rate):
    assert coverage(clopper_pearson, total, rate)[0] >= 0.95 - 1e-9


def test_many_trials_neither_overflow_nor_take_long():
    low, high = clopper_pearson(40, 40_000)
    assert low < 0.001 < high and high - low < 0.001
    assert coverage(wilson_interval, 2000, 0.01)[0] == pytest.approx(0.95, abs=0.01)


def test_estimate_formats_each_number():
    estimate = Estimate(0.5, 0.25, 0.75, n=4)
    assert f"{estimate:.0%}" == "50% (25% to 75%)" and str(estimate) == "0.500 (0.250 to 0.750)"
    assert 0.25 in estimate and 0.76 not in estimate


# --- pairs

@given(TABLE)
@FEW
def test_paired_difference_contains_and_mirrors(pairs):
    estimate = paired_difference(pairs)
    swapped = paired_difference(PairedRates(pairs.both, pairs.gained, pairs.lost, pairs.neither))
    assert -1 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert (swapped.low, swapped.high) == pytest.approx((-estimate.high, -estimate.low), abs=1e-12)
    assert paired_difference(pairs, level=0.8).low >= estimate.low
    assert estimate.value == pytest.approx(pairs.after.rate - pairs.before.rate)


@given(TABLE)
@FEW
def test_only_discordant_prompts_decide_the_test(pairs):
    other = PairedRates(pairs.both + 7, pairs.gained, pairs.lost, pairs.neither + 3)
    assert other.p_value == pairs.p_value and other.p_exact == pairs.p_exact
    assert 0 < pairs.p_value <= pairs.p_exact <= 1


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=50), st.randoms())
@FEW
def test_the_order_of_prompts_does_not_matter(marks, random):
    shuffled = random.sample(marks, len(marks))
    first = mcnemar(*zip(*marks, strict=True))
    assert first == mcnemar(*zip(*shuffled, strict=True)) and first.n == len(marks)
    assert first == mcnemar(*torch.tensor(marks).T)
    flipped = mcnemar(*(~np.array(marks).T))
    assert flipped.p_value == first.p_value and paired_difference(flipped).value == -paired_difference(first).value


def coverage_of_pairs(n, share_lost, share_gained):
    "How often the paired interval contains the truth: all outcomes, weighted."
    total, rest = 0.0, 1 - share_lost - share_gained
    for lost in range(n + 1):
        for gained in range(n + 1 - lost):
            ways = math.comb(n, lost) * math.comb(n - lost, gained)
            weight = ways * share_lost**lost * share_gained**gained * rest ** (n - lost - gained)
            if weight > 1e-7 and share_gained - share_lost in paired_difference(PairedRates(0, lost, gained, n - lost - gained)):
                total += weight
    return total


@pytest.mark.parametrize("lost, gained", [(0.02, 0.02), (0.1, 0.02), (0.3, 0.1), (0.02, 0.0), (0.2, 0.2)])
def test_paired_difference_keeps_its_promise(lost, gained):
    assert 0.92 < coverage_of_pairs(40, lost, gained) <= 1


def test_thousands_of_discordant_prompts():
    pairs = PairedRates(100, 2600, 2400, 100)
    assert 0.004 < pairs.p_value < pairs.p_exact < 0.005


@given(SCORE, SCORE)
@FEW
def test_rate_difference_contains_and_mirrors(before, after):
    estimate, swapped = rate_difference(before, after), rate_difference(after, before)
    assert -1 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert swapped.low == pytest.approx(-estimate.high)
    complement = rate_difference(Score(before.total - before.correct, before.total), Score(after.total - after.correct, after.total))
    assert complement.low == pytest.approx(-estimate.high)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.randoms())
@FEW
def test_holm_does_not_care_about_the_order(p_values, random):
    order = random.sample(range(len(p_values)), len(p_values))
    corrected = holm(p_values)
    assert (corrected >= p_values).all() and (corrected <= 1).all()
    assert holm([p_values[i] for i in order]) == pytest.approx(corrected[order])
    assert (np.diff(corrected[np.argsort(p_values, kind="stable")]) >= 0).all()


# --- the bootstrap

def test_bootstrap_keeps_its_promise():
    generator = np.random.default_rng(0)
    hits = [2.0 in bootstrap_interval(np.mean, generator.gamma(2.0, 1.0, size=80), draws=300, seed=i) for i in range(200)]
    assert 0.88 < np.mean(hits) < 0.99


def test_bootstrap_draws_rows_together_and_groups_whole():
    x = np.arange(40.0)
    assert bootstrap_interval(lambda a, b: float((a - b).sum()), x, x).high == 0
    halves = bootstrap_interval(lambda a: float(len(a)), x, groups=["a"] * 30 + ["b"] * 10, draws=200)
    assert (halves.low, halves.high, halves.n) == (20, 60, 2)
    renamed = bootstrap_interval(np.mean, x, groups=[i // 4 for i in range(40)], draws=100)
    assert renamed == bootstrap_interval(np.mean, x, groups=[f"prompt {i // 4}" for i in range(40)], draws=100)
    assert renamed == bootstrap_interval(np.mean, x, groups=torch.arange(40) // 4, draws=100)


def test_bootstrap_leaves_rare_undefined_draws_out_and_refuses_frequent_ones():
    truth, scores = [True] * 6 + [False] * 6, np.linspace(0, 1, 12)
    assert bootstrap_interval(auroc, truth, scores, draws=500).value == 0
    with pytest.raises(InputError, match="undefined in"):
        bootstrap_interval(auroc, [True, False, False, False], [1, 2, 3, 4])
    with pytest.raises(ZeroDivisionError): # only our own refusals count as undefined
        bootstrap_interval(lambda x: 1 / 0, scores)
    for columns in ([], [[]], [[1.0]]):
        with pytest.raises(InputError):
            bootstrap_interval(np.mean, *columns)
    with pytest.raises(InputError, match="0 draws"):
        bootstrap_interval(np.mean, scores, draws=0)
    with pytest.raises(InputError, match="groups for"):
        bootstrap_interval(np.mean, scores, groups=["a", "b"])


# --- seeds

@given(st.integers(2, 5), st.integers(2, 40), st.integers(0, 2**20), st.floats(0, 1))
@FEW
def test_over_seeds_contains_and_ignores_the_order(seeds, prompts, seed, rate):
    generator = np.random.default_rng(seed)
    marks = generator.random((seeds, prompts)) < rate
    estimate = rate_over_seeds(marks)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1 and estimate.n == prompts
    shuffled = rate_over_seeds(generator.permutation(generator.permutation(marks), axis=1))
    assert (shuffled.low, shuffled.high) == pytest.approx((estimate.low, estimate.high))
    opposite = rate_over_seeds(~marks)
    assert (1 - opposite.high, 1 - opposite.low) == pytest.approx((estimate.low, estimate.high))
    pooled = rate_estimate(Score(int(marks.sum()), marks.size))
    assert estimate.high - estimate.low >= pooled.high - pooled.low - 1e-12
    change = difference_over_seeds(np.zeros(prompts, bool), marks)
    assert change.value == pytest.approx(estimate.value) and change.n == prompts


def test_difference_over_seeds_keeps_its_promise():
    generator, hits = np.random.default_rng(1), []
    def rate(threshold, spread): return 0.5 * math.erfc(threshold / (2 * (2 + spread**2)) ** 0.5)
    truth = rate(1.5, 0.3) - rate(0.3, 0.0)
    for _ in range(300):
        hard = generator.normal(size=200)
        base = hard + generator.normal(size=200) > 0.3
        trained = hard + 0.3 * generator.normal(size=(3, 1)) + generator.normal(size=(3, 200)) > 1.5
        hits.append(truth in difference_over_seeds(base, trained))
    assert 0.92 < np.mean(hits) <= 1


def test_bad_seeds_are_refused():
    for marks in ([[True, False]], [[True], [False]], [True, False]):
        with pytest.raises(InputError, match=r"\(seeds, prompts\)"):
            rate_over_seeds(marks)
    with pytest.raises(InputError, match="array"):
        rate_over_seeds([[True], [True, False]])
    with pytest.raises(InputError, match="list of two"):
        mean_over_seeds([[0.1, 0.2], [0.1, 0.2]])
    with pytest.raises(InputError, match="level"):
        mean_over_seeds([0.1, 0.2], level=0)


# --- judges

@given(LABELS, st.randoms())
@FEW
def test_agreement_ignores_names_and_order(pairs, random):
    first, second = map(list, zip(*pairs, strict=True))
    assume(len(set(first + second)) > 1)
    names = dict(zip("abc", random.sample([10, 20, 30], 3), strict=True))
    shuffled = random.sample(pairs, len(pairs))
    kappa, alpha = cohen_kappa(first, second), krippendorff_alpha(pairs)
    assert -1 <= kappa <= 1 and alpha <= 1
    assert kappa == pytest.approx(cohen_kappa(second, first))
    assert kappa == pytest.approx(cohen_kappa([names[a] for a, _ in shuffled], [names[b] for _, b in shuffled]))
    assert alpha == pytest.approx(krippendorff_alpha([(names[b], None, names[a]) for a, b in shuffled]))
    assert (kappa == pytest.approx(1)) == (first == second) == (alpha == pytest.approx(1))


@given(LABELS)
@FEW
def test_confusion_transposes(pairs):
    truth, verdicts = zip(*pairs, strict=True)
    table, turned = confusion(truth, verdicts), confusion(verdicts, truth)
    assert table.counts == tuple(zip(*turned.counts, strict=True)) and table.accuracy == turned.accuracy
    for label in table.labels:
        assert table.recall(label) == turned.precision(label)
        r, p = table.recall(label).rate, table.precision(label).rate
        assert table.f1(label) == pytest.approx(2 * p * r / (p + r) if p + r else 0)


def test_labels_of_other_libraries_and_wrong_ones():
    assert confusion(torch.tensor([1, 0, 1]), np.array([1, 1, 1])).counts == ((0, 1), (0, 2))
    assert krippendorff_alpha(torch.tensor([[1, 1], [2, 2]])) == krippendorff_alpha(np.array([[1, 1, np.nan], [2, 2, 2]], dtype=np.float32)) == 1
    for wrong in (["a", None], ["a", 1], [0.5, 1.5], [["a"], ["b"]]):
        with pytest.raises(InputError, match="labels of type"):
            cohen_kappa(wrong, ["a", "b"])
    with pytest.raises(InputError, match="labels of type"):
        krippendorff_alpha([["a", 1], [1, 1]])
    with pytest.raises(InputError, match="two different"):
        krippendorff_alpha([])


@given(SCORED, st.randoms())
@FEW
def test_auroc_is_about_order_only(rows, random):
    truth, scores = mixed(rows)
    area = auroc(truth, scores)
    wins = [(a > b) + (a == b) / 2 for (a, x), (b, y) in itertools.product(zip(scores, truth, strict=True), repeat=2) if x and not y]
    assert area == pytest.approx(sum(wins) / len(wins)) == pytest.approx(roc_curve(truth, scores).area)
    assert auroc(truth, np.exp(scores)) == pytest.approx(area) == pytest.approx(1 - auroc([not x for x in truth], scores))
    assert auroc(*zip(*random.sample(rows, len(rows)), strict=True)) == pytest.approx(area)
    curve = roc_curve(truth, scores)
    assert (np.diff(curve.false_rate) >= 0).all() and (np.diff(curve.true_rate) >= 0).all() and (np.diff(curve.thresholds) < 0).all()
    for at, threshold in enumerate(curve.thresholds):
        assert curve.true_rate[at] == pytest.approx(np.mean(np.array(scores)[truth] >= threshold))


@given(SCORED, st.integers(1, 20))
@FEW
def test_calibration_counts_every_item_once(rows, bins):
    truth, p = map(list, zip(*rows, strict=True))
    result = calibration(truth, p, bins=bins)
    assert sum(b.observed.total for b in result.bins) == len(rows) and sum(b.observed.correct for b in result.bins) == sum(truth)
    assert 0 <= result.ece <= 1 and 0 <= result.brier <= 1
    mirrored = calibration([not x for x in truth], [1 - x for x in p], bins=1)
    assert mirrored.brier == pytest.approx(result.brier) and mirrored.ece == pytest.approx(calibration(truth, p, bins=1).ece)
    assert calibration(truth, p, bins=1).ece <= result.ece + 1e-12


def test_bad_scores_are_refused():
    for truth, scores, words in (([], [], "no values"), ([1, 0], [1, math.inf], "finite"), ([1, 0], ["a", "b"], "finite"), ([1, 2], [1, 2], "marks"),
                                 (["yes", "no"], [1, 2], "marks"), ([[1, 0]], [[1, 2]], "lists"), ([1, 0, 1], [1, 2], "match"), ([1, None], [1, 2], "marks")):
        with pytest.raises(InputError, match=words):
            auroc(truth, scores)
    with pytest.raises(InputError, match="at least one bin"):
        calibration([1, 0], [0.5, 0.5], bins=0)
    with pytest.raises(InputError, match="probabilities"):
        calibration([1, 0], [-0.5, 0.5])


# --- faulty scorers

@given(SCORE, SCORE, SCORE)
@FEW
def test_corrected_rate_stays_in_range(flagged, sensitivity, specificity):
    assume(sensitivity.rate + specificity.rate > 1.05 and min(sensitivity.total, specificity.total) > 20)
    estimate = corrected_rate(flagged, sensitivity, specificity)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    opposite = corrected_rate(Score(flagged.total - flagged.correct, flagged.total), specificity, sensitivity)
    assert (1 - opposite.high, 1 - opposite.low) == pytest.approx((estimate.low, estimate.high))


@pytest.mark.parametrize("truth, se, sp", [(0.02, 0.8, 0.9), (0.2, 0.8, 0.96), (0.5, 0.95, 0.9), (0.9, 0.7, 0.8)])
def test_corrected_rate_keeps_its_promise(truth, se, sp):
    generator = np.random.default_rng(2)
    def count(n, p): return Score(int(generator.binomial(n, p)), n)
    hits = [truth in corrected_rate(count(400, truth * se + (1 - truth) * (1 - sp)), count(100, se), count(100, sp)) for _ in range(600)]
    assert np.mean(hits) > 0.925


# --- figures

def test_figures_take_what_they_say():
    estimate = Estimate(0.1, 0.05, 0.2, n=10)
    fig = interval_figure({name: {"a": estimate, "b": estimate} for name in "uvwxyz"}, xlabel="rate, %", zero=True)
    assert len(fig.axes[0].get_legend().get_texts()) == 6
    assert [t.get_text() for t in interval_figure({"": {"a": estimate}}, xlabel="x", percent=False).axes[0].get_yticklabels()] == ["a"]
    for make in (lambda: interval_figure({name: {"a": estimate} for name in "abcdefg"}, xlabel=""), lambda: roc_figure({}), lambda: reliability_figure({})):
        with pytest.raises(InputError, match="don't make this figure"):
            make()


# --- other libraries, where they are installed

@given(LABELS)
@FEW
def test_equal_to_scikit_learn_on_labels(pairs):
    metrics = pytest.importorskip("sklearn.metrics")
    truth, verdicts = map(list, zip(*pairs, strict=True))
    table = confusion(truth, verdicts)
    assert np.array_equal(table.counts, metrics.confusion_matrix(truth, verdicts))
    reference = metrics.precision_recall_fscore_support(truth, verdicts, labels=list(table.labels), zero_division=0)
    ours = [[score.rate for score in map(table.precision, table.labels)], [score.rate for score in map(table.recall, table.labels)], [table.f1(x) for x in table.labels]]
    assert np.allclose(ours, reference[:3], atol=1e-12)
    if len(set(truth + verdicts)) > 1:
        assert cohen_kappa(truth, verdicts) == pytest.approx(metrics.cohen_kappa_score(truth, verdicts), abs=1e-12)


@given(SCORED)
@FEW
def test_equal_to_scikit_learn_on_scores(rows):
    metrics, reference = pytest.importorskip("sklearn.metrics"), pytest.importorskip("sklearn.calibration")
    truth, scores = mixed(rows)
    assert auroc(truth, scores) == pytest.approx(metrics.roc_auc_score(truth, scores), abs=1e-12)
    ours = roc_curve(truth, scores)
    theirs = metrics.roc_curve(truth, scores, drop_intermediate=False)
    for mine, their in zip((ours.false_rate, ours.true_rate, ours.thresholds), theirs, strict=True):
        assert np.allclose(mine, their, atol=1e-12)
    result, (true, said) = calibration(truth, scores), reference.calibration_curve(truth, scores, n_bins=10)
    assert np.allclose([[b.observed.rate for b in result.bins], [b.predicted for b in result.bins]], [true, said], atol=1e-12)
    assert result.brier == pytest.approx(metrics.brier_score_loss(truth, scores), abs=1e-12)


@given(SCORE, SCORE, COUNT, COUNT)
@FEW
def test_equal_to_statsmodels(one, other, lost, gained):
    proportion, tables = pytest.importorskip("statsmodels.stats.proportion"), pytest.importorskip("statsmodels.stats.contingency_tables")
    assert clopper_pearson(one.correct, one.total) == pytest.approx(proportion.proportion_confint(one.correct, one.total, method="beta"), abs=1e-9)
    theirs = proportion.confint_proportions_2indep(other.correct, other.total, one.correct, one.total, method="newcomb", compare="diff")
    ours = rate_difference(one, other)
    assert (ours.low, ours.high) == pytest.approx(theirs, abs=1e-9)
    exact = tables.mcnemar([[3, lost], [gained, 9]], exact=True).pvalue
    assert PairedRates(3, lost, gained, 9).p_exact == pytest.approx(float(exact), abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
@FEW
def test_holm_equals_statsmodels(p_values):
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    assert holm(p_values) == pytest.approx(multitest.multipletests(p_values, method="holm")[1], abs=1e-12)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=40), st.floats(0.5, 0.99))
@FEW
def test_student_equals_scipy(values, level):
    stats = pytest.importorskip("scipy.stats")
    ours, spread = mean_over_seeds(values, level=level), float(np.std(values, ddof=1)) / len(values) ** 0.5
    assert ours.high - ours.value == pytest.approx(stats.t.ppf((1 + level) / 2, len(values) - 1) * spread, rel=1e-9, abs=1e-12)


@given(st.lists(st.lists(st.sampled_from([1.0, 2.0, 3.0, math.nan]), min_size=3, max_size=3), min_size=2, max_size=30))
@FEW
def test_alpha_equals_the_krippendorff_package(items):
    package = pytest.importorskip("krippendorff")
    comparable = [[x for x in item if x == x] for item in items]
    assume(len({x for item in comparable if len(item) > 1 for x in item}) > 1)
    assert krippendorff_alpha(items) == pytest.approx(package.alpha(reliability_data=np.array(items).T, level_of_measurement="nominal"), abs=1e-12)
