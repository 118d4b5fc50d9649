"""The trainer beyond what its chapter shows: ranks that really wait for each other, other batches and models, compiled runs, old checkpoints, SIGTERM."""
import functools
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmie.core import InputError
from mmie.models.decoder import DecoderLM, ModelConfig, next_token_loss
from mmie.models.encoder_decoder import EncoderDecoderConfig, EncoderDecoderLM
from mmie.training import trainer as module
from mmie.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from mmie.training.data import Batch, EpochWindows, TokenFile
from mmie.training.optim import NamedOptimizer
from mmie.training.trainer import (
    Callback, HeldOutScore, HeldOut, History, SingleProcess, SkipEpoch, StopTraining, TrainConfig, Trainer, TrainingError, add_gradients, balanced_loss, evaluate,
    next_token_sum, recomputing,
)

SHAPE = ModelConfig(vocab_size=64, d_model=16, n_layers=2, n_heads=2, hidden=32, max_length=32)


def decoder(seed: int = 0, **changes: object) -> DecoderLM:
    torch.manual_seed(seed)
    return DecoderLM(SHAPE.replace(**changes)).double()


def tokens(n: int = 1500) -> TokenFile:
    ids = np.random.default_rng(0).integers(0, 64, n).astype(np.uint8)
    return TokenFile(ids, np.array([n]), np.array([n]), 0, "numbers")


def source(batch_size: int = 5) -> EpochWindows:
    return EpochWindows(tokens(), length=16, batch_size=batch_size)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# Ranks as threads: nobody passes a meeting point alone, so a rank that leaves the common path is found out by a broken barrier.

class Meeting:
    "Where threads put something on a table, wait, and look at what the others put there."

    def __init__(self, ranks: int) -> None:
        self.table: list[object] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=60)

    def exchange(self, rank: int, thing: object) -> list[object]:
        self.table[rank] = thing
        self.barrier.wait()
        all_of_them = list(self.table)
        self.barrier.wait()
        return all_of_them


class Threads(SingleProcess):
    "One of several ranks that live in threads of this process, each with a whole model."

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.ranks, self.meeting = rank, len(meeting.table), meeting # type: ignore[misc]

    def rounds(self, n: int) -> int:
        return max(self.meeting.exchange(self.rank, n)) # type: ignore[type-var]

    def total(self, *numbers: float) -> list[float]:
        return [sum(column) for column in zip(*self.meeting.exchange(self.rank, numbers), strict=True)] # type: ignore[misc]

    def scope(self, module: nn.Module, last: bool) -> AbstractContextManager[object]:
        @contextmanager
        def exchanging():
            yield
            if last:
                mine = [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters()]
                everyone = self.meeting.exchange(self.rank, [g.clone() for g in mine])
                for p, *grads in zip(module.parameters(), *everyone, strict=True):
                    p.grad = functools.reduce(torch.add, grads)
        return exchanging()

    def gather(self, model: nn.Module, optimizer: NamedOptimizer) -> tuple[dict, dict]:
        self.meeting.exchange(self.rank, None) # everybody takes part
        return super().gather(model, optimizer)

    def wait(self) -> None:
        self.meeting.exchange(self.rank, None)


def on_ranks(ranks: int, work: Callable[[Threads], object]) -> list[object]: # result or exception of each
    meeting, results = Meeting(ranks), [None] * ranks

    def run(rank: int) -> None:
        try:
            results[rank] = work(Threads(rank, meeting))
        except BaseException as error:
            results[rank] = error
            if isinstance(error, threading.BrokenBarrierError):
                raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(("ranks", "batch_size"), [(2, 5), (3, 4), (3, 2), (2, 1)])
def test_ranks_equal_one_process(ranks: int, batch_size: int, tmp_path: Path) -> None:
    "Uneven rows, ranks without rows, several batches a step, evaluation with a last batch of one row."
    config = TrainConfig(steps=6, accumulate=2, eval_every=3, checkpoint_every=4, precision="float32", device="cpu")
    held_out = HeldOut(tokens(16 * 7), length=16, batch_size=3)

    def fit(strategy: Threads | None = None, folder: Path | None = None, steps: int = 6, resume: Path | None = None) -> Trainer:
        trainer = Trainer(deepcopy(start), source(batch_size), held_out, config.replace(steps=steps), folder=folder, strategy=strategy)
        trainer.fit(resume=resume)
        return trainer

    start = decoder() # made once: the random generator is shared by the threads
    alone = fit(folder=tmp_path / "alone")
    together = on_ranks(ranks, lambda strategy: fit(strategy, tmp_path / "together"))
    for trainer in together:
        assert isinstance(trainer, Trainer), trainer
        assert trainer.history.losses == pytest.approx(alone.history.losses, abs=1e-12)
        assert [e.loss for e in trainer.history.evaluations] == pytest.approx([e.loss for e in alone.history.evaluations], abs=1e-12)
        assert trainer.history.tokens == alone.history.tokens and torch.allclose(weights(trainer.model), weights(alone.model), atol=1e-9)
        assert trainer.is_main == (trainer.strategy.rank == 0)
    assert sorted(p.name for p in (tmp_path / "together").iterdir()) == sorted(p.name for p in (tmp_path / "alone").iterdir())
    longer = on_ranks(ranks + 1, lambda strategy: fit(strategy, steps=8, resume=tmp_path / "together")) # on another number of ranks
    wanted = fit(steps=8, resume=tmp_path / "alone")
    assert all(torch.allclose(weights(t.model), weights(wanted.model), atol=1e-9) for t in longer)


def test_one_ranks_trouble_is_everybodys(tmp_path: Path) -> None:
    config = TrainConfig(steps=4, precision="float32", device="cpu", min_bad=1, max_bad_share=0.3)

    def poisoned(model: nn.Module, batch: Batch) -> Tensor: # NaN where the first row of the whole batch is
        marked = (batch.inputs == first).all(1).any()
        return next_token_sum(model, batch) * (math.nan if marked else 1.0)

    first = source().next_batch().inputs[0]
    for error in on_ranks(2, lambda s: Trainer(decoder(), source(), config=config, loss=poisoned, strategy=s).fit()):
        assert isinstance(error, TrainingError) and "the loss is nan" in str(error)

    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    for error in on_ranks(2, lambda s: Trainer(decoder(), source(), config=config, folder=tmp_path / "file" / "x", strategy=s).fit()):
        assert isinstance(error, InputError) and "cannot save the checkpoint of step 4" in str(error) # before the first step

    class Moved(Callback): # the disk breaks later
        def on_step_end(self, trainer: Trainer) -> None:
            trainer.folder = tmp_path / "file" / "x"

    main, other = on_ranks(2, lambda s: Trainer(decoder(), source(), config=config, folder=tmp_path / "fine", callbacks=[Moved()], strategy=s).fit())
    assert isinstance(main, InputError) and "cannot save" in str(main)
    assert isinstance(other, TrainingError) and "rank 0" in str(other)

    def tight(model: nn.Module, batch: Batch) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    for error in on_ranks(2, lambda s: Trainer(decoder(), source(), config=config, loss=tight, strategy=s).fit()):
        assert isinstance(error, TrainingError) and "lower the batch size" in str(error)


def test_an_interrupt_of_one_rank_ends_all_at_the_same_step(tmp_path: Path) -> None:
    def fit(strategy: Threads) -> None:
        trainer = Trainer(decoder(), source(), config=TrainConfig(steps=9, device="cpu"), folder=tmp_path, strategy=strategy)
        interrupts = module._Interrupts()

        class Pressed(Callback):
            def on_gradients(self, trainer: Trainer) -> None:
                if trainer.step == 3 and strategy.rank == 1:
                    interrupts.received = signal.SIGTERM

        trainer.callbacks.append(Pressed())
        with module.training_mode(trainer.network):
            module._begin(trainer, None)
            module._run(trainer, interrupts)

    assert [error.code for error in on_ranks(2, fit)] == [143, 143]
    assert latest_checkpoint(tmp_path).name == "step-000000004"


# Other batches, other models

@dataclass(frozen=True, slots=True)
class Pairs:
    "What an encoder–decoder learns from: nothing the trainer has heard of."

    source: Tensor
    target: Tensor

    @property
    def n_tokens(self) -> int:
        return self.target[:, 1:].numel()

    def __len__(self) -> int:
        return len(self.source)

    def to(self, device: torch.device) -> "Pairs":
        return Pairs(self.source.to(device), self.target.to(device))

    def split(self, parts: int) -> "list[Pairs]":
        return [Pairs(*both) for both in zip(self.source.chunk(parts), self.target.chunk(parts), strict=True)]


def translation_sum(model: nn.Module, batch: Pairs) -> Tensor:
    return next_token_loss(model(batch.source, batch.target[:, :-1]), batch.target[:, 1:]) * batch.n_tokens


@dataclass
class Same:
    "One batch, for ever."

    batch: object
    given: int = 0

    def next_batch(self):
        self.given += 1
        return self.batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


def pairs() -> Pairs:
    g = torch.Generator().manual_seed(0)
    return Pairs(torch.randint(64, (4, 9), generator=g), torch.randint(64, (4, 7), generator=g))


def translator() -> EncoderDecoderLM:
    torch.manual_seed(0)
    return EncoderDecoderLM(EncoderDecoderConfig(vocab_size=64, d_model=16, n_heads=2, hidden=32, max_length=32, encoder_layers=2, decoder_layers=2)).double()


def grads(model: nn.Module, batch: object, loss: Callable) -> Tensor:
    model.zero_grad()
    add_gradients(model, [batch], loss)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_an_encoder_decoder_learns_recomputes_and_is_cut() -> None:
    config = TrainConfig(steps=5, lr=1e-2, precision="float32", device="cpu")
    losses = Trainer(translator(), Same(pairs()), config=config, loss=translation_sum).fit().losses
    assert losses[-1] < losses[0]
    again = Trainer(translator(), Same(pairs()), config=config.replace(recompute=True), loss=translation_sum)
    assert again.fit().losses == losses and "forward" not in vars(again.model.blocks[0])
    cut = Trainer(translator(), Same(pairs()), config=config, loss=translation_sum)
    cut.pieces = 3
    assert cut.fit().losses == pytest.approx(losses, abs=1e-12)


def test_recomputing_gives_the_blocks_back_whatever_happens() -> None:
    model, batch = translator(), pairs()
    wanted = grads(model, batch, translation_sum)
    with recomputing(model):
        assert grads(model, batch, translation_sum).equal(wanted)
    with pytest.raises(KeyError), recomputing(model):
        raise KeyError
    assert not any("forward" in vars(m) for m in model.modules())
    with recomputing(decoder()), torch.no_grad():
        pass


def huggingface() -> list[Callable[[], nn.Module]]:
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    gpt2 = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.1, **common)
    return [lambda: transformers.GPT2LMHeadModel(gpt2), lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, **common))]


def test_hugging_faces_models_recompute_dropout_included() -> None:
    from mmie.models.pretrained import HFCausalLM
    config = TrainConfig(steps=4, precision="float32", device="cpu")
    for build in huggingface():
        losses = []
        for recompute in (False, True):
            torch.manual_seed(0)
            trainer = Trainer(HFCausalLM(build()), source(), config=config.replace(recompute=recompute))
            losses.append(trainer.fit().losses)
            assert not trainer.model.model.is_gradient_checkpointing
        assert losses[0] == losses[1]


def test_a_compiled_run_is_the_plain_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    "Captured and differentiated by the compiler; without the slow last stage that writes machine code."
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    config = TrainConfig(steps=4, eval_every=2, precision="float32", device="cpu")
    held_out = HeldOut(tokens(100), length=16)
    plain = Trainer(decoder(), source(), held_out, config).fit()
    for recompute in (False, True):
        folder = tmp_path / str(recompute)
        compiled = Trainer(decoder(), source(), held_out, config.replace(compile=True, recompute=recompute), folder=folder)
        assert compiled.fit().losses == pytest.approx(plain.losses, abs=1e-12)
        assert [e.loss for e in compiled.history.evaluations] == pytest.approx([e.loss for e in plain.evaluations], abs=1e-12)
        saved = load_checkpoint(latest_checkpoint(folder))["model"]
        assert saved.keys() == decoder().state_dict().keys() # no trace of the compiler in the names


def test_balance_is_learned_but_not_measured() -> None:
    config = TrainConfig(steps=3, precision="float32", device="cpu")
    trainer = Trainer(decoder(experts=4), source(), HeldOut(tokens(100), length=16), config, loss=balanced_loss(0.1))
    history = trainer.fit()
    plain = evaluate(decoder(experts=4), HeldOut(tokens(100), length=16), precision="float32")
    assert history.evaluations[0].loss == plain[0]
    assert history.losses[0] > Trainer(decoder(experts=4), source(), config=config).fit().losses[0] + 0.1 # two mixtures, each at least 1


# Runs that go on

def test_a_checkpoint_of_an_older_trainer_is_resumed(tmp_path: Path) -> None:
    config = TrainConfig(steps=6, precision="float32", device="cpu")
    straight = Trainer(decoder(), source(), config=config).fit()
    Trainer(decoder(), source(), config=config, folder=tmp_path / "new", callbacks=[StopAt(3)]).fit()
    state = load_checkpoint(latest_checkpoint(tmp_path / "new"))
    for key in ("epoch", "loss_scale"):
        del state[key]
    for key in ("compile", "recompute"):
        del state["config"][key]
    history = module.json.loads(state["history"])
    del history["retried"]
    state["history"] = module.json.dumps(history)
    save_checkpoint(tmp_path / "old", state, step=3)
    resumed = Trainer(decoder(1), source(), config=config)
    assert resumed.fit(resume=tmp_path / "old").losses == straight.losses and resumed.history.retried == []


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            raise StopTraining


class Count(Callback):
    def __init__(self) -> None:
        self.epochs = [0, 0]

    def on_epoch_start(self, trainer: Trainer) -> None:
        self.epochs[0] += 1

    def on_epoch_end(self, trainer: Trainer) -> None:
        self.epochs[1] += 1

    def state_dict(self) -> dict:
        return {"epochs": list(self.epochs)}

    def load_state_dict(self, state: dict) -> None:
        self.epochs = list(state["epochs"])


@pytest.mark.parametrize("stop", range(1, 12))
def test_a_resumed_run_announces_each_epoch_once(stop: int, tmp_path: Path) -> None:
    config = TrainConfig(steps=12, device="cpu")
    rows = lambda: EpochWindows(tokens(100), length=16, batch_size=2) # noqa: E731
    straight = Count()
    Trainer(decoder(), rows(), config=config, callbacks=[straight]).fit()
    Trainer(decoder(), rows(), config=config, callbacks=[Count(), StopAt(stop)], folder=tmp_path).fit()
    resumed = Count()
    Trainer(decoder(), rows(), config=config, callbacks=[StopAt(99), resumed]).fit(resume=tmp_path) # another order, too
    assert resumed.epochs == straight.epochs and straight.epochs[0] == straight.epochs[1] > 2


def test_data_that_ends_is_named_and_the_run_goes_on_with_more(tmp_path: Path) -> None:
    class Ending(EpochWindows):
        def next_batch(self) -> Batch:
            if self.position >= 15:
                raise StopIteration
            return super().next_batch()

    config = TrainConfig(steps=6, accumulate=2, device="cpu", precision="float32")
    with pytest.raises(TrainingError, match="the training data ended at step 1 of 6"): # in the second batch of that step
        Trainer(decoder(), Ending(tokens(), 16, 5), config=config, folder=tmp_path).fit()
    assert Trainer(decoder(2), source(), config=config).fit(resume=tmp_path).losses == Trainer(decoder(), source(), config=config).fit().losses


def test_skipping_epochs_for_ever_is_still_a_run() -> None:
    class Never(Callback):
        def on_step_start(self, trainer: Trainer) -> None:
            raise SkipEpoch("not today")

    trainer = Trainer(decoder(), source(), config=TrainConfig(steps=4, device="cpu"), callbacks=[Never()])
    assert len(trainer.fit().skipped) == 4 and trainer.train_data.epoch == 4 and not trainer.history.bad_steps


def test_a_history_of_the_old_kind_is_read() -> None:
    old = module.json.loads(History(losses=[1.0]).to_json())
    del old["retried"]
    assert History.from_json(module.json.dumps(old)).losses == [1.0]


def test_a_history_is_drawn_and_summed_up_whatever_is_in_it() -> None:
    for losses in ([], [math.nan], [math.nan] * 200, [math.nan] * 199 + [2.0], [2.0] * 3 + [math.inf] * 300, [1.0] * 120):
        n = len(losses)
        history = History(losses, [10] * n, [0.1] * n, [1.0] * n, [0.0] * n, [0.0] * n)
        assert len(history.figure().axes) == 2
        assert math.isnan(history.wait_share) and math.isnan(history.tokens_per_second)
        back = History.from_json(history.to_json())
        assert back.to_json() == history.to_json() and repr(back.mean_loss()) == repr(history.mean_loss())
    assert History().bits_per_byte is None and math.isnan(History().mean_loss())
    assert HeldOutScore(0, 0, 5000.0, None).perplexity == math.inf and math.isnan(HeldOutScore(0, 0, math.nan, None).perplexity)
    assert HeldOutScore(0, 0, math.log(50), None).perplexity == pytest.approx(50)


def test_a_finished_run_has_nothing_to_announce(tmp_path: Path) -> None:
    config, seen = TrainConfig(steps=3, device="cpu"), []

    class Notes(Callback):
        def on_fit_start(self, trainer: Trainer) -> None: seen.append("fit_start")
        def on_epoch_start(self, trainer: Trainer) -> None: seen.append("epoch_start")
        def on_epoch_end(self, trainer: Trainer) -> None: seen.append("epoch_end")
        def on_fit_end(self, trainer: Trainer) -> None: seen.append("fit_end")

    for _ in range(2):
        Trainer(decoder(), source(), config=config, callbacks=[Notes()], folder=tmp_path).fit(resume=tmp_path)
    assert seen == ["fit_start", "epoch_start", "epoch_end", "fit_end", "fit_start", "fit_end"]


class Nothing:
    n_bytes = 1

    def batches(self):
        return iter(())


@pytest.mark.parametrize(("parts", "message"), [
    ({"model": None}, "model is a NoneType"),
    ({"train_data": [1, 2]}, "train_data is a list"),
    ({"valid_data": "folder"}, "valid_data is a str"),
    ({"config": {"steps": 3}}, "config is a dict"),
    ({"callbacks": Callback()}, "callbacks is a Callback"),
    ({"callbacks": [Callback]}, "not a callback"),
    ({"callbacks": [None]}, "not a callback"),
    ({"loss": None}, "loss is a NoneType"),
])
def test_parts_of_the_wrong_kind_are_refused_at_once(parts: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Trainer(**{"model": decoder(), "train_data": source()} | parts) # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [lambda m, b: 1.0, lambda m, b: torch.ones(()), lambda m, b: m(b.inputs).mean(-1)])
def test_a_loss_is_one_number_to_learn_from(loss: Callable) -> None:
    with pytest.raises(InputError, match="that cannot be learned from"):
        Trainer(decoder(), source(), config=TrainConfig(steps=1, device="cpu"), loss=loss).fit()
    with pytest.raises(InputError, match="no held-out data"):
        evaluate(decoder(), tokens()) # type: ignore[arg-type]
    for text in ("{", "[]", "null", '{"loss": []}'):
        with pytest.raises(InputError, match="no history"):
            History.from_json(text)


@pytest.mark.parametrize("numbers", [{"length": 0}, {"length": -1}, {"length": 8, "stride": 0}, {"length": 8, "stride": 9}, {"length": 8, "batch_size": 0}])
def test_impossible_windows_are_refused_at_once(numbers: dict[str, int]) -> None:
    with pytest.raises(InputError):
        HeldOut(tokens(), **numbers)


def test_evaluation_leaves_no_trace_and_needs_something_to_score() -> None:
    model = decoder()
    model.train().blocks[0].eval() # somebody froze a part of it
    before = [m.training for m in model.modules()]
    evaluate(model, HeldOut(tokens(100), length=16))
    assert [m.training for m in model.modules()] == before and {*before} == {True, False}
    with pytest.raises(InputError, match="no token to score"):
        evaluate(model, Nothing())
    with pytest.raises(InputError, match="resume is True"):
        Trainer(model, source()).fit(resume=True) # type: ignore[arg-type]


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from test_trainer import *
class Slow(Callback):
    def on_step_end(self, trainer):
        print(trainer.step, flush=True)
        time.sleep(0.05)
Trainer(decoder(), source(), config=TrainConfig(steps=10_000, device="cpu"), callbacks=[Slow()], folder={folder!r}).fit()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize(("number", "codes"), [(signal.SIGTERM, {143}), (signal.SIGINT, {-signal.SIGINT})]) # 130 to a shell
def test_a_scheduler_gets_its_exit_code_and_we_our_checkpoint(number: int, codes: set[int], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path)), encoding="utf-8")
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    time.sleep(0.1)
    process.send_signal(number)
    steps = [int(line) for line in process.stdout]
    assert process.wait(30) in codes
    assert load_checkpoint(latest_checkpoint(tmp_path))["step"] == (steps or [1])[-1]
