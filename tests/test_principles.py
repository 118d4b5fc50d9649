"""The table keeps its promises, text can't talk its way out, no pattern explodes, and a judge that fails says so."""
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmie.core import InputError
from mmie.safety.principles import (
    PRINCIPLES,
    Rule,
    RuleLanguage,
    RuleTable,
    _blanked,
    _passages,
    evaluate_all,
    evaluate_by_rules,
    evaluate_harm_potential,
    find_personal_data,
    fold,
    judge_request,
    quoted,
    rule_table,
    sightings,
)

FEW = settings(max_examples=40, deadline=None)
TABLE = rule_table()


def letters(text: str) -> str:
    return TABLE.language.alphabet.encode(fold(text)[0])


@pytest.mark.parametrize("rule", TABLE.rules, ids=lambda rule: rule.id)
def test_every_example_of_every_rule(rule: Rule) -> None:
    for text in rule.matches:
        found = {span.rule for span in evaluate_by_rules(text, rule.principle).spans}
        assert rule.id in found or (rule.context and TABLE.language.matcher(rule.pattern).expression.search(letters(text))), text
    for text in rule.spares:
        assert rule.id not in {span.rule for span in evaluate_by_rules(text, rule.principle).spans}, text


@pytest.mark.parametrize("name", TABLE.excuses)
def test_every_example_of_every_excuse(name: str) -> None:
    def used(text: str) -> bool:
        return name in {seen.excuse for principle in PRINCIPLES for passage in sightings(text, principle) for seen in passage}
    excuse = TABLE.excuses[name]
    assert excuse.matches and excuse.spares
    assert [used(text) for text in (*excuse.matches, *excuse.spares)] == [True] * len(excuse.matches) + [False] * len(excuse.spares)


@pytest.mark.parametrize("number", range(len(TABLE.homonyms)))
def test_every_example_of_every_homonym(number: int) -> None:
    homonym = TABLE.homonyms[number]
    def changed(text: str) -> bool:
        return _blanked(letters(text), set(letters(text)), RuleTable((), (homonym,))) != letters(text)
    assert homonym.matches and homonym.spares
    assert [changed(text) for text in (*homonym.matches, *homonym.spares)] == [True] * len(homonym.matches) + [False] * len(homonym.spares)


PATTERNS = {rule.id: (rule.pattern, rule.matches) for rule in TABLE.rules}
PATTERNS |= {f"homonym {number}": (homonym.pattern, homonym.matches) for number, homonym in enumerate(TABLE.homonyms)}
PATTERNS |= {f"{name}, {side}": (pattern, excuse.matches) for name, excuse in TABLE.excuses.items()
             for side, pattern in (("before", excuse.before), ("after", excuse.after)) if pattern}
SHORTEST = {letter: word for word, letter in sorted(TABLE.language.alphabet.items(), key=lambda pair: -len(pair[0]))}


def nearly_matching(name: str) -> list[str]:
    pattern, examples = PATTERNS[name]
    needs = [min((SHORTEST[x] for x in need if x in SHORTEST), key=len, default="a") for need in TABLE.language.matcher(pattern).needs]
    texts = [*needs, " ".join(needs), " ".join(needs[:-1]), " a ".join(needs), " ".join(needs[::-1])]
    for example in examples[:2]:
        words = fold(example)[0].rstrip(".!? ").split()
        texts += [" ".join(words[:n]) for n in (1, len(words) - 1, len(words))]
    return [piece for piece in dict.fromkeys([*texts, "a", "a" * 50, "'", ",", "i", "how to", "just and", "you"]) if piece]


@pytest.mark.parametrize("name", PATTERNS)
def test_time_grows_with_the_text_and_not_faster(name: str) -> None:
    expression = TABLE.language.matcher(PATTERNS[name][0]).expression
    def seconds(piece: str, length: int) -> float:
        text = letters(((piece + " ") * length)[:length])
        start = time.process_time()
        for _ in expression.finditer(text):
            pass
        return time.process_time() - start
    piece = max(nearly_matching(name), key=lambda piece: seconds(piece, 1000)) # the one that annoys it most
    short, long = min(seconds(piece, 4000) for _ in range(3)), seconds(piece, 16_000)
    assert long < 8 * short + 0.01, piece # four times the text: linear is 4, quadratic 16
    assert seconds("a" * 16_000, 16_000) < 0.05 # one very long word


@FEW
@given(st.lists(st.sampled_from(sorted(TABLE.language.alphabet)), max_size=30), st.sampled_from(TABLE.rules))
def test_what_is_skipped_would_not_match(words: list[str], rule: Rule) -> None:
    matcher, text = TABLE.language.matcher(rule.pattern), letters(" ".join(words))
    assert matcher.possible(set(text)) or not any(m[0] for m in matcher.expression.finditer(text))


@FEW
@given(st.lists(st.sampled_from(["one", "two", "three", "x", "y", ",", "."]), max_size=8))
def test_the_little_language_means_what_it_says(words: list[str]) -> None:
    language = RuleLanguage({"number": {"words": "one, two, three"}, "odd": {"words": "one, three"}})
    matchers = [language.matcher(pattern) for pattern in ("<number>", "x y", "x ~2!odd two")] # these make the letters
    text = language.alphabet.encode(" ".join(words))
    found = [bool(matcher.expression.search(text)) for matcher in matchers]
    plain = " ".join(words)
    assert found == [bool({"one", "two", "three"} & set(words)), bool(re.search(r"x(?: ,)? y", plain)),
                     bool(re.search(r"x(?: (?!one|three|\.)\S+){0,2}(?: ,)? two", plain))]


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
    file.write_text("words: {person: {nouns: man}}\nhomonyms: []\nexcuses: {}\nrules:\n"
                    "  - {id: a, principle: harm, category: x, pattern: 'x <persons>', matches: [x man]}\n", encoding="utf-8")
    with pytest.raises(InputError, match="did you mean 'person'"):
        RuleTable.read(file)
