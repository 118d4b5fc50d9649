"Two processes arrive where one would have: packed rows, other people's models, workers shot, signals, full disks."
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
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmie.core import InputError
from mmie.models.decoder import DecoderLM, ModelConfig, next_token_loss
from mmie.training.checkpoint import latest_checkpoint, load_checkpoint
from mmie.training.data import PackedDocuments, TokenFile
from mmie.training.distributed import Launch, Replicated, Sharded, distributed, model_flops_utilization, sharding_units, training_flops
from mmie.training.trainer import Callback, HeldOut, History, TrainConfig, Trainer

LIMIT = 100 # seconds for a launch, generous because machines are busy
CASES = ("packed", "hugging face", "recompute", "muon", "separate head")


def text() -> TokenFile: # 40 documents of 3 to 30 tokens, each ended by 0
    sizes = np.random.default_rng(0).integers(3, 31, 40)
    ends = sizes.cumsum()
    tokens = np.concatenate([np.append((start + 3 * np.arange(n - 1)) % 60 + 1, 0) for start, n in enumerate(sizes)])
    return TokenFile(tokens.astype("<u2"), ends, ends, 0, "made up")


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
    return DecoderLM(ModelConfig(**shape)).double()


class Accident(Callback):
    "Rank 0 is killed in step 5, the first time."
    def on_gradients(self, trainer: Trainer) -> None:
        if trainer.step == 5 and trainer.is_main and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            os.kill(os.getpid(), signal.SIGKILL)


class Started(Callback):
    "Says so."
    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.is_main and trainer.step == 3:
            print("go", flush=True) # noqa: T201


def train(kind: str, case: str, folder: str | None, steps: int = 8, how: str = "") -> dict[str, object]:
    from mmie.training.data import EpochWindows
    tokens = text()
    source = PackedDocuments(tokens, 48, 5) if case == "packed" else EpochWindows(tokens, 32, 5)
    config = TrainConfig(
        steps=steps, lr=1e-2, warmup=0, accumulate=2, device="cpu", precision="float32", eval_every=0 if how else 4,
        checkpoint_every=2 if how in ("", "accident", "undisturbed", "full") else 1000, recompute=case == "recompute",
        optimizer="muon" if case == "muon" else "adamw")
    callbacks = {"accident": [Accident()], "endless": [Started()]}.get(how, [])
    with distributed(kind, timeout=60) as strategy: # type: ignore[arg-type]
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
    if task == "train":
        train(kind, words[0], words[1], int(words[2]), words[3])
    else:
        for case in CASES:
            result = train(kind, case, None)
            if os.environ["RANK"] == "0":
                torch.save(result, Path(words[0]) / f"{case}.pt")
