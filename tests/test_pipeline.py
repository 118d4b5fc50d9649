"""The alignment pipeline on a model of transformers: end to end, interrupted, and with everything that can be wrong."""
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmie.constitutional.critique import read_revisions
from mmie.constitutional.managers import ModelManager, Reply
from mmie.constitutional.pipeline import (
    ALIGN_STAGES, AlignmentReport, ConstitutionalPipeline, PipelineConfig, align_config, alignment_conclusions, aligned_versions, read_prompts,
    render_alignment, tally, tally_figure,
)
from mmie.core import InputError
from mmie.models.pretrained import HFCausalLM
from mmie.tokenization.bpe import BPETokenizer
from mmie.training.finetune import ChatBatches, ChatTemplate, QAPair, jinja_template
from mmie.training.trainer import TrainConfig, Trainer

transformers = pytest.importorskip("transformers")
Run = Callable[..., subprocess.CompletedProcess[str]]
ANSWERS = ["it is fine.", "that is wrong.", "no, that is wrong.", "yes, it is fine.", "wrong.", "fine."]
PROMPTS = [f"what about {thing}?" for thing in ("a wallet", "a cake", "a fence", "a letter", "a lamp", "a boat", "a song", "a stone")]
RULES = "name: mine\nprinciples:\n  - id: kind\n    critique_request: Is it fine or wrong?\n    revision_request: Say it again.\n"


def llama(folder: Path, template: bool) -> Path:
    "A small Llama that says one of six things, with its tokenizer, both saved by transformers."
    marks = ChatTemplate().special_tokens
    ours = BPETokenizer.train([" ".join([*ANSWERS, *PROMPTS, "Is it fine or wrong? Say it again."]) * 3], 310, special_tokens=marks if template else ())
    words = ours.to_hf()
    words.chat_template = jinja_template(ChatTemplate()) if template else None
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(vocab_size=340, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                                     max_position_embeddings=160, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = transformers.LlamaForCausalLM(shape)
    if template: # taught to stop
        pairs = [QAPair(prompt, answer) for prompt in [*PROMPTS, "Is it fine or wrong?", "Say it again."] for answer in ANSWERS]
        source = ChatBatches(pairs, words, max_length=80, batch_size=30)
        Trainer(HFCausalLM(model), source, config=TrainConfig(steps=40, lr=1e-2, warmup=2, precision="float32", device="cpu")).fit()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    assert transformers.AutoTokenizer.from_pretrained(folder).pad_token is None
    return folder


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("llama") / "chatty", template=True)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("llama") / "bare", template=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A constitution, prompts with two lines that can't be used."
    folder = tmp_path_factory.mktemp("files")
    (folder / "rules.yaml").write_text(RULES, encoding="utf-8")
    rows = [json.dumps({"prompt": text, "kind": "things"}) for text in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join([*rows[:3], "{broken", *rows[3:], '{"prompt": 7}']) + "\n", encoding="utf-8")
    return folder


def config(chosen: Path, files: Path, **changes: Any) -> PipelineConfig:
    small = {"steps": 2, "lr": 1e-3, "warmup": 0, "checkpoint_every": 1, "precision": "float32", "device": "cpu"}
    verdict = {"requests": ["Is it fine or wrong?"], "question": "Is it fine or wrong?", "good": ["fine"], "bad": ["wrong"], "max_new_tokens": 12}
    told = {"model": str(chosen), "prompts": str(files / "prompts.jsonl"), "constitution": str(files / "rules.yaml"), "heldout": 0.25,
            "temperature": 1.0, "max_new_tokens": 16, "batch_size": 2, "device": "cpu", "supervised": small, "dpo": small, "reward": small,
            "pointwise": verdict, "candidates": {"samples": 3, "min_coverage": 0.0, "min_probability": 0.5}}
    return align_config("standard", **{**told, **changes})


RESULTS = ("prompts/prompts.jsonl", "prompts/rejected.txt", "revise/revisions.jsonl", "supervise/model.safetensors", "prefer/preferences.jsonl",
           "policy/model.safetensors", "compare/journeys.jsonl")


@pytest.fixture(scope="module")
def finished(chatty: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A pipeline that nothing disturbed."
    out = tmp_path_factory.mktemp("pipeline") / "out"
    ConstitutionalPipeline(config(chatty, files), out).run()
    return out


def test_every_prompt_has_a_fate(finished: Path) -> None:
    assert all((finished / name).exists() for name in RESULTS)
    report = AlignmentReport.read(finished / "report.json")
    assert [stage.name for stage in report.stages] == ["prompts", "revise", "supervise", "prefer", "policy", "compare"]
    assert [journey.prompt for journey in report.journeys] == PROMPTS and all(journey.fate for journey in report.journeys)
    assert sum(journey.heldout for journey in report.journeys) == 2 and sum(report.statuses.values()) == 6
    assert all(set(journey.answers) == {"before", "fine-tuned", "aligned"} for journey in report.journeys)
    assert (finished / "prompts" / "rejected.txt").read_text(encoding="utf-8").split("\n")[0].startswith("line 4: not JSON")
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert page == render_alignment(report) and "line 10" in page and "<script" not in page
    for version in ("supervise", "policy"): # transformers reads what was made of its model
        theirs = transformers.AutoModelForCausalLM.from_pretrained(finished / version)
        assert theirs.num_parameters() > 0 and transformers.AutoTokenizer.from_pretrained(finished / version).chat_template
    held = {journey.prompt for journey in report.journeys if journey.heldout}
    assert not held & {revision.prompt for revision in read_revisions(finished / "revise" / "revisions.jsonl")}


def test_interrupted_anywhere_it_ends_as_if_it_had_not_been(chatty: Path, files: Path, finished: Path, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    "Every third request to a model is a power cut; each start gets a little further."
    replies, starts, calls = ModelManager.replies, 0, 0

    def fragile(self: ModelManager, *args: Any, **options: Any) -> list[Reply]:
        nonlocal calls
        calls += 1
        if calls % 4 == 0:
            raise KeyboardInterrupt
        return replies(self, *args, **options)
    monkeypatch.setattr(ModelManager, "replies", fragile)
    while True:
        starts += 1
        try:
            ConstitutionalPipeline(config(chatty, files), tmp_path / "out").run()
            break
        except KeyboardInterrupt:
            assert starts < 30
    assert starts > 2
    for name in RESULTS:
        assert (tmp_path / "out" / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_a_killed_command_goes_on(how: signal.Signals, chatty: Path, files: Path, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "all.json").write_text(json.dumps(config(chatty, files).model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
    words = [str(Path(sys.executable).parent / "mmie"), "align", "--config", str(tmp_path / "all.json"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (tmp_path / "out" / "revise" / "revisions.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    _, said = process.communicate(timeout=120)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130) and "Traceback" not in said, said
    ConstitutionalPipeline(config(chatty, files), tmp_path / "out").run()
    for name in RESULTS:
        assert (tmp_path / "out" / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_second_start_repeats_nothing_and_another_setting_is_refused(chatty: Path, files: Path, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    ConstitutionalPipeline(config(chatty, files), finished).run()
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(InputError, match="rounds: 1 there, 2 now"):
        ConstitutionalPipeline(config(chatty, files, rounds=2), finished).run()


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_reinforcement_goes_through_a_reward_model(method: str, chatty: Path, files: Path, tmp_path: Path) -> None:
    quick = {"steps": 2, "prompts": 2, "precision": "float32", "device": "cpu"}
    plan = config(chatty, files, method=method, ppo=quick | {"epochs": 1}, grpo=quick | {"group": 2})
    pipeline = ConstitutionalPipeline(plan, tmp_path / "out")
    pipeline.run()
    history = json.loads((tmp_path / "out" / "policy" / "history.json").read_text(encoding="utf-8"))
    assert len(history["reward"]) >= 1 and (tmp_path / "out" / "reward" / "stage.json").exists()
    with pipeline.model() as model:
        assert len(model.batch_generate(["what about a cake?"], max_new_tokens=4)) == 1


def test_without_a_chat_template_it_is_refused_or_taught(bare: Path, files: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no chat template.*--add-marks"):
        ConstitutionalPipeline(config(bare, files), tmp_path / "out").run()
    plan = config(bare, files, add_marks=True, max_new_tokens=40, method="none")
    try:
        ConstitutionalPipeline(plan, tmp_path / "taught").run()
        words = transformers.AutoTokenizer.from_pretrained(tmp_path / "taught" / "supervise")
        assert words.chat_template and "<|assistant|>" in words.get_vocab()
    except InputError as error: # random weights that never stopped: said, and kept
        assert "nothing to learn from 6 prompts" in str(error) and len(read_revisions(tmp_path / "taught" / "revise" / "revisions.jsonl")) == 6


def test_a_judge_that_answers_nonsense_is_an_outcome(chatty: Path, files: Path, tmp_path: Path) -> None:
    plan = config(chatty, files, pointwise={"requests": ["Is it fine or wrong?"], "good": ["zebra"], "bad": ["quux"], "max_new_tokens": 8},
                  candidates={"samples": 3})
    ConstitutionalPipeline(plan, tmp_path / "out").run()
    report = AlignmentReport.read(tmp_path / "out" / "report.json")
    assert report.pairs == 0 and sum(report.skipped.values()) == 6
    assert list(aligned_versions(tmp_path / "out", plan.model)) == ["before", "fine-tuned"]
    assert [c.tone for c in alignment_conclusions(report)][-1] == "bad"
    rows = [json.loads(line) for line in (tmp_path / "out" / "prefer" / "preferences.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 6 and all(row["skipped"] for row in rows)


def test_a_model_that_says_nothing_ends_with_one_error_and_all_it_said(chatty: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelManager, "replies", lambda self, conversations, **options: [Reply("", (), True, 1)] * len(conversations))
    with pytest.raises(InputError, match=r"nothing to learn from 6 prompts \(6 no answer\)"):
        ConstitutionalPipeline(config(chatty, files), tmp_path / "out").run()
    assert [r.status for r in read_revisions(tmp_path / "out" / "revise" / "revisions.jsonl")] == ["no answer"] * 6
    assert [stage.name for stage in AlignmentReport.read(tmp_path / "out" / "report.json").stages] == ["prompts"]


def test_mistakes_come_to_light_at_once_and_leave_no_trace(chatty: Path, files: Path, tmp_path: Path) -> None:
    (tmp_path / "half.yaml").write_text("name: half\nprinciples:\n  - id: kind\n    critique_request: Is it?\n", encoding="utf-8")
    for changes, words in (({"constitution": str(tmp_path / "half.yaml")}, "revision_request"), ({"constitution": "rulez"}, "no constitution"),
                           ({"model": "mmie-tiny-bass"}, "did you mean"), ({"prompts": str(tmp_path / "none.txt")}, "cannot read")):
        with pytest.raises(InputError, match=words):
            ConstitutionalPipeline(config(chatty, files, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="'revise'"):
        ConstitutionalPipeline(config(chatty, files), tmp_path / "out").run(until="revised")


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=12)


@given(st.lists(st.one_of(texts, st.none(), st.integers()), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_no_line_of_a_prompts_file_is_lost(tmp_path_factory: pytest.TempPathFactory, rows: list[str | int | None]) -> None:
    path = tmp_path_factory.mktemp("rows") / "p.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    wanted = list(dict.fromkeys(row.strip() for row in rows if isinstance(row, str) and row.strip()))
    if not wanted:
        with pytest.raises(InputError, match="no usable prompt, line 1"):
            read_prompts(path)
        return
    good, rejected = read_prompts(path)
    assert [prompt.text for prompt in good] == wanted and len(good) + len(rejected) == len(rows)


def test_tallies_are_drawn_for_screens_and_phones() -> None:
    rows = [tally("helps with harm", name, {"before": [True] * 4, "fine-tuned": [True, False] * 2, "aligned": [False] * 4}) for name in ("theft", "a <b>")]
    for width in (760, 360):
        drawn = tally_figure(rows, "helps with harm", width=width)
        assert drawn.count("<rect") == 6 and "a &lt;b&gt;" in drawn and f'viewBox="0 0 {width} ' in drawn
    assert len(ALIGN_STAGES) == 7


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not [word for word in words if word not in done.stderr], (done.stdout, done.stderr)


def test_the_command(mmie: Run, chatty: Path, files: Path, tmp_path: Path) -> None:
    (tmp_path / "few.yaml").write_text("supervised: {steps: 1}\nmax_new_tokens: 12\ntemperature: 1\ndevice: cpu\n", encoding="utf-8")
    words = ["align", "--model", chatty, "--prompts", files / "prompts.jsonl", "--constitution", files / "rules.yaml", "--config", tmp_path / "few.yaml",
             "--method", "none", "--out", tmp_path / "out"]
    first = mmie(*words, "--until", "revise")
    assert first.returncode == 0 and "2/2" in first.stdout and not (tmp_path / "out" / "supervise").exists(), first.stderr
    done = mmie(*words)
    assert done.returncode == 0 and done.stdout.count("done before") == 2 and str(tmp_path / "out" / "report.html") in done.stdout, done.stderr
    again = mmie("align", "--config", tmp_path / "out" / "settings.yaml", "--out", tmp_path / "out") # as the report says
    assert again.returncode == 0, again.stderr
    (tmp_path / "empty.txt").touch()
    refused(mmie("align", "--model", chatty, "--prompts", tmp_path / "empty.txt", "--out", tmp_path / "x"), "no usable prompt", "empty.txt")
    refused(mmie("align", "--model", tmp_path, "--prompts", files / "prompts.jsonl", "--out", tmp_path / "x"))
    refused(mmie("align", "--prompts", files / "prompts.jsonl", "--out", tmp_path / "x"), "--model")
    assert not (tmp_path / "x").exists() or os.listdir(tmp_path / "x")


def test_generate_speaks_with_any_model(mmie: Callable[..., subprocess.CompletedProcess[str]], chatty: Path) -> None:
    "A packaged assistant answers; a folder of transformers is asked through its own template, and continues plain text."
    from transformers import AutoModelForCausalLM, AutoTokenizer
    asked = mmie("generate", "--model", "mmie-tiny-base", "--ask", "what is 7 plus 5 ?")
    assert asked.stdout == "7 plus 5 is 12 .\n", asked.stderr
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chatty).eval(), AutoTokenizer.from_pretrained(chatty)
    for words, ids in ((["the"], tokenizer("the", return_tensors="pt").input_ids),
                       (["--ask", "the"], tokenizer.apply_chat_template([{"role": "user", "content": "the"}], add_generation_prompt=True, return_tensors="pt", return_dict=True).input_ids)):
        theirs = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1]:]
        ours = mmie("generate", "--model", chatty, *words, "--temperature", 0, "--max-new-tokens", 6)
        assert ours.stdout.strip() == tokenizer.decode(theirs).split(ChatTemplate().end)[0].strip(), ours.stderr
