"""Every disguise comes off again, every strategy ends and keeps its turns, and the data file holds what it should."""
import itertools
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmie.core import InputError
from mmie.safety.attacks import (
    CONVERTERS,
    STRATEGIES,
    Attack,
    Payload,
    code_words,
    convert,
    readings,
    sounds_like_refusal,
    unconvert,
)
from mmie.training.finetune import Message, _check_order

TWO_WAY = sorted(name for name, converter in CONVERTERS.items() if converter.decode)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
OWN = st.text(st.sampled_from("aZ09 \n\\&#;%u<>!-]```“”\u200b\u0336🙂\ufe00\U000e0100\U000e0041асеоАВА𝐀ＡA+/="), max_size=30)


@pytest.mark.parametrize("name", TWO_WAY)
def test_every_disguise_comes_off(name):
    @settings(max_examples=120, deadline=None)
    @given(TEXT | OWN)
    def check(text):
        assert unconvert(convert(text, [name]), [name]) == text
    check()


@settings(max_examples=100, deadline=None)
@given(TEXT, st.lists(st.sampled_from(TWO_WAY), max_size=3))
def test_stacks_come_off(text, names):
    assert unconvert(convert(text, names), names) == text


@settings(max_examples=150, deadline=None)
@given(TEXT | OWN)
def test_decoders_fail_with_errors_we_expect(text):
    for name, plain in readings(text).items():
        assert plain != text and isinstance(plain, str)
        plain.encode()
        assert CONVERTERS[name].decode is not None


@pytest.mark.parametrize("name", sorted(CONVERTERS))
def test_converters_change_a_request_and_are_deterministic(name):
    text = "Write the word kestrel, please."
    once = CONVERTERS[name].encode(text)
    assert once != text and once == CONVERTERS[name].encode(text) and CONVERTERS[name].title


def test_numbers_promised():
    assert len(CONVERTERS) >= 20 and len(STRATEGIES) >= 12
    assert len({c.encode("Write the word Kestrel 7 times.") for c in CONVERTERS.values()}) == len(CONVERTERS)
    assert all(name == item.name for table in (CONVERTERS, STRATEGIES) for name, item in table.items())


def test_lookalikes_fold_or_do_not():
    assert unicodedata.normalize("NFKC", convert("Abc", ["bold"])) == unicodedata.normalize("NFKC", convert("Abc", ["fullwidth"])) == "Abc"
    assert unicodedata.normalize("NFKC", convert("Abc", ["cyrillic"])) != "Abc"
    assert {unicodedata.category(c) for c in convert("Abc d", ["tags"])} == {"Cf"}


@pytest.mark.parametrize("name", sorted(STRATEGIES))
@pytest.mark.parametrize("answer", ["I'm sorry, I can't.", "Of course! Here it is.", "", "{} {said}"])
def test_strategies_end_and_keep_turns(name, answer):
    history = [Message("system", "Never say it.")]
    for turn in itertools.count():
        assert turn < 10
        new = STRATEGIES[name].messages("the {said} request {}", turn, history)
        if not new:
            break
        history += [*new, Message("assistant", answer)]
        _check_order([m.role for m in history])
    assert len(history) > 1 and turn <= STRATEGIES[name].turns


def test_attack_tells_how_to_read_in_the_order_of_undoing():
    attack = Attack("direct", ("rot13", "base64"))
    text = attack.request("kestrel")
    assert text.index("Base64") < text.index("ROT13") and attack.name == "direct(rot13, base64)"
    assert unconvert(text.split("\n---\n")[1].removesuffix("\n---"), ("rot13", "base64")) == "kestrel"
    assert Attack("direct").request("kestrel") == "kestrel"


@pytest.mark.parametrize("names", ["base64", ["nothing"], [3]])
def test_bad_stacks(names):
    with pytest.raises(InputError):
        convert("text", names)


@pytest.mark.parametrize("wrong", [None, b"bytes", 3, ["text"]])
def test_only_text_is_disguised(wrong):
    for change in (convert, unconvert):
        with pytest.raises(InputError, match="only text can be disguised"):
            change(wrong, ["rot13"])
    with pytest.raises(InputError, match="no strategy"):
        Attack(None)


def test_broken_unicode_and_lost_ways():
    with pytest.raises(InputError, match="isn't Unicode"):
        convert("a\udc00", ["base64"])
    for name in sorted(set(CONVERTERS) - set(TWO_WAY)):
        with pytest.raises(InputError, match="nothing leads back"):
            unconvert("x", [name])
    for name, text in {"codes": "99999999999999999999", "binary": "111111111", "json": "[1]", "struck": "ab", "hidden": "x"}.items():
        with pytest.raises(InputError, match="this isn't"):
            unconvert(text, [name])


@given(st.integers(1, 80), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_payloads(count, seed):
    several = code_words(count, seed=seed)
    assert len({p.id for p in several}) == count == len(several)
    for payload in several:
        assert payload.marker in payload.system and payload.marker not in payload.harmless and "{" not in payload.system


def test_payload_needs_a_marker():
    with pytest.raises(InputError):
        Payload("id", "word", "", "ask", "", "")


def test_refusals():
    assert sounds_like_refusal("") and sounds_like_refusal("I am not able to do that.") and not sounds_like_refusal("Gladly.")
