"""Generation on real models, under random prompts and settings: batches and rows, hooks, search, guessing, constraints, scores."""
import json
import math
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmie.core import InputError
from mmie.models.constrained import Constraint, compile_choices, compile_pattern, continuation_logprobs, parse_pattern, utf8_ranges
from mmie.models.decoder import DecoderLM, ModelConfig
from mmie.models.generation import Continuation, StopStrings, generate, generate_stream, stream_text
from mmie.models.search import IdsCache, ModelDraft, PromptLookup, beam_search, speculate
from mmie.tokenization.base import ByteTokenizer
from mmie.tokenization.bpe import BPETokenizer

quick = settings(max_examples=25, deadline=None, database=None, derandomize=True)
PROMPTS = st.lists(st.lists(st.integers(0, 47), min_size=1, max_size=9), min_size=1, max_size=5)


def random_decoder(seed: int, **changes: object) -> DecoderLM:
    "A decoder whose logits depend on everything it sees."
    torch.manual_seed(seed)
    model = DecoderLM(ModelConfig(**{"vocab_size": 48, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_length": 64, **changes}))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.4)
    return model.double().eval()


@pytest.fixture(scope="module")
def model() -> DecoderLM:
    return random_decoder(0)


@pytest.fixture(scope="module")
def drafts() -> list[DecoderLM]:
    return [random_decoder(0), random_decoder(1, d_model=16, n_layers=1, n_heads=2, n_kv_heads=None), random_decoder(2, max_length=12)]


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    text = ["on 2024-03-05 it was dry, on 1999-12-31 it rained: naïve café €5 🙂"] * 30
    return BPETokenizer.train(text, 299, special_tokens=["<|end|>"])


# ---- hooks and stops

@quick
@given(PROMPTS, st.sampled_from([0.5, 1.0, 1.3, 3.0]), st.integers(0, 99))
def test_penalized_batches_are_their_rows(model: DecoderLM, prompts: list[list[int]], penalty: float, seed: int) -> None:
    knobs = {"repetition_penalty": penalty, "top_p": 0.9, "eos_id": 3}
    seeds = [seed + n for n in range(len(prompts))]
    together = generate(model, prompts, 12, seed=seeds, **knobs)
    assert together == [generate(model, [prompt], 12, seed=[own], **knobs)[0] for prompt, own in zip(prompts, seeds, strict=True)]
    assert together[0] == list(generate_stream(model, prompts[0], 12, seed=seeds[0], **knobs))


def test_a_large_penalty_forbids_repetition(model: DecoderLM) -> None:
    for row in generate(model, [[1], [2, 3]], 12, temperature=0, repetition_penalty=1e9):
        assert len(set(row)) == len(row)


def test_processors_see_prompts_and_new_tokens_of_the_rows_they_are_given(model: DecoderLM) -> None:
    prompts, seen = [[1], [2, 3], [4, 5, 6], [7]], []

    def watch(rows: list[Continuation], logits: torch.Tensor) -> torch.Tensor:
        assert len(rows) == len(logits)
        seen.append([(tuple(row.prompt), len(row.new), row.room) for row in rows])
        return logits
    generate(model, prompts, 6, seed=0, processors=[watch])
    assert seen == [[(tuple(prompt), step, 6 - step) for prompt in prompts] for step in range(6)]


def test_processors_follow_rows_that_leave(model: DecoderLM) -> None:
    prompts = [[n] for n in range(12)]
    alone = [generate(model, [prompt], 20, seed=[n], eos_id=list(range(16)), repetition_penalty=1.7)[0] for n, prompt in enumerate(prompts)]
    assert generate(model, prompts, 20, seed=list(range(12)), eos_id=list(range(16)), repetition_penalty=1.7) == alone
    assert len({len(row) for row in alone}) > 2


@quick
@given(st.lists(st.sampled_from(["ab", "b", "é", "🙂", "abc", "ca"]), min_size=1, max_size=3), st.integers(0, 999))
def test_stop_strings_in_batches_streams_and_text_agree(stops: list[str], seed: int) -> None:
    tokenizer = ByteTokenizer()
    letters = list("abcé🙂".encode())
    writer = random_decoder(seed, vocab_size=tokenizer.vocab_size, d_model=16, n_layers=1, n_heads=2, n_kv_heads=None)

    def only_letters(rows: list[Continuation], logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, -math.inf).index_copy(1, torch.tensor(letters), logits[:, letters] / 3)
    rule, prompts = StopStrings(stops, tokenizer), [[1], [2, 3], [4]]
    full = generate(writer, prompts, 30, seed=[seed] * 3, processors=[only_letters])
    cut = generate(writer, prompts, 30, seed=[seed] * 3, processors=[only_letters], stop=rule)
    for whole, row, prompt in zip(full, cut, prompts, strict=True):
        assert row == whole[:len(row)] and rule.text(row) == rule.text(whole) and not any(stop in rule.text(row) for stop in stops)
        streamed = generate_stream(writer, prompt, 30, seed=seed, processors=[only_letters])
        assert "".join(stream_text(streamed, tokenizer, stops)) == rule.text(whole)


# ---- search

@quick
@given(PROMPTS, st.integers(1, 5), st.sampled_from([0.0, 1.0, 2.0, -0.5]))
def test_beams_in_a_padded_batch_are_those_of_each_prompt(model: DecoderLM, prompts: list[list[int]], beams: int, alpha: float) -> None:
    knobs = {"beams": beams, "n_best": beams, "length_penalty": alpha, "eos_id": [3, 9]}
    together = beam_search(model, prompts, 10, **knobs)
    for prompt, found in zip(prompts, together, strict=True):
        alone = beam_search(model, [prompt], 10, **knobs)[0]
        assert [one.tokens for one in found] == [one.tokens for one in alone]
        assert [one.log_prob for one in found] == pytest.approx([one.log_prob for one in alone], abs=1e-9)
        for one in found: # the score is the model's own, computed in one pass
            answer = [*one.tokens, *([9] if one.ended else [])]
            others = [[*one.tokens, 3]] if one.ended else []
            scores = [score.total for score in continuation_logprobs(model, [prompt], [[answer, *others]])[0]]
            assert min(abs(score - one.log_prob) for score in scores) < 1e-9


def test_one_beam_is_greedy_and_more_never_worse(model: DecoderLM) -> None:
    prompts = [[1, 2], [5]]
    assert [found[0].tokens for found in beam_search(model, prompts, 15, beams=1)] == generate(model, prompts, 15, temperature=0)
    best = [beam_search(model, [[7]], 8, beams=beams, length_penalty=0)[0][0].log_prob for beams in (1, 64)]
    assert best[0] <= best[1]


@quick
@given(st.lists(st.integers(0, 47), min_size=1, max_size=8), st.integers(0, 6), st.integers(0, 30), st.integers(0, 2))
def test_greedy_speculation_is_greedy(model: DecoderLM, drafts: list[DecoderLM], prompt: list[int], lookahead: int, new: int, which: int) -> None:
    alone = generate(model, [prompt], new, temperature=0, eos_id=3)[0]
    for draft in (ModelDraft(drafts[which]), PromptLookup()):
        result = speculate(model, prompt, new, draft, lookahead=lookahead, temperature=0, eos_id=3)
        assert result.tokens == alone and 0 <= result.accepted <= result.proposed


class Uncached:
    "A model that reads the whole text at each step."
    device = torch.device("cpu")

    def __init__(self, model: DecoderLM) -> None:
        self.model, self.max_length = model, model.max_length

    def new_cache(self, batch: int, max_length: int) -> IdsCache:
        return IdsCache(batch)

    def __call__(self, ids: torch.Tensor, *, cache: IdsCache, padding: torch.Tensor | None = None, last_only: bool = False) -> torch.Tensor:
        logits = self.model(cache.append(ids), padding=padding)
        return logits[:, -1:] if last_only else logits[:, -ids.shape[1]:]


@pytest.mark.parametrize("variant", [{}, {"window": 6}, {"attention": "retention"}, {"attention": "latent"}, {"attention": "differential"}, {"positions": "alibi"}, {"positions": "learned"}],
                         ids=str)
def test_every_cache_follows_searches_guesses_and_scores(variant: dict[str, object]) -> None:
    model = random_decoder(3, n_kv_heads=None, **variant)
    plain, prompts = Uncached(model), [[1, 2, 3], [4]]
    ours, theirs = (beam_search(one, prompts, 20, beams=4, n_best=4, eos_id=3) for one in (model, plain))
    assert [[one.tokens for one in found] for found in ours] == [[one.tokens for one in found] for found in theirs]
    ours, theirs = (continuation_logprobs(one, prompts, [[[5], [6, 7, 8]], [[9, 10]]]) for one in (model, plain))
    for mine, reference in zip(ours, theirs, strict=True):
        for one, other in zip(mine, reference, strict=True):
            assert one.tokens == pytest.approx(other.tokens, abs=1e-9)
    assert speculate(model, [1, 2, 3], 30, PromptLookup(1, 1), temperature=0).tokens == generate(model, [[1, 2, 3]], 30, temperature=0)[0]


def test_a_draft_can_be_used_again_for_another_prompt(model: DecoderLM, drafts: list[DecoderLM]) -> None:
    draft = ModelDraft(drafts[1])
    for prompt in ([1, 2, 3, 4, 5, 6], [1, 2], [1, 2, 9], [8] * 20, [1]):
        assert speculate(model, prompt, 12, draft, temperature=0).tokens == generate(model, [prompt], 12, temperature=0)[0]


def test_sampled_speculation_keeps_the_distribution_of_a_decoder() -> None:
    "χ² over the first token and over the second, given the knobs; by chance this fails once in 10,000 changes of the seeds."
    target, draft = (random_decoder(seed, vocab_size=6, d_model=8, n_layers=1, n_heads=2, n_kv_heads=None) for seed in (5, 6))
    knobs, n = {"temperature": 1.5, "top_k": 5}, 1500
    guesser = ModelDraft(draft)
    seen = torch.zeros(6, 6, dtype=torch.float64)
    for seed in range(n):
        a, b = speculate(target, [1, 2], 2, guesser, lookahead=2, seed=seed, **knobs).tokens
        seen[a, b] += 1
    expected = torch.zeros_like(seen)
    for a in range(6):
        first, second = (target(torch.tensor([ids]))[0, -1].detach() / 1.5 for ids in ([1, 2], [1, 2, a]))
        p, q = (row.masked_fill(row < row.topk(5).values[-1], -math.inf).softmax(-1) for row in (first, second))
        expected[a] = n * p[a] * q
    assert not seen[expected == 0].any()
    common = expected >= 5
    chi = ((seen - expected) ** 2 / expected)[common].sum() + (seen[~common].sum() - expected[~common].sum()) ** 2 / expected[~common].sum().clamp(min=1)
    assert torch.special.gammaincc(common.sum() / 2, chi / 2) > 1e-4


# ---- constraints

def matching(pattern: str, text: str) -> bool:
    return re.fullmatch(pattern, text, re.ASCII) is not None


@pytest.mark.parametrize("pattern", [
    "", "a|", "(a|b)*abb", r"\d{3}-\d{4}", "(é|€)+🙂?", r"[^\x00-\x7f]{2}", r"(a*)*b", "(a*|b)c", "(a|b*)?", "x{0}y", "(?P<year>[12]\\d{3})", "a{,3}b{2,}",
    r"[]a]+", r"[\]\-^]+", r"\x41\u00e9\U0001F642", "[a-]", ".{2}", r"\w+@\w+\.(com|org)", "((a|b)(c|d)){2}", "(?:)", r"[\w.]+\s?",
])
def test_patterns_mean_what_they_mean_in_python(pattern: str) -> None:
    automaton = compile_pattern(pattern)
    dice = random.Random(pattern)
    alphabet = "ab cdxy019-@._]^é€🙂A\n\tcomrg"
    for _ in range(800):
        text = "".join(dice.choices(alphabet, k=dice.randrange(7)))
        assert automaton.matches(text) == matching(pattern, text), (pattern, text)


@quick
@given(st.data())
def test_what_python_would_write_is_accepted(data: st.DataObject) -> None:
    pattern = data.draw(st.sampled_from([r"(\d+|[a-f]{2,4})(,(\d+|[a-f]{2,4}))*", r"[^a]*a?", r"(é|.)\W+", r"\S{1,4}( \S{1,4}){0,2}"]))
    text = data.draw(st.from_regex(re.compile(pattern, re.ASCII), fullmatch=True))
    assert compile_pattern(pattern).matches(text)


@pytest.mark.parametrize("pattern", ["a(?=b)", "a(?!b)", "(?<=a)b", "(?<!a)b", r"(a)\1", "(?P<x>a)(?P=x)", "^a", "a$", r"\bx", r"\Ba", r"\Ax", r"x\Z",
                                     "(?i:a)", "(?i)a", "(a)?(?(1)b|c)", "(?#note)a", "(", "[", "a{2", "*", "a**", "(?P<1>a)", r"\8", "\ud800", "(?>a)"])
def test_what_cannot_be_done_is_refused_in_a_sentence(pattern: str) -> None:
    with pytest.raises(InputError) as caught:
        compile_pattern(pattern)
    assert "pattern" in str(caught.value) and "\n" not in str(caught.value)


def test_patterns_that_are_too_large_or_empty_are_refused() -> None:
    with pytest.raises(InputError, match="more than 50 states"):
        compile_pattern("(a|b)*a(a|b){9}", 50)
    with pytest.raises(InputError, match="too large"):
        compile_pattern("(((a{99}){99}){99})")
    with pytest.raises(InputError, match="no text matches"):
        compile_pattern(r"[^\d\D]")
    with pytest.raises(InputError, match="a pattern is a text"):
        parse_pattern(b"a") # type: ignore[arg-type]


def test_all_of_unicode_has_its_bytes() -> None:
    for first, last in ((0, 0xD7FF), (0xE000, 0x10FFFF)):
        spans = [[(a, b) for a, b in sequence] for sequence in utf8_ranges(first, last)]
        assert sum(math.prod(b - a + 1 for a, b in span) for span in spans) == last - first + 1


@quick
@given(st.sampled_from([r"\d{4}-\d\d", "(yes|no)( .{1,3})?", "[é€🙂]{1,3}", r'\{"n": -?\d+\}']), st.integers(0, 999), st.sampled_from([0.0, 1.0, 3.0]))
def test_whatever_is_written_matches(bpe: BPETokenizer, pattern: str, seed: int, temperature: float) -> None:
    writer = random_decoder(seed % 3, vocab_size=bpe.vocab_size + 5)
    end = bpe.special_tokens["<|end|>"]
    constraint = Constraint(compile_pattern(pattern), bpe, end)
    prompts = [bpe.encode("on "), bpe.encode("it was dry"), [1]]
    room = int(constraint.distance[0]) + seed % 4
    rows = generate(writer, prompts, room, seed=seed, temperature=temperature, eos_id=end, processors=[constraint])
    assert all(matching(pattern, bpe.decode(row)) for row in rows)
    alone = [generate(writer, [prompt], room, seed=[seed], temperature=0, eos_id=end, processors=[constraint])[0] for prompt in prompts]
    assert generate(writer, prompts, room, temperature=0, eos_id=end, processors=[constraint]) == alone
    for found in beam_search(writer, prompts, room, beams=3, n_best=3, eos_id=end, processors=[constraint]):
        assert found and all(matching(pattern, bpe.decode(one.tokens)) for one in found)


def test_beams_find_the_most_probable_choice(bpe: BPETokenizer) -> None:
    writer = random_decoder(4, vocab_size=bpe.vocab_size)
    end, choices = bpe.special_tokens["<|end|>"], ["dry", "rained", "it", "it was"]
    constraint = Constraint(compile_choices(choices), bpe, end)
    found = beam_search(writer, [[1, 2]], 20, beams=200, n_best=1, length_penalty=0, eos_id=end, processors=[constraint])[0][0]
    spellings = {tuple(ids) for text in choices for ids in spelled(text.encode(), constraint, bpe)}
    scores = continuation_logprobs(writer, [[1, 2]], [[[*ids, end] for ids in sorted(spellings)]])[0]
    assert found.log_prob == pytest.approx(max(score.total for score in scores), abs=1e-9)


def spelled(data: bytes, constraint: Constraint, tokenizer: BPETokenizer) -> list[list[int]]:
    "Every way to write some bytes in tokens."
    if not data:
        return [[]]
    pieces = ((i, tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size) if i != constraint.eos_id)
    return [[i, *rest] for i, piece in pieces if data.startswith(piece) for rest in spelled(data[len(piece):], constraint, tokenizer)]


def test_json_from_noise(bpe: BPETokenizer) -> None:
    end = bpe.special_tokens["<|end|>"]
    rule = Constraint(compile_pattern(r'\{"ok": (true|false), "n": \[\d(, \d){0,3}\]\}'), bpe, end)
    for row in generate(random_decoder(1, vocab_size=bpe.vocab_size, max_length=128), [[5]] * 20, 60, seed=0, eos_id=end, processors=[rule]):
        assert json.loads(bpe.decode(row)).keys() == {"ok", "n"}


# ---- scores

@quick
@given(PROMPTS, st.data())
def test_scores_are_those_of_one_full_pass(model: DecoderLM, prompts: list[list[int]], data: st.DataObject) -> None:
    several = [data.draw(st.lists(st.lists(st.integers(0, 47), min_size=1, max_size=6), max_size=3)) for _ in prompts]
    scored = continuation_logprobs(model, prompts, several, batch_size=data.draw(st.integers(1, 8)))
    for prompt, candidates, scores in zip(prompts, several, scored, strict=True):
        assert len(candidates) == len(scores)
        for candidate, score in zip(candidates, scores, strict=True):
            with torch.inference_mode():
                logs = model(torch.tensor([prompt + candidate]))[0].log_softmax(-1)
            exact = [logs[len(prompt) - 1 + n, token].item() for n, token in enumerate(candidate)]
            assert score.tokens == pytest.approx(exact, abs=1e-9) and score.total == pytest.approx(sum(exact), abs=1e-9)


def test_scores_leave_the_model_as_it_was(model: DecoderLM) -> None:
    model.train()
    continuation_logprobs(model, [[1]], [[[2]]])
    assert model.training
    model.eval()
