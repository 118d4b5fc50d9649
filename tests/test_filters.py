"""The safety filter and the score explorer: promises that must hold for any text, any cutting and any evaluator."""
import html
import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmie.core import InputError
from mmie.models.decoder import DecoderLM, ModelConfig
from mmie.models.pretrained import HFCausalLM, as_transformers
from mmie.safety.explorer import RuleMark, ScoreExplorer, explore_scores, marked_text, rule_marks, scores_html
from mmie.safety.filters import (
    FilteredModel,
    FilterSettings,
    PrincipleLimits,
    SafetyFilter,
    TextEvaluator,
    _read_on,
    _Reading,
    _without_personal_data,
    _without_refusals,
    answer_pieces,
    redact,
    threshold_errors,
)
from mmie.safety.principles import PRINCIPLES, Evaluation, Judge, PrincipleName, Span, evaluate_by_rules, find_personal_data, rule_table
from mmie.tokenization.base import ByteTokenizer
from mmie.training.finetune import Message, answer

NASTY = """</mark></script><script>document.title="owned"</script><img src=x onerror="document.title='owned'"> & "quotes" 'n' é🙂\u202eabc"""


def fake(text: str, principle: PrincipleName) -> Evaluation:
    "Bad words stand for scores, and two halves of a secret only count together: quick, and independent of the rules."
    score = {"harm": 0.6, "fairness": 0.7}.get(principle, 0.0) * (f"x{principle}" in text)
    score = max(score, 0.9 * (principle == "harm" and "left" in text and "right" in text), 0.95 * (principle == "autonomy" and "obey" in text))
    at = text.find(f"x{principle}")
    return Evaluation(principle, score, "bad" if score >= 0.5 else "fine", spans=(Span(at, at + 5, "fake"),) if at >= 0 else ())


WORDS = st.sampled_from(["the cat", "xharm", "xfairness", "left", "right", "obey", "ada@example.org", "+44 20 7946 0958", "192.168.0.1", "3.14", "é🙂",
                         '"no"', "I can't explain xharm", "::", "1.2.3.4@a.bc", "word " * 60, "y" * 600])
ENDS = st.sampled_from([". ", "! ", "?\n", '." ', "… ", " ", ", ", ".", "\n", "\r\n", "  ", "!? ", "[…] ", ""])
TEXTS = st.lists(st.tuples(WORDS, ENDS), max_size=9).map(lambda parts: "".join(itertools.chain.from_iterable(parts)))
SETTINGS = st.builds(FilterSettings, harm=st.sampled_from([PrincipleLimits(), PrincipleLimits(block=None), PrincipleLimits(rewrite=None, block=0.95)]),
                     personal_data=st.sampled_from(["allow", "rewrite", "rewrite", "block"]), context=st.integers(1, 3), refusals=st.booleans())


@given(TEXTS, SETTINGS, st.data())
@settings(max_examples=150)
def test_the_cutting_of_a_stream_does_not_matter(text: str, config: FilterSettings, data: st.DataObject) -> None:
    guard = SafetyFilter(config, evaluators=[fake])
    places = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    stream = guard.stream([text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])])
    shown, whole = "".join(stream), guard.check(text)
    assert shown == whole.shown and stream.decision is not None and stream.held == 0
    assert stream.decision == whole, "a judge without moods"
    assert whole.text == ("" if whole.action == "block" else shown)
    assert shown == "".join(guard.stream(text)), "letter by letter"


@given(TEXTS, SETTINGS)
@settings(max_examples=150)
def test_what_is_left_passes_unchanged(text: str, config: FilterSettings) -> None:
    guard = SafetyFilter(config, evaluators=[fake])
    decision = guard.check(text)
    again = guard.check(decision.text)
    assert (again.action, again.text, again.removed, again.reason) == ("allow", decision.text, (), "")
    if decision.action == "allow":
        assert decision.text == text and not decision.removed and not decision.reason
    else:
        assert decision.reason
    if decision.action == "rewrite":
        assert decision.removed and decision.text != text
    for span, after in itertools.zip_longest(decision.removed, decision.removed[1:]):
        assert 0 <= span.start < span.end <= (after.start if after else len(text))
    for verdict in decision.evaluations.values():
        for span in verdict.spans:
            assert text[span.start:span.end].startswith(f"x{verdict.principle}"[:5]), "spans point into what the user wrote"


@given(TEXTS)
@settings(max_examples=60)
def test_nothing_between_the_gaps_is_changed(text: str) -> None:
    "Taking the removed spans out of the original gives the same as taking gaps and placeholders out of the result."
    text = text.replace("[…]", "")
    decision = SafetyFilter(FilterSettings(harm=PrincipleLimits(block=None), autonomy=PrincipleLimits(block=None)), evaluators=[fake]).check(text)
    if decision.action == "block":
        return
    kept, at = "", 0
    for span in decision.removed:
        kept, at = kept + text[at:span.start], span.end
    kinds = "|".join(map(re.escape, {span.rule for span in decision.removed} - set(PRINCIPLES)))
    ours = re.sub(rf"\[(?:…{'|' + kinds if kinds else ''})\]", "", decision.text)
    assert ours == kept + text[at:]


@given(st.text(alphabet="ab1234567890@.+-:() []IBGDE,", max_size=60))
def test_redaction_leaves_no_personal_data(text: str) -> None:
    clean, places, removed = _without_personal_data(text)
    assert not find_personal_data(clean) and len(places) == len(clean) and places == sorted(places)
    assert (clean == text) == (not removed)


def test_a_redaction_may_uncover_another() -> None:
    "Two numbers in a row: the second is the middle of something until the first is gone."
    twice = "+44 20 7946 0958+44 20 7946 0958"
    assert len(find_personal_data(twice)) == 1 and _without_personal_data(twice)[0] == "[phone][phone]"
    assert [(s.start, s.end) for s in _without_personal_data(twice)[2]] == [(0, 16), (16, 32)]


def test_what_was_removed_is_no_context() -> None:
    assert SafetyFilter(evaluators=[fake]).check("left xharm. right.").text == "[…] right."
    assert SafetyFilter(evaluators=[fake]).check("left. right.").shown == "left. "


@pytest.mark.parametrize("text", ["word " * 30 + "xharm " + "word " * 200, "word " * 230 + "xharm. ", "word " * 230 + "see 192.168.0.1. "])
def test_a_sentence_that_is_too_long_is_never_rewritten(text: str) -> None:
    decision = SafetyFilter(evaluators=[fake]).check("One. " + text)
    assert decision.action == "block" and "in a sentence of over 1000 characters" in decision.reason and decision.shown.startswith("One. ")


def test_a_sentence_that_grows_too_long_goes() -> None:
    text = "1.2.3.4 " * 110
    decision = SafetyFilter(evaluators=[fake]).check(f"One. {text}. Two.")
    assert decision.text == "One. […] Two." and decision.removed == (Span(5, 5 + len(text) + 1, "personal data"),)


@pytest.mark.parametrize("number", ["+44 20 7946 0958", "4111 1111 1111 1111", "DE89 3704 0044 0532 0130 00", "ada.lovelace@mail.example.org"])
@pytest.mark.parametrize("before", [*range(840, 1003, 9)])
def test_no_number_is_cut_in_two(number: str, before: int) -> None:
    "However far a text goes on without an end, the half of a number is never shown."
    text = ("word " * 300)[:before] + " " + number + " and so on" * 30
    shown = "".join(SafetyFilter(evaluators=[fake]).stream([text]))
    assert number[:6] not in shown and number[-6:] not in shown


def test_the_buffer_is_bounded_and_text_arrives_early() -> None:
    reading = _Reading(FilterSettings(), [fake])
    worst = 0
    for piece in ["go on " * 3] * 500:
        _read_on(reading, piece)
        worst = max(worst, len(reading.held))
    assert worst <= 1000 and reading.at > 7000
    stream = SafetyFilter(evaluators=[fake]).stream(iter("One. Two"))
    assert next(iter(stream)) == "One. " and stream.held == 0 and stream.decision is None


@pytest.mark.parametrize("principle", PRINCIPLES)
@pytest.mark.parametrize(("score", "rewrite", "block", "action"), [
    (0.3, 0.3, 0.6, "rewrite"), (0.29, 0.3, 0.6, "allow"), (0.6, 0.3, 0.6, "block"), (0.59, 0.3, 0.6, "rewrite"), (0.99, 0.3, None, "rewrite"),
    (0.99, None, None, "allow"), (0.6, None, 0.6, "block"), (0.0, None, 0.0, "block"), (1.0, None, 1.0, "block")])
def test_every_threshold_of_every_principle(principle: PrincipleName, score: float, rewrite: float | None, block: float | None, action: str) -> None:
    def one(text: str, about: PrincipleName) -> Evaluation:
        own = score if about == principle else 0.0
        return Evaluation(about, own, "bad" if own >= 0.5 else "fine")
    config = FilterSettings(**{principle: PrincipleLimits(rewrite=rewrite, block=block)})
    decision = SafetyFilter(config, evaluators=[one]).check("A sentence. ")
    assert decision.action == action and decision.reason == ("" if action == "allow" else principle)
    assert decision.text == {"allow": "A sentence. ", "rewrite": "[…] ", "block": ""}[action]


def test_principles_without_thresholds_are_not_asked() -> None:
    asked = []
    def notes(text: str, principle: PrincipleName) -> Evaluation:
        asked.append(principle)
        return fake(text, principle)
    off = PrincipleLimits(rewrite=None, block=None)
    SafetyFilter(FilterSettings(harm=off, fairness=off, autonomy=off), evaluators=[notes]).check("One. Two.")
    assert asked == ["truthfulness"] * 2


def silent(text: str, principle: PrincipleName) -> Evaluation:
    return Evaluation(principle, 0.0, "not evaluated", reason="no idea")


def failing_judge(text: str, principle: PrincipleName) -> Evaluation:
    return Evaluation(principle, 1.0, "bad", method="judge", reason="the judge failed, so the text counts as bad: nonsense")


def broken(text: str, principle: PrincipleName) -> Evaluation:
    raise KeyError("gone")


@pytest.mark.parametrize("evaluator", [silent, failing_judge, broken, lambda t, p: None, lambda t, p: 0.0, lambda t, p: fake(t, "harm")])
def test_it_fails_closed(evaluator: TextEvaluator) -> None:
    "Also where no score would ever block, and behind evaluators that have done their work."
    never = FilterSettings(**dict.fromkeys(PRINCIPLES, PrincipleLimits(block=None)))
    for config in (FilterSettings(), never):
        decision = SafetyFilter(config, evaluators=[fake, evaluator]).check("Good morning. And good night.")
        assert decision.action == "block" and decision.text == decision.shown == "" and decision.reason.startswith("nothing goes through unread")


def test_an_interrupt_is_not_an_evaluators_failure() -> None:
    def stopped(text: str, principle: PrincipleName) -> Evaluation:
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        SafetyFilter(evaluators=[stopped]).check("Hello.")


def words() -> ByteTokenizer:
    return ByteTokenizer(special_tokens=["<|user|>", "<|assistant|>", "<|end|>"])


def random_model(**changes: int) -> DecoderLM:
    torch.manual_seed(0)
    return DecoderLM(ModelConfig(**{"vocab_size": 259, "d_model": 16, "n_layers": 1, "n_heads": 2, "max_length": 2048} | changes)).eval()


def test_a_judge_that_talks_nonsense_blocks() -> None:
    decision = SafetyFilter(evaluators=[fake], judge=Judge(random_model(), words())).check("Good morning.")
    assert decision.action == "block" and "the judge failed" in decision.reason


def test_warnings_and_refusals_come_through() -> None:
    guard = SafetyFilter(FilterSettings(refusals=True))
    for text in ("Bleach and ammonia must not mix.", "Bleach and ammonia must not mix. You must not mix them.", "I can't help you build a bomb.", "I'm sorry, but I won't explain how to poison a dog.",
                 "You asked how to kill your boss. I won't tell you.", "I’m unable to assist you in stabbing anybody."):
        assert guard.check(text).text == text, text


@pytest.mark.parametrize("text", ["I can't help with that, but here is how to build a bomb.", "I won't tell anyone, so how do I build a bomb?",
                                  "I can't explain it and how do I build a bomb?", "We don't plan: how do I build a bomb?", "You want to build a bomb.",
                                  "I can't believe it. How do I build a bomb?"])
def test_a_refusal_excuses_its_own_clause_only(text: str) -> None:
    assert "build a bomb" in _without_refusals(text) and len(_without_refusals(text)) == len(text)


def test_a_refusal_excuses_nothing_where_users_speak() -> None:
    text = "You asked how to xharm and I won't tell xharm."
    assert SafetyFilter(evaluators=[fake]).check(text).action == "rewrite"
    assert SafetyFilter(FilterSettings(refusals=True), evaluators=[fake]).check(text).action == "allow"


@pytest.mark.parametrize(("wrong", "message"), [
    ({"harm": {"rewrite": 1.5}}, "less than or equal to 1"), ({"harm": {"block": -0.1}}, "greater than or equal to 0"),
    ({"harm": {"rewrite": 0.8, "block": 0.8}}, "leave nothing to rewrite"), ({"honesty": {}}, "unknown setting 'honesty'"),
    ({"personal_data": "hide"}, "'allow', 'rewrite' or 'block'"), ({"context": 0}, "context"), ({"harm": {"rewrite": float("nan")}}, "rewrite")])
def test_settings_that_make_no_sense(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FilterSettings(**wrong)


def test_mistakes_in_the_call() -> None:
    guard = SafetyFilter(evaluators=[fake])
    for text in (b"bytes", None, 3, ["a list"]):
        with pytest.raises(InputError, match="only text can be filtered"):
            guard.check(text) # type: ignore[arg-type]
        with pytest.raises(InputError, match="only text can be filtered"):
            list(guard.stream([text])) # type: ignore[list-item]
    for spans in ([], [Span(0, 9, "x")], [Span(0, 2, "x"), Span(1, 3, "y")], [Span(2, 2, "x")]):
        with pytest.raises(InputError):
            redact("short", spans)
    with pytest.raises(InputError, match="somebody who reads"):
        SafetyFilter(evaluators=["rules"]) # type: ignore[list-item]
    with pytest.raises(InputError, match="a list of evaluators"):
        SafetyFilter(evaluators=fake) # type: ignore[arg-type]
    with pytest.raises(InputError, match="dict is no FilterSettings"):
        SafetyFilter({"harm": {"block": 0.9}}) # type: ignore[arg-type]
    with pytest.raises(InputError, match="str is no judge"):
        SafetyFilter(judge="a model") # type: ignore[arg-type]
    for pieces in (None, b"bytes", 3):
        with pytest.raises(InputError, match="isn't a text in pieces"):
            guard.stream(pieces) # type: ignore[arg-type]
    model = FilteredModel(None, ByteTokenizer()) # type: ignore[arg-type]
    for said in (None, ["a text"], [None], 3):
        with pytest.raises(InputError, match="is no conversation"):
            model.stream(said) # type: ignore[arg-type]
    with pytest.raises(InputError, match="wrap a single one"):
        model("each letter would be a conversation")
    with pytest.raises(InputError, match="NaN"):
        threshold_errors([True, False], [float("nan"), 0.1])


def test_a_blocked_stream_closes_its_source() -> None:
    state = []
    def source() -> Iterator[str]:
        try:
            while True:
                state.append("more")
                yield "You must obey. "
        finally:
            state.append("closed")
    stream = SafetyFilter(evaluators=[fake]).stream(source())
    assert list(stream) == [] and state == ["more", "closed"] and stream.finished().action == "block"


def test_ours_and_transformers_answer_alike() -> None:
    pytest.importorskip("transformers")
    model, tokenizer = random_model(max_length=128), words()
    with torch.no_grad():
        model.embedding.weight[128:256] -= 5 # mostly ASCII, still the odd half character
    open_ = SafetyFilter(FilterSettings(), evaluators=[fake])
    sides = [FilteredModel(one, tokenizer, prompts=open_, answers=open_, max_new_tokens=24) for one in (model, HFCausalLM(as_transformers(model)))]
    for question in ("Hello", "What is the cat?"):
        pieces = list(answer_pieces(model, tokenizer, [Message("user", question)], max_new_tokens=24))
        assert "".join(pieces).strip() == answer(model, tokenizer, question, max_new_tokens=24)
        ours, theirs = ("".join(side.stream(question, temperature=1.0, seed=5)) for side in sides)
        assert ours == theirs
        assert sides[0]([question]) == ["".join(sides[0].stream(question)).strip()]


def test_a_blocked_prompt_never_reaches_the_model() -> None:
    class Forbidden:
        device, max_length = torch.device("cpu"), 100
        def __getattr__(self, name: str) -> object:
            raise AssertionError(f"the model was asked for {name}")
    strict = SafetyFilter(FilterSettings(), evaluators=[fake])
    model = FilteredModel(Forbidden(), words(), prompts=strict, answers=strict) # type: ignore[arg-type]
    stream = model.stream([Message("user", "You must obey."), Message("assistant", "Yes."), Message("user", "Hello")])
    assert "".join(stream) == model.refusal and [d.action for d in stream.asked] == ["block", "allow"]
    assert model(["You must obey.", "obey"]) == [model.refusal] * 2


# ------------------------------------------------------------------ the explorer


@given(st.text(alphabet="ab <>&\"'\u202e\u200bé🙂\n\r", max_size=30), st.data())
def test_marked_text_is_the_text(text: str, data: st.DataObject) -> None:
    "Whatever overlaps: without our own tags it is the text, and each mark covers what it should."
    def mark(ends: tuple[int, int], name: str) -> RuleMark:
        return RuleMark(min(ends), max(ends), name, data.draw(st.sampled_from([*PRINCIPLES, "personal data"])), 0.5, data.draw(st.sampled_from(["", '"<negation>'])))
    ends = data.draw(st.lists(st.tuples(st.integers(0, len(text)), st.integers(0, len(text))).filter(lambda e: e[0] != e[1]), max_size=4))
    marks = [mark(e, f'<r{n}>"') for n, e in enumerate(ends)]
    page = marked_text(text, marks)
    bare = re.sub(r'<sup style="[^"<>]*">[\d,]+</sup>|<mark style="[^"<>]*" title="[^"<>]*">|</mark>', "", page)
    assert "<" not in bare and ">" not in bare
    shown = html.unescape(bare).replace("\\u202e", "\u202e").replace("\\u200b", "\u200b").replace("\\x0d", "\r")
    assert shown == text
    numbers = [int(n) for found in re.findall(r">([\d,]+)</sup>", page) for n in found.split(",")]
    assert sorted(numbers) == list(range(1, len(marks) + 1))


def test_marks_that_count_are_the_evaluations() -> None:
    for rule in rule_table().rules[1::6]:
        for text in (*rule.matches[:1], *rule.spares[:1]):
            marks = rule_marks(text)
            for principle in PRINCIPLES:
                ours = {(m.start, m.end, m.rule) for m in marks if m.principle == principle and not m.excuse}
                assert ours == {(s.start, s.end, s.rule) for s in evaluate_by_rules(text, principle).spans}
            assert all(0 <= m.start < m.end <= len(text) and 0 < m.weight <= 1 for m in marks)


def test_the_widget() -> None:
    pytest.importorskip("ipywidgets")
    live = explore_scores("Hello.", SafetyFilter(FilterSettings(harm=PrincipleLimits(block=None))))
    _, box, view = live.panel.children # type: ignore[union-attr]
    assert box.description == "Text" and box.continuous_update and live.picture() in view.value
    typed = "How do I build a bomb?"
    for end in range(1, len(typed) + 1, 7):
        box.value = typed[:end]
        assert live.text == typed[:end] and scores_html(typed[:end], live.guard) in view.value
    box.value = typed
    assert "<b>rewrite</b>" in view.value and "[…]" in view.value
    live.text = NASTY
    assert box.value == NASTY and "<script" not in view.value
    with pytest.raises(InputError, match="only text"):
        live.text = 3 # type: ignore[assignment]
    assert live.text == box.value == NASTY
    assert live._repr_mimebundle_()["text/html"] == live.html()


def test_the_page_in_a_browser(browser: Any) -> None:
    "A hostile text owns nothing; the page fits a phone; text takes the color of the page around it."
    page, trouble = browser.new_page(viewport={"width": 380, "height": 700}), []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: trouble.append(request.url))
    text = f"How do I build a bomb? All women are stupid. Write to ada@example.org. {NASTY} " + "x" * 200
    for theme, ink in (("quarto-light", "rgb(28, 33, 39)"), ("quarto-dark", "rgb(227, 230, 234)")):
        page.set_content(f"<!doctype html><meta charset=utf-8><body class={theme}>" + ScoreExplorer(text).html())
        assert page.title() == "" and page.locator("img, script").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 380
        colors = page.eval_on_selector_all("mark", "marks => [...new Set(marks.map(m => getComputedStyle(m).color))]")
        lines = page.eval_on_selector_all("mark", "marks => [...new Set(marks.map(m => getComputedStyle(m).textDecorationStyle))]")
        assert colors == [ink] and {"solid", "double"} <= set(lines)
        assert page.locator("th[scope=row]").all_inner_texts() == list(PRINCIPLES)
    page.close()
    assert not trouble
