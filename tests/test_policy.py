"""Learning from comparisons: the losses beside TRL's, pairs that stay together, runs that survive a power cut."""
import copy
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from mmie.constitutional.policy import (
    ComparisonBatch, DPOConfig, PairStats, PreferenceBatches, PreferenceHistory, PreferenceObjective, PreferencePairs, dpo_loss,
    encode_preference, hinge_loss, ipo_loss, kl_optimum, kto_loss, pair_losses, sequence_logprobs, simpo_loss, target_logprobs, train_dpo,
)
from mmie.constitutional.preferences import Preference
from mmie.core import InputError
from mmie.models.decoder import IGNORE, DecoderLM, ModelConfig
from mmie.models.pretrained import HFCausalLM
from mmie.tokenization.base import WordTokenizer
from mmie.tokenization.bpe import BPETokenizer
from mmie.training.finetune import ChatTemplate, Dialogue, MarkedChat, QAPair, chat_format, collate, collate_packed
from mmie.training.lora import add_lora, use_lora
from mmie.training.trainer import Callback, Trainer, add_gradients

WORDS = ["how", "do", "i", "pick", "a", "lock", "?", "no", ".", "sure", "get", "it", "because", "hurts", "people", "!"]
TOKENIZER = WordTokenizer.train([" ".join(WORDS), *WORDS], 60, special_tokens=ChatTemplate().special_tokens)
CHAT = MarkedChat(TOKENIZER)
ASKED = [f"how do i {word} a lock ?" for word in ("pick", "get", "it", "no")]
PREFERENCES = [Preference(asked, "no . it hurts people", worse, p) for asked in ASKED for worse, p in (("sure !", 0.9), ("sure . get a lock", 1.0))]
QUICK = DPOConfig(steps=6, lr=3e-3, batch_size=3, precision="float32", device="cpu", checkpoint_every=2)
LOSSES = ("dpo", "ipo", "hinge", "simpo", "kto")


def tiny(seed: int = 0, **changes: object) -> DecoderLM:
    torch.manual_seed(seed)
    shape = {"vocab_size": TOKENIZER.vocab_size, "d_model": 16, "n_layers": 2, "n_heads": 2, "hidden": 32, "max_length": 48} | changes
    return DecoderLM(ModelConfig(**shape))


def four(n: int = 5, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return list((torch.randn(4, n, generator=random, dtype=torch.float64) * 3 - 15).requires_grad_(True).unbind())


def remembered(mismatched: bool = False, model: DecoderLM | None = None) -> PreferencePairs:
    return PreferencePairs(PREFERENCES, CHAT, max_length=48, mismatched=mismatched).remember(model or tiny().double())


nats = st.floats(-60, 0, allow_nan=False)
quads = st.lists(st.tuples(nats, nats, nats, nats), min_size=1, max_size=6).map(lambda rows: list(torch.tensor(rows, dtype=torch.float64).T))
chances = st.floats(0, 1, allow_nan=False)


@given(quads, st.floats(0.01, 3), chances)
@settings(max_examples=60, deadline=None)
def test_swapping_the_answers_is_swapping_the_verdict(quad: list[Tensor], beta: float, p: float) -> None:
    pc, pr, rc, rr = quad
    for loss in (dpo_loss, hinge_loss, ipo_loss):
        there, back = (loss(*x, beta=beta, probability=q) for x, q in (((pc, pr, rc, rr), p), ((pr, pc, rr, rc), 1 - p)))
        torch.testing.assert_close(there, back, rtol=1e-9, atol=1e-9)


@given(quads, st.floats(0.01, 3), st.floats(-30, 30))
@settings(max_examples=40, deadline=None)
def test_only_differences_count(quad: list[Tensor], beta: float, shift: float) -> None:
    pc, pr, rc, rr = quad
    for loss in (dpo_loss, hinge_loss, ipo_loss): # more probability for the policy's answers, or for all answers to a prompt
        torch.testing.assert_close(loss(pc + shift, pr + shift, rc, rr, beta=beta), loss(pc, pr, rc, rr, beta=beta), rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(loss(pc + shift, pr, rc + shift, rr, beta=beta), loss(pc, pr, rc, rr, beta=beta), rtol=1e-7, atol=1e-7)


@given(quads, st.floats(0.01, 3), chances, st.floats(0, 0.49))
@settings(max_examples=40, deadline=None)
def test_soft_labels_are_mixtures_of_sure_ones(quad: list[Tensor], beta: float, p: float, smoothing: float) -> None:
    pc, pr, rc, rr = quad
    sure, opposite = dpo_loss(pc, pr, rc, rr, beta=beta), dpo_loss(pr, pc, rr, rc, beta=beta)
    torch.testing.assert_close(dpo_loss(pc, pr, rc, rr, beta=beta, probability=p), p * sure + (1 - p) * opposite)
    smooth = dpo_loss(pc, pr, rc, rr, beta=beta, label_smoothing=smoothing)
    torch.testing.assert_close(smooth, (1 - smoothing) * sure + smoothing * opposite)


@given(st.lists(st.floats(-20, 0), min_size=2, max_size=6), st.floats(0.05, 10))
@settings(max_examples=40, deadline=None)
def test_the_optimum_earns_most(rewards: list[float], beta: float) -> None:
    reward = torch.tensor(rewards, dtype=torch.float64)
    reference = torch.randn(len(rewards), dtype=torch.float64).log_softmax(-1)
    best, other = kl_optimum(reference, reward, beta), torch.randn(len(rewards), dtype=torch.float64).log_softmax(-1)
    def earned(x: Tensor) -> Tensor:
        return (x.exp() * (reward - beta * (x - reference))).sum()
    assert earned(best) >= earned(other) - 1e-9
    shifted = kl_optimum(reference, reward + 7, beta)
    torch.testing.assert_close(shifted, best)


def test_extreme_margins_stay_finite() -> None:
    far = torch.tensor([1e4, -1e4], dtype=torch.float32, requires_grad=True)
    zero = torch.zeros(2)
    for loss in (dpo_loss(far, zero, zero, zero), kto_loss(far, zero, torch.tensor([True, False]), zero)):
        loss.sum().backward(retain_graph=True)
        assert loss.isfinite().all() and far.grad is not None and far.grad.isfinite().all()


def test_every_gradient() -> None:
    x, lengths = four(3), torch.tensor([3.0, 5, 7], dtype=torch.float64)
    def all_of(pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor) -> tuple[Tensor, ...]:
        return (dpo_loss(pc, pr, rc, rr, label_smoothing=0.1, nll_weight=0.5, chosen_lengths=lengths), ipo_loss(pc, pr, rc, rr, lengths, lengths + 1),
                hinge_loss(pc, pr, rc, rr), simpo_loss(pc, pr, lengths, lengths + 1), kto_loss(pc, rc, lengths > 4, pr.detach() - rr.detach()))
    assert torch.autograd.gradcheck(all_of, x)


@pytest.mark.parametrize("call, message", [
    (lambda x: dpo_loss(*x, beta=0), "beta is 0"), (lambda x: ipo_loss(*x, beta=-1), "beta is -1"), (lambda x: hinge_loss(*x, beta=math.nan), "beta is nan"),
    (lambda x: simpo_loss(x[0], x[1], x[2], x[3], beta=0), "beta is 0"), (lambda x: kl_optimum(x[0], x[1], 0), "beta is 0"),
    (lambda x: kto_loss(x[0], x[1], x[0] > 0, x[2], beta=0), "beta is 0"), (lambda x: dpo_loss(*x, probability=torch.full((5,), 2.0)), "no belief"),
    (lambda x: dpo_loss(*x, label_smoothing=0.7), "no belief"), (lambda x: ipo_loss(x[0][:2], *x[1:]), "not of the same pairs"),
    (lambda x: dpo_loss(*x, nll_weight=1.0), "chosen_lengths"), (lambda x: kto_loss(x[0], x[1], x[0] > 0, x[2][:0]), "no mismatched"),
])
def test_wrong_numbers_are_refused(call: Callable[[list[Tensor]], Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(four())


@given(st.lists(st.integers(0, len(PREFERENCES) - 1), min_size=1, max_size=5), st.integers(0, 9), st.integers(0, TOKENIZER.vocab_size - 1))
@settings(max_examples=25, deadline=None)
def test_filler_and_company_change_nothing(which: list[int], more: int, filler: int) -> None:
    model = tiny().double()
    rows = [CHAT.encode(Dialogue.of(QAPair(PREFERENCES[i].prompt, PREFERENCES[i].rejected)), 48)[0] for i in which]
    alone = torch.cat([sequence_logprobs(model, *(lambda b: (b.inputs, b.targets))(collate([row], 0))) for row in rows])
    together = collate(rows, filler)
    padded = sequence_logprobs(model, pad(together.inputs, (0, more), value=filler), pad(together.targets, (0, more), value=IGNORE))
    torch.testing.assert_close(padded, alone, rtol=1e-10, atol=1e-10)
    packed = collate_packed([rows[at:at + 2] for at in range(0, len(rows), 2)], filler)
    company = sequence_logprobs(model, packed.inputs, packed.targets, packed.documents)
    torch.testing.assert_close(company, alone, rtol=1e-10, atol=1e-10)


def test_logprobs_beside_a_loop_and_transformers() -> None:
    model = tiny()
    batch = collate([CHAT.encode(Dialogue.of(QAPair(p.prompt, p.chosen)), 48)[0] for p in PREFERENCES[:3]], 0)
    logits = model.to_hf()(batch.inputs).logits.log_softmax(-1)
    expected = torch.stack([sum((logits[i, t, target] for t, target in enumerate(row) if target != IGNORE), torch.zeros(()))
                            for i, row in enumerate(batch.targets.tolist())])
    torch.testing.assert_close(sequence_logprobs(model, batch.inputs, batch.targets), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sequence_logprobs(HFCausalLM(model.to_hf()), batch.inputs, batch.targets), expected, rtol=1e-5, atol=1e-5)
    assert target_logprobs(logits, torch.full_like(batch.targets, IGNORE)).eq(0).all()


@given(st.integers(0, 40), st.integers(1, 8), st.integers(1, 8), st.integers(12, 40))
@settings(max_examples=60, deadline=None)
def test_both_sides_answer_the_same_question(asked: int, better: int, worse: int, longest: int) -> None:
    preference = Preference("how " + "do " * asked, "no " * better, "get " * worse)
    pair = encode_preference(preference, CHAT, longest)
    n = pair.chosen.n_prompt
    assert pair.chosen.ids[:n] == pair.rejected.ids[:n] and pair.rejected.n_prompt == n
    assert max(len(pair.chosen.ids), len(pair.rejected.ids)) <= longest + 1
    for side in (pair.chosen, pair.rejected):
        assert side.spans == ((n, len(side.ids)),) and side.ids[-1] == CHAT.end_ids[0]


def test_pairs_that_cannot_be_learned_from() -> None:
    with pytest.raises(InputError, match="same tokens"):
        encode_preference(Preference("how", "klingon", "vulcan"), CHAT, 20) # both unknown words
    with pytest.raises(InputError, match="does not fit"):
        encode_preference(Preference("how", "no", "get " * 60), CHAT, 20)
    for nothing in ([], (), None, "pairs"):
        with pytest.raises(InputError):
            PreferencePairs(nothing, CHAT) # type: ignore[arg-type]
    with pytest.raises(InputError, match="same answer"):
        Preference("how", "no", "no")
    with pytest.raises(InputError, match="not known yet"):
        PreferenceBatches(PreferencePairs(PREFERENCES, CHAT))
    with pytest.raises(InputError, match="only one prompt"):
        PreferencePairs(PREFERENCES[:2], CHAT, mismatched=True)
    with pytest.raises(InputError, match="looks at 48"):
        train_dpo(tiny(), CHAT, PREFERENCES, QUICK.replace(max_length=64))
    with pytest.raises(InputError, match="nothing to compare"):
        train_dpo(tiny(), CHAT, [], QUICK)
    for wrong in ({"beta": 0}, {"beta": -1}, {"nll_weight": -1}, {"label_smoothing": 0.5}, {"loss": "ppo"}, {"batch_size": 0}, {"epochs": 0}):
        with pytest.raises(InputError):
            DPOConfig(**wrong)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_reference_is_where_learning_starts(loss: str) -> None:
    pairs = remembered(mismatched=True)
    start = pair_losses(pairs.reference, pairs.batch(range(8)), DPOConfig(loss=loss, nll_weight=0.0))
    expected = {"dpo": math.log(2), "hinge": 1.0, "kto": 0.5, "ipo": 25.0}
    if loss in expected:
        torch.testing.assert_close(start, torch.full_like(start, expected[loss]))
    assert start.isfinite().all()


@given(st.integers(1, 8), st.sampled_from(["dpo", "ipo", "hinge", "simpo"]))
@settings(max_examples=20, deadline=None)
def test_pieces_add_up(parts: int, loss: str) -> None:
    def gradients(batches: list[ComparisonBatch]) -> list[Tensor]:
        model = tiny(seed=1).double()
        add_gradients(model, batches, PreferenceObjective(DPOConfig(loss=loss)).loss)
        return [p.grad for p in model.parameters() if p.grad is not None]
    batch = remembered().batch(range(8))
    torch.testing.assert_close(gradients(batch.split(parts)), gradients([batch]), rtol=1e-9, atol=1e-12)


def test_trainer_accumulates_pairs_not_tokens() -> None:
    whole, parts = tiny(), tiny()
    config = QUICK.replace(steps=1, checkpoint_every=0, batch_size=8)
    train_dpo(whole, CHAT, PREFERENCES, config)
    pairs = PreferencePairs(PREFERENCES, CHAT, max_length=48).remember(parts)
    source, objective = PreferenceBatches(pairs, 8), PreferenceObjective(config)
    trainer = Trainer(parts, source, config=config, callbacks=[objective], loss=objective.loss)
    trainer.pieces = 3 # as after running out of memory
    trainer.fit()
    for a, b in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert objective.pairs[0].pairs == 8


class PowerCut(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_start(self, trainer: Trainer) -> None:
        if trainer.step == self.at:
            raise RuntimeError("the lights went out")


@pytest.mark.parametrize("loss", ["dpo", "kto"])
@pytest.mark.parametrize("same_object", [True, False])
def test_a_power_cut_leaves_no_trace(tmp_path: Path, loss: str, same_object: bool) -> None:
    config, valid = QUICK.replace(loss=loss, eval_every=2), PREFERENCES[:2] + PREFERENCES[6:]
    straight, cut = tiny(), tiny()
    expected = train_dpo(straight, CHAT, PREFERENCES, config, valid=valid)
    with pytest.raises(RuntimeError, match="lights"):
        train_dpo(cut, CHAT, PREFERENCES, config, tmp_path, valid=valid, callbacks=[PowerCut(5)])
    model = cut if same_object else tiny()
    history = train_dpo(model, CHAT, PREFERENCES, config, tmp_path, valid=valid)
    assert all(a.equal(b) for a, b in zip(model.parameters(), straight.parameters(), strict=True))
    assert history.pairs == expected.pairs and history.held_out == expected.held_out and history.losses == expected.losses
    assert PreferenceHistory.from_json(history.to_json()) == history
    again = train_dpo(model, CHAT, PREFERENCES, config, tmp_path, valid=valid) # a finished run stays as it is
    assert again.pairs == expected.pairs
    with pytest.raises(InputError, match="other pairs"):
        train_dpo(tiny(), CHAT, PREFERENCES[:4], config, tmp_path)


def test_a_lost_reference_is_not_made_up(tmp_path: Path) -> None:
    train_dpo(tiny(), CHAT, PREFERENCES, QUICK, tmp_path)
    (tmp_path / "reference.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="missing or damaged"):
        train_dpo(tiny(), CHAT, PREFERENCES, QUICK, tmp_path)
    (tmp_path / "reference.safetensors").unlink()
    with pytest.raises(InputError, match="missing or damaged"):
        train_dpo(tiny(), CHAT, PREFERENCES, QUICK, tmp_path)


def test_another_reference_is_noticed() -> None:
    source = PreferenceBatches(remembered(), 3)
    source.next_batch()
    state = source.state_dict()
    stranger = PreferenceBatches(remembered(model=tiny(seed=5, embedding_std=1.0).double()), 3)
    with pytest.raises(InputError, match="the reference gave"):
        stranger.load_state_dict(state)
    with pytest.raises(InputError, match="batch size"):
        PreferenceBatches(remembered(), 4).load_state_dict(state)


def test_epochs_count_batches() -> None:
    history = train_dpo(tiny(), CHAT, PREFERENCES, QUICK.replace(epochs=2, checkpoint_every=0))
    assert len(history.losses) == 6 and history.tokens[-1] == 16
    half = train_dpo(tiny(), CHAT, PREFERENCES, QUICK.replace(epochs=2, accumulate=2, checkpoint_every=0))
    assert len(half.losses) == 3 and half.tokens[-1] == 16


def test_an_unsure_judge_moves_nothing() -> None:
    model, before = tiny(), tiny()
    doubtful = [Preference(p.prompt, p.chosen, p.rejected, 0.5) for p in PREFERENCES]
    history = train_dpo(model, CHAT, doubtful, QUICK.replace(nll_weight=0.0, checkpoint_every=0))
    assert max(abs(s.margin) for s in history.pairs) < 0.02 and all(s.accuracy == 0.5 for s in history.pairs)
    assert all(torch.allclose(a, b, atol=2e-2) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_learning_and_what_is_written_down() -> None:
    model = tiny()
    history = train_dpo(model, CHAT, PREFERENCES, QUICK.replace(steps=40, lr=1e-2, checkpoint_every=0), valid=PREFERENCES, progress=True)
    last = history.held_out[-1]
    assert last.accuracy == 1 and last.margin > 1 and last.pairs == len(PREFERENCES) and last.step == 40
    fresh = PreferencePairs(PREFERENCES, CHAT, max_length=48).remember(model).reference.double().mean(0)
    torch.testing.assert_close(fresh, torch.tensor([last.chosen, last.rejected], dtype=torch.float64), rtol=1e-4, atol=1e-4)
    assert last.kl == -(last.chosen_shift + last.rejected_shift) / 2
    assert history.figure().axes[1].get_ylabel() == "change of ln π (nats)"
    assert isinstance(history.pairs[0], PairStats) and model.training


def test_only_the_adapter_learns() -> None:
    model = add_lora(tiny(), rank=2)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    train_dpo(model, CHAT, PREFERENCES, QUICK.replace(lr=2e-2, checkpoint_every=0))
    assert all(p.equal(base[name]) for name, p in model.named_parameters() if name in base)
    reference = PreferencePairs(PREFERENCES, CHAT, max_length=48).remember(tiny()).reference
    on, off = (PreferencePairs(PREFERENCES, CHAT, max_length=48).remember(use_lora(model, name)).reference for name in ("default", None))
    assert off.equal(reference) and not on.equal(reference)


def test_a_model_and_a_tokenizer_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    words = BPETokenizer.train(["how do i pick a lock? no. sure!"], 270, special_tokens=["<|im_start|>", "<|im_end|>"]).to_hf()
    words.chat_template = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
                           "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                     max_position_embeddings=96, attention_dropout=0.5)
    model = HFCausalLM(transformers.LlamaForCausalLM(shape))
    history = train_dpo(model, words, [Preference("how do i pick a lock?", "no.", "sure!"), Preference("how?", "no!", "sure.")],
                        QUICK.replace(steps=8, lr=1e-2, checkpoint_every=0, nll_weight=0.0))
    assert history.losses[0] == pytest.approx(math.log(2), abs=1e-5) # dropout is off, or it would be anything
    assert history.pairs[-1].accuracy == 1 and history.pairs[-1].margin > history.pairs[0].margin
    assert encode_preference(Preference("how?", "no!", "sure."), chat_format(words), 96).chosen.n_prompt > 3


def fake_trl(cls: type, logps: Tensor, **more: object) -> Callable[[dict], Tensor]:
    "TRL's loss on log-probabilities we choose: its trainers only ever see what a model returns."
    same = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x)
    metrics: dict = defaultdict(lambda: defaultdict(list))
    me = SimpleNamespace(model=SimpleNamespace(training=True), accelerator=same, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
                         f_divergence_type="reverse_kl", label_smoothing=0.0, use_weighting=False, loss_weights=[1.0], _metrics=metrics,
                         _total_train_tokens=0, _tp_size=1, **more)
    zeros = torch.zeros_like(logps)
    out = SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    return lambda inputs: cls._compute_loss(me, lambda **_: out, inputs, False) # type: ignore[attr-defined]


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "sft"])
def test_beside_trl(loss: str) -> None:
    dpo = pytest.importorskip("trl.trainer.dpo_trainer", exc_type=ImportError)
    if not hasattr(dpo.DPOTrainer, "_compute_loss"):
        pytest.skip("this version of trl computes its loss elsewhere")
    reference = remembered().reference
    model, batch = tiny(seed=1).double(), remembered().batch(range(8))
    inputs, targets = (x.transpose(0, 1).flatten(0, 1) for x in (batch.inputs, batch.targets)) # TRL: all chosen rows, then all rejected ones
    each = target_logprobs(model(inputs), targets)
    mask = pad((targets != IGNORE).long(), (1, 0))
    ids = torch.cat([inputs, torch.zeros(len(inputs), 1, dtype=torch.long)], 1)
    given_ = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask, "ref_chosen_logps": reference[:, 0],
              "ref_rejected_logps": reference[:, 1]}
    theirs = fake_trl(dpo.DPOTrainer, each, beta=0.3, loss_types=[loss])(given_)
    (pc, pr), (rc, rr), (lc, lr) = each.sum(-1).view(2, -1), reference.T, batch.lengths.T
    ours = {"sigmoid": dpo_loss(pc, pr, rc, rr, beta=0.3).mean(), "hinge": hinge_loss(pc, pr, rc, rr, beta=0.3).mean(),
            "ipo": ipo_loss(pc, pr, rc, rr, lc, lr, beta=0.3).mean(), "sft": -pc.sum() / lc.sum()}[loss] # theirs is an average over all tokens
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_kto_beside_trl() -> None:
    kto = pytest.importorskip("trl.trainer.kto_trainer", exc_type=ImportError)
    if not hasattr(kto.KTOTrainer, "_compute_loss"):
        pytest.skip("this version of trl computes its loss elsewhere")
    policy, reference, moved, stayed = four(6)
    label = torch.tensor([True, False, True, True, False, False])
    ids = torch.zeros(6, 2, dtype=torch.long)
    given_ = {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": torch.tensor([[0, 1]] * 6), "label": label, "ref_logps": reference,
              "ref_KL_logps": stayed}
    theirs = fake_trl(kto.KTOTrainer, policy[:, None], beta=0.3, loss_type="kto", calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.5,
                      _compute_kl_logps=lambda model, batch: moved)(given_)
    ours = kto_loss(policy, reference, label, moved - stayed, beta=0.3, down_weight=1.5)
    torch.testing.assert_close(ours.mean(), theirs, rtol=1e-6, atol=1e-8)


def test_simpo_and_smoothing_beside_the_formulas_in_trl() -> None:
    pc, pr, rc, rr = four()
    a, b = torch.arange(3.0, 8), torch.arange(8.0, 3, -1)
    logits, gamma = pc / a - pr / b, 0.7 # CPOTrainer.cpo_loss: averages, logits − γ/β
    cpo = -logsigmoid(2.5 * (logits - gamma / 2.5))
    torch.testing.assert_close(simpo_loss(pc, pr, a, b, beta=2.5, lead=gamma), cpo)
    h = 0.4 * ((pc - pr) - (rc - rr)) # DPOTrainer.dpo_loss of the versions before 1.0
    torch.testing.assert_close(dpo_loss(pc, pr, rc, rr, beta=0.4, label_smoothing=0.2), -logsigmoid(h) * 0.8 - logsigmoid(-h) * 0.2)


def test_a_copy_is_untouched_by_the_reference() -> None:
    model = tiny()
    twin = copy.deepcopy(model)
    PreferencePairs(PREFERENCES, CHAT).remember(model)
    assert model.training and all(a.equal(b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
