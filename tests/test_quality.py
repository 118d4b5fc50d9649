"""Numbers about tokenizers are counted right, and a pruned vocabulary is a tokenizer whatever its size."""
import itertools
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmie.core import InputError
from mmie.tokenization.base import ByteTokenizer, check_tokenizer
from mmie.tokenization.bpe import BPETokenizer
from mmie.tokenization.corpora import python_docs
from mmie.tokenization.quality import (
    SCRIPT_SAMPLES,
    assess,
    census,
    compare_tokenizers,
    coverage_curve,
    merge_firings,
    premiums,
    prune,
    ratio_interval,
    remap_embedding,
    renyi_efficiency,
    script_quality,
    script_runs,
    size_curve,
    token_counts,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
COUNTS = st.lists(st.integers(0, 10**9), min_size=2, max_size=200).map(np.array).filter(np.any)
SPECIAL = ("<|endoftext|>", "<|user|>")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [document.text for document in python_docs(["python"])[::12]] + list(SCRIPT_SAMPLES.values())


@pytest.fixture(scope="module")
def tokenizer(texts: list[str]) -> BPETokenizer:
    return BPETokenizer.train(texts, 1500, special_tokens=SPECIAL)


@settings(max_examples=150, deadline=None)
@given(size=st.integers(258, 1500), text=TEXT, seen=st.lists(st.integers(0, 60), min_size=1, max_size=4, unique=True))
def test_pruning_gives_a_tokenizer_of_the_size_asked_for(tokenizer: BPETokenizer, texts: list[str], size: int, text: str, seen: list[int]) -> None:
    pruned = prune(tokenizer, [texts[i % len(texts)] for i in seen], vocab_size=size)
    small = pruned.tokenizer
    assert small.vocab_size == size == len(set(pruned.kept)) and list(small.special_tokens) == list(SPECIAL)
    assert [small.decode_bytes([i]) for i in range(size)] == [tokenizer.decode_bytes([old]) for old in pruned.kept]
    assert small.decode(small.encode(text)) == text
    if set(tokenizer.encode(text)) <= set(pruned.kept):
        assert [pruned.kept[i] for i in small.encode(text)] == tokenizer.encode(text), "kept tokens are used as before"


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(0, 50), min_size=1500, max_size=1500), size=st.integers(258, 1500))
def test_any_counts_give_a_closed_list_of_merges(tokenizer: BPETokenizer, counts: list[int], size: int) -> None:
    counts[65] += 1
    pruned = prune(tokenizer, np.array(counts), vocab_size=size)
    assert pruned == prune(tokenizer, np.array(counts) / 4, vocab_size=size), "only the ratios of counts matter"
    assert pruned.tokenizer.vocab_size == size
    old = {pruned.kept[i]: tuple(pruned.kept[part] for part in pair) for i, pair in enumerate(pruned.tokenizer.merges, 256)}
    assert all(tokenizer.merges[i - 256] == pair for i, pair in old.items()), "kept merges are the old ones"


@settings(max_examples=100, deadline=None)
@given(share=st.floats(0.01, 1))
def test_coverage_is_reached_with_as_few_tokens_as_the_order_allows(tokenizer: BPETokenizer, texts: list[str], share: float) -> None:
    counts = token_counts(tokenizer, texts[:20])
    sizes = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])

    def covered(kept: tuple[int, ...]) -> float:
        return (counts * sizes)[list(kept)].sum() / (counts * sizes).sum()

    pruned = prune(tokenizer, counts, coverage=share)
    assert covered(pruned.kept) >= share - 1e-12
    if (size := pruned.tokenizer.vocab_size) > 258:
        assert covered(prune(tokenizer, counts, vocab_size=size - 1).kept) < share


def test_pruning_in_two_steps_is_pruning_in_one(tokenizer: BPETokenizer, texts: list[str]) -> None:
    some = texts[:25]
    lossless = prune(tokenizer, some, coverage=1.0)
    assert lossless.tokenizer.vocab_size < tokenizer.vocab_size and lossless.check(some).growth == 0
    for size in (258, 300, 600):
        twice, once = prune(lossless.tokenizer, some, vocab_size=size), prune(tokenizer, some, vocab_size=size)
        assert twice.tokenizer == once.tokenizer and [lossless.kept[i] for i in twice.kept] == list(once.kept)


def test_a_pruned_tokenizer_keeps_every_promise_and_the_others_agree(tokenizer: BPETokenizer, texts: list[str]) -> None:
    generator = random.Random(3)
    letters = "".join(SCRIPT_SAMPLES.values()) + texts[0][:2000]
    fuzz = ["".join(generator.choices(letters, k=generator.randint(1, 30))) for _ in range(500)] + texts[:5]
    for size in (400, 900, 1499):
        small = prune(tokenizer, texts[:25], vocab_size=size).tokenizer
        check_tokenizer(small, texts[:2])
        ids = small.encode_batch(fuzz)
        assert ids == small.to_tiktoken().encode_ordinary_batch(fuzz, num_threads=1)
        assert ids == small.to_hf()(fuzz, split_special_tokens=True, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("with_merges", [True, False])
def test_foreign_ids_are_pruned_to_the_same_tokenizer(tokenizer: BPETokenizer, texts: list[str], with_merges: bool) -> None:
    shuffled = random.Random(0).sample(range(256), 256)
    new = {i: shuffled[i] if i < 256 else i + 10 for i in range(1498)} # permuted bytes, a gap
    merges = [(new[first], new[second]) for first, second in tokenizer.merges] if with_merges else None # None: tiktoken's rule
    vocabulary = {tokenizer.decode_bytes([i]): new[i] for i in range(1498)}
    foreign = BPETokenizer(merges, special_tokens={"<|user|>": 5000, "<|endoftext|>": 4000}, vocabulary=vocabulary)
    assert (size_curve(foreign, texts[:5]) == size_curve(tokenizer, texts[:5])).all()
    theirs, ours = prune(foreign, texts[:25], vocab_size=700), prune(tokenizer, texts[:25], vocab_size=700)
    assert theirs.tokenizer == ours.tokenizer and theirs.kept == (*(new[i] for i in ours.kept[:-2]), 4000, 5000)
    assert theirs.check(texts[25:]) == ours.check(texts[25:])


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(TEXT, min_size=1, max_size=4))
def test_firings_of_bytes_are_the_bytes(tokenizer: BPETokenizer, rows: list[str]) -> None:
    counts = token_counts(tokenizer, rows)
    data = np.frombuffer("".join(rows).encode(), np.uint8)
    fires = merge_firings(tokenizer, counts)
    assert (fires[:256] == np.bincount(data, minlength=256)).all() and (fires >= counts).all()
    assert all(fires[part] >= fires[i] for i, pair in enumerate(tokenizer.merges, 256) for part in pair)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(TEXT, min_size=1, max_size=3), merges=st.integers(0, 1242))
def test_the_size_curve_is_what_encoding_anew_gives(tokenizer: BPETokenizer, rows: list[str], merges: int) -> None:
    smaller = BPETokenizer(tokenizer.merges[:merges])
    assert size_curve(tokenizer, rows)[merges] == sum(map(len, smaller.encode_batch(rows)))


@settings(max_examples=300, deadline=None)
@given(counts=COUNTS, alpha=st.floats(0, 50) | st.just(math.inf) | st.just(1.0))
def test_efficiency_is_a_share_and_falls_with_alpha(counts: np.ndarray, alpha: float) -> None:
    value = renyi_efficiency(counts, alpha)
    assert 0 <= value <= 1
    assert (value > 0) == (np.count_nonzero(counts) > 1) or value < 1e-6
    assert renyi_efficiency(counts, alpha + 1) <= value + 1e-6
    assert renyi_efficiency(counts * 3, alpha) == pytest.approx(value, abs=1e-6), "only shares matter"


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_fertility_is_at_least_one(tokenizer: BPETokenizer, text: str) -> None:
    runs = script_runs(text)
    assert all(a[2] <= b[1] for a, b in itertools.pairwise(runs)) and all(start < end <= len(text) for _, start, end in runs)
    for tried in (tokenizer, ByteTokenizer()):
        for one in script_quality(tried, [text]):
            assert one.words <= one.tokens and not one.fertility < 1
    assert sum(one.words for one in script_quality(tokenizer, [text])) == len(runs)
    covered = sum(len(text[start:end].encode()) for _, start, end in runs)
    assert sum(one.tokens for one in script_quality(ByteTokenizer(), [text])) == covered


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(TEXT.filter(bool), min_size=1, max_size=5))
def test_a_report_adds_up(tokenizer: BPETokenizer, rows: list[str]) -> None:
    report = assess(tokenizer, rows)
    assert report.bytes == sum(len(row.encode()) for row in rows) and report.tokens == token_counts(tokenizer, rows).sum()
    assert len(rows) == 1 or report.interval[0] <= report.bytes_per_token + 1e-9
    assert coverage_curve(tokenizer, rows)[-1] == pytest.approx(1)
    found = census(tokenizer, rows, rare=0)
    assert len(found.ids("used")) == report.used and len(found.fates) == tokenizer.vocab_size
    assert "tokens" in repr(found) and "<table" in report._repr_html_()


def test_each_missing_token_has_its_reason(tokenizer: BPETokenizer, texts: list[str]) -> None:
    found = census(tokenizer, texts[:10])
    fires = merge_firings(tokenizer, found.counts)
    assert found.ids("special") == sorted(tokenizer.special_tokens.values())
    assert all(found.counts[i] == 0 < fires[i] for i in found.ids("scaffold")) and all(fires[i] == 0 for i in found.ids("absent"))
    assert all(tokenizer.encode(tokenizer.decode([i], "strict")) == [i] for i in found.ids("scaffold", "absent"))
    for i in found.ids("fragment"):
        with pytest.raises(UnicodeDecodeError):
            tokenizer.decode([i], "strict")


def test_intervals_are_reproducible_and_narrow_with_more_documents() -> None:
    world = np.random.default_rng(0)
    below = world.integers(50, 5000, 4000)
    above = below * world.normal(4, 0.5, 4000)
    wide, narrow = ratio_interval(above[:40], below[:40]), ratio_interval(above, below)
    assert wide == ratio_interval(above[:40], below[:40]) != ratio_interval(above[:40], below[:40], seed=1)
    assert 0 < narrow[1] - narrow[0] < wide[1] - wide[0] and narrow[0] < 4 < narrow[1]


def test_a_stranger_can_be_measured(texts: list[str], tokenizer: BPETokenizer) -> None:
    hf = tokenizer.to_hf()
    table = compare_tokenizers({"theirs": hf, "ours": tokenizer}, texts[:10])
    assert table["theirs"].tokens == table["ours"].tokens and table["theirs"].efficiency == pytest.approx(table["ours"].efficiency, abs=1e-3)
    assert table["theirs"].scripts == () and premiums(hf) == premiums(tokenizer)


def test_rows_follow_their_tokens(tokenizer: BPETokenizer, texts: list[str]) -> None:
    pruned = prune(tokenizer, texts[:25], vocab_size=700)
    weight = torch.randn(tokenizer.vocab_size + 36, 8, dtype=torch.bfloat16, requires_grad=True) # padded, as models' tables are
    fewer = remap_embedding(weight, pruned.kept)
    assert fewer.shape == (700, 8) and fewer.dtype == torch.bfloat16 and not fewer.requires_grad
    assert all(fewer[new].equal(weight[old]) for new, old in enumerate(pruned.kept))
    with pytest.raises(InputError, match="rows"):
        remap_embedding(weight[:100], pruned.kept)


@pytest.mark.parametrize("how", [
    {}, {"vocab_size": 300, "coverage": 0.5}, {"coverage": -1.0}, {"vocab_size": 257}, {"vocab_size": 1501}, {"coverage": 1.1}, {"coverage": math.nan},
])
def test_impossible_wishes_are_refused(tokenizer: BPETokenizer, how: dict[str, float]) -> None:
    with pytest.raises(InputError):
        partial(prune, tokenizer, ["some text"])(**how)
