"""Batches: nothing lost, nothing twice, and every stop invisible."""

import contextlib
import json
import re
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmie.core import InputError
from mmie.models.decoder import IGNORE, DecoderLM, ModelConfig
from mmie.tokenization.base import ByteTokenizer
from mmie.tokenization.bpe import BPETokenizer
from mmie.tokenization.corpora import Document
from mmie.training.data import (
    Batch,
    BatchSource,
    BudgetBatches,
    EpochSource,
    EpochWindows,
    Mixture,
    PackedDocuments,
    Prefetched,
    StreamedText,
    TokenFile,
    best_fit,
    document_batches,
    evaluation_windows,
    measure_waiting,
    write_tokens,
)
from mmie.training.trainer import TrainConfig, Trainer

EOS = 0
TOKENIZER = ByteTokenizer(["<|end|>"])
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes_of_texts = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def token_file(sizes: list[int]) -> TokenFile:
    "Texts whose tokens are all different, so that each can be followed."
    ends = np.cumsum([size + 1 for size in sizes])
    tokens = np.arange(1, ends[-1] + 1, dtype=np.uint32)
    tokens[ends - 1] = EOS
    return TokenFile(tokens, ends, ends, EOS, "")


def scored(batch: Batch) -> list[int]:
    return batch.targets[batch.targets != IGNORE].tolist()


def same(one: Batch, other: Batch) -> bool:
    documents = one.documents is other.documents or one.documents.equal(other.documents)
    return one.inputs.equal(other.inputs) and one.targets.equal(other.targets) and documents


def epoch_of(source: EpochSource) -> list[Batch]:
    "The batches of an epoch that ends with a batch."
    batches = []
    while source.epoch == 0 and source.position < source._n:
        batches.append(source.next_batch())
    return batches


SAMPLERS = {
    "windows": lambda tokens, seed: EpochWindows(tokens, 5, 3, seed=seed),
    "packed": lambda tokens, seed: PackedDocuments(tokens, 16, 3, seed=seed),
    "buckets": lambda tokens, seed: document_batches(tokens, 48, length=16, pool=8, seed=seed),
    "mixture": lambda tokens, seed: Mixture(
        {"a": EpochWindows(tokens, 4, 2, seed=seed), "b": PackedDocuments(tokens, 12, 2, seed=seed)}, {"a": 2, "b": 1}),
}


@pytest.mark.parametrize("kind", SAMPLERS)
@quick
@given(sizes=sizes_of_texts.filter(lambda s: sum(s) > 8), seed=st.integers(0, 99), before=st.integers(0, 40), after=st.integers(1, 15))
def test_resume_anywhere(kind: str, sizes: list[int], seed: int, before: int, after: int) -> None:
    straight, resumed = SAMPLERS[kind](token_file(sizes), seed), SAMPLERS[kind](token_file(sizes), seed)
    assert isinstance(straight, BatchSource)
    for _ in range(before):
        straight.next_batch()
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    for _ in range(after):
        assert same(straight.next_batch(), resumed.next_batch())
    assert straight.state_dict() == resumed.state_dict()


@quick
@given(sizes=sizes_of_texts, length=st.integers(1, 50), seed=st.integers(0, 99))
def test_packing_loses_nothing(sizes: list[int], length: int, seed: int) -> None:
    tokens = token_file(sizes)
    batches = epoch_of(PackedDocuments(tokens, length, 1, seed=seed))
    assert sorted(token for batch in batches for token in scored(batch)) == sorted(tokens.tokens.tolist())
    for batch in batches:
        assert batch.inputs.shape == batch.targets.shape == batch.documents.shape == (1, length)
        assert ((batch.documents < 0) == (batch.targets == IGNORE)).all()
        same_text = batch.documents[:, 1:] == batch.documents[:, :-1]
        follows = same_text & (batch.documents[:, 1:] >= 0)
        assert batch.inputs[:, 1:][follows].equal(batch.targets[:, :-1][follows])


@quick
@given(sizes=st.lists(st.integers(1, 40), max_size=60), room=st.integers(0, 30))
def test_best_fit(sizes: list[int], room: int) -> None:
    capacity = max(sizes, default=1) + room
    rows = best_fit(np.array(sizes, dtype=np.int64), capacity)
    filled = np.bincount(rows, weights=sizes) if sizes else np.zeros(0)
    assert filled.sum() == sum(sizes) and (filled <= capacity).all() and (filled > 0).all()
    assert len(filled) < 2 or np.sort(filled)[:2].sum() > capacity # no two rows could have been one
    naive: list[int] = [] # the definition: the fullest row with room
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, free in enumerate(naive) if free >= size]
        if fitting:
            naive[min(fitting, key=lambda i: naive[i])] -= size
        else:
            naive.append(capacity - size)
    assert len(naive) == len(filled)


@quick
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=80), budget=st.integers(50, 300), pool=st.integers(1, 100), seed=st.integers(0, 9))
def test_budget_is_kept(sizes: list[int], budget: int, pool: int, seed: int) -> None:
    chosen: list[list[int]] = []

    def collate(numbers: np.ndarray) -> Batch:
        chosen.append(numbers.tolist())
        return Batch(torch.zeros(len(numbers), 1), torch.zeros(len(numbers), 1))
    source = BudgetBatches(sizes, collate, budget, pool=pool, seed=seed)
    for epoch in range(2):
        chosen.clear()
        for _ in range(source._n):
            source.next_batch()
        assert source.epoch == epoch and sorted(i for batch in chosen for i in batch) == list(range(len(sizes)))
        assert all(len(batch) * max(sizes[i] for i in batch) <= budget for batch in chosen)
        source.next_epoch()


@quick
@given(sizes=sizes_of_texts, length=st.integers(1, 20))
def test_windows_show_each_token_once(sizes: list[int], length: int) -> None:
    tokens = token_file(sizes)
    if tokens.n_tokens < length + 1:
        with pytest.raises(InputError, match="too few"):
            EpochWindows(tokens, length, 1)
        return
    seen = [token for batch in epoch_of(EpochWindows(tokens, length, 1)) for token in scored(batch)]
    everything = tokens.tokens.tolist()
    assert all(seen.count(token) <= everything.count(token) for token in set(seen)) and len(seen) > len(everything) - 1 - 2 * length


@quick
@given(kind=st.sampled_from(sorted(SAMPLERS)), ahead=st.integers(1, 5), before=st.integers(0, 12), after=st.integers(1, 8), seed=st.integers(0, 9))
def test_prefetched_is_plain(kind: str, ahead: int, before: int, after: int, seed: int) -> None:
    tokens = token_file([7, 3, 30, 12, 5, 21])
    plain = SAMPLERS[kind](tokens, seed)
    with Prefetched(SAMPLERS[kind](tokens, seed), ahead) as source, Prefetched(SAMPLERS[kind](tokens, seed), ahead) as resumed:
        for _ in range(before):
            assert same(source.next_batch(), plain.next_batch())
        assert source.state_dict() == plain.state_dict()
        resumed.load_state_dict(json.loads(json.dumps(source.state_dict())))
        for _ in range(after):
            batch = plain.next_batch()
            assert same(source.next_batch(), batch) and same(resumed.next_batch(), batch)
    assert source.source.state_dict() == plain.state_dict() # closed: the source is where its consumer was


def test_prefetched_ends() -> None:
    def running() -> int:
        return sum(thread.name == "mmie-prefetch" for thread in threading.enumerate())
    before, forgotten = running(), Prefetched(SAMPLERS["windows"](token_file([50]), 0), 1)
    forgotten.next_batch()
    assert running() == before + 1
    time.sleep(0.02) # it's waiting for room by now
    del forgotten
    deadline = time.monotonic() + 5
    while running() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running() == before


def test_errors_arrive_in_order() -> None:
    class Failing(EpochWindows):
        def next_batch(self) -> Batch:
            if self.position >= 6:
                raise OSError("gone")
            return super().next_batch()
    source = Prefetched(Failing(token_file([100]), 5, 3), ahead=4)
    for _ in range(2):
        source.next_batch()
    for _ in range(3): # it says so each time
        with pytest.raises(OSError, match="gone"):
            source.next_batch()
    assert source.state_dict()["position"] == 6


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    lines = ["".join(chr(97 + c) for c in rng.integers(0, 26, n)) for n in rng.integers(1, 60, 300)]
    (tmp_path / "a.txt").write_text("\n".join(lines[:100]), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[100:]), encoding="utf-8")
    (tmp_path / "c.md").write_bytes("\ufeffgrün\r\nund blau".encode())
    return sorted(tmp_path.iterdir())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=st.integers(0, 120), after=st.integers(1, 10), buffer=st.integers(1, 40), length=st.integers(1, 40), seed=st.integers(0, 9))
def test_streams_resume_anywhere(files: list[Path], before: int, after: int, buffer: int, length: int, seed: int) -> None:
    straight, resumed = (StreamedText(files, TOKENIZER, length, 3, eos_id=256, buffer=buffer, seed=seed) for _ in range(2))
    for _ in range(before):
        straight.next_batch()
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    for _ in range(after):
        assert same(straight.next_batch(), resumed.next_batch())
    assert straight.state_dict() == resumed.state_dict() and straight.epoch == resumed.epoch


def test_stream_is_the_text(files: list[Path]) -> None:
    texts = [files[0].read_text(encoding="utf-8"), *(json.loads(line)["text"] for line in files[1].read_text(encoding="utf-8").splitlines()), "grün\nund blau"]
    epoch = sum(len(text.encode()) + 1 for text in texts)
    source = StreamedText(files, TOKENIZER, epoch, 1, eos_id=256, buffer=1) # a row is an epoch
    for number in range(4):
        row = source.next_batch().inputs[0].tolist()
        assert bytes(0 if i == 256 else i for i in row).decode().split("\0")[-1] == "" and source.epoch == number
        assert sorted(bytes(0 if i == 256 else i for i in row).decode().split("\0")[:-1]) == sorted(texts)
    source.next_epoch()
    assert source.epoch == 4


def test_stretches_give_the_ids_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "def f(x):\n    return x  \n\n\n  # a comment\n" * 40 + "end, without a line break"
    (tmp_path / "code.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr("mmie.training.data._STRETCH", 50)
    tokenizer = BPETokenizer.train([text], 300, special_tokens=("<|end|>",))
    expected = [*tokenizer.encode(text), tokenizer.special_tokens["<|end|>"]]
    source = StreamedText([tmp_path], tokenizer, len(expected), 1, eos_id=expected[-1], buffer=1)
    assert source.next_batch().inputs[0].tolist() == expected


def test_a_stream_is_never_held_whole(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    path.write_text(json.dumps({"text": "some words " * 20}) + "\n", encoding="utf-8")
    row = path.read_bytes()
    with path.open("wb") as file:
        for _ in range(100):
            file.write(row * 2000)
    source = StreamedText([path], BPETokenizer.train(["some words " * 20], 266, special_tokens=("<|end|>",)), 64, 8, eos_id=265, buffer=64)
    tracemalloc.start()
    for _ in range(30):
        source.next_batch()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 40e6 > 16e6 > peak


@pytest.mark.parametrize("content, message", [
    (b'{"text": "good"}\n{"text": 3}\n', "from byte 17"), (b'{"text": "good"}\nnonsense\n', "from byte 17"), (b'{"text": "\xff"}\n', "from byte 0"),
])
def test_bad_rows_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        StreamedText([tmp_path], TOKENIZER, 4, 2, eos_id=256, buffer=8).next_batch()


@quick
@given(counts=st.lists(st.integers(1, 4), min_size=5, max_size=5))
def test_ranks_may_change(counts: list[int]) -> None:
    tokens = token_file([9, 4, 17, 30, 8, 8, 3])
    for make in (lambda: PackedDocuments(tokens, 16, 12), lambda: EpochWindows(tokens, 5, 12)):
        alone, state = make(), make().state_dict()
        for ranks in counts:
            sources = [make() for _ in range(ranks)]
            for source in sources:
                source.load_state_dict(state)
            rows = [source.next_batch().split(ranks)[rank] for rank, source in enumerate(sources)]
            whole, state = alone.next_batch(), sources[-1].state_dict()
            assert torch.cat([part.targets for part in rows]).equal(whole.targets) and sum(part.n_tokens for part in rows) == whole.n_tokens
            assert {len(part) for part in rows} == {12 // ranks}


@quick
@given(rows=st.integers(1, 9), parts=st.integers(1, 12))
def test_split(rows: int, parts: int) -> None:
    batch = Batch(*(torch.arange(rows * 2).view(rows, 2) for _ in range(3)))
    pieces = batch.split(parts)
    sizes = [len(piece) for piece in pieces]
    assert len(pieces) == min(rows, parts) and max(sizes) - min(sizes) <= 1
    assert torch.cat([piece.documents for piece in pieces]).equal(batch.documents)


@quick
@given(weights=st.lists(st.integers(1, 9), min_size=1, max_size=4), batches=st.integers(1, 80))
def test_mixture_keeps_its_shares(weights: list[int], batches: int) -> None:
    tokens = token_file([30] * 8)
    mixed = Mixture({str(i): EpochWindows(tokens, 3 + i, 2) for i in range(len(weights))}, {str(i): w for i, w in enumerate(weights)})
    largest = 2 * (2 + len(weights))
    for _ in range(batches):
        mixed.next_batch()
    total = sum(mixed.given.values())
    assert all(abs(given - mixed.weights[name] * total) <= largest * len(weights) for name, given in mixed.given.items())


def test_workers_write_the_same_file(tmp_path: Path) -> None:
    documents = [Document(str(i), f"text number {i}, " * (1 + i % 7)) for i in range(200)]
    tokenizer = BPETokenizer.train([d.text for d in documents], 280, special_tokens=("<|end|>",))
    for folder, workers in (("one", 1), ("two", 2)):
        write_tokens(documents, tokenizer, tmp_path / folder, eos_id=tokenizer.special_tokens["<|end|>"], workers=workers)
    for name in ("tokens.bin", "documents.bin", "tokens.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["documents.bin", "tokens.bin", "tokens.json"]


def test_states_of_others_are_refused() -> None:
    tokens = token_file([9, 9, 30])
    states = {kind: make(tokens, 0).state_dict() for kind, make in SAMPLERS.items()}
    for kind, make in SAMPLERS.items():
        for other, state in states.items():
            with pytest.raises(InputError) if kind != other else contextlib.nullcontext():
                make(tokens, 0).load_state_dict(state)
    for wrong in ({"length": 0}, {"length": 5, "batch_size": 0}):
        with pytest.raises(InputError, match="use at least 1"):
            PackedDocuments(tokens, **({"batch_size": 1} | wrong))


def tiny(**changes: object) -> DecoderLM:
    torch.manual_seed(0)
    return DecoderLM(ModelConfig(**({"vocab_size": 257, "d_model": 32, "n_layers": 2, "n_heads": 2, "hidden": 64, "max_length": 64} | changes)))


@pytest.mark.parametrize("changes", [{}, {"window": 8}, {"positions": "alibi"}, {"attention": "latent"}, {"positions": "learned"}])
def test_packed_rows_by_rule_and_by_matrix(changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny(**changes).double(), torch.randint(0, 257, (2, 40))
    documents = torch.tensor([[0] * 10 + [1] * 20 + [2] * 6 + [-1] * 4, [0] * 40])
    with torch.no_grad():
        by_rule = model(ids, documents=documents)
        compiled = by_rule if changes else torch.compile(model, backend="eager", fullgraph=True)(ids, documents=documents)
        alone = model(ids[:1, 10:30])
        monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
        by_matrix = model(ids, documents=documents)
    torch.testing.assert_close(by_matrix, by_rule, rtol=0, atol=1e-12)
    torch.testing.assert_close(compiled, by_rule, rtol=0, atol=1e-12)
    torch.testing.assert_close(by_rule[:1, 10:30], alone, rtol=0, atol=1e-12)


def test_a_run_on_fetched_mixtures_resumes_exactly(tmp_path: Path) -> None:
    tokens = write_tokens([Document(str(i), f"text {i} " * (1 + i % 9)) for i in range(60)], TOKENIZER, tmp_path / "tokens", eos_id=256)

    def run(steps: int, resume: Path | None = None) -> tuple[list[float], dict[str, torch.Tensor]]:
        mixed = Mixture({"packed": PackedDocuments(tokens, 48, 4), "windows": EpochWindows(tokens, 24, 4)}, {"packed": 2, "windows": 1})
        config = TrainConfig(steps=steps, schedule="constant", warmup=0, device="cpu", checkpoint_every=3)
        with Prefetched(mixed) as data:
            trainer = Trainer(tiny(), data, config=config, folder=tmp_path / ("b" if resume or steps < 9 else "a"))
            history = trainer.fit(resume=resume)
        return history.losses, trainer.model.state_dict()
    losses, weights = run(9)
    run(5)
    again, resumed = run(9, tmp_path / "b")
    assert again == losses and all(weights[name].equal(resumed[name]) for name in weights)


def text_files(folder: Path) -> None:
    (folder / "text.txt").write_text("some words\n" * 100, encoding="utf-8")
    (folder / "empty.txt").touch()


BOOK = token_file([30, 30])


@pytest.mark.parametrize(("make", "message"), [
    (lambda f: EpochWindows("book", 8, 2), "tokens is a str"),
    (lambda f: EpochWindows(BOOK, 0, 2), "length is 0"),
    (lambda f: EpochWindows(BOOK, 8.0, 2), "length is 8.0"),
    (lambda f: EpochWindows(BOOK, 8, -2), "batch_size is -2"),
    (lambda f: EpochWindows(BOOK, 8, float("nan")), "batch_size is nan"),
    (lambda f: EpochWindows(BOOK, 8, 2, seed=-1), "seed is -1"),
    (lambda f: EpochWindows(BOOK, 10**12, 2), "too few"),
    (lambda f: PackedDocuments(None, 8, 2), "tokens is a NoneType"),
    (lambda f: PackedDocuments(BOOK, -3, 2), "length is -3"),
    (lambda f: document_batches(BOOK, 100, length=0), "length is 0"),
    (lambda f: BudgetBatches([], lambda x: x, 10), "n_examples is 0"),
    (lambda f: StreamedText(f / "text.txt", TOKENIZER, 8, 2, eos_id=256), "put it into a list"),
    (lambda f: StreamedText([], TOKENIZER, 8, 2, eos_id=256), "no text to read"),
    (lambda f: StreamedText([f / "empty.txt"], TOKENIZER, 8, 2, eos_id=256), "no text to read"),
    (lambda f: StreamedText([f / "gone"], TOKENIZER, 8, 2, eos_id=256), "no such file"),
    (lambda f: StreamedText([f / "text.txt"], TOKENIZER, 8, 2, eos_id=None), "eos_id None"),
    (lambda f: StreamedText([f / "text.txt"], TOKENIZER, 8, 2, eos_id=256, buffer=0), "buffer is 0"),
    (lambda f: StreamedText([f / "text.txt"], TOKENIZER, 8, 2, eos_id=256, seed=-1), "seed is -1"),
    (lambda f: Mixture({}, {}), "don't fit"),
    (lambda f: Mixture({"a": [1]}, {"a": 1}), "a list is no source"),
    (lambda f: Mixture({"a": EpochWindows(BOOK, 8, 2)}, {"a": 0}), "above 0"),
    (lambda f: Mixture({"a": EpochWindows(BOOK, 8, 2)}, {"a": float("nan")}), "above 0"),
    (lambda f: Mixture({"a": EpochWindows(BOOK, 8, 2)}, {"b": 1}), "don't fit"),
    (lambda f: Prefetched(EpochWindows(BOOK, 8, 2), ahead=0), "0 batches ahead"),
    (lambda f: Prefetched([1]), "a list is no source"),
    (lambda f: evaluation_windows("book", 8, 4), "tokens is a str"),
    (lambda f: evaluation_windows(BOOK, 8, 4, batch_size=0), "batch_size is 0"),
    (lambda f: evaluation_windows(BOOK, 8, 9), "stride of 9"),
    (lambda f: write_tokens(["a", "b"], TOKENIZER, f / "out", eos_id=256), "'a' is a str"),
    (lambda f: write_tokens([], TOKENIZER, f / "out", eos_id=256), "no document"),
    (lambda f: write_tokens([Document("a", "b")], TOKENIZER, f / "out", eos_id="<|end|>"), "is not a token"),
    (lambda f: write_tokens([Document("a", "b")], TOKENIZER, f / "out", eos_id=257), "is not a token"),
    (lambda f: write_tokens([Document("a", "b")], TOKENIZER, f / "text.txt", eos_id=256), "cannot write tokens"),
    (lambda f: measure_waiting(EpochWindows(BOOK, 8, 2), len, steps=0), "steps is 0"),
])
def test_what_cannot_work_is_refused_in_one_sentence(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    text_files(tmp_path)
    with pytest.raises(InputError, match=re.escape(message)):
        make(tmp_path)


@pytest.mark.parametrize("change", [{"dtype": "banana"}, {"dtype": 3}, {"n_tokens": 3}, {"eos_id": "x"}, {"eos_id": None}])
def test_a_damaged_description_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    write_tokens([Document("a", "some text")], TOKENIZER, tmp_path, eos_id=256)
    about = json.loads((tmp_path / "tokens.json").read_text(encoding="utf-8"))
    for content in (json.dumps(about | change), "[]", "", "null"):
        (tmp_path / "tokens.json").write_text(content, encoding="utf-8")
        with pytest.raises(InputError):
            TokenFile.open(tmp_path)


def test_nine_tokens_are_one_window_of_eight() -> None:
    one = TokenFile(np.arange(9, dtype=np.uint16), np.array([9]), np.array([8]), 8, "")
    batch = EpochWindows(one, 8, 3).next_batch()
    assert batch.inputs.tolist() == [[*range(8)]] * 3 and batch.targets[:, -1].tolist() == [8] * 3


def test_rows_longer_than_the_corpus_cost_nothing_to_pack() -> None:
    assert best_fit(np.array([3, 4, 5]), 10**12).tolist() == [0, 0, 0]
