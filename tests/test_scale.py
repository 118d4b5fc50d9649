"""A corpus is tokenized to the same bytes, whoever does it, and whatever happens meanwhile."""
import errno
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmie.core import InputError
from mmie.tokenization import scale
from mmie.tokenization.base import BaseTokenizer, ByteTokenizer
from mmie.tokenization.bpe import BPETokenizer
from mmie.tokenization.corpora import Document, python_docs, read_corpus
from mmie.tokenization.scale import ShardSet, count_shards, encode_shards
from mmie.tokenization.splitting import count_chunks

SIZE = 40_000
SCRIPT = """
import multiprocessing, resource, sys
from mmie.tokenization.base import load_tokenizer
from mmie.tokenization.scale import encode_shards
if __name__ == "__main__":
    folder, out, workers, *options = sys.argv[1:]
    if "spawn" in options:
        multiprocessing.set_start_method("spawn")
    if "small-disk" in options:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))
    encode_shards(load_tokenizer(folder + "/tokenizer"), folder + "/corpus", out, workers=int(workers), shard_bytes=40_000)
"""


class Fragile(ByteTokenizer):
    "Kills its process at the word BOOM, the first time or always."
    kind = "fragile"

    def __init__(self, mark: str) -> None:
        super().__init__()
        self.mark = mark

    def _settings(self) -> dict[str, object]:
        return {"mark": self.mark}

    def _encode_plain(self, text: str) -> list[int]:
        if "BOOM" in text and not (self.mark and Path(self.mark).exists()):
            if self.mark:
                Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._encode_plain(text)


del BaseTokenizer.kinds["fragile"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A corpus of rows and notes, a tokenizer, a script, and the shards that one undisturbed process makes."
    home = tmp_path_factory.mktemp("scale")
    documents = python_docs(["python"])
    tokenizer = BPETokenizer.train([d.text for d in documents[::8]], 1500)
    tokenizer.save(home / "tokenizer")
    (home / "corpus").mkdir()
    (home / "corpus" / "rows.jsonl").write_text("".join(json.dumps({"text": d.text}) + "\n" for d in documents), encoding="utf-8")
    for document in documents[:30]:
        (home / "corpus" / f"{document.name}.txt").write_text(document.text, encoding="utf-8")
    (home / "encode.py").write_text(SCRIPT, encoding="utf-8")
    encode_shards(tokenizer, home / "corpus", home / "serial", shard_bytes=SIZE)
    return home


@pytest.fixture(scope="module")
def tokenizer(home: Path) -> BaseTokenizer:
    return BPETokenizer.load(home / "tokenizer")


def contents(folder: Path, *kinds: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("shard-*")) if not kinds or p.suffix[1:] in kinds}


def start(home: Path, out: Path, workers: int, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(home / "encode.py"), str(home), str(out), str(workers), *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(run: "subprocess.Popen[str]") -> tuple[int, str]:
    errors = run.communicate(timeout=120)[1]
    return run.returncode, errors


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def made(folder: Path) -> int:
    return len(list(folder.glob("shard-*.json")))


def test_the_shards_hold_what_the_readers_read(home: Path, tokenizer: BaseTokenizer) -> None:
    shards = ShardSet.open(home / "serial", tokenizer)
    documents = read_corpus([home / "corpus"])
    assert [ids.tolist() for ids in shards] == [tokenizer.encode(d.text) for d in documents]
    assert (shards.n_documents, shards.n_bytes) == (len(documents), sum(len(d.text.encode()) for d in documents))
    tokens, ends = shards.concatenated()
    assert np.array_equal(tokens, np.concatenate(list(shards))) and ends[0].tolist() == np.cumsum([len(ids) for ids in shards]).tolist()


@pytest.mark.parametrize("options", [[], ["spawn"]], ids=["default", "spawn"])
def test_any_number_of_workers_writes_the_same(home: Path, tmp_path: Path, options: list[str]) -> None:
    code, errors = finish(start(home, tmp_path / "out", 3, *options))
    assert code == 0, errors
    assert contents(tmp_path / "out") == contents(home / "serial")
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("seed", range(4))
def test_a_run_that_is_killed_again_and_again_ends_the_same(home: Path, tmp_path: Path, seed: int) -> None:
    rng, out, total = random.Random(seed), tmp_path / "out", made(home / "serial")
    kills = 0
    for goal in sorted(rng.sample(range(total), 3)):
        run = start(home, out, rng.choice([1, 2]))
        wait_for(lambda goal=goal, run=run: made(out) >= goal or run.poll() is not None)
        time.sleep(rng.uniform(0, 0.02))
        run.kill()
        kills += finish(run)[0] == -signal.SIGKILL
    assert kills
    code, errors = finish(start(home, out, 2))
    assert code == 0, errors
    assert contents(out) == contents(home / "serial")
    log = [json.loads(line) for line in (out / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    done = [entry["shard"] for entry in log]
    assert len(done) == len(set(done)), "a shard that was finished and noted is not done again"


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_worker_is_replaced(home: Path, tmp_path: Path, seed: int) -> None:
    rng, out = random.Random(seed), tmp_path / "out"
    run = start(home, out, 2)
    assert wait_for(lambda: made(out) >= 1 or run.poll() is not None)
    time.sleep(rng.uniform(0, 0.05))
    victims = [p for p in psutil.Process(run.pid).children() if "resource_tracker" not in " ".join(p.cmdline())] if run.poll() is None else []
    if victims:
        rng.choice(victims).kill()
    code, errors = finish(run)
    assert code == 0, errors
    assert contents(out) == contents(home / "serial")


def test_workers_end_with_their_parent(home: Path, tmp_path: Path) -> None:
    run = start(home, tmp_path / "out", 2)
    assert wait_for(lambda: made(tmp_path / "out") >= 1 or run.poll() is not None)
    workers = psutil.Process(run.pid).children()
    run.kill()
    finish(run)
    assert workers and wait_for(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in workers)), "orphans"


def test_ctrl_c_leaves_finished_shards(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = start(home, out, 2)
    assert wait_for(lambda: made(out) >= 2 or run.poll() is not None)
    os.killpg(run.pid, signal.SIGINT) # as a terminal does: to the workers too
    code, errors = finish(run)
    assert code in (0, -signal.SIGINT) and errors.count("Traceback") <= 1, errors
    kept = contents(out)
    assert kept.items() <= contents(home / "serial").items()
    assert finish(start(home, out, 2))[0] == 0 and contents(out) == contents(home / "serial")


def test_a_worker_dies_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    documents = [Document(str(n), "BOOM" if n == 17 else f"text {n}") for n in range(40)]
    with caplog.at_level(logging.WARNING, "mmie"):
        encode_shards(Fragile(str(tmp_path / "mark")), documents, tmp_path / "a", shard_bytes=40, workers=2)
    assert (tmp_path / "mark").exists() and "a worker died" in caplog.text
    encode_shards(ByteTokenizer(), documents, tmp_path / "b", shard_bytes=40)
    assert contents(tmp_path / "a", "ids", "ends") == contents(tmp_path / "b", "ids", "ends")


def test_a_document_that_kills_is_named(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "BOOM" if n == 3 else "quiet"}) + "\n" for n in range(6)), encoding="utf-8")
    with pytest.raises(InputError, match=r"shard 3 has killed its worker 3 times .*rows.jsonl, bytes 54 to 71"):
        encode_shards(Fragile(""), rows, tmp_path / "out", shard_bytes=10, workers=2)


def test_a_real_full_disk_is_one_line_and_can_be_mended(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for workers in (1, 2):
        code, errors = finish(start(home, out, workers, "small-disk"))
        assert code == 1 and "cannot write: file too large" in errors.splitlines()[-1]
    assert finish(start(home, out, 1))[0] == 0 and contents(out) == contents(home / "serial")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_writing_can_fail(home: Path, tokenizer: BaseTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    write = scale.atomic_write

    def full(path: Path, data: bytes) -> None:
        if path.name.startswith("shard-000002"):
            raise OSError(code, os.strerror(code), str(path))
        write(path, data)

    monkeypatch.setattr(scale, "atomic_write", full)
    with pytest.raises(InputError, match=f"cannot write: {os.strerror(code).lower()}"):
        encode_shards(tokenizer, home / "corpus", tmp_path / "out", shard_bytes=SIZE)
    monkeypatch.undo()
    assert made(tmp_path / "out") == 2
    encode_shards(tokenizer, home / "corpus", tmp_path / "out", shard_bytes=SIZE)
    assert contents(tmp_path / "out") == contents(home / "serial")


def test_a_folder_that_cannot_be(tokenizer: BaseTokenizer, home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="cannot write"):
        encode_shards(tokenizer, home / "corpus", tmp_path / "file" / "out")


def damages() -> Iterator[tuple[str, Callable[[Path], object]]]:
    yield "cut off", lambda path: path.write_bytes(path.read_bytes()[:-3])
    yield "emptied", lambda path: path.write_bytes(b"")
    yield "longer", lambda path: path.write_bytes(path.read_bytes() + b"\0\0")
    yield "one bit", lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    yield "gone", Path.unlink


@pytest.mark.parametrize("damage", [pytest.param(damage, id=name) for name, damage in damages()])
@pytest.mark.parametrize("kind", ["ids", "ends", "json"])
def test_damage_is_found_and_mended(tmp_path: Path, kind: str, damage: Callable[[Path], object]) -> None:
    documents = [Document(str(n), f"some text {n}") for n in range(6)]
    encode_shards(ByteTokenizer(), documents, tmp_path / "out", shard_bytes=40)
    before = contents(tmp_path / "out")
    damage(tmp_path / "out" / f"shard-000001.{kind}")
    with pytest.raises(InputError, match="shard 1 of 3 is missing or damaged"):
        ShardSet.open(tmp_path / "out")
    encode_shards(ByteTokenizer(), documents, tmp_path / "out", shard_bytes=40)
    assert contents(tmp_path / "out") == before and len(list(ShardSet.open(tmp_path / "out"))) == 6


def test_what_changed_is_named(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "a.txt").write_text("alpha", encoding="utf-8")
    (folder / "b.jsonl").write_text('{"text": "beta"}\n{"text": "gamma"}\n', encoding="utf-8")

    def again(tokenizer: BaseTokenizer | None = None, **options: int) -> ShardSet:
        return encode_shards(tokenizer or ByteTokenizer(), folder, out, shard_bytes=options.pop("shard_bytes", 10), **options)

    again()
    with pytest.raises(InputError, match="tokenizer is"):
        again(ByteTokenizer(["<|end|>"]))
    with pytest.raises(InputError, match="eos_id is '1'"):
        again(eos_id=1)
    with pytest.raises(InputError, match="shard_bytes is '20', was '10'"):
        again(shard_bytes=20)
    os.utime(folder / "a.txt", ns=(1, 1))
    assert again().n_documents == 3, "another time, the same text"
    (folder / "c.txt").write_text("new", encoding="utf-8")
    with pytest.raises(InputError, match=r"c\.txt is new"):
        again()
    (folder / "c.txt").unlink()
    (folder / "a.txt").write_text("alphA", encoding="utf-8")
    with pytest.raises(InputError, match=r"another text .*a\.txt"):
        again()
    (folder / "a.txt").write_text("alphabet", encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.txt has 8 bytes, had 5"):
        again()
    (folder / "a.txt").unlink()
    with pytest.raises(InputError, match=r"a\.txt is gone"):
        again()
    with pytest.raises(InputError, match="they are ids, not counts"):
        count_shards(folder, folder=out)
    (out / "plan.json").unlink()
    with pytest.raises(InputError, match=r"no plan\.json"):
        again()
    (out / "plan.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="damaged"):
        again()
    (out / "plan.json").write_text('{"format": "mmie-shards", "version": 99}', encoding="utf-8")
    with pytest.raises(InputError, match="version 99"):
        again()


def test_documents_that_come_out_differently_are_refused(tmp_path: Path) -> None:
    encode_shards(ByteTokenizer(), iter([Document("a", "one"), Document("b", "two")]), tmp_path, shard_bytes=5)
    assert encode_shards(ByteTokenizer(), (Document(n, n) for n in ("one", "two")), tmp_path, shard_bytes=5).n_documents == 2
    with pytest.raises(InputError, match="another text"):
        encode_shards(ByteTokenizer(), [Document("a", "one"), Document("b", "too")], tmp_path, shard_bytes=5)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=1, max_size=12), size=st.integers(1, 200))
def test_any_texts_in_shards_of_any_size(tmp_path_factory: pytest.TempPathFactory, texts: list[str], size: int) -> None:
    folder = tmp_path_factory.mktemp("any")
    tokenizer = ByteTokenizer(["<|end|>"])
    shards = encode_shards(tokenizer, [Document(str(n), text) for n, text in enumerate(texts)], folder, shard_bytes=size, eos_id=256)
    assert [tokenizer.decode(ids) for ids in shards] == [text + "<|end|>" for text in texts]
    assert count_shards([Document(str(n), text) for n, text in enumerate(texts)], shard_bytes=size) == count_chunks(texts)


def test_counting_goes_on_where_it_was(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = count_chunks([d.text for d in read_corpus([home / "corpus"])])
    assert count_shards(home / "corpus", folder=tmp_path, shard_bytes=SIZE, workers=2) == expected
    monkeypatch.setattr(scale, "count_chunks", None)
    assert count_shards(home / "corpus", folder=tmp_path, shard_bytes=SIZE) == expected, "nothing is counted again"


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer([f"<|{n}|>" for n in range(1 << 16)])
    shards = encode_shards(tokenizer, [Document("a", "hi")], tmp_path, eos_id=tokenizer.vocab_size - 1)
    assert shards.dtype == "<u4" and next(iter(shards)).tolist() == [104, 105, tokenizer.vocab_size - 1]
    with pytest.raises(InputError, match="not a token"):
        encode_shards(tokenizer, [Document("a", "hi")], tmp_path, eos_id=tokenizer.vocab_size)


def test_the_bar_counts_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encode_shards(ByteTokenizer(), [Document("a", "x" * 990)], tmp_path, progress=True)
    assert "1.00k/1.00k" in capsys.readouterr().err


def test_a_cluster_writes_the_same(home: Path, tokenizer: BaseTokenizer, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason='Ray is optional: pip install "mmie[scale]"')
    ray.init(num_cpus=2, include_dashboard=False, ignore_reinit_error=True, object_store_memory=200_000_000, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        encode_shards(tokenizer, home / "corpus", tmp_path / "out", shard_bytes=SIZE, workers="ray")
        assert contents(tmp_path / "out") == contents(home / "serial")
        texts = [d.text for d in read_corpus([home / "corpus"])]
        assert count_shards(home / "corpus", shard_bytes=SIZE, folder=tmp_path / "counts", workers="ray") == count_chunks(texts)
        table = ray.data.from_items([{"number": n, "text": text} for n, text in enumerate(texts)], override_num_blocks=4)
        rows = {row["number"]: list(row["ids"]) for row in scale.encode_with_ray(tokenizer, table).iter_rows()}
        assert [rows[n] for n in range(len(texts))] == [tokenizer.encode(text) for text in texts]
        assert scale.count_with_ray(table) == count_chunks(texts)
    finally:
        ray.shutdown()


def test_the_start_method_is_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: "spawn")
    pool = scale._new_pool(print, 1) # type: ignore[arg-type]
    assert type(pool._mp_context).__name__ == "SpawnContext"
    pool.shutdown()
