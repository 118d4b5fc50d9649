"""Callbacks: watchers change nothing, memories survive a resume, logs have every step once."""
import copy
import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mmie.core import InputError
from mmie.models.decoder import DecoderLM, ModelConfig
from mmie.tokenization.base import ByteTokenizer
from mmie.training import callbacks as cb
from mmie.training.checkpoint import best_checkpoint, latest_checkpoint, load_checkpoint
from mmie.training.data import EpochWindows, TokenFile
from mmie.training.trainer import (
    Callback,
    HeldOutScore,
    HeldOut,
    ProgressBar,
    SingleProcess,
    SkipStep,
    StopTraining,
    TrainConfig,
    Trainer,
    next_token_sum,
    random_state,
)
from torch import nn

TOKENIZER = ByteTokenizer()
TEXT = ("It was the best of times, it was the worst of times, " * 60).encode()


def tokens(part: bytes = TEXT) -> TokenFile:
    return TokenFile(np.frombuffer(part, np.uint8), np.array([len(part)]), np.array([len(part)]), 0, "bytes")


class Small(DecoderLM):
    "A decoder with dropout on its logits: whoever draws a global random number is found out."

    def forward(self, *args, **kwargs):
        return F.dropout(super().forward(*args, **kwargs), 0.1, self.training)


def make(callbacks=(), folder=None, seed=0, **changes):
    torch.manual_seed(seed)
    model = Small(ModelConfig(vocab_size=256, d_model=16, n_layers=1, n_heads=2, hidden=32, max_length=32))
    config = TrainConfig(**{"steps": 24, "lr": 1e-2, "eval_every": 5, "checkpoint_every": 7, "precision": "float32"} | changes)
    return Trainer(model, EpochWindows(tokens(), 24, 4), HeldOut(tokens(TEXT[:400]), 24), config, callbacks, folder)


def result(trainer):
    return trainer.history.losses, [(e.step, e.loss) for e in trainer.history.evaluations], \
        {name: tensor.tolist() for name, tensor in trainer.model.state_dict().items()}


class Die(Callback):
    "Raise, or kill the process, before a step."

    def __init__(self, step=None, error=None):
        self.step, self.error = step, error or RuntimeError("died")

    def on_step_start(self, trainer):
        if trainer.step == self.step:
            raise self.error


WATCHERS = {
    "ProgressBar": lambda folder: ProgressBar(),
    "EarlyStopping": lambda folder: cb.EarlyStopping(patience=1000, restore_best=False),
    "TimeLimit": lambda folder: cb.TimeLimit(minutes=60),
    "SampleText": lambda folder: cb.SampleText(TOKENIZER, ["It was", "times"], every=3, max_new_tokens=8),
    "LiveLoss": lambda folder: cb.LiveLoss(seconds=0, show=lambda figure: figure._repr_png_()),
    "JsonLog": lambda folder: cb.JsonLog(folder / "log.jsonl"),
    "TensorBoard": lambda folder: cb.TensorBoard(folder / "events"),
    "AveragedWeights": lambda folder: cb.AveragedWeights(),
}


@pytest.fixture(scope="module")
def unwatched():
    kinds = {}
    for kind in ("adamw", "muon"):
        run = make(optimizer=kind, accumulate=2, steps=12)
        run.fit()
        kinds[kind] = result(run)
    return kinds


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("name", [*WATCHERS, "all"])
def test_watchers_change_nothing(name, kind, unwatched, tmp_path):
    chosen = [build(tmp_path) for key, build in WATCHERS.items() if name in (key, "all")]
    run = make(chosen, optimizer=kind, accumulate=2, steps=12)
    generators = []
    run.callbacks.append(type("Last", (Callback,), {"on_fit_end": lambda self, trainer: generators.append(random_state()["torch"])})())
    run.fit()
    assert result(run) == unwatched[kind]
    plain = make(optimizer=kind, accumulate=2, steps=12)
    plain.fit()
    assert torch.equal(generators[0], random_state()["torch"]) # and the generators stand where they would


def carriers(folder):
    return [cb.EarlyStopping(patience=1000, restore_best=True), cb.SampleText(TOKENIZER, "It was", every=4, max_new_tokens=6),
            cb.AveragedWeights(decay=0.8), cb.JsonLog(folder / "log.jsonl"), cb.TensorBoard(folder / "events")]


def told(folder):
    "What the two logs say, without times."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [(r["event"], r["step"], r.get("loss"), r.get("reason")) for r in rows if r["event"] not in ("fit_start", "fit_end", "saved")]
    reader = EventAccumulator(str(folder / "events"), size_guidance={"scalars": 0})
    reader.Reload()
    tags = [tag for tag in reader.Tags()["scalars"] if "second" not in tag]
    return kept, {tag: [(p.step, p.value) for p in reader.Scalars(tag)] for tag in tags}


def memories(callbacks):
    stopper, writer, average = callbacks[:3]
    as_lists = {k: {n: t.tolist() for n, t in s["model" if k == "average" else "weights"].items()}
                for k, s in {"average": average.state_dict(), "stopper": stopper.state_dict()}.items()}
    return as_lists, stopper.best, stopper.best_step, stopper.waited, writer.samples, average.evaluations


@pytest.fixture(scope="module")
def peaceful(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peaceful")
    carried = carriers(folder)
    run = make(carried, folder / "run")
    run.fit()
    return result(run), memories(carried), told(folder)


@pytest.mark.parametrize("deaths", [(0,), (3,), (7,), (8, 9), (13, 20), (23, 23)])
def test_resumed_is_never_stopped(deaths, peaceful, tmp_path):
    for step in deaths:
        with pytest.raises(RuntimeError, match="died"):
            make([Die(step), *carriers(tmp_path)], tmp_path / "run").fit(resume=tmp_path / "run")
    carried = carriers(tmp_path)
    run = make([Die(), *carried], tmp_path / "run", seed=99 if latest_checkpoint(tmp_path / "run") else 0)
    run.fit(resume=tmp_path / "run")
    assert result(run) == peaceful[0]
    assert memories(carried) == peaceful[1]
    assert told(tmp_path) == peaceful[2]


def test_logs_survive_kill_nine(tmp_path):
    script = textwrap.dedent("""
        import os, signal, sys
        sys.path.insert(0, sys.argv[1])
        from pathlib import Path
        from test_callbacks import Callback, carriers, make, told
        class Kill(Callback):
            def on_gradients(self, trainer):
                if trainer.step == int(sys.argv[3]):
                    os.kill(os.getpid(), signal.SIGKILL)
        folder = Path(sys.argv[2])
        make([Kill(), *carriers(folder)], folder / "run").fit(resume=folder / "run")
        """)
    for step, expected in (("16", -signal.SIGKILL), ("-1", 0)):
        command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path), step]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
        assert done.returncode == expected, done.stderr
    rows, curves = told(tmp_path)
    assert [step for event, step, *_ in rows if event == "step"] == list(range(1, 25))
    assert [step for step, _ in curves["train/loss"]] == list(range(1, 25))
    assert [step for step, _ in curves["valid/loss"]] == [0, 5, 10, 15, 20, 24]


def test_a_half_written_line_is_cut_off(tmp_path, peaceful):
    with pytest.raises(RuntimeError):
        make([Die(11), *carriers(tmp_path)], tmp_path / "run").fit()
    with (tmp_path / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"event": "step", "lo')
    make([Die(), *carriers(tmp_path)], tmp_path / "run", seed=5).fit(resume=tmp_path / "run")
    assert told(tmp_path) == peaceful[2]


def test_json_log_never_touches_what_is_not_its_own(tmp_path):
    log, run = tmp_path / "log.jsonl", tmp_path / "run"
    make([cb.JsonLog(log)], run, steps=7).fit()
    log.write_text('{"mine": true}\n' * 200, encoding="utf-8")
    with pytest.raises(InputError, match="not written by the run"):
        make([cb.JsonLog(log)], run).fit(resume=run)
    assert log.read_text(encoding="utf-8") == '{"mine": true}\n' * 200
    make([cb.JsonLog(log)], steps=2).fit()
    assert (tmp_path / "log-before-1.jsonl").read_text(encoding="utf-8") == '{"mine": true}\n' * 200
    with pytest.raises(InputError, match="cannot write the log"):
        make([cb.JsonLog(tmp_path)], steps=2).fit()
    log.unlink() # a lost log is begun anew
    make([cb.JsonLog(log)], run).fit(resume=run)
    assert json.loads(log.read_text(encoding="utf-8").splitlines()[0])["step"] == 7


def test_two_fits_of_one_trainer_share_a_log(tmp_path):
    log = tmp_path / "log.jsonl"
    run = make([cb.JsonLog(log), type("Stop", (Callback,), {"on_step_end": lambda self, t: cb._stop_if("pause" if t.step == 4 else None)})()])
    run.fit()
    run.fit()
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [r["step"] for r in rows if r["event"] == "step"] == list(range(1, 25)) and not list(tmp_path.glob("*before*"))


# early stopping


def expected_stop(losses, patience, min_delta):
    "An independent statement: where to stop, and the best until then."
    best, best_at = math.inf, -1
    for n, loss in enumerate(losses):
        if math.isnan(loss) or math.isinf(loss):
            return n, best_at
        if best - loss > min_delta:
            best, best_at = loss, n
        if n - best_at >= patience:
            return n, best_at
    return None, best_at


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 40).map(lambda n: n / 8), st.just(math.nan)), min_size=1, max_size=12),
       st.integers(1, 4), st.sampled_from([0.0, 0.125, 0.5]))
def test_early_stopping_by_definition(losses, patience, min_delta):
    stopper, stopped, still = cb.EarlyStopping(patience, min_delta=min_delta, restore_best=False), None, object()
    for n, loss in enumerate(losses):
        stopper = pickled(stopper, patience, min_delta) # resumed before every single score
        try:
            stopper.on_evaluated(still, HeldOutScore(n, n, loss, None))
        except StopTraining:
            stopped = n
            break
    assert (stopped, stopper.best_step) == expected_stop(losses, patience, min_delta)


def pickled(stopper, patience, min_delta):
    "As after a resume."
    fresh = cb.EarlyStopping(patience, min_delta=min_delta, restore_best=False)
    fresh.load_state_dict(stopper.state_dict())
    return fresh


class Worsen(Callback):
    "Spoil the weights a little more at each step from the tenth on."

    def on_step_end(self, trainer):
        if trainer.step >= 10:
            with torch.no_grad():
                trainer.model.embedding.weight.mul_(1.5)


def test_best_weights_are_a_copy_and_the_disk_is_left_alone(tmp_path):
    stopper = cb.EarlyStopping(patience=2)
    run = make([Worsen(), stopper], tmp_path, checkpoint_every=5, keep_last=1)
    run.fit()
    assert run.step < 24 and run.step == stopper.best_step + 10
    best, last = load_checkpoint(best_checkpoint(tmp_path)), load_checkpoint(next(tmp_path.glob(f"step-{run.step:09d}")))
    assert best["step"] == stopper.best_step
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, best["model"][name])
    assert not torch.equal(last["model"]["embedding.weight"], best["model"]["embedding.weight"])
    again = make([Worsen(), cb.EarlyStopping(patience=2)], tmp_path, seed=3, checkpoint_every=5, keep_last=1)
    again.fit(resume=tmp_path) # the same line again: nothing but the best weights
    assert again.step == run.step
    assert all(torch.equal(t, best["model"][n]) for n, t in again.model.state_dict().items())


def test_interrupted_runs_keep_their_last_weights(tmp_path):
    class Halt(Callback):
        def on_step_end(self, trainer):
            if trainer.step == 14:
                raise StopTraining("out of time")
    stopper = cb.EarlyStopping(patience=100)
    run = make([Worsen(), stopper, Halt()], tmp_path)
    run.fit()
    saved = load_checkpoint(tmp_path / "step-000000014")["model"]
    assert stopper.best_step < 14 and all(torch.equal(t, saved[n]) for n, t in run.model.state_dict().items())


@pytest.mark.parametrize("wrong", [{"patience": 0}, {"min_delta": -1}, {"min_delta": math.nan}, {"target": 2, "divergence": 1}, {"divergence": math.nan}])
def test_impossible_limits(wrong):
    with pytest.raises(InputError, match="make no sense"):
        cb.EarlyStopping(**wrong)


def test_a_stopper_without_scores_is_refused():
    with pytest.raises(InputError, match="no scores to judge by"):
        make([cb.EarlyStopping()], eval_every=0).fit()
    run = make()
    with pytest.raises(InputError, match="no scores to judge by"):
        Trainer(run.model, run.train_data, config=run.config, callbacks=[cb.EarlyStopping()]).fit()


# time


class Chorus(SingleProcess):
    "Two ranks; the other one votes as told."
    ranks = 1

    def __init__(self, rank=0, other=0.0):
        self.rank, self.other = rank, other

    def total(self, *numbers):
        return [number + self.other for number in numbers]


def test_one_vote_ends_the_run():
    limit, trainer = cb.TimeLimit(60), make()
    limit.on_fit_start(trainer)
    limit.on_step_end(trainer)
    trainer.strategy = Chorus(other=1.0)
    with pytest.raises(StopTraining, match="60 minutes"):
        limit.on_step_end(trainer)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.1, 20), min_size=1, max_size=30), st.floats(0.5, 2))
def test_time_limit_is_kept_if_steps_dont_grow(durations, minutes):
    now, trainer = [0.0], type("Still", (), {"strategy": SingleProcess()})()
    limit = cb.TimeLimit(minutes, clock=lambda: now[0])
    limit.on_fit_start(trainer)
    longest = 0.0
    for seconds in durations:
        now[0], longest = now[0] + seconds, max(longest, seconds)
        try:
            limit.on_step_end(trainer)
        except StopTraining:
            assert now[0] + longest > 60 * minutes # it didn't stop too early
            return
        assert now[0] + longest <= 60 * minutes # nor too late


def test_nonpositive_limits():
    for minutes in (0, -1, math.nan):
        with pytest.raises(InputError):
            cb.TimeLimit(minutes)


# the learning rate


def everything(model, data):
    return copy.deepcopy(model.state_dict()), data.state_dict(), random_state()


def same(a, b):
    return a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0]) and a[1] == b[1] \
        and all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in ((a[2][k], b[2][k]) for k in a[2]))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_find_lr_leaves_no_trace(kind):
    run = make(optimizer=kind)
    run.train_data.next_batch()
    random.random(), np.random.rand(), torch.rand(())
    before = everything(run.model, run.train_data)
    found = cb.find_lr(run.model, run.train_data, run.config, steps=40)
    assert same(before, everything(run.model, run.train_data))
    assert all(p.grad is None for p in run.model.parameters())
    assert found.config.lr == found.suggestion in found.lrs and list(found.lrs) == sorted(found.lrs)
    assert len(found.lrs) == len(found.losses) and all(map(math.isfinite, found.losses))
    assert np.allclose(np.diff(np.log(found.lrs)), math.log(10 / 1e-6) / 39)


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_find_lr_leaves_no_trace_when_it_fails(error):
    calls = iter(range(100))

    def loss(model, batch):
        if next(calls) == 7:
            raise error
        return next_token_sum(model, batch)
    run = make()
    before = everything(run.model, run.train_data)
    with pytest.raises(type(error)):
        cb.find_lr(run.model, run.train_data, run.config, loss=loss)
    assert same(before, everything(run.model, run.train_data))


def test_find_lr_scales_both_rates_and_stops_when_it_explodes():
    run = make(optimizer="muon", muon_lr=5e-2)
    seen = []

    def loss(model, batch):
        seen.append(1)
        return next_token_sum(model, batch)
    found = cb.find_lr(run.model, run.train_data, run.config, loss=loss, high=1e4)
    assert math.isclose(found.config.muon_lr / found.config.lr, 5.0) and len(seen) < 100
    assert found.config.replace(lr=run.config.lr, muon_lr=run.config.muon_lr) == run.config


def test_find_lr_refuses():
    run = make()
    for wrong in ({"low": 0}, {"low": 1, "high": 1}, {"steps": 5}, {"divergence": 1}):
        with pytest.raises(InputError, match="make no sense"):
            cb.find_lr(run.model, run.train_data, run.config, **wrong)
    with pytest.raises(InputError, match="never falls"):
        cb.find_lr(run.model, run.train_data, run.config, low=1e-9, high=1e-8, steps=40)
    with pytest.raises(InputError, match="never falls"):
        cb.find_lr(run.model, run.train_data, run.config, loss=lambda model, batch: next_token_sum(model, batch) * math.nan)


# texts, plots, curves, averages


def test_samples_depend_on_model_and_seed_alone():
    run = make()
    texts = []
    for _ in range(2):
        torch.rand(5)
        writer = cb.SampleText(TOKENIZER, ["It was", "the"], max_new_tokens=9)
        writer.on_fit_start(run)
        texts.append(writer.samples)
    assert texts[0] == texts[1] and [s.prompt for s in texts[0]] == ["It was", "the"]
    for wrong in ({"prompts": ""}, {"prompts": []}, {"prompts": ["a", ""]}, {"prompts": "a", "every": 0}):
        with pytest.raises(InputError, match="no prompt"):
            cb.SampleText(TOKENIZER, **wrong)
    with pytest.raises(InputError, match="can't write"):
        Trainer(nn.Linear(1, 1), run.train_data, callbacks=[cb.SampleText(TOKENIZER, "a")]).fit()


def test_live_loss_is_throttled_and_shows_the_history():
    figures = []
    run = make([cb.LiveLoss(seconds=3600, show=figures.append)])
    run.fit()
    assert len(figures) == 2 # the first step and the end
    twin = run.history.figure()
    for ours, theirs in zip(figures[-1].axes, twin.axes, strict=True):
        for a, b in zip(ours.get_lines(), theirs.get_lines(), strict=True):
            assert np.array_equal(a.get_xydata(), b.get_xydata())


def test_live_loss_survives_runs_with_hardly_a_usable_step():
    class Skip(Callback):
        def on_step_start(self, trainer):
            if trainer.step != 0:
                raise SkipStep("no")
    run = make([cb.LiveLoss(seconds=0, show=lambda figure: figure._repr_png_()), Skip()], steps=120, eval_every=0, checkpoint_every=0)
    run.fit()


def test_live_loss_outside_of_a_notebook_says_so(caplog):
    with caplog.at_level(logging.WARNING, logger="mmie"):
        make([cb.LiveLoss()], steps=2).fit()
    assert "no notebook" in caplog.text


def test_live_loss_leaves_one_picture_in_the_notebook(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_callbacks import cb, make\n"
    train = "run = make([cb.LiveLoss(seconds=0)])\n_ = run.fit()"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code), nbformat.v4.new_code_cell(train), nbformat.v4.new_code_cell("run.history.figure()")])
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown, twin = book.cells[1].outputs, book.cells[2].outputs
    assert [o.output_type for o in shown] == ["display_data"]
    assert shown[0].data["image/png"] == twin[0].data["image/png"] # to the last pixel


def test_other_ranks_write_nothing(tmp_path):
    run = make([cb.JsonLog(tmp_path / "log.jsonl"), cb.TensorBoard(tmp_path / "events"), cb.LiveLoss(show=lambda figure: 1 / 0)], steps=3)
    run.strategy, run.is_main = Chorus(rank=1), False
    run.fit()
    assert not list(tmp_path.iterdir())


def test_missing_tensorboard_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"mmie\[training\]"):
        cb.TensorBoard(tmp_path)
    monkeypatch.undo()
    with pytest.raises(InputError, match="writes nothing"):
        cb.TensorBoard(tmp_path, every=0)


def test_tensorboard_thinned_out(tmp_path):
    make([cb.TensorBoard(tmp_path / "events", every=4), cb.JsonLog(tmp_path / "log.jsonl")]).fit()
    assert [step for step, _ in told(tmp_path)[1]["train/loss"]] == [4, 8, 12, 16, 20, 24]


def test_average_is_the_unrolled_sum_and_skips_skipped_steps():
    class Tape(Callback):
        def __init__(self):
            self.weights = []

        def on_step_end(self, trainer):
            if math.isfinite(trainer.history.losses[-1]):
                self.weights.append([p.detach().double().clone() for p in trainer.model.parameters()])

        def on_step_start(self, trainer):
            if trainer.step % 3 == 1:
                raise SkipStep("no")
    tape, average = Tape(), cb.AveragedWeights(decay=0.6)
    make([tape, average]).fit()
    expected = tape.weights[0]
    for n, weights in enumerate(tape.weights[1:], 1):
        keep = min(0.6, (1 + n) / (10 + n))
        expected = [keep * e + (1 - keep) * w for e, w in zip(expected, weights, strict=True)]
    for ours, theirs in zip(average.model.parameters(), expected, strict=True):
        assert torch.allclose(ours.double(), theirs, atol=1e-6)


def test_average_takes_buffers_too():
    class Counting(Small):
        def __init__(self, *args):
            super().__init__(*args)
            self.register_buffer("count", torch.zeros((), dtype=torch.long))

        def forward(self, *args, **kwargs):
            self.count += self.training
            return super().forward(*args, **kwargs)
    run = make(steps=5)
    run = Trainer(Counting(run.model.config), run.train_data, None, run.config, [average := cb.AveragedWeights()])
    run.fit()
    assert average.model.count == run.model.count > 0


def test_average_refuses():
    with pytest.raises(InputError, match="no average yet"):
        cb.AveragedWeights().model # noqa: B018
    for decay in (0.0, 1.0, 2.0, math.nan):
        with pytest.raises(InputError, match="no average"):
            cb.AveragedWeights(decay)
    for callback in (cb.AveragedWeights(), cb.EarlyStopping()):
        run = make([callback])
        next(run.model.parameters()).full_tensor = None # as parameters have that are sharded
        with pytest.raises(InputError, match="cannot be copied whole"):
            run.fit()


RANKS = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_callbacks import *
from mmie.training.distributed import distributed
folder = Path(sys.argv[2])
with distributed("fsdp", device="cpu") as strategy:
    base = make(steps=8, device="cpu", eval_every=4)
    watchers = [cb.EarlyStopping(restore_best=False), cb.TimeLimit(5), cb.SampleText(TOKENIZER, "It was", every=4, max_new_tokens=6),
                cb.LiveLoss(show=lambda figure: None), cb.JsonLog(folder / "log.jsonl"), cb.TensorBoard(folder / "events")]
    run = Trainer(DecoderLM(base.model.config), base.train_data, base.valid_data, base.config, watchers, folder / "run", strategy=strategy)
    run.fit()
    print("wrote", run.step, [s.text for s in watchers[2].samples], flush=True)
    try:
        Trainer(DecoderLM(base.model.config), base.train_data, config=base.config, callbacks=[cb.EarlyStopping()], strategy=strategy).fit()
    except InputError as error:
        print("refused", error, flush=True)
"""


def test_two_ranks_with_sharded_weights(tmp_path):
    (tmp_path / "script.py").write_text(RANKS, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "script.py")]
    done = subprocess.run([*command, str(Path(__file__).parent), str(tmp_path)], capture_output=True, text=True, timeout=240, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    wrote = [line for line in done.stdout.splitlines() if line.startswith("wrote 8")]
    assert len(wrote) == 2 and wrote[0] == wrote[1] and done.stdout.count("cannot be copied whole") == 2
    rows, curves = told(tmp_path)
    assert [step for event, step, *_ in rows if event == "step"] == list(range(1, 9)) == [step for step, _ in curves["train/loss"]]


NAN = math.nan
MISTAKES = {
    "patience nan": lambda: cb.EarlyStopping(NAN), "patience None": lambda: cb.EarlyStopping(None), "patience a half": lambda: cb.EarlyStopping(1.5),
    "min_delta text": lambda: cb.EarlyStopping(min_delta="0"), "divergence nan": lambda: cb.EarlyStopping(divergence=NAN),
    "minutes None": lambda: cb.TimeLimit(None), "minutes text": lambda: cb.TimeLimit("5"), "minutes nan": lambda: cb.TimeLimit(NAN),
    "prompts None": lambda: cb.SampleText(TOKENIZER, None), "every half": lambda: cb.SampleText(TOKENIZER, "a", every=1.5),
    "temperature nan": lambda: cb.SampleText(TOKENIZER, "a", temperature=NAN), "no new token": lambda: cb.SampleText(TOKENIZER, "a", max_new_tokens=0),
    "seconds nan": lambda: cb.LiveLoss(NAN), "seconds None": lambda: cb.LiveLoss(None), "show 3": lambda: cb.LiveLoss(show=3),
    "points": lambda: cb.TensorBoard("x", every=0.5), "decay None": lambda: cb.AveragedWeights(None), "decay text": lambda: cb.AveragedWeights("0.9"),
    "low None": lambda: cb.find_lr(make().model, None, low=None), "high inf": lambda: cb.find_lr(make().model, None, high=math.inf),
    "steps half": lambda: cb.find_lr(make().model, None, steps=20.5),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence(mistake):
    with pytest.raises(InputError) as error:
        MISTAKES[mistake]()
    assert "\n" not in str(error.value)


def test_tensorboard_in_the_place_of_a_file(tmp_path):
    (tmp_path / "events").write_text("something else")
    with pytest.raises(InputError, match="cannot write there"):
        make([cb.TensorBoard(tmp_path / "events")]).fit()
    assert (tmp_path / "events").read_text() == "something else"
