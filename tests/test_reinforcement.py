"""Reinforcement: advantages, losses and aggregation against slow arithmetic; runs that are killed, resumed, or given nonsense."""
import math
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmie.constitutional.reinforcement import (
    GRPOConfig, PolicyAndValue, PPOConfig, RLHistory, Rollouts, ValueModel, adapted_beta, aggregate, answer_logprobs, frontier_figure, gae,
    grpo_advantages, kl_estimates, laid_out, ppo_advantages, ppo_loss, rl_figure, token_weights, train_grpo, train_ppo, value_loss, whiten,
    write_answers,
)
from mmie.core import InputError
from mmie.models.decoder import DecoderLM, ModelConfig
from mmie.models.pretrained import HFCausalLM
from mmie.tokenization.base import WordTokenizer
from mmie.training.finetune import ChatTemplate, chat_format
from mmie.training.trainer import Callback, Trainer, TrainingError

patient = settings(max_examples=50, deadline=None)
TEMPLATE = ChatTemplate()
TOKENIZER = WordTokenizer.train(["one two three four five six ?"], 20, special_tokens=TEMPLATE.special_tokens)
CHAT = chat_format(TOKENIZER)
PROMPTS = ["one two ?", "three ?", "four five six ?", "two two ?", "six ?"]
SMALL = {"max_new_tokens": 6, "device": "cpu", "lr": 3e-3}


def tiny(seed: int = 0, **changes: object) -> DecoderLM:
    torch.manual_seed(seed)
    shape = {"vocab_size": TOKENIZER.vocab_size, "d_model": 16, "n_layers": 1, "n_heads": 2, "hidden": 32, "max_length": 24} | changes
    return DecoderLM(ModelConfig(**shape))


def twos(prompts: Sequence[str], answers: Sequence[str]) -> Tensor:
    return torch.tensor([float(answer.split().count("two")) for answer in answers])


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@st.composite
def ragged(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    rows, tokens, seed = draw(st.integers(1, 5)), draw(st.integers(1, 8)), draw(st.integers(0, 2**20))
    lengths = draw(st.lists(st.integers(1, tokens), min_size=rows, max_size=rows))
    rewards, values = torch.randn(2, rows, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rewards, values, torch.arange(tokens) < torch.tensor(lengths)[:, None]


share = st.floats(0, 1)


@patient
@given(ragged(), share, share)
def test_gae_is_the_loop(data: tuple[Tensor, Tensor, Tensor], gamma: float, lam: float) -> None:
    rewards, values, mask = data
    expected = torch.zeros_like(rewards)
    for row, n in enumerate(mask.sum(1).tolist()):
        ahead = 0.0
        for t in reversed(range(n)):
            after = float(values[row, t + 1]) if t + 1 < n else 0.0
            ahead = float(rewards[row, t]) + gamma * after - float(values[row, t]) + gamma * lam * ahead
            expected[row, t] = ahead
    torch.testing.assert_close(gae(rewards, values, mask, gamma=gamma, lam=lam), expected, rtol=0, atol=1e-12)


@patient
@given(ragged(), share)
def test_a_perfect_critic_leaves_nothing_to_explain(data: tuple[Tensor, Tensor, Tensor], lam: float) -> None:
    rewards, _, mask = data
    to_come = rewards.where(mask, 0.0).flip(1).cumsum(1).flip(1)
    assert gae(rewards, to_come, mask, lam=lam).abs().max() < 1e-12


@patient
@given(ragged(), share, share)
def test_what_stands_behind_the_end_changes_nothing(data: tuple[Tensor, Tensor, Tensor], gamma: float, lam: float) -> None:
    rewards, values, mask = data
    wild = [x.where(mask, 1e6) for x in (rewards, values)]
    assert torch.equal(gae(*wild, mask, gamma=gamma, lam=lam), gae(rewards, values, mask, gamma=gamma, lam=lam))
    for how in ("sequence", "token", "constant"):
        assert torch.equal(aggregate(wild[0], mask, how, 8), aggregate(rewards, mask, how, 8))
    assert torch.equal(whiten(wild[0], mask), whiten(rewards, mask))


@patient
@given(ragged())
def test_weights_of_tokens(data: tuple[Tensor, Tensor, Tensor]) -> None:
    losses, _, mask = data
    for how in ("sequence", "token"):
        assert math.isclose(float(token_weights(mask, how, dtype=torch.float64).sum()), 1.0)
    per_row = [losses[i][mask[i]] for i in range(len(mask))]
    wanted = {"sequence": sum(row.mean() for row in per_row) / len(per_row), "token": torch.cat(per_row).mean(),
              "constant": sum(row.sum() for row in per_row) / len(per_row) / 11}
    for how, value in wanted.items():
        torch.testing.assert_close(aggregate(losses, mask, how, 11), value)
    full = torch.ones_like(mask)
    torch.testing.assert_close(aggregate(losses, full, "sequence"), aggregate(losses, full, "token"))
    torch.testing.assert_close(aggregate(losses, full, "constant", mask.shape[1]), aggregate(losses, full, "token"))


@patient
@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 2**20), st.floats(-5, 5), st.floats(0.5, 4))
def test_groups_know_neither_offset_nor_scale(prompts: int, group: int, seed: int, offset: float, factor: float) -> None:
    rewards = torch.randn(prompts, group, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    plain = grpo_advantages(rewards, scale=False)
    torch.testing.assert_close(grpo_advantages(factor * rewards + offset, scale=False), factor * plain, rtol=0, atol=1e-10)
    torch.testing.assert_close(plain.sum(1), torch.zeros(prompts, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(grpo_advantages(rewards), plain / (rewards.std(1, keepdim=True) + 1e-4))
    assert not grpo_advantages(torch.full((prompts, group), offset)).abs().max() > 1e-2


@patient
@given(ragged(), st.floats(0.05, 0.5), st.floats(0.05, 0.9))
def test_clipping_only_ever_takes_away(data: tuple[Tensor, Tensor, Tensor], low: float, high: float) -> None:
    new, advantages, _ = data
    old = torch.zeros_like(new)
    clipped = ppo_loss(new, old, advantages, low, high)
    assert (clipped >= -(new.exp() * advantages) - 1e-12).all()
    inside = (new.exp() > 1 - low) & (new.exp() < 1 + high)
    torch.testing.assert_close(clipped[inside], -(new.exp() * advantages)[inside])
    assert torch.equal(ppo_loss(old, old, advantages), -advantages)


@patient
@given(ragged())
def test_estimates_of_divergence(data: tuple[Tensor, Tensor, Tensor]) -> None:
    p, q = (x.log_softmax(-1) for x in data[:2])
    k = kl_estimates(p, q)
    kl = (p.exp() * (p - q)).sum(-1)
    for estimate in (k.k1, k.k3):
        torch.testing.assert_close((p.exp() * estimate).sum(-1), kl)
    assert (k.k3 >= 0).all() and (k.k2 >= 0).all()
    torch.testing.assert_close(kl_estimates(p, p), type(k)(*[torch.zeros_like(p)] * 3))


@patient
@given(ragged(), st.floats(0.05, 1))
def test_value_loss_is_never_below_the_squared_error(data: tuple[Tensor, Tensor, Tensor], clip: float) -> None:
    values, returns, _ = data
    old = torch.zeros_like(values)
    squared = 0.5 * (values - returns).square()
    assert (value_loss(values, old, returns, clip) >= squared).all()
    torch.testing.assert_close(value_loss(values, values, returns, clip), squared)


def test_gradients_by_differences() -> None:
    torch.manual_seed(0)
    new, old, advantages, returns = torch.randn(4, 3, 5, dtype=torch.float64) * 0.5
    mask = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    new.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ppo_loss(x, old, advantages, 0.2, 0.3), new)
    assert torch.autograd.gradcheck(lambda x: tuple(kl_estimates(x, old)), new)
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, returns, 0.3), new)
    for how in ("sequence", "token", "constant"):
        assert torch.autograd.gradcheck(lambda x, how=how: aggregate(x, mask, how, 5), new)


def test_ppo_advantages_by_hand() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    old = torch.tensor([[-1.0, -2.0, -1.0], [-0.5, 7.0, 7.0]], dtype=torch.float64)
    reference = old - torch.tensor([[0.3, -0.1, 0.0], [1.0, 5.0, 5.0]], dtype=torch.float64)
    values = torch.tensor([[0.5, 0.4, 0.6], [0.1, 9.0, 9.0]], dtype=torch.float64)
    advantages, returns = ppo_advantages(torch.tensor([1.0, -1.0]), old, reference, values, mask, PPOConfig(lam=1.0), 0.1)
    torch.testing.assert_close(returns, torch.tensor([[0.98, 1.01, 1.0], [-1.1, 0, 0]], dtype=torch.float64))
    torch.testing.assert_close(advantages, whiten(returns - values, mask))
    assert not advantages[~mask].any()


def test_beta_follows_the_target() -> None:
    beta = 0.1
    for _ in range(50):
        beta = adapted_beta(beta, 9.0, 3.0)
    assert math.isclose(beta, 0.1 * 1.02**50)
    assert adapted_beta(0.1, 3.3, 3.0) == pytest.approx(0.101)


def test_the_whole_loss_of_ppo() -> None:
    model = PolicyAndValue(tiny()).double()
    torch.nn.init.normal_(model.value.head.weight)
    config = PPOConfig(prompts=5, epochs=2, minibatches=2, beta=0.1, value_weight=0.3, aggregate="sequence", **SMALL)
    source = Rollouts(model, tiny(1).double(), CHAT, PROMPTS, twos, config)
    from mmie.constitutional.reinforcement import _Learner
    learner, batch = _Learner(source), source.next_batch()
    with torch.no_grad(): # as if a step had been taken
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    total, n = 0.0, batch.mask.shape[1]
    for row in range(len(batch)):
        logits, values = model(batch.ids[row:row + 1])
        start, length = int(batch.starts[row]), int(batch.mask[row].sum())
        new, values = answer_logprobs(logits, batch.ids[row:row + 1], batch.starts[row:row + 1], n)[0].detach(), values.detach()
        each = 0.0
        for t in range(length):
            ratio, a = math.exp(float(new[0, t] - batch.old[row, t])), float(batch.advantages[row, t])
            v, before, wanted = float(values[0, start + t - 1]), float(batch.values[row, t]), float(batch.returns[row, t])
            near = min(max(v, before - 0.2), before + 0.2)
            each += -min(ratio * a, min(max(ratio, 0.8), 1.2) * a) + 0.3 * 0.5 * max((v - wanted) ** 2, (near - wanted) ** 2)
        total += each / length / len(batch)
    assert float(learner.loss(model, batch).detach() / batch.n_tokens) == pytest.approx(total, rel=1e-6)


def test_pieces_of_a_batch_are_the_batch() -> None:
    model, config = tiny().double(), GRPOConfig(prompts=3, group=4, aggregate="sequence", beta=0.2, **SMALL)
    source = Rollouts(model, tiny(1).double(), CHAT, PROMPTS, twos, config)
    from mmie.constitutional.reinforcement import _Learner
    learner, batch = _Learner(source), source.next_batch()
    whole = learner.loss(model, batch)
    parts = [learner.loss(model, part) for part in batch.split(5)]
    torch.testing.assert_close(sum(parts), whole)
    assert [len(part) for part in batch.split(5)] == [3, 3, 2, 2, 2]


def test_a_rollout_belongs_to_the_model_that_wrote_it() -> None:
    model, config = tiny(), GRPOConfig(prompts=4, group=2, temperature=0.7, **SMALL)
    source = Rollouts(model, tiny(1), CHAT, PROMPTS, twos, config)
    batch = source.next_batch()
    new, every = answer_logprobs(model(batch.ids), batch.ids, batch.starts, batch.mask.shape[1], 0.7)
    assert torch.equal(new[batch.mask], batch.old[batch.mask])
    torch.testing.assert_close(every.exp().sum(-1), torch.ones(batch.mask.shape))
    assert source.measured["kl"] > 0 and source.measured["length"] == float(batch.mask.sum(1).float().mean())
    assert torch.equal(source.next_batch().old[0], source.rollout.old[0]) and source.collected == 2


def test_the_end_mark_is_an_action() -> None:
    model = tiny()
    rows = write_answers(model, [CHAT.prompt([m]) for m in _asked(PROMPTS * 10)], CHAT.end_ids, max_new_tokens=6)
    assert all(CHAT.end_ids[0] not in row[:-1] and (len(row) == 6 or row[-1] == CHAT.end_ids[0]) for row in rows)
    assert any(row[-1] == CHAT.end_ids[0] for row in rows)
    ids, starts, mask = laid_out([[1, 2], [3]], [[4], [5, 6]], pad_id=9)
    assert ids.tolist() == [[1, 2, 4], [3, 5, 6]] and starts.tolist() == [2, 1] and mask.tolist() == [[True, False], [True, True]]


def _asked(texts: Sequence[str]) -> list:
    from mmie.training.finetune import Message
    return [Message("user", text) for text in texts]


class Stop(Callback):
    "Fail, or press Ctrl-C, after a number of steps."
    def __init__(self, step: int, kill: bool = False) -> None:
        self.step, self.kill = step, kill

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            if self.kill:
                signal.raise_signal(signal.SIGINT)
            else:
                raise OSError("power")


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 9), st.booleans(), st.booleans())
def test_a_killed_run_goes_on(tmp_path_factory: pytest.TempPathFactory, step: int, kill: bool, critic: bool) -> None:
    folder = tmp_path_factory.mktemp("runs")
    shared = {"steps": 10, "epochs": 2, "minibatches": 2, "checkpoint_every": 3, "target_kl": 0.1, **SMALL}
    train, config = (train_ppo, PPOConfig(prompts=8, **shared)) if critic else (train_grpo, GRPOConfig(prompts=3, group=4, **shared))
    whole, broken = tiny(), tiny()
    expected = train(whole, TOKENIZER, PROMPTS, twos, config, truth=twos)
    with pytest.raises(KeyboardInterrupt if kill else OSError):
        train(broken, TOKENIZER, PROMPTS, twos, config, folder, truth=twos, callbacks=[Stop(step, kill)])
    resumed = train(broken, TOKENIZER, PROMPTS, twos, config, folder, truth=twos)
    assert resumed.curves() == expected.curves() and same(whole, broken)
    again = tiny(5)
    assert train(again, TOKENIZER, PROMPTS, twos, config, folder, truth=twos).curves() == expected.curves() and same(again, whole)


def test_the_same_seed_gives_the_same_run_and_another_one_does_not() -> None:
    config, models = GRPOConfig(steps=3, prompts=4, group=2, **SMALL), [tiny() for _ in range(3)]
    runs = [train_grpo(model, TOKENIZER, PROMPTS, twos, config.replace(seed=seed)) for model, seed in zip(models, (0, 0, 1), strict=True)]
    assert runs[0].reward == runs[1].reward != runs[2].reward
    assert same(models[0], models[1]) and not same(models[0], models[2])


def test_each_prompt_comes_once_an_epoch() -> None:
    seen: list[str] = []

    def watch(prompts: Sequence[str], answers: Sequence[str]) -> Tensor:
        seen.extend(prompts)
        return torch.zeros(len(answers))

    train_grpo(tiny(), TOKENIZER, PROMPTS, watch, GRPOConfig(steps=5, prompts=3, group=2, **SMALL))
    assert len(seen) == 30 and all(seen[n] == seen[n + 1] for n in range(0, 30, 2))
    assert [sorted(seen[n:n + 10:2]) for n in (0, 10, 20)] == [sorted(PROMPTS)] * 3


@pytest.mark.parametrize("train", [train_grpo, train_ppo])
def test_it_learns(train: object) -> None:
    model = tiny()
    config = GRPOConfig(steps=40, prompts=8, group=8, beta=0.0, **SMALL) if train is train_grpo else PPOConfig(
        steps=80, prompts=64, minibatches=1, beta=0.0, **SMALL)
    history = train(model, TOKENIZER, PROMPTS, twos, config) # type: ignore[operator]
    assert np.mean(history.reward[-5:]) > 2 + np.mean(history.reward[:3]) and history.kl[-1] > history.kl[0] == 0
    assert len(history.reward) == 40 and all(math.isnan(x) for x in history.accuracy)


def test_nothing_is_learned_from_equal_grades() -> None:
    model, before = tiny(), tiny()
    train_grpo(model, TOKENIZER, PROMPTS, lambda p, a: torch.ones(len(a)), GRPOConfig(steps=3, prompts=2, group=3, beta=0.0, **SMALL))
    assert same(model, before)


def test_dropout_is_off_and_the_mode_comes_back() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    model = HFCausalLM(GPT2LMHeadModel(GPT2Config(vocab_size=TOKENIZER.vocab_size, n_positions=24, n_embd=16, n_layer=1, n_head=2,
                                                  resid_pdrop=0.5, bos_token_id=0, eos_token_id=0)))
    history = train_ppo(model, TOKENIZER, PROMPTS, twos, PPOConfig(steps=2, prompts=8, epochs=2, minibatches=1, lr=1e-9, max_new_tokens=6, device="cpu"))
    assert history.clipped == [0.0] and model.training
    assert ValueModel(model)(torch.ones(2, 3, dtype=torch.long)).shape == (2, 3)


def test_the_reference_stays_where_it_was(tmp_path: Path) -> None:
    model, folder = tiny(), tmp_path / "run"
    config = GRPOConfig(steps=4, prompts=4, group=4, checkpoint_every=2, **SMALL)
    train_grpo(model, TOKENIZER, PROMPTS, twos, config, folder)
    from mmie.constitutional.reinforcement import _reference
    assert same(_reference(model, folder), tiny()) and not same(model, tiny())
    assert not any(p.requires_grad for p in _reference(model, folder).parameters())


def test_mistakes_are_told_before_anything_is_learned(tmp_path: Path) -> None:
    model, one = tiny(), GRPOConfig(steps=1, prompts=2, group=2, **SMALL)
    for prompts, what in (([], "no prompts"), ("one ?", "no prompts"), ([1], "no prompts"), ([*PROMPTS, "one " * 30], r"prompts\[5\]")):
        with pytest.raises(InputError, match=what):
            train_grpo(model, TOKENIZER, prompts, twos, one)
    for reward, what in ((lambda p, a: torch.zeros(3), "shape"), (lambda p, a: torch.zeros(len(a), 1), "shape"),
                         (lambda p, a: torch.full((len(a),), math.nan), "nan"), (lambda p, a: None, "no numbers"),
                         (lambda p, a: [math.inf] * len(a), "inf")):
        with pytest.raises(InputError, match=what):
            train_grpo(model, TOKENIZER, PROMPTS, reward, one)
    for wrong in ({"group": 1}, {"prompts": 0}, {"temperature": 0}, {"ratio_clip": 1.5}, {"accumulate": 2}, {"aggregate": "mean"}):
        with pytest.raises(InputError):
            GRPOConfig(**wrong)
    with pytest.raises(InputError, match="room for 0"):
        train_grpo(model, TOKENIZER, PROMPTS, twos, GRPOConfig(max_new_tokens=24))
    with pytest.raises(InputError, match="critic"):
        ValueModel(torch.nn.Linear(2, 2))
    assert same(model, tiny())


def test_a_grader_that_crashes_leaves_a_checkpoint(tmp_path: Path) -> None:
    calls = []

    def crashes(prompts: Sequence[str], answers: Sequence[str]) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise ConnectionError("no grader")
        return twos(prompts, answers)

    config, model = GRPOConfig(steps=4, prompts=4, group=2, **SMALL), tiny()
    with pytest.raises(TrainingError, match="no grader"):
        train_grpo(model, TOKENIZER, PROMPTS, crashes, config, tmp_path / "run")
    history = train_grpo(model, TOKENIZER, PROMPTS, crashes, config, tmp_path / "run")
    whole = tiny()
    assert history.reward == train_grpo(whole, TOKENIZER, PROMPTS, twos, config).reward and same(model, whole)


def test_figures() -> None:
    history = RLHistory(*[[float(n) for n in range(9)] for _ in range(7)])
    assert len(history.figure().axes) == 6 and len(rl_figure({"a": history, "b": history}, ("kl", "reward")).axes) == 3
    assert len(frontier_figure({"a": history}).axes) == 2
    history.accuracy = [math.nan] * 9
    assert len(frontier_figure({"a": history}).axes) == 1


def test_trl_agrees() -> None:
    trl = pytest.importorskip("trl.trainer.utils")
    logits, ids = torch.randn(3, 7, 11), torch.randint(11, (3, 7))
    expected = trl.selective_log_softmax(logits[:, 1:4], ids[:, 2:5])
    torch.testing.assert_close(answer_logprobs(logits, ids, torch.full((3,), 2), 3)[0], expected)
