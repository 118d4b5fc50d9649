"""Training that is killed, starved, interrupted and lied to: it goes on bit for bit, or says in one line why not."""
import errno
import json
import math
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import Tensor, nn

from mmie.core import InputError
from mmie.models.decoder import DecoderLM, ModelConfig
from mmie.tokenization.base import ByteTokenizer
from mmie.tokenization.bpe import BPETokenizer
from mmie.training.checkpoint import best_checkpoint, checkpoint_info, latest_checkpoint, load_checkpoint, save_checkpoint
from mmie.training.data import Batch, EpochWindows, TokenFile
from mmie.training.finetune import ChatBatches, ChatTemplate, QAPair
from mmie.training.trainer import Callback, HeldOut, TrainConfig, Trainer, TrainingError, next_token_sum

forks = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork with torch loaded, and Linux's limits and mounts")
signals = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for a single process")

# ---------------------------------------------------------------- the runs that are disturbed

VOCABULARY = 61


def tokens(n: int, seed: int) -> TokenFile:
    "Random text of one document, with a pattern in it."
    ids = (np.random.default_rng(seed).integers(0, 7, n).cumsum() % VOCABULARY).astype("<u2")
    return TokenFile(ids, np.array([n]), np.array([2 * n]), 0, "test")


def model(seed: int = 0) -> DecoderLM:
    torch.manual_seed(seed)
    return DecoderLM(ModelConfig(vocab_size=VOCABULARY, d_model=16, n_layers=1, n_heads=2, max_length=16))


def noisy_sum(net: nn.Module, batch: Batch) -> Tensor:
    "A loss that needs all three random generators, and is NaN for one batch in about forty."
    loss = next_token_sum(net, batch)
    if net.training:
        loss = loss * (1 + 0.1 * torch.rand(()) + 0.1 * random.random() + 0.1 * np.random.rand())
        if int(batch.inputs.sum()) % 41 == 0:
            loss = loss * math.nan
    return loss


SCENARIOS: dict[str, dict[str, object]] = {
    "plain": {"steps": 150, "checkpoint_every": 5},
    "accumulate": {"accumulate": 3, "checkpoint_every": 4},
    "muon": {"optimizer": "muon", "schedule": "wsd"},
    "chat": {"optimizer": "muon", "accumulate": 2},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
}


def chats(seed: int = 0) -> ChatBatches:
    pairs = [QAPair(f"What is {n} plus {n}?", str(2 * n)) for n in range(40)]
    return ChatBatches(pairs, ByteTokenizer(special_tokens=ChatTemplate().special_tokens), max_length=16, batch_size=4, seed=seed)


def trainer(scenario: str, folder: Path | None, *, seed: int = 0, callbacks: tuple[Callback, ...] = (), **changes: object) -> Trainer:
    "A run; another seed starts from other weights, which must not matter once there is a checkpoint."
    plan: dict[str, object] = {"steps": 60, "checkpoint_every": 3, "eval_every": 10, "lr": 1e-2, "device": "cpu", "precision": "float32", "max_bad_share": 0.5}
    config = TrainConfig(**(plan | SCENARIOS[scenario] | changes))
    if scenario != "chat":
        return Trainer(model(seed), EpochWindows(tokens(1500, 0), 16, 4), HeldOut(tokens(200, 1), 16, batch_size=4), config, callbacks, folder, noisy_sum)
    torch.manual_seed(seed)
    net = DecoderLM(ModelConfig(vocab_size=259, d_model=16, n_layers=1, n_heads=2, max_length=16))
    return Trainer(net, chats(), None, config, callbacks, folder, noisy_sum)


def same(a: object, b: object) -> bool:
    "Equal with the same types all the way down; tensors to the last bit."
    if type(a) is not type(b):
        return False
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))
    return a == b or (a != a and b != b)


def result(done: Trainer) -> dict[str, object]:
    "Everything a run leaves, apart from what a clock said: the whole checkpoint, and the batches that would come next."
    state = load_checkpoint(latest_checkpoint(done.folder))
    history = {key: value for key, value in json.loads(state.pop("history")).items() if key not in ("seconds", "waits")}
    following = [done.train_data.next_batch() for _ in range(3)]
    return {"state": state, "history": history, "next": [[b.inputs, b.targets] for b in following], "step": done.step}


def compare(ours: dict[str, object], reference: dict[str, object]) -> None:
    "Name what differs."
    for part in ("step", "history", "state", "next"):
        if not same(ours[part], reference[part]):
            a, b = ours[part], reference[part]
            names = [key for key in a if not same(a[key], b.get(key))] if isinstance(a, dict) and isinstance(b, dict) else []
            raise AssertionError(f"{part} differs {names}")


# ---------------------------------------------------------------- programs for a process of their own

def in_fresh_python(function: Callable[..., object], *args: object, wrapper: tuple[str, ...] = ()) -> object:
    "Call one of this file's functions in a new process, where forks, limits, hooks and signals do no harm."
    program = f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import torch; torch.set_num_threads(1)\n"
    program += f"import test_robustness as t; print(json.dumps(t.{function.__name__}(*json.loads(sys.argv[1]))))"
    words = [*wrapper, sys.executable, "-W", "ignore", "-c", program, json.dumps(args, default=str)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


class Started(Callback):
    "Tells the parent that start-up is over."

    def __init__(self, flag: mmap.mmap) -> None:
        self.flag = flag

    def on_fit_start(self, trainer: Trainer) -> None:
        self.flag[0] = 1


def fork(action: Callable[[], object]) -> int:
    "A child that does something and ends without a trace of its parent's."
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return child


def kill_once(scenario: str, folder: Path, kind: str, delay: float) -> str:
    "Start or resume a run in a child, kill it a moment after it is where we want it; where it was when it died."
    flag, begun, litter = mmap.mmap(-1, 1), latest_checkpoint(folder), unfinished(folder)
    reached = {"start": lambda: True, "step": lambda: flag[0], "saving": lambda: flag[0] and unfinished(folder) - litter}[kind]
    child = fork(lambda: trainer(scenario, folder, seed=7 if begun else 0, callbacks=(Started(flag),)).fit(resume=folder))
    while not reached():
        if os.waitpid(child, os.WNOHANG)[0]:
            return "done"
        time.sleep(0.0005)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "saving" if unfinished(folder) - litter else "step" if flag[0] else "start"


def kill_again_and_again(scenario: str, folder: str, kills: int, seed: int) -> dict[str, object]:
    "Kill a run at random moments of three kinds, let it finish, and compare it with one that was left alone."
    rng, home, moments, steps = random.Random(seed), Path(folder), [], [0]
    disturbed = home / "disturbed"
    trainer(scenario, None, steps=2, checkpoint_every=0).fit() # what PyTorch loads on first use is loaded here, once, and not in every child
    for number in range(kills):
        kind, longest = (("start", 0.03), ("step", 0.1), ("saving", 0.006))[number % 3]
        moments.append(kill_once(scenario, disturbed, kind, rng.random() ** 3 * longest)) # mostly at once, sometimes late
        found = latest_checkpoint(disturbed)
        steps.append(load_checkpoint(found)["step"] if found else 0)
    ours, straight = trainer(scenario, disturbed, seed=9 if steps[-1] else 0), trainer(scenario, home / "straight")
    ours.fit(resume=disturbed)
    straight.fit()
    compare(result(ours), result(straight))
    return {"moments": moments, "steps": steps, "left": sorted(path.name for path in disturbed.iterdir()), "skipped": len(straight.history.skipped)}


def unfinished(folder: Path) -> set[str]:
    "Checkpoints that are being written, or whose writer died."
    return {path.name for path in folder.glob(".saving-*")}


# ---------------------------------------------------------------- kill −9

@forks
def test_thirty_kills_change_nothing(tmp_path: Path) -> None:
    "The heart of it: start-up, steps and half-written checkpoints are hit, and every bit is as if nothing had happened."
    found = in_fresh_python(kill_again_and_again, "plain", tmp_path, 30, 0)
    assert found["steps"] == sorted(found["steps"]), "a checkpoint was lost"
    assert all(found["moments"].count(kind) >= 2 for kind in ("start", "step", "saving")) and len(found["moments"]) == 30, found["moments"]
    assert found["skipped"] and not [name for name in found["left"] if name.startswith(".")]


def kill_each_a_little(folder: str, kills: int) -> list[str]:
    "The same with every other kind of run."
    for scenario in SCENARIOS:
        if scenario != "plain":
            steps = kill_again_and_again(scenario, str(Path(folder) / scenario), kills, 1)["steps"]
            assert steps == sorted(steps), f"{scenario}: a checkpoint was lost"
    return list(SCENARIOS)


@forks
def test_kills_change_nothing_in_any_kind_of_run(tmp_path: Path) -> None:
    assert in_fresh_python(kill_each_a_little, tmp_path, 6) == list(SCENARIOS)


# ---------------------------------------------------------------- disks that refuse

def small(step: int) -> dict[str, object]:
    "A state that shows whether it is whole: its tensor repeats its step."
    return {"step": step, "w": torch.full((5_000,), float(step)), "note": "grüße"}


def whole(folder: Path) -> int:
    "The step of the latest checkpoint, which is not a mixture of two."
    state = load_checkpoint(latest_checkpoint(folder))
    assert state["w"].eq(state["step"]).all() and state["w"].shape == (5_000,)
    return state["step"]


class Faults:
    "Makes the n-th operation on the disk (or that one and all later ones) fail, wherever it is: open, write, fsync, rename, mkdir, remove."

    def __init__(self) -> None:
        self.armed, self.count, self.first, self.lasting, self.number, self.said = False, 0, 0, False, errno.ENOSPC, ""
        sys.addaudithook(self.hook)
        self.fsync, os.fsync = os.fsync, self.failing_fsync
        self.path_open, Path.open = Path.open, lambda path, mode="r", *a, **k: self.opened(self.path_open(path, mode, *a, **k), mode)
        from mmie.training import checkpoint
        self.save_file, checkpoint.safetensors.torch.save_file = checkpoint.safetensors.torch.save_file, self.half_a_file

    def operation(self, name: str) -> None:
        if self.armed:
            self.count += 1
            if self.count == self.first or (self.lasting and self.count > self.first):
                self.said = self.said or name
                raise OSError(self.number, os.strerror(self.number))

    def hook(self, event: str, args: tuple[object, ...]) -> None:
        removes = event in ("os.remove", "os.rmdir")
        makes = event == "os.mkdir" and not os.path.exists(str(args[0]))
        writes = makes or event == "os.rename" or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wxa+"))
        if writes or (removes and self.number != errno.ENOSPC): # removing works on a full disk
            self.operation(event)

    def failing_fsync(self, handle: int) -> None:
        self.operation("fsync")
        self.fsync(handle)

    def opened(self, file: object, mode: str) -> object:
        faults = self

        class Half:
            "Half of what is written arrives before the disk is full."
            def __enter__(self) -> "Half":
                return self
            def __exit__(self, *exception: object) -> None:
                file.close()
            def __getattr__(self, name: str) -> object:
                return getattr(file, name)
            def write(self, data: bytes) -> int:
                file.write(data[: len(data) // 2])
                faults.operation("write")
                return file.write(data[len(data) // 2:])
        return Half() if set(mode) & set("wxa") else file

    def half_a_file(self, tensors: dict[str, Tensor], path: Path) -> None:
        self.save_file(tensors, path)
        data = path.read_bytes()
        try:
            self.operation("safetensors")
        except OSError as error:
            os.truncate(path, len(data) // 2)
            raise SafetensorError(f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})") from error


def refuse_everywhere(folder: str, faults: Faults, number: int, lasting: bool) -> list[tuple[str, str, int]]:
    "Save step 2 over step 1 while the n-th operation fails, for every n; what failed, what was said, what is left."
    rows: list[tuple[str, str, int]] = []
    while not rows or rows[-1][0]:
        run = Path(folder) / f"{number}-{lasting}-{len(rows)}"
        save_checkpoint(run, small(1), step=1, keep_last=1)
        (run / ".saving-old").mkdir()
        (run / ".saving-old" / "tensors.safetensors").write_bytes(b"half")
        faults.number, faults.lasting, faults.count, faults.first, faults.said = number, lasting, 0, len(rows) + 1, ""
        faults.armed, message = True, ""
        try:
            save_checkpoint(run, small(2), step=2, keep_last=1)
        except InputError as error:
            message = str(error)
        faults.armed = False
        survivor = whole(run)
        assert not message or f"the last good checkpoint is {latest_checkpoint(run).name}" in message, message
        save_checkpoint(run, small(3), step=3, keep_last=1)
        assert whole(run) == 3 and [path.name for path in run.iterdir()] == ["step-000000003"], "something is left behind"
        rows.append((faults.said, message, survivor))
    return rows


def refuse_in_every_way(folder: str) -> list[int]:
    "A full disk, a read-only one and a broken one, for a moment or for good; how many operations each went through."
    faults, counts = Faults(), []
    for number in (errno.ENOSPC, errno.EROFS, errno.EIO):
        for lasting in (False, True):
            rows = refuse_everywhere(folder, faults, number, lasting)
            survivors = [survivor for name, _, survivor in rows if lasting or name not in ("os.remove", "os.rmdir")] # litter may stay
            assert {"os.mkdir", "open", "write", "fsync", "safetensors", "os.rename"} <= {name for name, *_ in rows}
            assert survivors == sorted(survivors) and set(survivors) == {1, 2}, "the old one, up to the one moment from which on it is the new one"
            for name, message, survivor in rows:
                said = os.strerror(number) in message and "last good checkpoint is step-000000001" in message
                assert said or survivor == 2 or name in ("os.remove", "os.rmdir"), (name, message)
            assert rows[-1] == ("", "", 2)
            counts.append(len(rows) - 1)
    return counts


@forks
def test_a_disk_that_refuses_anywhere(tmp_path: Path) -> None:
    "Every open, write, fsync, rename and removal of a save fails once, and from then on, in three ways."
    assert min(in_fresh_python(refuse_in_every_way, tmp_path)) > 12


def limits_on_size(folder: str) -> list[list[object]]:
    "Save step 2 while no file may grow beyond a limit, as on a disk with a quota."
    import resource
    run, rows = Path(folder), []
    save_checkpoint(run, small(1), step=1)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in [0, 1, 7, 8, 50, 100, 150, 200, 250, 300, 350, 400, 1000, 10_000, 20_000]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            save_checkpoint(run, small(2), step=2)
            message = ""
        except InputError as error:
            message = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        rows.append([limit, message, whole(run), [path.name for path in run.iterdir()]])
    return rows


@forks
def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    for limit, message, survivor, left in in_fresh_python(limits_on_size, tmp_path):
        assert "cannot save the checkpoint of step 2" in message and "last good checkpoint is step-000000001" in message, limit
        assert survivor == 1 and left == ["step-000000001"]


def mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True)


def a_small_disk(folder: str) -> dict[str, object]:
    "A real file system of a few pages: full at every possible page, read-only, and a run that fills it up."
    disk = Path(folder)
    mount(disk, "size=1m")
    save_checkpoint(disk / "run", small(1), step=1, keep_last=1)
    used, survivors = sum(-(-path.stat().st_size // 4096) for path in disk.rglob("*") if path.is_file()), []
    for pages in range(used, used + 20):
        mount(disk, f"remount,size={4 * pages}k")
        try:
            save_checkpoint(disk / "run", small(2), step=2, keep_last=1)
        except InputError as error:
            assert "No space left on device" in str(error) and "step-000000001" in str(error), str(error)
        survivors.append(whole(disk / "run"))
    mount(disk, "remount,ro")
    try:
        save_checkpoint(disk / "run", small(3), step=3)
        refused = ""
    except InputError as error:
        refused = str(error)
    mount(disk, "remount,rw,size=1m")
    filled = fill_up(disk)
    return {"survivors": survivors, "refused": refused, "left": whole(disk / "run"), "filled": filled}


def fill_up(disk: Path) -> str:
    "A run on a disk that gets full in the middle; once there is room it goes on as if nothing had been."
    class Fill(Callback):
        def on_step_start(self, trainer: Trainer) -> None:
            if trainer.step == 31:
                (disk / "ballast").write_bytes(bytes(1024 * (shutil.disk_usage(disk).free // 1024 - 8)))
    run = disk / "train"
    try:
        trainer("plain", run, steps=60, callbacks=(Fill(),)).fit()
        said = "nothing"
    except InputError as error:
        said = str(error)
    (disk / "ballast").unlink()
    ours, straight = trainer("plain", run, seed=3, steps=60), trainer("plain", disk.parent / "straight", steps=60)
    ours.fit(resume=run)
    straight.fit()
    compare(result(ours), result(straight))
    return said


@pytest.fixture
def own_mounts() -> tuple[str, ...]:
    "A prefix for commands that may mount what nobody else sees."
    for words in (("unshare", "--mount"), ("unshare", "--mount", "--map-root-user")):
        if shutil.which("unshare") and subprocess.run([*words, "sh", "-c", "mount -t tmpfs none /mnt"], capture_output=True, check=False).returncode == 0:
            return words
    pytest.skip("mounting is not permitted here")


@forks
def test_a_disk_that_is_really_full(own_mounts: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    found = in_fresh_python(a_small_disk, tmp_path / "disk", wrapper=own_mounts)
    assert found["survivors"] == sorted(found["survivors"]) and set(found["survivors"]) == {1, 2} and found["left"] == 2
    assert "Read-only file system" in found["refused"] and "last good checkpoint is step-000000002" in found["refused"]
    assert "No space left on device" in found["filled"] and "last good checkpoint is step-000000030" in found["filled"]


def test_places_one_cannot_write_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match="no earlier checkpoint"):
            save_checkpoint(place, small(1), step=1)
    with pytest.raises(InputError, match="cannot save"):
        trainer("plain", tmp_path / "file", steps=2).fit()


@forks
def test_a_folder_that_must_not_change(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_checkpoint(run, small(1), step=1)
    if not shutil.which("chattr") or subprocess.run(["chattr", "+i", str(run)], capture_output=True, check=False).returncode:
        pytest.skip("chattr is not permitted here")
    try:
        with pytest.raises(InputError, match=r"Operation not permitted.*last good checkpoint is step-000000001"):
            save_checkpoint(run, small(2), step=2)
    finally:
        subprocess.run(["chattr", "-i", str(run)], check=True)
    assert whole(run) == 1


# ---------------------------------------------------------------- faults inside a step

class At(Callback):
    "Does something at one event of one step."

    def __init__(self, event: str, step: int, action: Callable[[Trainer], object]) -> None:
        def react(trainer: Trainer, *details: object) -> None:
            if trainer.step == step:
                action(trainer)
        setattr(self, f"on_{event}", react)


def with_fault(fault: Callable[[nn.Module, Batch, Tensor], Tensor], at: int) -> Callable[[nn.Module, Batch], Tensor]:
    "The usual loss, with something done to it in one training pass."
    calls = 0

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        nonlocal calls
        calls += net.training
        value = next_token_sum(net, batch)
        return fault(net, batch, value) if net.training and calls == at else value
    return loss


def plain(loss: Callable[[nn.Module, Batch], Tensor] = next_token_sum, folder: Path | None = None, callbacks: tuple[Callback, ...] = (), **changes: object) -> Trainer:
    "Twelve steps without noise, in float64."
    plan = {"steps": 12, "checkpoint_every": 3, "lr": 1e-2, "device": "cpu", "precision": "float32", "max_bad_share": 0.3, "min_bad": 3, "warmup": 0}
    return Trainer(model().double(), EpochWindows(tokens(1500, 0), 16, 4), None, TrainConfig(**(plan | changes)), callbacks, folder, loss)


def raise_it(error: BaseException) -> Callable[..., object]:
    def action(*_: object) -> object:
        raise error
    return action


def in_backward(action: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Batch, Tensor], Tensor]:
    "A fault that waits for the backward pass."
    def fault(net: nn.Module, batch: Batch, loss: Tensor) -> Tensor:
        loss = loss * 1
        loss.register_hook(action)
        return loss
    return fault


NOT_A_NUMBER = {
    "forward": (lambda net, batch, loss: loss * math.nan, "the loss is nan"),
    "infinite": (lambda net, batch, loss: loss + math.inf, "the loss is inf"),
    "backward": (in_backward(lambda gradient: gradient * math.nan), "the gradient is nan"),
}


@pytest.mark.parametrize("where", NOT_A_NUMBER)
def test_a_batch_that_is_not_a_number_is_left_out_and_counted(where: str) -> None:
    fault, reason = NOT_A_NUMBER[where]
    run = plain(with_fault(fault, at=5))
    history = run.fit()
    assert history.bad_steps == 1 and history.skipped == [(4, reason)] and math.isnan(history.losses[4])
    assert all(p.isfinite().all() for p in run.model.parameters())
    without = plain(callbacks=(At("gradients", 4, skip),))
    without.fit()
    assert all(p.equal(q) for p, q in zip(run.model.parameters(), without.model.parameters(), strict=True)), "as if that step had not been taken"


def skip(trainer: Trainer) -> None:
    from mmie.training.trainer import SkipStep
    raise SkipStep("asked to")


def test_too_many_of_them_end_the_run_with_the_reason(tmp_path: Path) -> None:
    def sick(net: nn.Module, batch: Batch) -> Tensor:
        return next_token_sum(net, batch) * (math.nan if net.training and run.step >= 5 else 1)
    run = plain(sick, tmp_path, steps=100)
    with pytest.raises(TrainingError, match="the loss is nan"):
        run.fit()
    assert run.step < 12
    state = load_checkpoint(latest_checkpoint(tmp_path))
    assert all(value.isfinite().all() for value in state["model"].values())


def test_weights_that_broke_never_push_out_good_checkpoints(tmp_path: Path) -> None:
    "The optimizer itself goes wrong: every later step is bad, and nothing it leaves is worth keeping."
    def poison(trainer: Trainer) -> None:
        with torch.no_grad():
            next(trainer.model.parameters()).fill_(math.nan)
    run = plain(folder=tmp_path, callbacks=(At("step_end", 61, poison),), steps=100, checkpoint_every=2, keep_last=2)
    with pytest.raises(TrainingError):
        run.fit()
    for path in tmp_path.iterdir():
        assert all(value.isfinite().all() for value in load_checkpoint(path)["model"].values()), path.name
    assert checkpoint_info(latest_checkpoint(tmp_path)).step == 60


OUT_OF_MEMORY = {
    "CUDA's class": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "the CPU's words": RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
    "Python's class": MemoryError("Unable to allocate 2.00 GiB"),
}


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_out_of_memory_halves_the_batch_and_changes_nothing_else(kind: str, where: str) -> None:
    def too_large(net: nn.Module, batch: Batch) -> Tensor:
        value = next_token_sum(net, batch) * 1
        if net.training and len(batch.inputs) > 1 and run.step >= 5:
            if where == "forward":
                raise OUT_OF_MEMORY[kind]
            value.register_hook(raise_it(OUT_OF_MEMORY[kind]))
        return value
    run, roomy = plain(too_large), plain()
    ours, reference = run.fit(), roomy.fit()
    assert run.pieces == 4 and roomy.pieces == 1 and not ours.skipped
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(reference.losses), rtol=1e-6, atol=1e-6)
    for p, q in zip(run.model.parameters(), roomy.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def test_a_single_row_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    def impossible(net: nn.Module, batch: Batch) -> Tensor:
        if net.training and run.step >= 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return next_token_sum(net, batch)
    run = plain(impossible, tmp_path)
    with pytest.raises(TrainingError, match="out of memory"):
        run.fit()
    assert checkpoint_info(latest_checkpoint(tmp_path)).step in (3, 6)


class Breaks:
    "A source that fails once."

    def __init__(self, source: EpochWindows, at: int, error: Exception) -> None:
        self.source, self.at, self.error = source, at, error

    @property
    def epoch(self) -> int:
        return self.source.epoch

    def next_batch(self) -> Batch:
        self.at -= 1
        if self.at == -1:
            raise self.error
        return self.source.next_batch()

    def state_dict(self) -> dict[str, int]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.source.load_state_dict(state)


def breaks_in_optimizer(trainer: Trainer) -> None:
    part = next(iter(trainer.optimizer.parts.values()))
    part.register_step_pre_hook(raise_it(torch.OutOfMemoryError("CUDA out of memory")))


FAULTS: dict[str, Callable[[], dict[str, object]]] = {
    "data": lambda: {"data": OSError(errno.EIO, "Input/output error")},
    "memory of the data": lambda: {"data": MemoryError("Unable to allocate 2.00 GiB")},
    "forward": lambda: {"loss": with_fault(raise_it(ValueError("index out of range")), at=16)},
    "backward": lambda: {"loss": with_fault(in_backward(raise_it(ValueError("a bug in a backward"))), at=16)},
    "optimizer": lambda: {"callback": At("step_start", 7, breaks_in_optimizer)},
    "step_start": lambda: {"callback": At("step_start", 7, raise_it(ValueError("a bug in a callback")))},
    "gradients": lambda: {"callback": At("gradients", 7, raise_it(ValueError("a bug in a callback")))},
    "step_end": lambda: {"callback": At("step_end", 8, raise_it(ValueError("a bug in a callback")))},
    "saved": lambda: {"callback": At("saved", 9, raise_it(ValueError("a bug in a callback")))},
}


@pytest.mark.parametrize("where", FAULTS)
@pytest.mark.parametrize("again", ["the same trainer", "a new one"])
def test_an_error_arrives_as_it_is_and_costs_no_step(where: str, again: str, tmp_path: Path) -> None:
    "Whatever raises, wherever: the user sees that error; resumed, the run ends as if it had never happened."
    fault, straight = FAULTS[where](), plain(folder=tmp_path / "straight", accumulate=2)
    straight.fit()
    callbacks = (fault["callback"],) if "callback" in fault else ()
    run = plain(fault.get("loss", next_token_sum), tmp_path / "run", callbacks, accumulate=2)
    if "data" in fault:
        run.train_data = Breaks(run.train_data, 15, fault["data"])
    with pytest.raises((OSError, MemoryError, ValueError, RuntimeError)) as caught:
        run.fit()
    assert any(words in str(caught.value) for words in ("Input/output", "memory", "allocate", "a bug", "index out of range"))
    assert checkpoint_info(latest_checkpoint(tmp_path / "run")).step in (6, 7, 9)
    rest = run if again == "the same trainer" else plain(folder=tmp_path / "run", accumulate=2)
    rest.callbacks, rest.loss = [], next_token_sum
    for part in rest.optimizer.parts.values():
        part._optimizer_step_pre_hooks.clear()
    rest.fit(resume=tmp_path / "run")
    ours, reference = result(rest), result(straight)
    for each in (ours, reference):
        each["state"].pop("callbacks")
    compare(ours, reference)


# ---------------------------------------------------------------- Ctrl-C and SIGTERM

def press(*signals: int) -> Callable[[Trainer], None]:
    "Send this process signals, as a terminal or a scheduler does."
    def action(trainer: Trainer) -> None:
        for number in signals:
            os.kill(os.getpid(), number)
    return action


LEAVES = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}


@signals
@pytest.mark.parametrize("number", LEAVES, ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("event", ["fit_start", "step_start", "gradients", "step_end", "evaluated", "saved"])
def test_a_signal_at_any_event_finishes_the_step_and_saves(event: str, number: int, tmp_path: Path) -> None:
    step = {"fit_start": 0, "evaluated": 20, "saved": 6}.get(event, 7)
    disturbed = trainer("plain", tmp_path / "run", steps=24, checkpoint_every=6, callbacks=(At(event, step, press(number)),))
    before = signal.getsignal(number)
    with pytest.raises(LEAVES[number]) as caught:
        disturbed.fit()
    assert number == signal.SIGINT or caught.value.code == 143
    assert signal.getsignal(number) is before
    saved = checkpoint_info(latest_checkpoint(tmp_path / "run")).step
    assert saved == {"fit_start": 0, "step_start": 8, "gradients": 8, "step_end": 7, "evaluated": 20, "saved": 6}[event]
    rest, straight = trainer("plain", tmp_path / "run", seed=5, steps=24, checkpoint_every=6), trainer("plain", tmp_path / "straight", steps=24, checkpoint_every=6)
    rest.fit(resume=tmp_path / "run")
    straight.fit()
    ours, reference = result(rest), result(straight)
    compare(ours, reference)
    assert best_checkpoint(tmp_path / "run").name.removesuffix("-2") == best_checkpoint(tmp_path / "straight").name


@signals
@pytest.mark.parametrize("event", ["step_start", "gradients", "step_end", "evaluated"])
def test_a_second_ctrl_c_leaves_at_once_and_saves_nothing(event: str, tmp_path: Path) -> None:
    run = trainer("plain", tmp_path, steps=24, checkpoint_every=6, callbacks=(At(event, 20, press(signal.SIGINT, signal.SIGINT)),))
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert checkpoint_info(latest_checkpoint(tmp_path)).step == 18
    rest, straight = trainer("plain", tmp_path, seed=5, steps=24, checkpoint_every=6), trainer("plain", tmp_path / "straight", steps=24, checkpoint_every=6)
    rest.fit(resume=tmp_path)
    straight.fit()
    compare(result(rest), result(straight))


@signals
@pytest.mark.parametrize("pressed", [20, 24], ids=["in the middle", "the last one"])
def test_ctrl_c_in_an_evaluation_costs_no_score(pressed: int, tmp_path: Path) -> None:
    "The checkpoint of that step gets its score afterwards, so that it can be the best."
    def loss(net: nn.Module, batch: Batch) -> Tensor:
        if not net.training and run.step == pressed:
            os.kill(os.getpid(), signal.SIGINT)
        return noisy_sum(net, batch)
    plan = {"steps": 24, "checkpoint_every": 4, "eval_every": 4}
    run, straight = trainer("plain", tmp_path / "run", **plan), trainer("plain", tmp_path / "straight", **plan)
    run.loss = loss
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    rest = trainer("plain", tmp_path / "run", seed=5, **plan)
    rest.fit(resume=tmp_path / "run")
    straight.fit()
    compare(result(rest), result(straight))
    ours, reference = best_checkpoint(tmp_path / "run"), best_checkpoint(tmp_path / "straight")
    assert (checkpoint_info(ours).step, checkpoint_info(ours).metric) == (checkpoint_info(reference).step, checkpoint_info(reference).metric)
    metrics = {checkpoint_info(path).step: checkpoint_info(path).metric for path in (tmp_path / "run").iterdir()}
    assert metrics[24] is not None


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    "A folder of text and a tokenizer."
    home = tmp_path_factory.mktemp("library")
    pages = [topics[name] for name in sorted(topics)[:12]]
    (home / "text").mkdir()
    for number, page in enumerate(pages):
        (home / "text" / f"{number}.txt").write_text(page, encoding="utf-8")
    BPETokenizer.train(pages, 400, special_tokens=("<|endoftext|>", *ChatTemplate().special_tokens)).save(home / "tokenizer")
    return home / "text", home / "tokenizer"


def start(library: tuple[Path, Path], out: Path) -> "subprocess.Popen[str]":
    words = ["train", "--corpus", library[0], "--tokenizer", library[1], "--preset", "smoke", "--steps", 60, "--out", out]
    program = [str(Path(sys.executable).parent / "mmie"), *map(str, words)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@signals
def test_ctrl_c_and_sigterm_in_a_real_run(library: tuple[Path, Path], tmp_path: Path) -> None:
    "`mmie train`, stopped by Ctrl-C, stopped by SIGTERM, then left alone: the same model as in one go, byte for byte."
    straight = start(library, tmp_path / "straight")
    assert straight.wait(timeout=240) == 0, straight.communicate()[0]
    reached = [0]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = start(library, tmp_path / "out")
        while process.poll() is None and newest_step(tmp_path / "out" / "checkpoints") <= reached[-1] + 4:
            time.sleep(0.005)
        process.send_signal(number)
        said = process.communicate(timeout=120)[0]
        assert process.returncode == code and "Traceback" not in said, said
        reached.append(checkpoint_info(latest_checkpoint(tmp_path / "out" / "checkpoints")).step)
    assert 0 < reached[1] < reached[2] < 60
    last = start(library, tmp_path / "out")
    assert last.wait(timeout=240) == 0, last.communicate()[0]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "straight" / "model.safetensors").read_bytes()


def newest_step(folder: Path) -> int:
    "By its name, without looking inside."
    return max((int(path.name[5:14]) for path in folder.glob("step-*")), default=0)


# ---------------------------------------------------------------- files that were damaged

@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A run with two checkpoints."
    run = tmp_path_factory.mktemp("two") / "run"
    for step in (1, 2):
        save_checkpoint(run, small(step) | {"best": math.inf, "order": [3, (1, 2)], "more": torch.arange(7)}, step=step, metric=1.0 / step)
    return run


def places(path: Path) -> Iterator[int]:
    "Bytes of every kind: a header's length, the header, its end, the data; both ends and a hundred in between."
    size = path.stat().st_size
    if path.name == "tensors.safetensors":
        header = int.from_bytes(path.read_bytes()[:8], "little")
        yield from [*range(8), 8, 9, 8 + header // 2, 7 + header, 8 + header, 9 + header]
    yield from sorted({0, 1, size // 2, size - 2, size - 1, *np.random.default_rng(0).integers(0, size, 100).tolist()})


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_no_flipped_bit_is_loaded(name: str, two: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    shutil.copytree(two, run)
    path, reference = run / "step-000000002" / name, load_checkpoint(two / "step-000000002")
    whole_file = path.read_bytes()
    everywhere = name == "manifest.json"
    bits = [(i, bit) for i in (range(len(whole_file)) if everywhere else places(path)) for bit in (range(8) if everywhere else (i % 8,))]
    for i, bit in bits:
        path.write_bytes(whole_file[:i] + bytes([whole_file[i] ^ (1 << bit)]) + whole_file[i + 1:])
        try:
            state = load_checkpoint(path.parent)
        except InputError as error:
            assert "older checkpoint" in str(error) or "update mmie" in str(error), error
            assert i % 16 or latest_checkpoint(run) == run / "step-000000001"
        else: # only where the bit says nothing: the same number or space, written in another way
            info = checkpoint_info(path.parent)
            assert everywhere and same(state, reference) and (info.step, info.metric) == (2, 0.5), (i, bit)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_no_file_that_is_too_short_too_long_missing_or_anothers_is_loaded(name: str, two: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(two, run)
    path = run / "step-000000002" / name
    content, older = path.read_bytes(), (run / "step-000000001" / name).read_bytes()
    zeros = content[: len(content) // 2] + bytes(len(content) - len(content) // 2) # what some file systems leave after a power cut
    for wrong in [*(content[:n] for n in places(path)), content + b"x", older, zeros, bytes(len(content)), None]:
        path.unlink() if wrong is None else path.write_bytes(wrong)
        with pytest.raises(InputError):
            load_checkpoint(path.parent)
        assert latest_checkpoint(run) == best_checkpoint(run) == run / "step-000000001"


def test_a_run_goes_on_from_before_the_damage(tmp_path: Path) -> None:
    "The newest checkpoint is damaged on the disk: the one before is taken, and the end is the same."
    run, straight = trainer("plain", tmp_path / "run", steps=18, checkpoint_every=6), trainer("plain", tmp_path / "straight", steps=18, checkpoint_every=6)
    straight.fit()
    run.callbacks.append(At("step_end", 14, raise_it(ValueError("crash"))))
    with pytest.raises(ValueError, match="crash"):
        run.fit()
    newest = latest_checkpoint(tmp_path / "run")
    assert newest.name == "step-000000012"
    data = bytearray((newest / "tensors.safetensors").read_bytes())
    data[-100] ^= 16
    (newest / "tensors.safetensors").write_bytes(data)
    rest = trainer("plain", tmp_path / "run", seed=5, steps=18, checkpoint_every=6)
    rest.fit(resume=tmp_path / "run")
    compare(result(rest), result(straight))


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(tmp_path: Path) -> None:
    "Starting afresh would look like going on, and tidy away what somebody might still repair."
    trainer("plain", tmp_path, steps=6).fit()
    for path in tmp_path.iterdir():
        os.truncate(path / "state.json", 10)
    before = sorted(path.name for path in tmp_path.iterdir())
    for resume in (tmp_path, None):
        with pytest.raises(InputError, match=r"none of them is whole.*start afresh"):
            trainer("plain", tmp_path, steps=6).fit(resume=resume)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_damaged_checkpoint_does_not_count_as_one_to_keep(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, small(step), step=step, keep_last=2)
    os.truncate(tmp_path / "step-000000003" / "state.json", 10)
    save_checkpoint(tmp_path, small(4), step=4, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000002", "step-000000004"]


def test_the_best_one_is_never_replaced_by_a_worse_attempt(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, small(1), step=1, metric=1.0)
    for metric in (None, math.nan, math.inf, 2.0):
        save_checkpoint(tmp_path, small(1), step=1, keep_last=1, metric=metric)
        assert best_checkpoint(tmp_path).name == "step-000000001"
    for step in range(2, 8):
        save_checkpoint(tmp_path, small(step), step=step, keep_last=1, metric=1.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000001", "step-000000007"]
    save_checkpoint(tmp_path, small(1), step=1, keep_last=1, metric=0.5)
    assert best_checkpoint(tmp_path).name == "step-000000001-2" and latest_checkpoint(tmp_path).name == "step-000000007"


# ---------------------------------------------------------------- whatever a state may hold

leaves = st.none() | st.booleans() | st.integers(-2**80, 2**80) | st.floats() | st.text(st.characters(exclude_categories=())) | st.builds(
    lambda dtype, shape, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(50).to(dtype),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64]),
    st.lists(st.integers(0, 3), max_size=3), st.integers(0, 9))
keys = st.text(max_size=5).filter(lambda key: not key.startswith("$"))
trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3), max_leaves=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=st.dictionaries(keys, trees, max_size=4))
def test_any_tree_comes_back(state: dict[str, object], tmp_path: Path) -> None:
    assert same(load_checkpoint(save_checkpoint(tmp_path, state, step=1, keep_last=1)), state)


@pytest.mark.parametrize("state", [{"x": {1}}, {"x": b"bytes"}, {"x": np.float32(1)}, {"$tensor": "0"}, {3: 4}, {"x": print}, {"x": torch.device("cpu")},
                                   {"x": torch.empty(3, device="meta")}, {"x": torch.eye(3).to_sparse()}, {"x": torch.zeros(2, dtype=torch.complex128)}], ids=str)
def test_what_cannot_be_stored_is_named_and_nothing_is_written(state: dict[object, object], tmp_path: Path) -> None:
    save_checkpoint(tmp_path, small(1), step=1)
    try:
        back = load_checkpoint(save_checkpoint(tmp_path, state, step=2))
    except InputError:
        assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    else:
        assert same(back, state)


@pytest.mark.parametrize("step", [-1, 10**9])
def test_a_step_that_no_name_can_hold(step: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no number of a step"):
        save_checkpoint(tmp_path, small(1), step=step)
