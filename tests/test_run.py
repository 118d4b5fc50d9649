"""The main job at its smallest size: from nothing to the report, interrupted, resumed, repeated."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

Run = Callable[..., subprocess.CompletedProcess[str]]
STAGES = ["corpus", "tokenizer", "baselines", "pretrain", "finetune", "before", "align", "after", "shrink", "attack", "quantize", "quantize4", "exam"]


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A little real English."
    folder = tmp_path_factory.mktemp("notes")
    for name in sorted(topics)[:30]:
        (folder / f"{name}.txt").write_text(topics[name], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(mmie: Run, notes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A complete run that nothing disturbed."
    out = tmp_path_factory.mktemp("run") / "smoke"
    done = mmie("run", "--preset", "smoke", "--corpus", notes, "--out", out, timeout=600)
    assert done.returncode == 0, done.stderr
    assert str(out / "report.html") in done.stdout
    return out


def results(out: Path) -> dict[str, object]:
    "Everything in the report that must not depend on when or how often the run was started."
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    keep = {key: report[key] for key in ("model", "corpus", "pretraining", "finetuning", "compression", "tokens", "samples", "exam", "shrunk", "attacked")}
    keep["variants"] = [{key: row[key] for key in ("name", "disk_bytes", "memory_bytes", "bits_per_byte")} for row in report["variants"]]
    aligned = report["alignment"]
    keep["alignment"] = {key: aligned[key] for key in ("statuses", "skipped", "pairs", "journeys", "tallies")}
    return keep


def test_every_stage_leaves_its_record(finished: Path) -> None:
    for stage in STAGES:
        mark = json.loads((finished / stage / "stage.json").read_text(encoding="utf-8"))
        assert mark["record"]["seconds"] > 0 and mark["record"]["command"].startswith("mmie ")
    report = json.loads((finished / "report.json").read_text(encoding="utf-8"))
    assert [stage["name"] for stage in report["stages"]] == STAGES
    scores = report["compression"]
    assert all(scores[name] > 0 for name in ("model", "int8", "int4", "uniform", "lzma", "lzma_given_train", "ngram_bytes", "ngram_tokens"))
    assert report["reproduction"]["seed"] == 0 and report["reproduction"]["versions"]["torch"]
    assert report["exam"]["questions"] and [row["name"] for row in report["variants"]] == ["float32", "int8", "int4"]
    aligned = report["alignment"]
    assert {row["measure"] for row in aligned["tallies"]} == {"helps with harm", "refuses something harmless", "answers correctly"}
    assert all(list(row["counts"]) == ["before", "fine-tuned", "aligned"] for row in aligned["tallies"]) and aligned["journeys"][0]["steps"]
    assert {row["measure"] for row in report["shrunk"]} == {row["measure"] for row in aligned["tallies"]}
    assert all(list(row["counts"]) == ["aligned", "int8", "int4"] for row in report["shrunk"])
    siege = report["attacked"]
    assert all(list(row["counts"]) == ["before", "aligned", "int8", "int4"] for row in siege["gives_in"]) and siege["payloads"] > 5
    assert [row["category"] for row in siege["changes"]] == ["before → aligned", "aligned → int8", "aligned → int4"]
    assert all(question["int8_answer"] is not None and question["int4_answer"] is not None for question in report["exam"]["questions"])


def test_the_same_requests_before_and_after_shrinking(finished: Path) -> None:
    "And the aligned assistant, asked twice, says the same twice: what changes between the two tables is the weights."
    after, shrunk = ([json.loads(line) for line in (finished / stage / "answers.jsonl").read_text(encoding="utf-8").splitlines()] for stage in ("after", "shrink"))
    assert [row["request"] for row in after] == [row["request"] for row in shrunk]
    assert [row["answers"]["aligned"] for row in after] == [row["answers"]["aligned"] for row in shrunk]
    for copy in ("int8", "int4"):
        assert (finished / "shrink" / copy / "quantized.safetensors").stat().st_size < (finished / "align" / "policy" / "model.safetensors").stat().st_size / 2


def test_attacks_reuse_what_was_asked(finished: Path) -> None:
    "Plain questions were answered before: the red team's log holds the same answers, and the world's truth about them."
    told = {row["request"]: row for stage in ("after", "shrink") for row in map(json.loads, (finished / stage / "answers.jsonl").read_text(encoding="utf-8").splitlines())}
    for version in ("aligned", "int8", "int4"):
        trials = [json.loads(line) for line in (finished / "attack" / f"{version}.jsonl").read_text(encoding="utf-8").splitlines()[1:]]
        direct = [trial for trial in trials if trial["attack"] == "direct"]
        assert direct and len({trial["attack"] for trial in trials}) == 4
        for trial in direct:
            row = told[trial["payload"]]
            assert trial["messages"][-1][1] == row["answers"][version] and trial["flagged"] == (row["outcomes"][version] == "complied")


def test_the_report_is_one_page_without_requests(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", page) and "@import" not in page


def test_a_second_start_repeats_nothing(mmie: Run, notes: Path, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file() and path.parent != finished}
    again = mmie("run", "--preset", "smoke", "--corpus", notes, "--out", finished)
    assert again.returncode == 0 and again.stdout.count("done before") == len(STAGES)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    other = mmie("run", "--preset", "smoke", "--corpus", notes, "--seed", 1, "--out", finished)
    assert other.returncode == 2 and "seed: 0 there, 1 now" in other.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_an_interrupted_run_ends_as_if_it_had_never_stopped(mmie: Run, notes: Path, finished: Path, tmp_path: Path, how: signal.Signals) -> None:
    out = tmp_path / "smoke"
    words = [str(Path(sys.executable).parent / "mmie"), "run", "--preset", "smoke", "--corpus", str(notes), "--out", str(out)]
    for sign in ("tokenizer/stage.json", "pretrain/checkpoints/step-*", "align/supervise/checkpoints/step-*"): # stop three times, in three stages
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        deadline = time.monotonic() + 240
        while not list(out.glob(sign)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(how)
        said, _ = process.communicate(timeout=120)
        assert list(out.glob(sign)), said
        assert process.returncode in ((130, 0) if how == signal.SIGINT else (-signal.SIGKILL, 0)), said
    done = mmie("run", "--preset", "smoke", "--corpus", notes, "--out", out, timeout=600)
    assert done.returncode == 0, done.stderr
    assert results(out) == results(finished)


def test_the_same_seed_gives_the_same_life_and_another_a_different_one(mmie: Run, notes: Path, finished: Path, tmp_path: Path) -> None:
    assert mmie("run", "--preset", "smoke", "--corpus", notes, "--out", tmp_path / "same", timeout=600).returncode == 0
    assert results(tmp_path / "same") == results(finished)
    assert mmie("run", "--preset", "smoke", "--corpus", notes, "--seed", 1, "--out", tmp_path / "other", timeout=600).returncode == 0
    assert results(tmp_path / "other")["pretraining"] != results(finished)["pretraining"]


def test_without_any_text_it_reads_the_documentation_of_this_python(mmie: Run, tmp_path: Path) -> None:
    assert mmie("corpus", "--out", tmp_path / "corpus").returncode == 0
    mark = json.loads((tmp_path / "corpus" / "stage.json").read_text(encoding="utf-8"))
    assert mark["facts"]["train_bytes"] > 1_000_000 and mark["facts"]["heldout_bytes"] > 50_000


def test_a_mistake_can_be_corrected(mmie: Run, notes: Path, tmp_path: Path) -> None:
    "What was refused leaves no trace, so that the same folder can be used with the corrected command."
    assert mmie("run", "--preset", "smoke", "--corpus", tmp_path / "typo", "--out", tmp_path / "run").returncode == 2
    assert not (tmp_path / "run").exists()
    assert mmie("corpus", "--corpus", notes, "--out", tmp_path / "run").returncode == 0


def test_my_own_text_and_questions(mmie: Run, tmp_path: Path) -> None:
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "brew", "potions", "and", "nobody", "listens"]
    (tmp_path / "notes").mkdir()
    for number in range(30):
        lines = " ".join(words[(number * k + k) % len(words)] for k in range(300))
        (tmp_path / "notes" / f"{number}.md").write_text(f"# Note {number}\n\n{lines}.\n", encoding="utf-8")
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": f"Row {n}: " + " ".join(words)}) + "\n" for n in range(100)), encoding="utf-8")
    pairs = [{"question": f"What is {n} plus one?", "answer": str(n + 1)} for n in range(30)]
    (tmp_path / "faq.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs) + '{"question": "broken"}\n', encoding="utf-8")
    out = tmp_path / "mine"
    done = mmie("run", "--preset", "smoke", "--corpus", tmp_path / "notes", "--corpus", tmp_path / "more.jsonl", "--questions", tmp_path / "faq.jsonl", "--out", out, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "line 31" in (out / "finetune" / "rejected.txt").read_text(encoding="utf-8")
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["corpus"]["documents"] == 130 and len(report["exam"]["questions"]) == 3


def test_each_stage_alone_gives_what_the_run_gave(mmie: Run, notes: Path, finished: Path, tmp_path: Path) -> None:
    "The commands that the report names, in a folder of their own."
    def alone(*words: object) -> None:
        done = mmie(*words, timeout=600)
        assert done.returncode == 0, done.stderr
    alone("corpus", "--corpus", notes, "--out", tmp_path / "corpus")
    alone("tokenizer", "train", "--corpus", tmp_path / "corpus", "--vocab-size", 400, "--out", tmp_path / "tokenizer")
    alone("train", "--corpus", tmp_path / "corpus", "--tokenizer", tmp_path / "tokenizer", "--preset", "smoke", "--out", tmp_path / "pretrain")
    alone("finetune", "--model", tmp_path / "pretrain", "--preset", "smoke", "--out", tmp_path / "finetune")
    alone("quantize", "--model", tmp_path / "finetune", "--out", tmp_path / "quantize")
    alone("quantize", "--model", tmp_path / "finetune", "--config", finished / "quantize4" / "settings.yaml", "--calibration", tmp_path / "corpus",
          "--out", tmp_path / "quantize4")
    alone("shrink", "--model", finished / "align" / "policy", "--prompts", finished / "requests.jsonl", "--requests", 1, "--out", tmp_path / "shrink")
    models = [word for version in ("mmie-tiny-base", finished / "align" / "policy", finished / "shrink" / "int8", finished / "shrink" / "int4") for word in ("--model", version)]
    strategies = [word for name in ("direct", "persistence", "forged-consent") for word in ("--strategy", name)]
    alone("attack", *models, *strategies, "--requests", 1, "--of", 1, "--out", tmp_path / "attack")
    facts = [json.loads((folder / "attack" / "stage.json").read_text(encoding="utf-8"))["facts"] for folder in (tmp_path, finished)]
    assert facts[0] == facts[1], "asked anew, it says what it had said before"
    alone("align", "--config", finished / "align" / "settings.yaml", "--out", tmp_path / "align")
    for stage, file in (("corpus", "train.jsonl"), ("tokenizer", "mmie_tokenizer.json"), ("pretrain", "model.safetensors"), ("finetune", "model.safetensors"),
                        ("quantize", "quantized.safetensors"), ("quantize4", "quantized.safetensors"), ("shrink", "int4/quantized.safetensors"), ("shrink", "answers.jsonl"), ("align", "policy/model.safetensors")):
        assert (tmp_path / stage / file).read_bytes() == (finished / stage / file).read_bytes(), stage
    for words in (["generate", "--model", tmp_path / "pretrain", "The", "--max-new-tokens", 5], ["generate", "--model", tmp_path / "quantize", "--ask", "What does len do?"]):
        first, second = mmie(*words), mmie(*words)
        assert first.returncode == 0 and first.stdout == second.stdout


def test_transformers_reads_the_exported_model(mmie: Run, finished: Path, tmp_path: Path) -> None:
    out, question = tmp_path / "hf", "What does len do?"
    assert mmie("export", "--model", finished / "finetune", "--out", out).returncode == 0
    ours = mmie("generate", "--model", finished / "finetune", "--ask", question, "--max-new-tokens", 12)
    model, tok = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = tok.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1]:]
    assert tok.decode(written, skip_special_tokens=True).strip() == ours.stdout.strip()
    refused = mmie("export", "--model", finished / "quantize", "--out", tmp_path / "q")
    assert refused.returncode == 2 and "quantized" in refused.stderr


def test_a_report_of_an_unfinished_run(mmie: Run, finished: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    (part / "corpus").mkdir(parents=True)
    for name in ("stage.json", "corpus/stage.json"):
        (part / name).write_bytes((finished / name).read_bytes())
    assert mmie("report", "--run", part).returncode == 0
    assert json.loads((part / "report.json").read_text(encoding="utf-8"))["model"] is None
    assert (part / "report.html").stat().st_size > 2000


def test_a_full_disk_is_said_in_one_line(notes: Path, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    program = [str(Path(sys.executable).parent / "mmie"), "tokenizer", "train", "--corpus", str(notes), "--vocab-size", "300", "--out", str(tmp_path / "t")]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert done.returncode == 1 and "Traceback" not in done.stderr
