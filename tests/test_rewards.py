"""Reward models: the loss, padding, ownership of weights, training that resumes, files, and what is refused."""
import copy
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmie.constitutional.preferences import Preference, Scorer, make_preferences
from mmie.constitutional.rewards import (
    HeldOutRewards, RewardBatches, RewardModel, bradley_terry_loss, evaluate_rewards, load_reward_model, pad_right, preference_warnings,
    reward_loss, save_reward_model, shortcut_accuracy, split_preferences, train_reward_model,
)
from mmie.core import InputError
from mmie.models.decoder import DecoderLM, ModelConfig
from mmie.models.pretrained import HFCausalLM
from mmie.tokenization.base import ByteTokenizer
from mmie.tokenization.bpe import BPETokenizer
from mmie.training.finetune import ChatTemplate, jinja_template
from mmie.training.trainer import TrainConfig, evaluate

MARKS = ChatTemplate().special_tokens
LETTERS = ByteTokenizer(MARKS)
numbers = st.floats(-30, 30)


def language_model(seed: int = 0, **changes: object) -> DecoderLM:
    torch.manual_seed(seed)
    shape = {"vocab_size": LETTERS.vocab_size, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_length": 96} | changes
    return DecoderLM(ModelConfig(**shape))


def opinionated(seed: int = 0, **changes: object) -> RewardModel:
    model = RewardModel(language_model(seed, **changes), LETTERS)
    torch.nn.init.normal_(model.head.weight)
    return model


def pairs(n: int = 12) -> list[Preference]:
    return [Preference(f"q{i}", f"good {i}", f"bad {i} " + "x" * (i % 5), 1 - i / 40) for i in range(n)]


def settings_(steps: int, **changes: object) -> TrainConfig:
    return TrainConfig(**({"steps": steps, "lr": 1e-2, "precision": "float32", "device": "cpu"} | changes))


def hub() -> tuple[object, object]:
    transformers = pytest.importorskip("transformers")
    theirs = BPETokenizer.train(["Why is the sky blue? Because of scattering. " * 3], 280, special_tokens=MARKS).to_hf()
    theirs.chat_template = jinja_template(ChatTemplate())
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(theirs), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)), theirs


# ------------------------------------------------------------------------------------------------ the loss

@given(numbers, numbers, st.floats(0, 1), st.floats(0, 3))
def test_swapping_chosen_and_rejected_with_the_opposite_label_changes_nothing(a: float, b: float, p: float, margin: float) -> None:
    one, two, label = (torch.tensor([x], dtype=torch.float64) for x in (a, b, p))
    loss = bradley_terry_loss(one, two, probability=label, margin=margin)
    assert torch.allclose(loss, bradley_terry_loss(two, one, probability=1 - label, margin=margin), atol=1e-12)
    assert torch.allclose(loss, bradley_terry_loss(one + 100, two + 100, probability=label, margin=margin), atol=1e-9)
    assert loss >= -1e-12


@given(st.floats(0.02, 0.98))
def test_a_soft_label_is_learned_exactly(p: float) -> None:
    gap = torch.tensor([math.log(p / (1 - p))], dtype=torch.float64, requires_grad=True)
    label = torch.tensor([p], dtype=torch.float64)
    slope, = torch.autograd.grad(bradley_terry_loss(gap, torch.zeros(1), probability=label).sum(), gap)
    assert abs(slope.item()) < 1e-9


def test_the_loss_survives_extremes_and_has_its_gradient() -> None:
    r = torch.tensor([1e4, -1e4, 0.0], dtype=torch.float64, requires_grad=True)
    loss = bradley_terry_loss(r, -r)
    assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), r)[0].isfinite().all()
    a, b = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind()
    assert torch.autograd.gradcheck(lambda x, y: bradley_terry_loss(x, y, probability=torch.full((4,), 0.7), margin=0.3), (a, b))


# ------------------------------------------------------------------------------------------------ scores

texts = st.lists(st.text("abc ", max_size=30), min_size=1, max_size=6)


@given(texts, st.integers(1, 4))
@settings(deadline=None, max_examples=25)
def test_a_batch_gives_each_answer_what_it_would_get_alone(responses: list[str], batch_size: int) -> None:
    model = MODEL
    together = model.score(["why"] * len(responses), responses, batch_size)
    alone = torch.cat([model.score(["why"], [text]) for text in responses])
    assert torch.allclose(together, alone, atol=1e-5)


MODEL = opinionated()


@pytest.mark.parametrize("changes", [{"positions": "learned"}, {"positions": "alibi"}, {"attention": "linear", "positions": "none"},
                                     {"window": 4}, {"n_kv_heads": 1}, {"tie_embeddings": False}])
def test_filler_on_the_right_is_never_seen(changes: dict) -> None:
    model = opinionated(**changes)
    ids, last = pad_right([model.encode("why", "because")], 64)
    with torch.no_grad():
        assert torch.allclose(model(ids, last), model(ids[:, :int(last) + 1], last), atol=1e-5)
        assert torch.allclose(model(ids, last), model(ids.where(torch.arange(64) <= last, 7), last), atol=1e-5)


def test_half_precision_trunks_have_a_wide_head() -> None:
    model = RewardModel(language_model().bfloat16(), LETTERS)
    assert model.head.weight.dtype is torch.float32 and model.score(["a"], ["b"]).dtype is torch.float32
    assert RewardModel(language_model().double(), LETTERS).score(["a"], ["b"]).dtype is torch.float64


def test_a_long_prompt_loses_its_beginning_and_an_answer_never_anything() -> None:
    model = opinionated()
    ids = model.encode("x" * 500, "the answer")
    assert len(ids) == 96 and ids[-11:] == [*LETTERS.encode("the answer"), model.chat.end_ids[0]]
    assert model.score(["x" * 500], ["the answer"]).isfinite()
    with pytest.raises(InputError, match="does not fit"):
        model.score(["q"], ["y" * 500])


def test_nothing_and_nonsense() -> None:
    assert MODEL.score([], []).shape == (0,) and MODEL.score(["q"], [""]).isfinite()
    for bad in (("q", "a"), (["q"], ["a", "b"]), (["q"], [None])):
        with pytest.raises(InputError):
            MODEL.score(*bad)
    for bad in (torch.nn.Linear(2, 2), "mmie-tiny-base"):
        with pytest.raises(InputError):
            RewardModel(bad, LETTERS)


# ------------------------------------------------------------------------------------------------ whose weights

@pytest.mark.parametrize("kind", ["ours", "theirs", "wrapped"])
def test_no_weight_is_shared_and_training_leaves_the_policy_alone(kind: str) -> None:
    policy, words = (language_model(), LETTERS) if kind == "ours" else hub()
    source = HFCausalLM(policy) if kind == "wrapped" else policy
    before = copy.deepcopy(policy.state_dict())
    model = RewardModel(source, words)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert not own & {tensor.untyped_storage().data_ptr() for tensor in (*policy.parameters(), *policy.buffers())}
    train_reward_model(model, pairs(), settings_(3), batch_size=4)
    assert all(before[name].equal(tensor) for name, tensor in policy.state_dict().items())
    assert any(not p.equal(q) for p, q in zip(model.trunk.parameters(), RewardModel(source, words).trunk.parameters(), strict=True))


def test_frozen_policies_make_trainable_reward_models() -> None:
    policy = language_model(tie_embeddings=False).requires_grad_(False)
    model = RewardModel(policy, LETTERS)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["trunk.head.weight"]


# ------------------------------------------------------------------------------------------------ training

def test_the_first_loss_is_ln_2_and_the_last_one_is_lower() -> None:
    model, data = RewardModel(language_model(), LETTERS), [Preference(p.prompt, p.chosen, p.rejected) for p in pairs()]
    history = train_reward_model(model, data, settings_(40), valid=data, batch_size=4)
    assert history.evaluations[0].loss == pytest.approx(math.log(2), abs=1e-6) and history.evaluations[-1].loss < 0.3
    report = evaluate_rewards(model, data)
    assert report.right.rate > 0.9 and report.loss == pytest.approx(history.evaluations[-1].loss, rel=1e-3)


def test_held_out_pairs_are_all_scored_once_whatever_the_batch() -> None:
    data = pairs(11)
    losses = [evaluate(MODEL, HeldOutRewards(data, MODEL, size), loss=reward_loss, precision="float32")[0] for size in (1, 4, 100)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole = RewardModel(language_model(), LETTERS)
    train_reward_model(whole, pairs(), settings_(8, checkpoint_every=4), batch_size=4, folder=tmp_path / "whole")
    class Stop(Exception):
        pass
    from mmie.training.trainer import Callback
    class Kill(Callback):
        def on_step_end(self, trainer: object) -> None:
            if trainer.step == 6:
                raise Stop
    part = RewardModel(language_model(), LETTERS)
    with pytest.raises(Stop):
        train_reward_model(part, pairs(), settings_(8, checkpoint_every=4), batch_size=4, folder=tmp_path / "part", callbacks=[Kill()])
    again = RewardModel(language_model(), LETTERS)
    train_reward_model(again, pairs(), settings_(8, checkpoint_every=4), batch_size=4, folder=tmp_path / "part")
    assert all(p.equal(q) for p, q in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_batches_go_on_from_their_state_and_both_sides_stay_together() -> None:
    source, other = RewardBatches(pairs(), MODEL, batch_size=5), RewardBatches(pairs(), MODEL, batch_size=5)
    for _ in range(7):
        source.next_batch()
    other.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert source.next_batch().ids.equal(other.next_batch().ids)
    seen = RewardBatches(pairs(), MODEL, batch_size=5)
    rows = [row for _ in range(3) for row in seen.next_batch().probability.tolist()]
    assert sorted(rows) == sorted(p.probability for p in pairs())
    batch = source.next_batch()
    assert sum(len(part) for part in batch.split(3)) == len(batch) == batch.n_tokens
    for bad in ({"batch_size": 0}, {"seed": -1}, {"batch_size": 2.5}):
        with pytest.raises(InputError):
            RewardBatches(pairs(), MODEL, **bad)
    for empty in ([], pairs()[0], ["text"]):
        with pytest.raises(InputError, match="no preferences"):
            RewardBatches(empty, MODEL)


@given(st.integers(2, 30), st.floats(0.05, 0.95), st.integers(0, 5))
def test_a_prompt_is_never_on_both_sides(n: int, share: float, seed: int) -> None:
    data = [Preference(f"q{i % n}", f"a{i}", f"b{i}") for i in range(2 * n)]
    try:
        fit, held_out = split_preferences(data, share, seed)
    except InputError:
        assert round(share * n) in (0, n)
        return
    assert {p.prompt for p in fit}.isdisjoint(p.prompt for p in held_out) and len(fit) + len(held_out) == 2 * n
    assert (fit, held_out) == split_preferences(data[::1], share, seed)


# ------------------------------------------------------------------------------------------------ what is easy

def test_shortcuts_are_found_and_said(caplog: pytest.LogCaptureFixture) -> None:
    long = [Preference(f"q{i}", f"word{i} and more", f"other{i}") for i in range(200)]
    assert shortcut_accuracy(long)["the longer answer"].rate == 1 and "the longer answer" in preference_warnings(long)[0]
    says_no = [Preference(f"q{i}", "no thanks", f"sure {'x ' * (i % 3)}") for i in range(200)]
    assert any("begins with 'no'" in warning for warning in preference_warnings(says_no))
    both = [Preference(f"q{i}", *(("no thanks", "sure thing") if i % 2 else ("sure thing", "no thanks"))) for i in range(200)]
    assert preference_warnings(both) == []
    with caplog.at_level(logging.WARNING):
        train_reward_model(RewardModel(language_model(), LETTERS), long[:50], settings_(1))
    assert "by heart" in caplog.text and "longer" in caplog.text


def test_confidence_is_judged_with_sides_drawn_by_lot() -> None:
    data = [Preference(f"q{i}", f"a{i}", f"b{i}") for i in range(40)]
    report = evaluate_rewards(MODEL, data)
    assert report.right.total == 40 and 0 <= report.calibration.ece <= 1
    reverse = evaluate_rewards(MODEL, [Preference(p.prompt, p.rejected, p.chosen) for p in data])
    assert reverse.right.correct == 40 - report.right.correct
    with pytest.raises(InputError, match="better side"):
        evaluate_rewards(MODEL, [])


# ------------------------------------------------------------------------------------------------ files and other people's models

@pytest.mark.parametrize("kind", ["ours", "untied", "theirs"])
def test_what_was_saved_scores_the_same(kind: str, tmp_path: Path) -> None:
    source, words = hub() if kind == "theirs" else (language_model(tie_embeddings=kind == "ours"), LETTERS)
    model = RewardModel(source, words)
    torch.nn.init.normal_(model.head.weight)
    save_reward_model(model, tmp_path)
    again = load_reward_model(tmp_path)
    said = (["q"] * 3, ["", "a", "longer answer"])
    assert again.score(*said).equal(model.score(*said)) and not again.training
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    record = json.loads((tmp_path / "reward.json").read_text())
    for changed in ({"version": 2}, {"mmie": "decoder"}):
        (tmp_path / "reward.json").write_text(json.dumps(record | changed))
        with pytest.raises(InputError, match="another kind"):
            load_reward_model(tmp_path)
    (tmp_path / "reward.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        load_reward_model(tmp_path)
    with pytest.raises(InputError, match="no reward model"):
        load_reward_model(tmp_path / "nowhere")


def test_a_head_of_another_trunk_is_refused(tmp_path: Path) -> None:
    save_reward_model(opinionated(), tmp_path / "a")
    save_reward_model(opinionated(d_model=32), tmp_path / "b")
    (tmp_path / "a" / "head.safetensors").write_bytes((tmp_path / "b" / "head.safetensors").read_bytes())
    with pytest.raises(InputError, match="head of"):
        load_reward_model(tmp_path / "a")


def test_a_llama_scores_alone_as_in_company() -> None:
    llama, words = hub()
    model = RewardModel(llama, words)
    torch.nn.init.normal_(model.head.weight)
    said = ["", "a", "because of scattering", "b" * 20]
    alone = torch.cat([model.score(["why"], [text]) for text in said])
    assert torch.allclose(model.score(["why"] * 4, said), alone, atol=1e-5) and len(set(alone.tolist())) == 4


def test_a_reward_model_is_a_judge_too() -> None:
    class Says:
        def batch_generate(self, conversations, *, seed, openings, **options): return ["x" * (1 + s % 5) for s in seed]
    assert isinstance(MODEL, Scorer)
    made = make_preferences(Says(), [f"q{i}" for i in range(8)], MODEL, samples=4, min_probability=0.51)
    for pair in made.preferences:
        assert MODEL.score([pair.prompt], [pair.chosen]) > MODEL.score([pair.prompt], [pair.rejected])
