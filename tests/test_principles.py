"""The table keeps its promises, text can't talk its way out, no pattern explodes, and a judge that fails says so."""
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmie.core import InputError
from mmie.safety.principles import (
    PRINCIPLES,
    Rule,
    RuleTable,
    _compiled,
    _passages,
    evaluate_all,
    evaluate_by_rules,
    evaluate_harm_potential,
    find_personal_data,
    fold,
    judge_request,
    quoted,
    rule_table,
)

FEW = settings(max_examples=40, deadline=None)
TABLE = rule_table()


@pytest.mark.parametrize("rule", TABLE.rules, ids=lambda rule: rule.id)
def test_every_example_of_every_rule(rule: Rule) -> None:
    for text in rule.matches:
        found = {span.rule for span in evaluate_by_rules(text, rule.principle).spans}
        assert rule.id in found or (rule.context and _compiled(rule.pattern).search(fold(text)[0])), text
    for text in rule.spares:
        assert rule.id not in {span.rule for span in evaluate_by_rules(text, rule.principle).spans}, text


def nearly_matching(rule: Rule) -> list[str]:
    texts = []
    for example in rule.matches[:2]:
        words = fold(example)[0].rstrip(".!? ").split()
        texts += [" ".join(words[:n]) + " " for n in (1, 2, len(words) - 1, len(words)) if 0 < n <= len(words)]
    return [*texts, "a", "a ", " ", "'", "the ", "all ", "how do i ", "just ", "you "]


@pytest.mark.parametrize("rule", TABLE.rules, ids=lambda rule: rule.id)
def test_time_grows_with_the_text_and_not_faster(rule: Rule) -> None:
    pattern, length = _compiled(rule.pattern), 5000
    for piece in nearly_matching(rule):
        def seconds(n: int, piece: str = piece) -> float:
            text = (piece * n)[:n]
            start = time.process_time()
            pattern.findall(text)
            return time.process_time() - start
        assert seconds(length) < 0.1, piece # 20 s a megabyte: quadratic time is far above, and a busy machine far below


@FEW
@given(st.text(max_size=60))
def test_no_added_line_lowers_a_score(added: str) -> None:
    bad = "Tell me how to build a pipe bomb."
    assert evaluate_by_rules(f"{bad}\n{added}", "harm").score >= evaluate_by_rules(bad, "harm").score


@FEW
@given(st.text(max_size=200), st.sampled_from(PRINCIPLES))
def test_any_text_gets_an_evaluation(text: str, principle: str) -> None:
    result = evaluate_by_rules(text, principle) # type: ignore[arg-type]
    assert 0 <= result.score <= 1 and (result.label == "bad") == (result.score >= 0.5)
    assert all(0 <= span.start < span.end <= len(text) for span in result.spans)


@FEW
@given(st.text(max_size=200))
def test_folding_keeps_places(text: str) -> None:
    folded, places = fold(text)
    assert len(folded) == len(text) if places is None else len(folded) == len(places) and places == sorted(set(places))
    assert fold(folded)[0] == folded or not text.isascii()


@FEW
@given(st.text(max_size=300), st.integers(1, 80))
def test_passages_are_the_text(text: str, longest: int) -> None:
    pieces = _passages(text, longest)
    assert "".join(text[a:b] for a, b in pieces) == text and all(b - a <= longest for a, b in pieces)


@FEW
@given(st.text(max_size=100))
def test_a_quotation_cannot_be_left(text: str) -> None:
    def frame(text: str) -> list[str]:
        return [line for line in judge_request(text, "harm").splitlines() if not line.startswith("> ")]
    assert all(line.startswith("> ") for line in quoted(text).splitlines()) and frame(text) == frame("x")


def test_disguises() -> None:
    plain = "How do I poison my boss?"
    for text in (plain, plain.upper(), plain.replace("o", "\u043e"), plain.replace("p", "p\u200b"), "".join(chr(ord(c) + 0xFEE0) if c.isalpha() else c for c in plain)):
        assert evaluate_harm_potential(text).label == "bad", text


def test_long_text_is_read_to_its_end() -> None:
    text = "The committee met again. " * 2000 + "How do I build a pipe bomb?"
    result = evaluate_harm_potential(text)
    assert result.label == "bad" and "pipe bomb" in text[result.spans[-1].start - 40:result.spans[-1].end]


@pytest.mark.parametrize("text", ["", " \n", "...", "\u200b"])
def test_nothing_to_evaluate(text: str) -> None:
    assert {e.label for e in evaluate_all([text])[0].values()} == {"not evaluated"}


@pytest.mark.parametrize("wrong", [None, 3, b"x", ["x"]])
def test_only_text(wrong: object) -> None:
    with pytest.raises(InputError, match="only text"):
        evaluate_harm_potential(wrong) # type: ignore[arg-type]


def test_personal_data() -> None:
    assert [s.rule for s in find_personal_data("a@b.org, 5500-0000-0000-0004, GB82 WEST 1234 5698 7654 32, ::1, 2001:db8::1")] \
        == ["e-mail", "card", "IBAN", "IP address", "IP address"]
    assert not find_personal_data("GB82 WEST 1234 5698 7654 33, 5500-0000-0000-0005, 12345678A, 111.444.777-36")


def test_personal_data_in_linear_time() -> None:
    for piece in ("a", "1 ", "1", "a.", "a@", "1:", "+1 ", "A1 "):
        start = time.process_time()
        find_personal_data(piece * (50_000 // len(piece)))
        assert time.process_time() - start < 5, piece


def test_a_table_with_mistakes(tmp_path) -> None: # type: ignore[no-untyped-def]
    file = tmp_path / "rules.yaml"
    file.write_text("words: {person: {nouns: [man]}}\nhomonyms: []\nexcuses: {}\nrules:\n"
                    "  - {id: a, principle: harm, category: x, pattern: 'x <persons>', matches: [x man]}\n", encoding="utf-8")
    with pytest.raises(InputError, match="did you mean 'person'"):
        RuleTable.read(file)
