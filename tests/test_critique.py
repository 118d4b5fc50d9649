"""Constitutions and critiques: anything in a file, anything out of a model, and a plug pulled anywhere."""
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mmie.constitutional.constitution import Constitution, Principle, WorkedExample, hearing
from mmie.constitutional.critique import (Revision, RevisionStepper, changes_html, critique_revise, exchange_messages, Exchange, fit_exchange,
                                          model_fingerprint, read_revisions, revision_data, revision_html, summarize_revisions, text_fault,
                                          word_changes)
from mmie.constitutional.managers import DualModelManager, ModelManager, Reply
from mmie.core import InputError
from mmie.models.decoder import DecoderLM, ModelConfig
from mmie.tokenization.base import ByteTokenizer
from mmie.training.finetune import ChatTemplate, Message, chat_format

CHAT = chat_format(ByteTokenizer(special_tokens=ChatTemplate().special_tokens))
SMALL = Constitution.load("small-world")
PROMPTS = [f"how do i do thing number {n} ?" for n in range(11)]


class Scripted:
    "Says what a function of the conversation says."
    def __init__(self, says, max_length=None) -> None:
        self.says, self.chat, self.model, self.heard = says, CHAT, SimpleNamespace(max_length=max_length), []

    def replies(self, conversations: Sequence[Sequence[Message]], *, max_new_tokens: int, **options: object) -> list[Reply]:
        self.heard += conversations
        said = [self.says(messages) for messages in conversations]
        return [Reply(text, tuple(text.encode()), len(text.encode()) < max_new_tokens, 0) for text in said]


def honest(messages: Sequence[Message]) -> str:
    "An answer, a critique that names the prompt, a revision that names the critique."
    return f"sure , {messages[0].content}" if len(messages) == 1 else f"{'no' if len(messages) == 5 else 'wrong'} : {messages[-3].content}"


def tiny(seed: int = 0, max_length: int = 192) -> ModelManager:
    "A random model that speaks in bytes."
    torch.manual_seed(seed)
    tokenizer = ByteTokenizer(special_tokens=ChatTemplate().special_tokens)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, d_model=32, n_layers=1, n_heads=2, max_length=max_length)
    return ModelManager(DecoderLM(config), tokenizer)


# The page

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.sampled_from(["id", "weight", "name"]), inner, max_size=4),
    max_leaves=8)
FIELDS = st.fixed_dictionaries({}, optional={
    "id": st.sampled_from(["a", "b.c", "A", ""]) | ANYTHING, "critique_request": st.just("is it ?") | ANYTHING,
    "revision_request": st.just("do it .") | ANYTHING, "weight": st.just(2) | ANYTHING, "examples": ANYTHING, "extra": ANYTHING})


@settings(max_examples=60, deadline=None)
@given(data=st.fixed_dictionaries({}, optional={"name": st.just("x") | ANYTHING, "principles": st.lists(FIELDS, max_size=3) | ANYTHING, "more": ANYTHING}) | ANYTHING)
def test_a_page_loads_or_is_refused_in_one_sentence(data, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("page") / "page.yaml"
    path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    try:
        page = Constitution.load(path)
    except InputError as error:
        assert "page.yaml" in str(error) and "\n" not in str(error)
    else:
        assert page.principles and abs(page.probabilities.sum() - 1) < 1e-9


@settings(max_examples=25, deadline=None)
@given(noise=st.binary(max_size=60), at=st.integers(0, 10**6))
def test_a_damaged_page_loads_or_is_refused(noise, at, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("page")
    Constitution.load("default").write(folder / "good.yaml")
    good = (folder / "good.yaml").read_bytes()
    at %= len(good)
    (folder / "page.yaml").write_bytes(good[:at] + noise + good[at + 1:])
    try:
        Constitution.load(folder / "page.yaml")
    except InputError as error:
        assert "page.yaml" in str(error)


def test_a_page_that_refers_to_itself(tmp_path: Path) -> None:
    (tmp_path / "page.yaml").write_text("name: x\nprinciples: &a [*a]\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"page\.yaml"):
        Constitution.load(tmp_path / "page.yaml")


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x85"), min_size=1, max_size=30).filter(str.strip) # \x85: see Settings.write
EXAMPLE = st.builds(WorkedExample, prompt=TEXT, response=TEXT, critique=TEXT, revision=TEXT)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.tuples(TEXT, TEXT, st.floats(1e-300, 1e300), st.lists(EXAMPLE, max_size=2)), min_size=1, max_size=4), suffix=st.sampled_from(["yaml", "json"]))
def test_what_is_written_can_be_read(rows, suffix, tmp_path_factory) -> None:
    page = Constitution(name="x", principles=[Principle(id=f"p{n}", critique_request=a, revision_request=b, weight=w, examples=e)
                                              for n, (a, b, w, e) in enumerate(rows)])
    path = tmp_path_factory.mktemp("page") / f"page.{suffix}"
    page.write(path)
    assert Constitution.load(path) == page and Constitution.load(path).fingerprint() == page.fingerprint()
    assert page.draw(np.random.default_rng(0)) in page.principles


@pytest.mark.parametrize("name", ["default", "small-world", "polite"])
def test_what_comes_along(name: str) -> None:
    page = Constitution.load(name)
    assert page.name == name and page.draw(np.random.default_rng(1)) in page.principles
    requests = [(p.critique_request, p.revision_request) for p in page.principles]
    assert len(set(requests)) == len(requests) and abs(sum(hearing(page, 1).values()) - 1) < 1e-9


# What a model may say

@settings(max_examples=40, deadline=None)
@given(lines=st.lists(st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(["", " .", "no .", "a a a a", "b\u2028c\x85\rd", "</div>"]), min_size=1, max_size=9),
       variant=st.sampled_from(["critique", "direct", "shuffled", "unrevised"]), rounds=st.integers(1, 3), limit=st.sampled_from([8, 1000]))
def test_no_failure_becomes_a_text(lines, variant, rounds, limit, tmp_path_factory) -> None:
    count = iter(range(10**6))
    model = Scripted(lambda messages: lines[next(count) % len(lines)])
    path = tmp_path_factory.mktemp("run") / "r.jsonl"
    records = critique_revise(model, PROMPTS, SMALL, rounds, path=path, variant=variant, max_new_tokens=limit, chunk=4)
    assert read_revisions(path) == records and [r.prompt for r in records] == PROMPTS
    for r in records:
        assert len(r.steps) == (rounds if r.response and variant != "unrevised" else 0)
        assert r.final is None or any(c.isalnum() for c in r.final)
        for step in r.steps:
            assert (step.revision is None) == (step.outcome not in ("revised", "unchanged"))
            assert not step.rejected or step.revision is None
            assert step.revision is None or text_fault(step.revision, finished=len(step.revision.encode()) < limit) == ""
            assert (step.critique is None) == (variant == "direct" or step.outcome.startswith(("critique", "no other")))
        revision_html(r)
    data = revision_data(records)
    assert len(data.pairs) + sum(data.left_out.values()) == len(records) and all(pair.answer.strip() for pair in data.pairs)
    summary = summarize_revisions(records)
    assert sum(score.correct for score in summary.after.values()) == len(records)


def test_a_model_that_says_nothing_at_all(tmp_path: Path) -> None:
    records = critique_revise(Scripted(lambda messages: ""), PROMPTS, SMALL, rounds=2, path=tmp_path / "r.jsonl")
    assert {r.status for r in records} == {"no answer"} and revision_data(records).pairs == ()


def test_one_usable_critique_cannot_be_shuffled() -> None:
    model = Scripted(lambda m: honest(m) if len(m) != 3 or m[0].content == PROMPTS[0] else "")
    records = critique_revise(model, PROMPTS, SMALL, variant="shuffled", max_new_tokens=300)
    assert records[0].steps[0].outcome == "no other critique" and {r.final for r in records} == {None}


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 10, 11, 12])
def test_shuffling_gives_everyone_another_critique(chunk: int) -> None:
    records = critique_revise(Scripted(honest), PROMPTS, SMALL, variant="shuffled", max_new_tokens=300, chunk=max(chunk, 2))
    critiques = [r.steps[0].critique for r in records]
    assert sorted(critiques) == sorted(f"wrong : {p}" for p in PROMPTS)
    assert not any(c == f"wrong : {p}" for c, p in zip(critiques, PROMPTS, strict=True))


def test_rounds_go_on_from_the_last_usable_answer() -> None:
    def says(messages: Sequence[Message]) -> str:
        if len(messages) != 5:
            return {1: "one", 3: "so so"}[len(messages)]
        return {"one": "two", "two": "", "three": "four"}.get(messages[1].content, "?")
    (record,) = critique_revise(Scripted(says), PROMPTS[:1], SMALL, rounds=3)
    assert [s.outcome for s in record.steps] == ["revised", "revision empty", "revision empty"] and record.final == "two"


def test_principles_do_not_depend_on_neighbors() -> None:
    page = Constitution.load("default")
    drawn = [[s.principle for s in r.steps] for r in critique_revise(Scripted(lambda m: f"{len(m)} words"), PROMPTS, page, rounds=4)]
    fewer = [[s.principle for s in r.steps] for r in critique_revise(Scripted(lambda m: f"{len(m)} words"), PROMPTS[:3], page, rounds=2, chunk=1)]
    assert fewer == [steps[:2] for steps in drawn[:3]] and len({p for steps in drawn for p in steps}) > 8


def test_the_evaluation_model_criticizes() -> None:
    dual = DualModelManager(tiny(0), tiny(1))
    speaker, critic = Scripted(honest), Scripted(honest)
    dual.generation, dual.evaluation = speaker, critic
    critique_revise(dual, PROMPTS[:2], SMALL, max_new_tokens=300)
    assert {len(m) for m in critic.heard} == {3} and {len(m) for m in speaker.heard} == {1, 5}


@pytest.mark.parametrize("wrong", [["", "a"], "a text", [1], ["\ud800"], None])
def test_prompts_that_cannot_be_asked(wrong: object) -> None:
    with pytest.raises(InputError, match="prompt"):
        critique_revise(Scripted(honest), wrong, SMALL)


def test_no_prompts_make_no_records(tmp_path: Path) -> None:
    assert critique_revise(Scripted(honest), [], SMALL, path=tmp_path / "r.jsonl") == [] == read_revisions(tmp_path / "r.jsonl")


# Prompts that are too long

@settings(max_examples=50, deadline=None)
@given(prompt=TEXT.map(lambda t: t * 9), response=TEXT.map(lambda t: t * 5), critique=TEXT.map(lambda t: t * 5), room=st.integers(120, 400),
       task=st.sampled_from(["critique", "revision", "direct"]), examples=st.lists(EXAMPLE, max_size=2))
def test_requests_survive_and_everything_fits(prompt, response, critique, room, task, examples) -> None:
    principle = SMALL.principles[0].replace(examples=examples)
    exchange = Exchange(principle, prompt, response, critique)
    fitted = fit_exchange(exchange, task, lambda m: len(CHAT.prompt(m)), room)
    whole = exchange_messages(exchange, task)
    assert len(CHAT.prompt(fitted.messages)) <= room and fitted.messages[-1] == whole[-1]
    assert fitted.left_out == sum(len(m.content) for m in whole) - sum(len(m.content) for m in fitted.messages) >= 0
    last = fitted.messages[-len(exchange_messages(exchange, task, 0)):]
    assert prompt.endswith(last[0].content) and response.startswith(last[1].content)
    if last[1].content != response:
        assert last[0].content == ""


@pytest.mark.parametrize("variant", ["critique", "direct", "unrevised"])
def test_a_real_model_with_a_small_context(variant: str) -> None:
    manager = tiny(max_length=160)
    records = critique_revise(manager, ["word " * 100 + "the end ?", "short ?"], SMALL, variant=variant, max_new_tokens=20, temperature=1.0)
    assert records[0].left_out > 300 and records[1].left_out == 0
    with pytest.raises(InputError, match="requests alone"):
        critique_revise(tiny(max_length=90), ["short ?"], SMALL, max_new_tokens=40, temperature=1.0)


# Files

def test_the_same_file_wherever_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    options = {"rounds": 2, "path": path, "max_new_tokens": 300, "chunk": 3}
    records = critique_revise(Scripted(honest), PROMPTS[:7], SMALL, **options)
    whole = path.read_bytes()
    for size in range(whole.index(b"\n") + 1, len(whole) + 1, 37):
        path.write_bytes(whole[:size])
        assert critique_revise(Scripted(honest), PROMPTS[:7], SMALL, **options) == records
        assert path.read_bytes() == whole


def test_sampling_resumes_with_the_same_dice(tmp_path: Path) -> None:
    options = {"rounds": 2, "seed": 3, "max_new_tokens": 12, "temperature": 1.0, "chunk": 2}
    whole = critique_revise(tiny(), PROMPTS[:6], SMALL, path=tmp_path / "a.jsonl", **options)
    data = (tmp_path / "a.jsonl").read_bytes()
    lines = data.split(b"\n")
    (tmp_path / "b.jsonl").write_bytes(b"\n".join(lines[:4]) + b"\n" + lines[4][:7])
    assert critique_revise(tiny(), PROMPTS[:6], SMALL, path=tmp_path / "b.jsonl", **options) == whole
    assert (tmp_path / "b.jsonl").read_bytes() == data
    assert critique_revise(tiny(), PROMPTS[:6], SMALL, **{**options, "seed": 4}) != whole


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_critique import PROMPTS, SMALL, Scripted, critique_revise, honest
calls = 0
class Doomed(Scripted):
    def replies(self, conversations, **options):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().replies(conversations, **options)
critique_revise(Doomed(honest), PROMPTS, SMALL, rounds=2, path=sys.argv[1], max_new_tokens=300, chunk=3)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 here")
def test_killed_and_started_again(tmp_path: Path) -> None:
    critique_revise(Scripted(honest), PROMPTS, SMALL, rounds=2, path=tmp_path / "whole.jsonl", max_new_tokens=300, chunk=3)
    program = tmp_path / "run.py"
    program.write_text(KILLED.format(tests=str(Path(__file__).parent)), encoding="utf-8")
    codes = []
    for fatal in (8, 0): # calls of the model; 5 make a chunk; 0: never
        codes.append(subprocess.run([sys.executable, str(program), str(tmp_path / "r.jsonl"), str(fatal)], env=os.environ, check=False).returncode)
        (tmp_path / "r.jsonl").open("ab").write(b'{"prompt": "half a li') if fatal else None
    assert codes == [-signal.SIGKILL, 0]
    assert (tmp_path / "r.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_files_that_belong_to_others(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    critique_revise(tiny(0), PROMPTS[:2], SMALL, path=path, max_new_tokens=8)
    before = path.read_bytes()
    for model, changes, reason in ((tiny(1), {}, "model"), (tiny(0), {"chunk": 7}, "chunk"), (tiny(0), {"max_new_tokens": 9}, "max_new_tokens")):
        with pytest.raises(InputError, match=f"made with {reason}"):
            critique_revise(model, PROMPTS[:2], SMALL, path=path, **{"max_new_tokens": 8, **changes})
    assert path.read_bytes() == before
    for content in (b"", b"[]\n", b"hello", b'{"mmie": "revisions"}', b'{"mmie": "other"}\n', b"\xff\xfe\n"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="no file of revisions"):
            critique_revise(tiny(0), PROMPTS[:2], SMALL, path=path, max_new_tokens=8)
        assert path.read_bytes() == content
    with pytest.raises(InputError, match="cannot read"):
        read_revisions(tmp_path)


def test_fingerprints_see_training_and_nothing_else() -> None:
    one = tiny()
    before = model_fingerprint(one)
    assert before == model_fingerprint(tiny()) != model_fingerprint(tiny(1))
    with torch.no_grad():
        next(iter(one.model.parameters())).mul_(1 + 1e-3) # type: ignore[attr-defined]
    assert model_fingerprint(one) != before


# Pages

WORDS = st.text(st.characters(codec="utf-8"), max_size=40) | st.lists(st.sampled_from(["a", "b", " ", "\n", "<b>", "&"]), max_size=20).map("".join)


@settings(max_examples=80, deadline=None)
@given(old=WORDS, new=WORDS)
def test_a_difference_keeps_both_texts(old: str, new: str) -> None:
    changes = word_changes(old, new)
    assert "".join(c.text for c in changes if c.kind != "in") == old and "".join(c.text for c in changes if c.kind != "out") == new
    assert all(c.text for c in changes)
    found: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append(tag)  # type: ignore[method-assign]
    parser.feed(changes_html(old, new))
    assert set(found) <= {"ins", "del"}


def test_the_stepper_stays_in_range() -> None:
    records = critique_revise(Scripted(honest), PROMPTS[:2], SMALL, rounds=2, max_new_tokens=300)
    stepper = RevisionStepper(records)
    for index in (-3, 0, 1, 7):
        for shown in (-1, 1, 3, 99, None):
            stepper.go(index, shown)
            assert 0 <= stepper.index <= 1 and 1 <= stepper.shown <= stepper.cards == 6
            assert len(re.findall("<div", stepper.picture())) == stepper.shown
    assert RevisionStepper([Revision("p", "")]).picture().count("<div") == 2


def test_a_local_llama_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    machine = tokenizers.Tokenizer(tokenizers.models.BPE())
    machine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    machine.decoder = tokenizers.decoders.ByteLevel()
    machine.train_from_iterator(["how do i do it ?"] * 9, tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=machine, eos_token="</s>", bos_token="<s>")
    words.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=400)
    ).save_pretrained(tmp_path / "llama")
    words.save_pretrained(tmp_path / "llama")
    options = {"rounds": 2, "path": tmp_path / "r.jsonl", "max_new_tokens": 10, "temperature": 1.0, "chunk": 2}
    prompts = [*PROMPTS[:2], "word " * 200 + "?"]
    records = critique_revise(ModelManager(tmp_path / "llama", device="cpu"), prompts, SMALL, **options)
    assert all(len(r.steps) == (2 if r.response else 0) for r in records) and not records[2].seen_whole and records[0].seen_whole
    assert critique_revise(ModelManager(tmp_path / "llama", device="cpu"), prompts, SMALL, **options) == records
