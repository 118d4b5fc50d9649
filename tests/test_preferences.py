"""Judges that can't be trusted, and preferences that can: abstentions, symmetry, resuming, other people's files and models."""
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmie.constitutional.managers import ModelManager
from mmie.constitutional.preferences import (
    MadePreferences, PairwiseJudge, PairwiseWording, PointwiseJudge, PointwiseWording, Preference, Scorer, both_orders, choose_pair,
    judge_agreement, make_preferences, position_bias, position_figure, read_preferences, sample_answers, save_preferences, strengths, weigh_labels,
)
from mmie.core import InputError
from mmie.models.decoder import DecoderLM, ModelConfig
from mmie.tokenization.base import ByteTokenizer
from mmie.tokenization.bpe import BPETokenizer
from mmie.training.finetune import ChatTemplate, MarkedChat, jinja_template

MARKS = ChatTemplate().special_tokens
LETTERS = ByteTokenizer(MARKS)
PAIRS = PairwiseWording(template="{prompt}|{first}|{second}")
MARKED = PointwiseWording(marker=", so it", good=("keeps",), bad=("breaks",), max_new_tokens=8)

probabilities = st.floats(0, 1)
numbers = st.floats(-20, 20)


def tiny(max_length: int = 512, seed: int = 0) -> DecoderLM:
    torch.manual_seed(seed)
    return DecoderLM(ModelConfig(vocab_size=LETTERS.vocab_size, d_model=16, n_layers=2, n_heads=2, max_length=max_length)).eval()


class Fake:
    "A model that says what it's told to, about conversations it is asked about."
    def __init__(self, logprobs=None, says=None, max_length: int | None = None) -> None:
        self.model, self.chat, self.asked = SimpleNamespace(max_length=max_length), MarkedChat(LETTERS), []
        self._logprobs, self._says = logprobs, says

    def logprobs(self, conversations, choices: Sequence[str]) -> Tensor:
        self.asked += conversations
        return torch.tensor([self._logprobs(talk, choices) for talk in conversations], dtype=torch.float64).log()

    def batch_generate(self, conversations, *, seed=None, openings="", **options) -> list[str]:
        seeds = seed if isinstance(seed, list) else [0] * len(conversations)
        begun = [openings] * len(conversations) if isinstance(openings, str) else openings
        return [self._says(talk, s, opening) for talk, s, opening in zip(conversations, seeds, begun, strict=True)]


# ------------------------------------------------------------------------------------------------ opinions

@given(st.lists(st.tuples(probabilities, probabilities), min_size=1, max_size=8), st.floats(0.501, 1))
def test_swapping_both_answers_gives_the_opposite_probability(pairs: list[tuple[float, float]], most_sure: float) -> None:
    one, two = torch.tensor(pairs, dtype=torch.float64).T
    p, q = both_orders(one, two, most_sure), both_orders(two, one, most_sure)
    assert torch.allclose(p + q, torch.ones_like(p), atol=1e-12)
    assert (p >= 1 - most_sure - 1e-12).all() and (p <= most_sure + 1e-12).all()


@given(st.dictionaries(st.sampled_from("abcdef"), numbers, min_size=2), numbers, st.floats(0.06, 1))
@settings(deadline=None, max_examples=40)
def test_a_pairwise_judge_is_antisymmetric_whatever_its_bias(taste: dict[str, float], bias: float, coverage: float) -> None:
    def opinion(talk, choices):
        first, second = talk[0].content.split("|")[1:]
        p = 1 / (1 + math.exp(-max(-600.0, min(600.0, taste[first] - taste[second] + bias))))
        return [coverage * p, coverage * (1 - p)]
    judge, names = PairwiseJudge(Fake(opinion), PAIRS), sorted(taste)
    first, second = names[:-1], names[1:]
    there = judge.compare(["?"] * len(first), first, second)
    back = judge.compare(["?"] * len(first), second, first)
    assert torch.allclose(there + back, torch.ones_like(there))
    assert (there >= 0.05 - 1e-9).all() and (there <= 0.95 + 1e-9).all()


def test_both_orders_are_really_asked() -> None:
    fake = Fake(lambda talk, choices: [0.5, 0.4])
    PairwiseJudge(fake, PAIRS).judge(["p"], ["one"], ["two"])
    assert sorted(talk[0].content for talk in fake.asked) == ["p|one|two", "p|two|one"]


@pytest.mark.parametrize(("answer", "reason"), [
    ([1e-9, 1e-9], "of the probability"), ([math.nan, 0.5], "no numbers"), ([0.0, 0.0], "of the probability"), ([math.nan, math.nan], "no numbers"),
])
def test_nonsense_is_an_abstention_and_no_vote_for_the_first(answer: list[float], reason: str) -> None:
    verdict, = PairwiseJudge(Fake(lambda talk, choices: answer), PAIRS).judge(["?"], ["one"], ["two"])
    assert math.isnan(verdict.probability) and reason in verdict.abstained


def test_half_an_opinion_is_none() -> None:
    judge = PairwiseJudge(Fake(lambda talk, choices: [0.9, 0.05] if talk[0].content.endswith("two") else [1e-6, 1e-6]), PAIRS)
    verdict, = judge.judge(["?"], ["one"], ["two"])
    assert verdict.abstained and math.isnan(verdict.probability)


def test_a_conversation_that_does_not_fit_is_not_judged_by_half() -> None:
    fake = Fake(lambda talk, choices: [0.5, 0.4], max_length=40)
    short, long = PairwiseJudge(fake, PAIRS).judge(["?", "?" * 50], ["one", "one"], ["two", "two"])
    assert not short.abstained and long.abstained == "too long for the model"
    assert all(len(talk[0].content) < 40 for talk in fake.asked)
    verdict, = PointwiseJudge(Fake(max_length=40)).judge(["?" * 50], ["yes"])
    assert verdict.abstained == "too long for the model"


def test_a_random_model_abstains_and_a_broken_one_does_too() -> None:
    manager = ModelManager(tiny(), LETTERS)
    assert all(v.abstained for v in PairwiseJudge(manager).judge(["hi"] * 3, ["one"] * 3, ["two"] * 3))
    assert all(v.abstained for v in PointwiseJudge(manager, MARKED).judge(["hi"] * 3, ["one", "two", ""]))
    broken = tiny()
    for p in broken.parameters():
        p.data.fill_(math.nan)
    verdicts = PointwiseJudge(ModelManager(broken, LETTERS), MARKED).judge(["hi"] * 2, ["one", "two"])
    assert [v.abstained for v in verdicts] == ["its probabilities are no numbers"] * 2
    assert PairwiseJudge(ModelManager(broken, LETTERS)).judge(["hi"], ["one"], ["two"])[0].abstained == "its probabilities are no numbers"


def test_labels_of_a_real_model_are_the_products_of_its_probabilities() -> None:
    model = tiny()
    judge = PairwiseJudge(ModelManager(model, LETTERS), PAIRS, most_sure=1.0, min_coverage=0.0)
    verdict, = judge.judge(["p"], ["x"], ["y"])
    chat = MarkedChat(LETTERS)
    shown = []
    for text in ("p|x|y", "p|y|x"):
        logits = model(torch.tensor([chat.prompt(PAIRS.question(*text.split("|")))]))[0, -1]
        shown.append(logits.log_softmax(-1)[[LETTERS.encode("A")[0], LETTERS.encode("B")[0]]].exp())
    forward, backward = (both[0] / both.sum() for both in shown)
    assert verdict.forward == pytest.approx(forward.item(), rel=1e-4) and verdict.backward == pytest.approx(backward.item(), rel=1e-4)
    assert verdict.probability == pytest.approx(((forward + 1 - backward) / 2).item(), rel=1e-4)


def test_a_verdict_behind_a_marker_is_scored_given_the_critique() -> None:
    model = tiny()
    fake = Fake(says=lambda talk, seed, opening: "hm , so it breaks , so it keeps")
    fake.model = model
    verdict, = PointwiseJudge(fake, MARKED, min_coverage=0.0).judge(["p"], ["r"])
    chat = fake.chat
    talk = chat.prompt(_talk("p", "r"))
    begun = LETTERS.encode("hm , so it breaks , so it ")
    expected = []
    for label in ("keeps", "breaks"):
        ids = [*talk, *begun, *LETTERS.encode(label)]
        logprobs = model(torch.tensor([ids]))[0].log_softmax(-1)
        at = len(talk) + len(begun)
        expected.append(sum(logprobs[n - 1, ids[n]].item() for n in range(at, len(ids))))
    assert verdict.score == pytest.approx(max(-30.0, min(30.0, expected[0] - expected[1])), abs=1e-4)


def _talk(prompt: str, response: str):
    from mmie.training.finetune import Message
    return Message("user", prompt), Message("assistant", response), Message("user", MARKED.requests[0])


def test_requests_are_averaged_over_those_that_reached_a_verdict() -> None:
    odds = {"one": 2.0, "two": -1.0}
    def says(talk, seed, opening): return "" if talk[-1].content == "three" else f"about {talk[-1].content}"
    def opinion(talk, choices):
        p = 1 / (1 + math.exp(-odds[talk[2].content]))
        return [p, 0.0, 1 - p, 0.0]
    judge = PointwiseJudge(Fake(opinion, says), PointwiseWording(requests=("one", "two", "three")))
    verdict, = judge.judge(["?"], ["r"])
    assert verdict.score == pytest.approx(0.5) and verdict.critique == "about one\nabout two\n" and not verdict.abstained
    assert PointwiseJudge(Fake(opinion, lambda *_: ""), judge.wording).judge(["?"], ["r"])[0].abstained == "the critique is empty"


@given(st.lists(numbers, min_size=2, max_size=7))
def test_consistent_comparisons_give_back_the_strengths(true: list[float]) -> None:
    s = torch.tensor(true, dtype=torch.float64)
    assert torch.allclose(strengths(s[:, None] - s), s - s.mean(), atol=1e-9)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6))
def test_weighing_is_antisymmetric_and_bounded(rows: list[tuple[float, float]]) -> None:
    logprobs = torch.tensor(rows, dtype=torch.float64)
    odds, coverage = weigh_labels(logprobs, 0.0)
    assert torch.equal(odds, -weigh_labels(logprobs.flip(1), 0.0)[0]) and (odds.abs() <= 30).all()
    assert torch.allclose(coverage, weigh_labels(logprobs.flip(1), 0.0)[1])


def test_wordings_that_cannot_work_are_refused() -> None:
    for bad in ({"good": ("yes",), "bad": ("yes",)}, {"good": ("",)}, {"bad": ()}, {"good": ("no way",), "bad": ("no",)}):
        with pytest.raises(InputError):
            PointwiseWording(**bad)
    for bad in ({"template": "{prompt} {first}"}, {"first": ("A",), "second": ("A",)}, {"second": ("AB",)}):
        with pytest.raises(InputError):
            PairwiseWording(**bad)
    assert PairwiseWording(template="{prompt}{first}{second}{x}").question("{second}", "{prompt}", "b")[0].content == "{second}{prompt}b{x}"


def test_lists_must_match() -> None:
    judge = PairwiseJudge(Fake(lambda *_: [0.5, 0.4]), PAIRS)
    for bad in ((["?"], ["a"], []), ("?", "a", "b"), (["?"], ["a"], [None])):
        with pytest.raises(InputError):
            judge.judge(*bad)
    assert judge.judge([], [], []) == [] and judge.compare([], [], []).shape == (0,)
    assert PointwiseJudge(Fake()).score([], []).shape == (0,)


def test_agreement_counts_errors_and_abstentions_apart() -> None:
    found = judge_agreement(torch.tensor([1.0, -1.0, 1.0, math.nan, 2.0]), [True, True, False, True, True])
    assert (found.right.correct, found.right.total, found.abstained) == (2, 4, 1)
    assert (found.missed.correct, found.missed.total) == (1, 1) and (found.false_alarms.correct, found.false_alarms.total) == (1, 3)
    assert judge_agreement(torch.full((4,), math.nan), [True] * 4).kappa is None


def test_position_bias_needs_opinions() -> None:
    with pytest.raises(InputError, match="0 opinions"):
        position_bias([])
    always = PairwiseJudge(Fake(lambda *_: [0.9, 0.1]), PAIRS).judge(["?"] * 5, list("abcde"), list("fghij"))
    found = position_bias(always)
    assert found.rate.value == 1 and found.first_twice == 5 and "100" in str(found)
    assert position_figure({"always the first": always}).axes


# ------------------------------------------------------------------------------------------------ preferences

class Length:
    "Likes long answers."
    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        return torch.tensor([float(len(text)) for text in responses])


def says(talk, seed: int, opening: str) -> str:
    return opening + "!" if opening else "x" * (seed % 4)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    fake, prompts = Fake(says=says), [f"prompt {n}" for n in range(23)]
    whole = make_preferences(fake, prompts, Length(), samples=3, path=tmp_path / "a.jsonl", chunk=4)
    data = (tmp_path / "a.jsonl").read_bytes()
    for cut in (0, 1, len(data) // 3, len(data) - 1, len(data)):
        (tmp_path / "b.jsonl").write_bytes(data[:cut])
        again = make_preferences(fake, prompts, Length(), samples=3, path=tmp_path / "b.jsonl", chunk=7)
        assert (tmp_path / "b.jsonl").read_bytes() == data and again == whole
    silent = Fake(says=lambda *_: pytest.fail("everything was done already"))
    assert make_preferences(silent, prompts, Length(), samples=3, path=tmp_path / "a.jsonl") == whole
    assert len(make_preferences(fake, [*prompts, "one more"], Length(), samples=3, path=tmp_path / "a.jsonl").records) == 24


def test_answers_do_not_depend_on_the_company(tmp_path: Path) -> None:
    fake = Fake(says=says)
    alone = make_preferences(fake, ["prompt 5"], Length(), samples=8).records
    assert alone[0] in make_preferences(fake, [f"prompt {n}" for n in range(9)], Length(), samples=8).records
    assert len(make_preferences(fake, ["prompt 5"] * 3, Length(), samples=8).records) == 1


def test_other_settings_and_other_files_are_refused(tmp_path: Path) -> None:
    fake, prompts, path = Fake(says=says), ["a", "b", "c"], tmp_path / "a.jsonl"
    make_preferences(fake, prompts, Length(), samples=8, path=path)
    for changed in ({"samples": 5}, {"seed": 1}, {"temperature": 0.5}, {"openings": ("no",)}, {"min_probability": 0.9}, {"max_new_tokens": 3}):
        with pytest.raises(InputError, match="other settings"):
            make_preferences(fake, prompts, Length(), **({"samples": 8} | changed), path=path)
    for text in ('{"prompt": 1}\n', "[]\n", "nonsense\n", '{"prompt": "a", "skipped": "", "answers": 1, "scores": 2, "run": 3}\n'):
        path.write_text(text)
        with pytest.raises(InputError, match="line 1"):
            make_preferences(fake, prompts, Length(), path=path)


def test_no_pair_is_an_error_with_reasons() -> None:
    with pytest.raises(InputError, match="2: all answers are the same"):
        make_preferences(Fake(says=lambda *_: "same"), ["a", "b"], Length())
    with pytest.raises(InputError, match="no prompts"):
        make_preferences(Fake(says=says), [], Length())
    with pytest.raises(InputError, match="judged alike"):
        make_preferences(Fake(says=lambda talk, seed, opening: f"{seed % 10}"), ["a", "b"], Length(), samples=8)
    for bad in ({"samples": 1}, {"samples": 4, "temperature": 0.0}, {"samples": -1}, {"most_sure": 0.3}):
        with pytest.raises(InputError):
            make_preferences(Fake(says=says), ["a"], Length(), **bad)


def test_a_pairwise_judge_ranks_all_answers() -> None:
    def opinion(talk, choices):
        first, second = talk[0].content.split("|")[1:]
        p = 1 / (1 + math.exp(3.0 * (len(second) - len(first)) - 2.0)) # likes long ones, and what comes first
        return [p, 1 - p]
    judge = PairwiseJudge(Fake(opinion), PAIRS)
    assert not isinstance(judge, Scorer) and isinstance(Length(), Scorer)
    made = make_preferences(Fake(says=says), [f"prompt {n}" for n in range(6)], judge, samples=6, min_probability=0.6)
    for pair in made.preferences:
        record = next(r for r in made.records if r.prompt == pair.prompt)
        assert pair.chosen == max(record.answers, key=len) and pair.rejected == min(record.answers, key=len)


def test_empty_answers_are_no_answers() -> None:
    answers = sample_answers(Fake(says=lambda talk, seed, opening: ["", "  ", "x", "y"][seed % 4]), [f"{n}" for n in range(20)], samples=6)
    assert all(set(row) <= {"x", "y"} for row in answers)


def test_forced_openings_are_kept_and_the_real_thing_goes_on_from_them() -> None:
    manager = ModelManager(tiny(), LETTERS)
    row, = sample_answers(manager, ["hi"], samples=2, openings=("sure .", "no ."), max_new_tokens=6, seed=1)
    assert any(text.startswith("sure .") for text in row) and any(text.startswith("no .") for text in row)
    assert [row] == sample_answers(manager, ["hi"], samples=2, openings=("sure .", "no ."), max_new_tokens=6, seed=1)


@given(st.lists(st.one_of(st.floats(-50, 50), st.just(math.nan)), min_size=1, max_size=6))
def test_a_pair_is_the_best_and_the_worst_or_there_is_a_reason(scores: list[float]) -> None:
    answers = [f"answer {n}" for n in range(len(scores))]
    record = choose_pair("?", answers, scores)
    judged = [s for s in scores if not math.isnan(s)]
    if record.preference is None:
        assert record.skipped and (len(judged) < 2 or max(judged) - min(judged) < math.log(3) + 1e-9)
        return
    by_text = dict(zip(answers, scores, strict=True))
    assert by_text[record.preference.chosen] == max(judged) and by_text[record.preference.rejected] == min(judged)
    assert 0.75 <= record.preference.probability <= 0.95


# ------------------------------------------------------------------------------------------------ files

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).map(str.strip).filter(bool)


@given(st.lists(st.builds(lambda p, a, b, q: (p, a, b, q), words, words, words, st.floats(0, 1)), min_size=1, max_size=5))
@settings(deadline=None, max_examples=40)
def test_what_was_saved_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str, float]]) -> None:
    pairs = [Preference(*row) for row in rows if row[1] != row[2]]
    if pairs:
        path = tmp_path_factory.mktemp("files") / "pairs.jsonl"
        save_preferences(path, pairs)
        assert read_preferences(path) == (pairs, [])


def test_rows_are_good_or_there_is_a_reason(tmp_path: Path) -> None:
    user, says_ = {"role": "user", "content": "q"}, lambda text: {"role": "assistant", "content": text}
    rows = [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, None),
        ({"chosen": [user, says_("a")], "rejected": [user, says_("b")]}, None),
        ({"prompt": "q", "chosen": [says_("a")], "rejected": [says_("b")], "probability": 0.6}, None),
        ({"chosen": [user, says_("a")], "rejected": [{"role": "user", "content": "other"}, says_("b")]}, "different prompts"),
        ({"chosen": [user, says_("a"), user, says_("c")], "rejected": [user, says_("b")]}, "no single exchange"),
        ({"chosen": [user], "rejected": [user, says_("b")]}, "no single exchange"),
        ({"chosen": "a", "rejected": "b"}, 'no field "prompt"'),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "null"),
        ({"prompt": "q", "chosen": " ", "rejected": "b"}, "empty"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "probability": 2}, "probability is 2"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "probability": True}, "probability is True"),
        ({"prompt": "q", "chosen": "\ud800", "rejected": "b"}, "surrogates"),
        ("text", "not an object but str"),
    ]
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(json.dumps(row) for row, _ in rows).encode() + b"\n\n\xff\n")
    good, rejected = read_preferences(path)
    assert len(good) == 3 and good[0] == good[1] and good[2].probability == 0.6
    expected = [(n, reason) for n, (_, reason) in enumerate(rows, 1) if reason]
    assert [row.line for row in rejected] == [n for n, _ in expected] + [len(rows) + 2]
    for row, (_, reason) in zip(rejected, expected, strict=False):
        assert reason in row.reason
    for bad in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match="cannot read"):
            read_preferences(bad)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match="it is empty"):
        read_preferences(tmp_path / "empty.jsonl")


def test_records_survive_what_json_has_no_word_for(tmp_path: Path) -> None:
    class Odd:
        def score(self, prompts, responses): return torch.tensor([math.inf if r == "x" else math.nan if r == "xx" else 0.0 for r in responses])
    made = make_preferences(Fake(says=says), [f"{n}" for n in range(9)], Odd(), samples=5, path=tmp_path / "a.jsonl")
    for line in (tmp_path / "a.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    assert isinstance(make_preferences(Fake(), [r.prompt for r in made.records], Odd(), samples=5, path=tmp_path / "a.jsonl"), MadePreferences)


# ------------------------------------------------------------------------------------------------ other people's models

def test_a_model_of_transformers_judges_too() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = BPETokenizer.train(["Which answer is better? A or B. Yes, no. " * 3], 280, special_tokens=MARKS).to_hf()
    theirs.chat_template = jinja_template(ChatTemplate())
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(theirs), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=512))
    manager = ModelManager(llama.eval(), theirs)
    pairwise = PairwiseJudge(manager, min_coverage=0.0).compare(["hi", "ho"], ["a", "b"], ["c", "d"])
    swapped = PairwiseJudge(manager, min_coverage=0.0).compare(["hi", "ho"], ["c", "d"], ["a", "b"])
    assert torch.allclose(pairwise + swapped, torch.ones(2, dtype=torch.float64), atol=1e-6)
    scores = PointwiseJudge(manager, PointwiseWording(max_new_tokens=8), min_coverage=0.0).judge(["hi", "ho"], ["a", "b"])
    assert all(math.isfinite(v.score) and v.critique for v in scores)
    assert PairwiseJudge(manager).judge(["hi"], ["a"], ["c"])[0].abstained
    made = make_preferences(manager, ["hi", "ho"], Length(), samples=3, max_new_tokens=6)
    assert made.preferences
