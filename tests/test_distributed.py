"Two processes arrive where one would have: packed rows, other people's models, workers shot, signals, full disks."
import functools
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from mmie.core import InputError
from mmie.models.decoder import DecoderLM, ModelConfig, next_token_loss
from mmie.training.checkpoint import latest_checkpoint, load_checkpoint
from mmie.training.data import PackedDocuments, TokenFile
from mmie.training.distributed import (
    Launch,
    Replicated,
    Sharded,
    distributed,
    model_flops_utilization,
    peak_flops,
    sharding_units,
    training_flops,
)
from mmie.training.trainer import Callback, HeldOut, History, TrainConfig, Trainer, TrainingError

LIMIT = 100 # seconds for a launch, generous because machines are busy
CASES = ("packed", "hugging face", "recompute", "muon", "separate head", "frozen", "compiled")


def text() -> TokenFile: # 40 documents of 3 to 30 tokens, each ended by 0
    sizes = np.random.default_rng(0).integers(3, 31, 40)
    ends = sizes.cumsum()
    tokens = np.concatenate([np.append((start + 3 * np.arange(n - 1)) % 60 + 1, 0) for start, n in enumerate(sizes)])
    return TokenFile(tokens.astype("<u2"), ends, ends, 0, "made up")


class In16Bits(nn.Module):
    "Computes with rounded copies of a model's weights, in one process."
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: object, **options: object) -> torch.Tensor:
        rounded = {name: p.bfloat16() for name, p in self.model.named_parameters()}
        return functional_call(self.model, rounded, args, options) # type: ignore[no-any-return]


def model_for(case: str) -> nn.Module:
    torch.manual_seed(0)
    if case == "hugging face":
        from transformers import GPT2Config, GPT2LMHeadModel

        class Logits(GPT2LMHeadModel): # what the trainer's loss expects of a model
            def forward(self, ids): # type: ignore[no-untyped-def]
                return super().forward(ids, use_cache=False).logits
        config = GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        return Logits(config).double()
    shape = {"vocab_size": 61, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_length": 64, "tie_embeddings": case != "separate head"}
    model = DecoderLM(ModelConfig(**shape)).double()
    for name, p in model.named_parameters() if case == "frozen" else ():
        p.requires_grad_("blocks.0" not in name and "attention" not in name) # a whole block, and half of another one
    return In16Bits(model) if case == "in 16 bits" else model


class Accident(Callback):
    "Rank 0 is killed in step 5, the first time."
    def on_gradients(self, trainer: Trainer) -> None:
        if trainer.step == 5 and trainer.is_main and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            os.kill(os.getpid(), signal.SIGKILL)


class Poison(Callback):
    "The last rank's last weight is no number, after step 2."
    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == 2 and trainer.strategy.rank == trainer.strategy.ranks - 1:
            weight = next(p for name, p in trainer.model.named_parameters() if "o_proj" in name).detach()
            getattr(weight, "to_local", lambda: weight)().view(-1)[-1] = math.nan


class Started(Callback):
    "Says so."
    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.is_main and trainer.step == 3:
            print("go", flush=True) # noqa: T201


def train(kind: str, case: str, folder: str | None, steps: int = 8, how: str = "", dtype: torch.dtype | None = None) -> dict[str, object]:
    from mmie.training.data import EpochWindows
    tokens = text()
    source = PackedDocuments(tokens, 48, 5) if case in ("packed", "in 16 bits") else EpochWindows(tokens, 32, 5)
    config = TrainConfig(
        steps=steps, lr=1e-2, warmup=0, accumulate=2, device="cpu", precision="float32", eval_every=0 if how else 4,
        checkpoint_every=2 if how in ("", "accident", "undisturbed", "full", "poison") else 1000, recompute=case == "recompute",
        compile=case == "compiled" and "RANK" in os.environ, optimizer="muon" if case == "muon" else "adamw")
    callbacks: list[Callback] = {"accident": [Accident()], "endless": [Started()], "poison": [Poison()]}.get(how, []) # type: ignore[assignment]
    with distributed(kind, timeout=60, dtype=dtype) as strategy: # type: ignore[arg-type]
        trainer = Trainer(model_for(case), source, HeldOut(tokens, 32, batch_size=3), config, callbacks, folder, strategy=strategy)
        history = trainer.fit(resume=folder)
        weights = strategy.gather(trainer.model, trainer.optimizer)[0]
    return {"losses": history.losses, "norms": history.grad_norms, "held out": [e.loss for e in history.evaluations],
            "weights": {name: weight.detach() for name, weight in weights.items()}}


def torchrun(*words: object, ranks: int = 2, options: tuple[str, ...] = ()) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *options]
    return [*launcher, __file__, *map(str, words)]


def run(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(torchrun(*words, **options), capture_output=True, text=True, timeout=LIMIT, check=False, env=ENV) # type: ignore[arg-type]


ENV = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def close(ours: dict, reference: dict, tol: float) -> None:
    assert ours["weights"].keys() == reference["weights"].keys()
    for name, weight in reference["weights"].items():
        torch.testing.assert_close(ours["weights"][name], weight, atol=tol, rtol=tol)
    for key in ("losses", "norms", "held out"):
        assert ours[key] == pytest.approx(reference[key], abs=tol, rel=tol), key


def outcome(folder: Path) -> dict:
    state = load_checkpoint(latest_checkpoint(folder)) # type: ignore[arg-type]
    history = History.from_json(state["history"]) # type: ignore[arg-type]
    return {"losses": history.losses, "norms": history.grad_norms, "held out": [e.loss for e in history.evaluations], "weights": state["model"]}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_are_one(kind: str, tmp_path: Path) -> None:
    done = run("cases", kind, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for case in CASES:
        close(torch.load(tmp_path / f"{case}.pt"), train("ddp", case, None), 1e-10)
    if kind == "fsdp": # gathered in 16 bits: near, not equal, and nothing of it in the weights that are kept
        half, whole, reference = torch.load(tmp_path / "bf16.pt"), train("ddp", "packed", None), train("ddp", "in 16 bits", None)
        for key in ("losses", "norms"): # of the first step; later ones amplify the rounding of sums
            assert half[key][0] == pytest.approx(reference[key][0], abs=1e-3 if key == "norms" else 1e-4) # type: ignore[index]
            assert half[key][0] != whole[key][0] # type: ignore[index]
        assert {weight.dtype for weight in half["weights"].values()} == {torch.float64}
        assert any((weight != weight.bfloat16()).any() for weight in half["weights"].values())


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_weight_that_is_no_number_on_one_rank_is_not_saved(kind: str, tmp_path: Path) -> None:
    done = run("train", kind, "packed", tmp_path, 8, "poison")
    assert done.returncode != 0 and "the weights are not finite after step 2" in done.stderr
    assert latest_checkpoint(tmp_path) is None


def test_a_shot_worker_comes_back(tmp_path: Path) -> None:
    done = run("train", "fsdp", "packed", tmp_path / "shot", 8, "accident", options=("--max-restarts", "1"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert run("train", "fsdp", "packed", tmp_path / "whole", 8, "undisturbed").returncode == 0
    close(outcome(tmp_path / "shot"), outcome(tmp_path / "whole"), 0.0)
    assert done.stderr.count("Traceback") == 0 or "rank 1 lost the others" in done.stderr


def test_ctrl_c_saves_one_step_and_another_number_of_ranks_goes_on(tmp_path: Path) -> None:
    running = subprocess.Popen(torchrun("train", "ddp", "packed", tmp_path, 10**6, "endless"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=ENV, start_new_session=True)
    assert running.stdout is not None and running.stdout.readline() == "go\n"
    os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=LIMIT)
    assert running.returncode != 0 and "lost the others" not in said
    found = latest_checkpoint(tmp_path)
    assert found is not None, said[-3000:]
    state = load_checkpoint(found)
    step = int(state["step"]) # type: ignore[call-overload]
    assert step >= 3 and len(History.from_json(state["history"]).losses) == step # type: ignore[arg-type]
    resumed = train("ddp", "packed", str(tmp_path), steps=step + 2, how="alone")
    assert len(resumed["losses"]) == step + 2 # type: ignore[arg-type]


def test_a_full_disk_ends_everybody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    start = time.monotonic()
    done = run("train", "fsdp", "packed", tmp_path / "file", 8, "full")
    assert done.returncode != 0 and time.monotonic() - start < LIMIT
    assert "cannot save the checkpoint of step 2" in done.stderr
    assert len(re.findall(r"^Traceback", done.stderr, re.MULTILINE)) <= 3, done.stderr # rank 0's (with its cause) and the launcher's


@given(rank=st.integers(-2, 5), ranks=st.integers(1, 4), gone=st.sampled_from(["", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]))
def test_the_environment_is_whole_or_refused(rank: int, ranks: int, gone: str) -> None:
    told = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    told.pop(gone, None)
    if gone or not 0 <= rank < ranks:
        with pytest.raises(InputError):
            Launch.read(told)
    else:
        assert Launch.read(told) == Launch(rank, ranks, 0)


def test_devices_without_a_way_to_talk_are_refused() -> None:
    for strategy in (Replicated(Launch(0, 2, 0)), Sharded(Launch(0, 2, 0))):
        with pytest.raises(InputError, match="set device to cpu"):
            strategy.wrap(nn.Linear(2, 2), torch.device("mps"))


def test_devices_that_do_not_fit_the_connection_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(InputError, match="without their GPUs"):
            Replicated(Launch(0, 2, 0)).wrap(nn.Linear(2, 2), torch.device("cuda"))
        monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        with pytest.raises(InputError, match="cuda:1 belongs to another rank"):
            Sharded(Launch(0, 2, 0)).wrap(nn.Linear(2, 2), torch.device("cuda:1"))
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match="connected already"), distributed("fsdp", device="cpu"):
            pass
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("settings", "message"), [
    ({"kind": None}, "no strategy None"), ({"kind": "zero"}, "no strategy 'zero'"), ({"timeout": 0}, "timeout of 0"), ({"timeout": -1.0}, "timeout"),
    ({"timeout": math.nan}, "timeout of nan"), ({"timeout": math.inf}, "timeout of inf"), ({"timeout": "60"}, "timeout of '60'"),
    ({"kind": "fsdp", "dtype": torch.float16}, "float16"), ({"kind": "fsdp", "dtype": "bfloat16"}, "'bfloat16'"),
    ({"dtype": torch.bfloat16}, "replicas have no dtype"), ({"device": "cdua"}, "cuda"),
])
def test_settings_that_make_no_sense_are_refused_at_the_door(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        distributed(**settings)


@pytest.mark.parametrize("change", [{"LOCAL_RANK": "-1"}, {"LOCAL_RANK": "2"}, {"WORLD_SIZE": "2.0"}, {"MASTER_PORT": "0"}, {"MASTER_PORT": "99999"}])
def test_launchers_that_tell_nonsense(change: dict[str, str]) -> None:
    told = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    with pytest.raises(InputError, match=r"cannot be|no port|not a whole number"):
        Launch.read(told | change)
    with pytest.raises(InputError, match="no RANK, WORLD_SIZE"):
        Launch.read({"LOCAL_RANK": "1"})


@pytest.mark.parametrize(("error", "lost"), [
    (TrainingError("the training data failed (TimeoutError: timed out) at step 2 of 4"), False), (RuntimeError("Connection closed by peer"), True),
    (dist.DistBackendError("NCCL error"), True), (OSError("broken pipe"), False), (RuntimeError("shapes do not fit"), False),
])
def test_only_the_connections_own_errors_mean_that_others_are_lost(error: Exception, lost: bool) -> None:
    from mmie.training.distributed import _farewell
    reason = _farewell(error, Launch(0, 1, 0), dist.HashStore())
    assert (type(reason) is ConnectionError) == lost and (lost or reason is error)


def test_nonsense_about_speed_is_refused() -> None:
    config = ModelConfig(vocab_size=50, d_model=16, n_layers=1, n_heads=1, max_length=32)
    for length, rate, peak in [(0, 1.0, 1.0), (8, math.nan, 1.0), (8, -1.0, 1.0), (8, 1.0, math.nan), (8, 1.0, -1.0), (8, 1.0, math.inf)]:
        with pytest.raises(InputError):
            model_flops_utilization(config, length, rate, peak)
    for options in ({"size": 0}, {"dtype": torch.int64}, {"device": "gpu"}):
        with pytest.raises(InputError):
            peak_flops(**options) # type: ignore[arg-type]


def test_lists_of_lists_are_sharded_by_what_is_called() -> None:
    layers = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for _ in range(3)])
    assert sharding_units(nn.Sequential(layers)) == [part for layer in layers for part in layer] # type: ignore[attr-defined]


def test_units_are_the_outermost_blocks() -> None:
    gpt2 = model_for("hugging face")
    assert sharding_units(gpt2) == list(gpt2.transformer.h) # type: ignore[union-attr, arg-type]
    tied = nn.ModuleDict({"outside": nn.Linear(2, 2), "blocks": nn.ModuleList([nn.Linear(2, 2)])})
    tied["blocks"][0].weight = tied["outside"].weight # type: ignore[index, union-attr, assignment]
    with pytest.raises(InputError, match=r"outside\.weight"):
        sharding_units(tied)


@settings(deadline=None, max_examples=15)
@given(heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]), layers=st.integers(1, 3), length=st.integers(2, 20), tie=st.booleans(),
       mlp=st.sampled_from(["swiglu", "gelu"]))
def test_operations_are_counted_right(heads: tuple[int, int], layers: int, length: int, tie: bool, mlp: str) -> None:
    config = ModelConfig(vocab_size=50, d_model=16, n_layers=layers, n_heads=heads[0], n_kv_heads=heads[1], head_dim=6, max_length=32, mlp=mlp,
                         tie_embeddings=tie, attention_backend="reference")
    model, ids = DecoderLM(config), torch.randint(50, (3, length + 1))
    with FlopCounterMode(display=False) as counter:
        next_token_loss(model(ids[:, :-1]), ids[:, 1:]).backward()
    assert counter.get_total_flops() == training_flops(config, length) * 3 * length
    assert model_flops_utilization(config, length, 10.0, 10 * training_flops(config, length)) == pytest.approx(1.0)


if __name__ == "__main__": # what torchrun starts
    task, kind, *words = sys.argv[1:]
    torch.compile = functools.partial(torch.compile, backend="aot_eager") # type: ignore[assignment] # cut up as ever, but nothing to wait for
    if task == "train":
        train(kind, words[0], words[1], int(words[2]), words[3])
    else:
        for case in CASES:
            result = train(kind, case, None)
            if os.environ["RANK"] == "0":
                torch.save(result, Path(words[0]) / f"{case}.pt")
        if kind == "fsdp":
            result = train(kind, "packed", None, dtype=torch.bfloat16)
            if os.environ["RANK"] == "0":
                torch.save(result, Path(words[0]) / "bf16.pt")
