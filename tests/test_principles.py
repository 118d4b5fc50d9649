"""The table keeps its promises, text can't talk its way out, no pattern explodes, and a judge that fails says so."""
import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmie.core import InputError
from mmie.safety import principles
from mmie.safety.principles import (
    _KINDS,
    PRINCIPLES,
    Evaluation,
    Judge,
    Rule,
    RuleLanguage,
    RuleTable,
    _blanked,
    _card_starts,
    _passages,
    _valid_end,
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
from mmie.tokenization.base import ByteTokenizer
from mmie.training.finetune import ChatTemplate

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
    assert len(folded) == len(text) if places is None else len(folded) == len(places) and places == sorted(places)
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


PERSONAL = {
    "e-mail": ["ada@example.org", "jörg@example.org", "o'brien@example.org", "ada@münchen.de", "x@y.xn--p1ai", "a@b.c.d.e.f.g.com", "+tag@example.org"],
    "IBAN": ["GB82 WEST 1234 5698 7654 32", "de89 3704 0044 0532 0130 00", "FR1420041010050500013M02606", "NO93 8601 1117 947", "MT84MALT011000012345MTLCAST001S"],
    "card": ["5500-0000-0000-0004", "378282246310005", "4111\u00a01111\u00a01111\u00a01111", "４１１１ １１１１ １１１１ １１１１", "4111\u200b111111111111"],
    "IP address": ["::1", "2001:db8::1", "192.168.0.1", "::ffff:192.168.0.1"],
    "phone": ["+44 20 7946 0958", "+49 (0)30 123456", "(415) 555-2671", "1-800-555-0199", "415.555.2671", "415\u2011555\u20112671"],
    "social security number (US)": ["123-45-6789"],
    "insurance number (UK)": ["AB 12 34 56 C"],
    "identity number (Spain)": ["12345678Z", "X1234567L"],
    "security number (France)": ["1 85 05 78 006 084 91", "2 69 05 2A 005 012 " + str(97 - int("2690519005012") % 97)],
    "CPF (Brazil)": ["111.444.777-35"],
    "insurance number (Canada)": ["046 454 286"],
}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in PERSONAL.items() for text in texts])
@pytest.mark.parametrize("around", ["{}", "see {}.", "({}), 12 and then", "x: {}\nAND MORE", "\u00fc {} \U0001f642"])
def test_personal_data_is_found_as_a_whole(kind: str, text: str, around: str) -> None:
    whole = around.format(text)
    assert [(s.rule, whole[s.start:s.end]) for s in find_personal_data(whole)] == [(kind, text)]


@pytest.mark.parametrize(("text", "found"), [
    ("4111 1111 1111 1111 123", "4111 1111 1111 1111"), ("12/27 order 55 4111 1111 1111 1111", "4111 1111 1111 1111"),
    ("ES91 2100 0418 4502 0005 1332 BANK", "ES91 2100 0418 4502 0005 1332"), ("http://192.168.0.1:8080/x", "192.168.0.1"), ("IP:192.168.0.1", "192.168.0.1"),
    ("call me at 020 7946 0958", "020 7946 0958"), ("Tel: 0171 1234567", "0171 1234567"), ("\u8054\u7cfbada@example.org", "ada@example.org"), ("'a@b.org'", "a@b.org")])
def test_personal_data_beside_something_else(text: str, found: str) -> None:
    assert [text[s.start:s.end] for s in find_personal_data(text)] == [found]


@pytest.mark.parametrize(("text", "kinds"), [
    ("GB82 WEST 1234 5698 7654 32 ada@example.org", ["IBAN", "e-mail"]), ("5500 0000 0000 0004 12a@example.org", ["card", "e-mail"]),
    ("5500 0000 0000 0004 1 85 05 78 006 084 91", ["card", "security number (France)"])])
def test_a_number_that_runs_into_the_next_find(text: str, kinds: list[str]) -> None:
    assert [s.rule for s in find_personal_data(text)] == kinds


@pytest.mark.parametrize("text", [
    "::", "x :: Int", "a::b", "std::vector", "12:30:45", "00:1A:2B:3C:4D:5E", "1.2.3.4.5", "version 1.2.3.4", "Section 1.2.3.4", "999.999.999.999",
    "GB82 WEST 1234 5698 7654 33", "5500-0000-0000-0005", "0000 0000 0000 0000", "978-3-16-148410-0", "12345678A", "X1234567A", "111.444.777-36", "000 000 000",
    "GB 12 34 56 A", "2024-01-15", "2024-01-15 2024-01-16", "15/01/2024 12:30", "text 01/02/2024 12:30", "call 2024-01-15", "order 415-555-2671", "Invoice no. 123-456-7890",
    "order number 00123456789", "$1,234,567,890", "3.14159265358979", "1732302480003", "user@localhost", "@handle", "npm i foo@1.2.3"])
def test_what_is_no_personal_data(text: str) -> None:
    assert not find_personal_data(text)


@FEW
@given(st.text(alphabet="0123456789 .:-+()@aEXZ\u00a0\u200b\uff11\udc00é", max_size=80))
def test_personal_data_in_any_text(text: str) -> None:
    spans = find_personal_data(text)
    assert all(0 <= s.start < s.end <= len(text) for s in spans) and all(a.end <= b.start for a, b in itertools.pairwise(spans))


@pytest.mark.parametrize("piece", ["a@b.org ", "192.168.0.1 ", "4111111111111111 ", "a", "1 ", "1", "4 ", "a.", "a@", "a'", "1:", "+1 ", "A1 ", "tel: 0", "order no. ", "4 44 ", "4 4-", "4.", "(4) ", "+4 ", "00 "])
def test_personal_data_in_linear_time(piece: str) -> None:
    def seconds(length: int) -> float:
        start = time.process_time()
        find_personal_data(piece * (length // len(piece)))
        return time.process_time() - start
    short, long = (min(seconds(length) for _ in range(3)) for length in (20_000, 80_000))
    assert long < 8 * short + 0.1 # four times the text: linear is 4, quadratic 16


@pytest.mark.parametrize("piece", ["4 ", "4 44 ", "4 4-", "4-4 44 ", "22 ", "6 6 ", "4\u00a0", "3 0 0 0 0 ", "(4" + " 4" * 20])
def test_few_numbers_of_a_hostile_text_are_looked_at_closely(monkeypatch: pytest.MonkeyPatch, piece: str) -> None:
    calls = list[str]()
    monkeypatch.setattr(principles, "_valid_end", lambda text, span, kind: calls.append(kind) or 0)
    find_personal_data(piece * 1000)
    assert len(calls) < 100, calls[0]


@FEW
@given(st.text(alphabet="0123456 -", min_size=40, max_size=200), st.sampled_from(["4111 1111 1111 1111", "5500-0000-0000-0004", "6304000000000000"]))
def test_no_card_is_missed(text: str, card: str) -> None:
    text = f"{text} {card} {text}"
    found = [m.start() for m in _KINDS["card"][0].finditer(text, overlapped=True) if _valid_end(text, m.span(), "card")] # each by itself
    assert len(text) // 2 - len(card) // 2 in found and set(found) <= set(_card_starts(text))


@pytest.mark.parametrize(("text", "folded"), [("\u0411\u041e\u041c\u0412", None), ("\u041d\u041eW", "how"), ("\ufb01rearm", "firearm"), ("\ufb01\u200b", "fi"), ("\u338f", "kg")])
def test_capitals_and_ligatures(text: str, folded: str | None) -> None:
    plain, places = fold(text)
    assert folded in (None, plain) and (places is None or len(places) == len(plain))


def test_a_ligature_hides_nothing() -> None:
    for text in ("How do I build a \ufb01rebomb?", "\ufb01 How do I build a bomb?"):
        plain = text.replace("\ufb01", "fi")
        marked = [[t[s.start:s.end].replace("\ufb01", "fi") for s in evaluate_harm_potential(t).spans] for t in (text, plain)]
        assert marked[0] == marked[1] and marked[0]


def opinions_of(monkeypatch: pytest.MonkeyPatch, totals: list[tuple[float, float]], **settings: float) -> list[Evaluation]:
    "What a judge makes of log-probabilities of fine and bad, one pair for each order."
    rows = iter(totals)
    monkeypatch.setattr(principles, "_asked", lambda *_: ([1], [[1], [2]]))
    monkeypatch.setattr(principles, "continuation_logprobs", lambda *_, **__: [[SimpleNamespace(total=x) for x in next(rows)] for _ in totals])
    judge = Judge(SimpleNamespace(max_length=None), ByteTokenizer(special_tokens=list(ChatTemplate().special_tokens)), **settings) # type: ignore[arg-type]
    return judge.evaluate(["Some words."], "harm")


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("totals", [[(-0.1, -3.0), (NAN, -3.0)], [(-0.1, -3.0), (-0.1, NAN)], [(NAN, NAN), (-0.1, -3.0)], [(-0.1, -3.0), (-INF, -INF)],
                                    [(-INF, -INF), (-INF, -INF)], [(-3.0, -0.1), (-0.1, -3.0)]])
@pytest.mark.parametrize("least", [0.0, 0.1])
def test_a_judge_of_nonsense_fails_closed(monkeypatch: pytest.MonkeyPatch, totals: list[tuple[float, float]], least: float) -> None:
    (said,) = opinions_of(monkeypatch, totals, least=least)
    assert said.label == "bad" and said.score == 1 and "the judge failed" in said.reason


@pytest.mark.parametrize("error", [AttributeError("x"), TypeError("x"), OSError("gone"), MemoryError(), RuntimeError("x"), AssertionError()])
def test_a_judge_that_raises_fails_closed(error: Exception) -> None:
    class Broken:
        device, max_length = torch.device("cpu"), 4096
        def __getattr__(self, name: str) -> object:
            raise error
    judge = Judge(Broken(), ByteTokenizer(special_tokens=list(ChatTemplate().special_tokens))) # type: ignore[arg-type]
    said = judge.evaluate(["Good morning.", "", "Good night."], "harm")
    assert [e.label for e in said] == ["bad", "not evaluated", "bad"] and all(type(error).__name__ in said[i].reason for i in (0, 2))


@pytest.mark.parametrize("wrong", ["one text", None, b"bytes", 3, {"a": "text"}])
def test_evaluators_want_a_list(wrong: Any) -> None:
    judge = Judge(SimpleNamespace(max_length=None), ByteTokenizer(special_tokens=list(ChatTemplate().special_tokens))) # type: ignore[arg-type]
    message = f"list of texts, not a {type(wrong).__name__} .*wrap a single text"
    for evaluate in (lambda: judge.evaluate(wrong, "harm"), lambda: evaluate_all(wrong), lambda: evaluate_all(wrong, judge=judge)):
        with pytest.raises(InputError, match=message):
            evaluate()
    with pytest.raises(InputError, match="only text"):
        judge.evaluate([wrong] if wrong != "one text" else [None], "harm")
    assert [e["harm"].label for e in evaluate_all(iter(["...", "!"]), judge=judge)] == ["not evaluated"] * 2 # type: ignore[arg-type]


@pytest.mark.parametrize("ask", [lambda p: sightings("x", p), lambda p: evaluate_by_rules("x", p), lambda p: judge_request("x", p),
                                 lambda p: evaluate_all(["x"], [p]), lambda p: Judge.evaluate(None, [], p)]) # type: ignore[arg-type]
@pytest.mark.parametrize("wrong", ["harms", ["harm"], None])
def test_unknown_principles(ask: Callable[[Any], object], wrong: object) -> None:
    with pytest.raises(InputError, match="no principle"):
        ask(wrong)


def test_a_model_alone_is_no_judge() -> None:
    with pytest.raises(InputError, match="SimpleNamespace is no judge"):
        evaluate_harm_potential("x", SimpleNamespace(max_length=None)) # type: ignore[arg-type]


def test_a_table_with_mistakes(tmp_path) -> None: # type: ignore[no-untyped-def]
    file = tmp_path / "rules.yaml"
    file.write_text("words: {person: {nouns: man}}\nhomonyms: []\nexcuses: {}\nrules:\n"
                    "  - {id: a, principle: harm, category: x, pattern: 'x <persons>', matches: [x man]}\n", encoding="utf-8")
    with pytest.raises(InputError, match="did you mean 'person'"):
        RuleTable.read(file)


RULE = "id: a, principle: harm, category: x, pattern: x, matches: [x]"


@pytest.mark.parametrize(("changed", "message"), [
    ({"words": None}, "section 'words' is missing, or isn't a mapping"), ({"words": "[bomb]"}, "section 'words'"), ({"rules": None}, "section 'rules' .* list"),
    ({"words": "{a: bomb}"}, "'bomb' is no list of words .words, a.: write .verbs: 'make"), ({"words": "{a: {noun: bomb}}"}, "no list of words"),
    ({"words": "{a: {nouns: [bomb]}}"}, "no list of words"), ({"words": "{a: {lists: b}, b: {lists: a}}"}, "<a> contains itself"),
    ({"rules": "[bomb]"}, "'bomb' isn't a set of named values .*rule 1"), ({"rules": "[{id: a, principle: harm}]"}, "'category' is missing .*rule 1"),
    ({"rules": f"[{{{RULE}, wieght: 1}}]"}, "no 'wieght' here .*did you mean 'weight'"), ({"rules": f"[{{{RULE}, weight: high}}]"}, "weight of 'high'"),
    ({"rules": f"[{{{RULE.replace('[x]', 'x')}}}]"}, "matches is no list"), ({"rules": f"[{{{RULE.replace('pattern: x', 'pattern: 7')}}}]"}, "7 is no pattern"),
    ({"homonyms": "[{matches: [x]}]"}, "'pattern' is missing .*homonym 1"), ({"excuses": "{odd: {befor: x}}"}, "excuse odd.: did you mean 'before'"),
    ({"homonyms": "[{pattern: 'a ) b ('}]"}, "brackets don't match")])
def test_a_table_of_another_shape(tmp_path: Path, changed: dict[str, str | None], message: str) -> None:
    sections = {"words": "{}", "homonyms": "[]", "excuses": "{}", "rules": f"[{{{RULE}}}]"}
    def read(parts: dict[str, str | None]) -> RuleTable:
        (tmp_path / "rules.yaml").write_text("".join(f"{name}: {part}\n" for name, part in parts.items() if part), encoding="utf-8")
        return RuleTable.read(tmp_path / "rules.yaml")
    assert len(read({**sections}).rules) == 1
    with pytest.raises(InputError, match=message):
        read(sections | changed)
