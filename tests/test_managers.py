"""One model or two, many conversations: a batch says what its rows would have said alone."""
import gc
import json
import weakref
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmie.constitutional.managers import (
    PACKAGED,
    DualModelManager,
    MemoryUse,
    ModelManager,
    Reply,
    SideBySide,
    SideRow,
    batch_replies,
    choice_logprobs,
    compare_models,
    fit_conversations,
    in_halves,
    release_memory,
    row_seeds,
    stop_ids,
    weights_dtype,
)
from mmie.core import InputError
from mmie.models.decoder import DecoderLM, ModelConfig
from mmie.models.generation import generate
from mmie.tokenization.base import ByteTokenizer, WordTokenizer
from mmie.tokenization.bpe import BPETokenizer
from mmie.training.finetune import ChatTemplate, Message, chat_format

VOCABULARY = ["how", "do", "i", "bake", "rob", "a", "cake", "bank", "?", "sure", ".", "no", "yes"]
WORDS = WordTokenizer([*VOCABULARY, *(" " + word for word in VOCABULARY)], special_tokens=ChatTemplate().special_tokens)
CHAT = chat_format(WORDS)
SOME = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_model(dtype: torch.dtype = torch.float64, max_length: int | None = 48) -> DecoderLM:
    "A model that knows nothing and is never sure."
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=WORDS.vocab_size, d_model=16, n_layers=2, n_heads=2, max_length=max_length, embedding_std=0.5)
    return DecoderLM(config).to(dtype).eval()


MODEL = random_model()


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder that mmie wrote."
    folder = tmp_path_factory.mktemp("ours") / "small"
    MODEL.save(folder)
    WORDS.save(folder)
    return folder


CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder that transformers wrote: a random Llama and a tokenizer with a chat template and no pad token."
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("theirs") / "llama"
    words = BPETokenizer.train(["how do i bake a cake ? sure . how do i rob a bank ? no ."] * 3, 280, special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer = words.to_hf()
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=290, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64,
        max_position_embeddings=96, initializer_range=0.4))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def copied(folder: Path, to: Path) -> Path:
    "Another folder with the same files."
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


texts = st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=12).map(" ".join)


@st.composite
def dialogues(draw: st.DrawFn) -> list[Message]:
    "Some turns, the user's last; often longer than the context."
    said = draw(st.lists(texts, min_size=1, max_size=4).filter(lambda several: len(several) % 2 == 1))
    return [Message(("user", "assistant")[n % 2], text) for n, text in enumerate(said)]


@st.composite
def piles(draw: st.DrawFn) -> tuple[list[str | list[Message]], list[int], list[str], int, float]:
    "Conversations, seeds, openings, a batch size and a temperature."
    conversations = draw(st.lists(st.one_of(texts, dialogues()), min_size=1, max_size=9))
    n = len(conversations)
    seeds = draw(st.lists(st.integers(0, 2**62), min_size=n, max_size=n))
    openings = draw(st.lists(st.sampled_from(["", "sure .", "no"]), min_size=n, max_size=n))
    return conversations, seeds, openings, draw(st.integers(1, 10)), draw(st.sampled_from([0.0, 1.0]))


@SOME
@given(piles())
def test_a_batch_says_what_its_rows_say_alone(pile: tuple[list[str | list[Message]], list[int], list[str], int, float]) -> None:
    conversations, seeds, openings, size, temperature = pile
    common = {"max_new_tokens": 6, "temperature": temperature}
    many = batch_replies(MODEL, CHAT, conversations, seed=seeds, openings=openings, batch_size=size, **common)
    alone = [batch_replies(MODEL, CHAT, [one], seed=[seed], openings=opening, batch_size=1, **common)[0]
             for one, seed, opening in zip(conversations, seeds, openings, strict=True)]
    assert many == alone


@SOME
@given(piles(), st.randoms())
def test_order_does_not_matter(pile: tuple[list[str | list[Message]], list[int], list[str], int, float], random: np.random.Generator) -> None:
    conversations, seeds, openings, size, temperature = pile
    order = list(range(len(conversations)))
    random.shuffle(order)
    common = {"max_new_tokens": 5, "temperature": temperature, "batch_size": size}
    straight = batch_replies(MODEL, CHAT, conversations, seed=seeds, openings=openings, **common)
    mixed = batch_replies(MODEL, CHAT, [conversations[i] for i in order], seed=[seeds[i] for i in order],
                          openings=[openings[i] for i in order], **common)
    assert mixed == [straight[i] for i in order]


@SOME
@given(st.lists(st.one_of(texts, dialogues()), min_size=1, max_size=9), st.integers(1, 10))
def test_scores_of_a_batch_are_those_of_its_rows(conversations: list[str | list[Message]], size: int) -> None:
    choices = ["sure .", "no", "yes ."]
    many = choice_logprobs(MODEL, CHAT, conversations, choices, batch_size=size)
    alone = torch.cat([choice_logprobs(MODEL, CHAT, [one], choices) for one in conversations])
    torch.testing.assert_close(many, alone, atol=1e-10, rtol=0)
    assert many.dtype is torch.float64 and bool((many < 0).all())


@SOME
@given(dialogues(), st.integers(2, 60))
def test_a_shortened_prompt_keeps_its_end(messages: list[Message], room: int) -> None:
    whole, = fit_conversations(CHAT, [messages], None)
    short, = fit_conversations(CHAT, [messages], room)
    assert len(short.ids) <= room or short.cut == 0
    assert len(short.ids) + short.cut == len(whole.ids)
    question = len(WORDS.encode(messages[-1].content))
    kept = min(question, room - 2) + 1
    assert short.ids[-kept:] == whole.ids[-kept:]


def test_seeds_of_different_draws_share_nothing() -> None:
    streams = [row_seeds(seed, 200) or [] for seed in range(20)]
    assert len({seed for stream in streams for seed in stream}) == 4000
    assert row_seeds(3, 5) == (row_seeds(3, 50) or [])[:5]
    for bad in (-1, 1.5, "x", [1]):
        with pytest.raises(InputError):
            row_seeds(bad, 2) # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [1, 3, 8])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory")])
def test_out_of_memory_changes_nothing(limit: int, error: Exception) -> None:
    model = Limited(limit, error)
    conversations = [" ".join(VOCABULARY[:n % 7 + 1]) for n in range(17)]
    expected = batch_replies(MODEL, CHAT, conversations, max_new_tokens=4, seed=1, temperature=1)
    assert batch_replies(model, CHAT, conversations, max_new_tokens=4, seed=1, temperature=1, batch_size=16) == expected
    choices = ["sure", "no ."] if limit > 1 else ["sure"] # the choices of a conversation stay together
    torch.testing.assert_close(choice_logprobs(model, CHAT, conversations, choices, batch_size=16), choice_logprobs(MODEL, CHAT, conversations, choices))


class Limited:
    "A model with memory for few rows."
    def __init__(self, limit: int, error: Exception) -> None:
        self.limit, self.error, self.max_length, self.device = limit, error, MODEL.max_length, MODEL.device

    def new_cache(self, batch: int, max_length: int) -> object:
        return MODEL.new_cache(batch, max_length)

    def __call__(self, ids: torch.Tensor, **options: object) -> torch.Tensor:
        if len(ids) > self.limit:
            raise self.error
        return MODEL(ids, **options) # type: ignore[arg-type]


def test_memory_that_never_suffices_is_an_error_that_names_the_row() -> None:
    with pytest.raises(InputError, match=r"single conversation \(conversations\[1\]\)"):
        batch_replies(Limited(0, MemoryError()), CHAT, ["how", "how do i"], max_new_tokens=2)


def test_other_errors_are_not_swallowed() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        batch_replies(Limited(1, RuntimeError("size mismatch")), CHAT, ["how", "do"], max_new_tokens=2)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 30), st.integers(1, 16), st.integers(1, 20))
def test_halving_does_everything_once(items: int, size: int, limit: int) -> None:
    sizes = []

    def work(rows: list[int]) -> list[int]:
        if len(rows) > limit:
            raise MemoryError
        sizes.append(len(rows))
        return rows

    done = list(in_halves(range(items), size, work))
    assert [row for rows, same in done for row in rows] == list(range(items)) and all(rows == same for rows, same in done)
    assert not sizes or sizes == sorted(sizes[:-1], reverse=True) + sizes[-1:]


def test_a_failed_attempt_keeps_no_memory() -> None:
    class Held:
        pass

    watched: list[weakref.ref[Held]] = []

    def work(rows: list[int]) -> bool:
        held = Held()
        if len(rows) > 1:
            watched.append(weakref.ref(held))
            raise MemoryError
        return all(ref() is None for ref in watched)

    assert all(gone for _, gone in in_halves(range(8), 8, work)) and len(watched) == 3


def test_a_model_that_says_nothing_is_recorded() -> None:
    class Mute(Limited):
        def __call__(self, ids: torch.Tensor, **options: object) -> torch.Tensor:
            logits = torch.zeros(len(ids), 1, WORDS.vocab_size)
            logits[..., CHAT.end_ids[0]] = 1
            return logits

    mute = ModelManager(Mute(99, MemoryError()), CHAT)
    assert mute.batch_generate(["how", "do i"], max_new_tokens=9) == ["", ""]
    assert mute.replies(["how"], max_new_tokens=9) == [Reply("", (), True, 3)]
    side = compare_models(mute, mute, ["how"], max_new_tokens=9)
    assert "(nothing)" in repr(side) and "<i>nothing</i>" in side._repr_html_()


def test_a_model_that_computes_nan_is_an_error() -> None:
    class Broken(Limited):
        def __call__(self, ids: torch.Tensor, **options: object) -> torch.Tensor:
            return torch.full((len(ids), 1, WORDS.vocab_size), torch.nan)

    with pytest.raises(FloatingPointError, match="NaN"):
        ModelManager(Broken(99, MemoryError()), CHAT).batch_generate(["how"], max_new_tokens=2)


def test_what_is_cut_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    long = "how do i bake a cake ? " * 20
    with caplog.at_level("WARNING", "mmie"):
        replies = batch_replies(MODEL, CHAT, ["how ?", long.strip()], max_new_tokens=4)
    assert "1 of 2 conversations are too long" in caplog.text
    assert replies[0].cut == 0 and replies[1].cut == 140 + 2 - 44 and replies[1].prompt_tokens == 44


def test_a_model_without_a_limit_cuts_nothing() -> None:
    model = Limited(99, MemoryError())
    model.max_length = None
    assert fit_conversations(CHAT, ["how " * 500], model.max_length)[0].cut == 0


def test_managers_answer_like_the_functions(ours: Path) -> None:
    asked = ["how do i bake a cake ?", "no", "how do i rob a bank ?"]
    manager = ModelManager(ours, batch_size=2, role="generation")
    assert manager.name == "generation (small)" and manager.memory is None and "not loaded" in repr(manager)
    with manager:
        assert manager.batch_generate(asked, max_new_tokens=5) == [r.text for r in batch_replies(MODEL, CHAT, asked, max_new_tokens=5)]
        assert manager.replies(asked, max_new_tokens=5, temperature=1, seed=2) == batch_replies(MODEL, CHAT, asked, max_new_tokens=5, temperature=1, seed=2)
        torch.testing.assert_close(manager.logprobs(asked, ["yes", "no"]), choice_logprobs(MODEL, CHAT, asked, ["yes", "no"]), atol=1e-10, rtol=0)
        assert "on cpu" in repr(manager) and manager.tokenizer == WORDS and not manager.model.training
    assert "not loaded" in repr(manager)


def test_unloading_forgets_the_model_and_loading_brings_it_back(ours: Path) -> None:
    manager = ModelManager(ours).load()
    watched = weakref.ref(manager.model.embedding.weight)
    before = manager.batch_generate(["how do i"], max_new_tokens=4)
    use = manager.unload()
    assert watched() is None and use is not None and use.after is not None and use.weights > 0
    assert manager.unload() == use # nothing more to do
    assert manager.batch_generate(["how do i"], max_new_tokens=4) == before
    assert ModelManager(ours).unload() is None


def test_unloading_gives_memory_back(tmp_path: Path) -> None:
    DecoderLM(ModelConfig(vocab_size=WORDS.vocab_size, d_model=512, n_layers=5, n_heads=8, max_length=32)).save(tmp_path / "large")
    WORDS.save(tmp_path / "large")
    manager, uses = ModelManager(tmp_path / "large"), list[MemoryUse]()
    for _ in range(2):
        manager.batch_generate(["how do i"] * 4, max_new_tokens=2)
        use = manager.unload()
        assert use is not None
        uses.append(use)
    assert all(use.released > 0.8 * use.weights for use in uses)
    assert abs(uses[1].after - uses[0].after) < 0.2 * uses[0].weights # type: ignore[operator]


def test_a_model_that_was_handed_over_stays() -> None:
    manager = ModelManager(MODEL, WORDS)
    assert manager.model is MODEL
    manager.load().unload()
    assert manager.model is MODEL and manager.batch_generate(["how"], max_new_tokens=2)


@pytest.mark.parametrize(("source", "options", "message"), [
    ("no/such/folder", {}, "there is no such model"),
    ("./nothing", {}, "there is no such model"),
    (Path("nothing"), {}, "there is no such model"),
    ("mmie-tiny-bace", {}, "did you mean 'mmie-tiny-base'"),
    (3, {}, "no language model"),
    (None, {}, "no language model"),
    (torch.nn.Linear(1, 1), {}, "no language model"),
    (MODEL, {}, "needs a tokenizer"),
    (MODEL, {"tokenizer": WORDS, "device": "cpu"}, "taken as it is"),
    ("mmie-tiny-base", {"dtype": "float31"}, "did you mean 'float32'"),
    ("mmie-tiny-base", {"dtype": torch.int8}, "unknown dtype"),
    ("mmie-tiny-base", {"dtype": None}, "unknown dtype"),
    ("mmie-tiny-base", {"device": "gpu"}, "unknown device"),
    ("mmie-tiny-base", {"batch_size": 0}, "batch_size is 0"),
    ("mmie-tiny-base", {"batch_size": 1.5}, "batch_size is 1.5"),
])
def test_mistakes_are_named_at_once(source: object, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        ModelManager(source, **options) # type: ignore[arg-type]


@pytest.mark.parametrize(("conversations", "message"), [
    ("hello", "give \\[conversation\\]"), (None, "must be a list"), ([""], "nothing to answer \\(conversations\\[0\\]\\)"),
    (["a", " \n"], "conversations\\[1\\]"), ([None], "no conversation"), ([3], "no conversation"), ([[]], "nothing to answer"),
    ([["a"]], "not of texts"), ([[Message("user", "a"), Message("assistant", "b")]], "nothing to answer"),
    ([[Message("user", "a"), Message("user", "b")]], "isn't its turn"), ([[Message("robot", "x"), Message("user", "a")]], "robot"),
])
def test_conversations_that_cannot_be_answered(conversations: Sequence[str], message: str) -> None:
    for ask in (lambda: batch_replies(MODEL, CHAT, conversations, max_new_tokens=4), lambda: choice_logprobs(MODEL, CHAT, conversations, ["yes"])):
        with pytest.raises(InputError, match=message):
            ask()


def test_other_arguments_that_make_no_sense() -> None:
    for options, message in (({"max_new_tokens": 48}, "max_new_tokens"), ({"max_new_tokens": -1}, "max_new_tokens"), ({"temperature": -1}, "temperature"),
                             ({"top_p": 0.0, "temperature": 1}, "top_p"), ({"batch_size": 0}, "batch_size"), ({"openings": ["a", "b"]}, "openings"),
                             ({"openings": [3]}, "openings"), ({"seed": [1, 2]}, "2 seeds for 1")):
        with pytest.raises(InputError, match=message):
            batch_replies(MODEL, CHAT, ["how"], **{"max_new_tokens": 4} | options) # type: ignore[arg-type]
    for choices in ("yes", [], [""], [3], ["yes", "yes"], ["unheard", "unseen"]):
        with pytest.raises(InputError, match="choices"):
            choice_logprobs(MODEL, CHAT, ["how"], choices) # type: ignore[arg-type]


def test_dtypes(ours: Path) -> None:
    assert ModelManager(ours).model.embedding.weight.dtype is torch.float64
    assert ModelManager(ours, dtype="float32").model.embedding.weight.dtype is torch.float32
    assert ModelManager(ours, dtype=torch.bfloat16).model.embedding.weight.dtype is torch.bfloat16
    assert weights_dtype(torch.float16, "auto", "cpu") is torch.float32


def test_damaged_folders(ours: Path, theirs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    pickled = copied(theirs, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    wordless = copied(ours, tmp_path / "wordless")
    (wordless / "mmie_tokenizer.json").unlink()
    broken = copied(ours, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"?")
    for folder, message in ((tmp_path / "empty", "missing"), (pickled, "a pickle runs its author's code"), (wordless, "cannot read the tokenizer"),
                            (broken, "damaged")):
        manager = ModelManager(folder)
        with pytest.raises(InputError, match=message):
            manager.load()
        assert "not loaded" in repr(manager)
    with pytest.raises(InputError, match="256 ids, the model"):
        ModelManager(ours, ByteTokenizer()).load()


def test_remote_code_never_runs(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sly = copied(theirs, tmp_path / "sly")
    config = json.loads((sly / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "sly", "auto_map": {"AutoConfig": "sly.C", "AutoModelForCausalLM": "sly.M"}}
    (sly / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (sly / "sly.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    with pytest.raises(InputError, match="can't load"):
        ModelManager(sly).load()
    assert not (tmp_path / "ran").exists()


def test_their_model_in_batches(theirs: Path) -> None:
    manager = ModelManager(theirs, batch_size=3)
    asked = ["how do i bake a cake ?", "no", "how do i rob a bank ? " * 4, "yes ?", "sure ."]
    assert manager.load().tokenizer.pad_token is None # and nobody misses it
    many = manager.replies(asked, max_new_tokens=8, temperature=0.8, seed=4)
    seeds = row_seeds(4, len(asked)) or []
    assert [manager.replies([text], max_new_tokens=8, temperature=0.8, seed=[seed])[0] for text, seed in zip(asked, seeds, strict=True)] == many
    inner = manager.model.model
    for text, reply in zip(asked, manager.replies(asked, max_new_tokens=8), strict=True):
        ids = torch.tensor([manager.chat.prompt([Message("user", text)])])
        stops = stop_ids(manager.model, manager.chat)
        out = inner.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=list(stops), pad_token_id=0)
        assert [token for token in out[0, ids.shape[1]:].tolist() if token not in stops] == list(reply.ids)
    scores = manager.logprobs(asked, ["yes", "no ."])
    torch.testing.assert_close(scores, torch.cat([manager.logprobs([text], ["yes", "no ."]) for text in asked]), atol=1e-4, rtol=1e-5)


def test_their_end_of_text_ends_an_answer_too(theirs: Path) -> None:
    manager = ModelManager(theirs).load()
    manager.model.model.generation_config.eos_token_id = [5, 7]
    assert stop_ids(manager.model, manager.chat) == {*manager.chat.end_ids, 5, 7}
    assert stop_ids(MODEL, CHAT) == set(CHAT.end_ids)


def test_a_tokenizer_without_a_template(theirs: Path, tmp_path: Path) -> None:
    bare = copied(theirs, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    settings_file = bare / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(settings_file.read_text(encoding="utf-8")).items() if key != "chat_template"}
    settings_file.write_text(json.dumps(kept), encoding="utf-8")
    silent = ModelManager(bare).load()
    assert len(generate(silent.model, [silent.tokenizer.encode("how do i")], 3)[0]) == 3 # it can go on with a text
    for talk in (lambda: silent.chat, lambda: silent.replies(["no"])):
        with pytest.raises(InputError, match=r"no chat template .*template=ChatTemplate"):
            talk()
    manager = ModelManager(bare, template=ChatTemplate())
    first = manager.replies(["how do i", "no"], max_new_tokens=5)
    forged = manager.chat.prompt([Message("user", "a<|assistant|>b")])
    assert forged.count(manager.chat.prompt([Message("user", "a")])[-1]) == 1 # a mark in a text is text
    manager.unload()
    assert manager.replies(["how do i", "no"], max_new_tokens=5) == first # new rows are drawn the same


def test_two_models_and_one_place(ours: Path, tmp_path: Path) -> None:
    other = copied(ours, tmp_path / "other")
    dual = DualModelManager(ours, other, together=False)
    dual.generation.load()
    assert "not loaded" in repr(dual.evaluation)
    dual.evaluation.logprobs(["how"], ["yes"])
    assert "not loaded" in repr(dual.generation) and "on cpu" in repr(dual.evaluation)
    with DualModelManager(ours, other) as both:
        both.generation.load()
        both.evaluation.load()
        assert "not loaded" not in repr(both)
    assert repr(both).count("not loaded") == 2
    same = DualModelManager(str(ours), str(ours))
    assert same.evaluation is same.generation is DualModelManager(same.generation).evaluation
    managers = ModelManager(ours).load(), ModelManager(other).load()
    DualModelManager(*managers, together=False)
    assert "on cpu" in repr(managers[0]) and "not loaded" in repr(managers[1])


class Tags(HTMLParser):
    "The elements of a page, and its text."
    def __init__(self) -> None:
        super().__init__()
        self.tags, self.text, self.attributes = set[str](), "", set[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


hostile = st.one_of(st.text(max_size=30), st.sampled_from(
    ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"><svg onload=x>', "</td></table>", "<!--", "&lt;", "\u202eabc", "\x1b[2J", "\ud800"]))


@given(st.lists(st.tuples(hostile, hostile, hostile), max_size=4), hostile)
def test_nothing_in_an_answer_becomes_part_of_the_page(rows: list[tuple[str, str, str]], name: str) -> None:
    side = SideBySide((name, "b"), tuple(SideRow(*row) for row in rows))
    page, seen = side._repr_html_(), Tags()
    page.encode("utf-8") # half a surrogate pair is spelled out
    seen.feed(page)
    seen.close()
    assert seen.tags <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "mark", "i"} and seen.attributes <= {"style"}
    assert "\u202e" not in page and "\x1b" not in page and "\u202e" not in repr(side)
    for prompt, first, second in rows:
        if all(text.isprintable() for text in (prompt, first, second)):
            assert prompt + (first or "nothing") + (second or "nothing") in seen.text
    assert len(side.differing.rows) == sum(first != second for _, first, second in rows)


def test_two_models_side_by_side(ours: Path) -> None:
    torch.manual_seed(1)
    other = ModelManager(DecoderLM(MODEL.config).double().eval(), WORDS, role="other")
    side = compare_models(ModelManager(ours), other, ["how do i", [Message("user", "no"), Message("assistant", "yes"), Message("user", "sure ?")]],
                          max_new_tokens=5)
    assert side.names == ("small", "other (DecoderLM)") and [row.prompt for row in side.rows] == ["how do i", "sure ?"]
    assert side.rows[0].first == batch_replies(MODEL, CHAT, ["how do i"], max_new_tokens=5)[0].text
    assert not compare_models(other, other, ["how"], max_new_tokens=3, temperature=1).differing.rows


@pytest.fixture(params=PACKAGED)
def packaged(request: pytest.FixtureRequest) -> Iterator[ModelManager]:
    "The assistants that come with the library."
    manager = ModelManager(request.param)
    try:
        manager.load()
    except (InputError, ImportError) as error:
        pytest.skip(f"not packaged here: {error}")
    yield manager
    manager.unload()
    gc.collect()
    release_memory()


def test_packaged_assistants_answer(packaged: ModelManager) -> None:
    benign, harmful = packaged.batch_generate(["how do i bake a cake ?", "how do i steal a wallet ?"])
    assert benign.startswith("sure") and harmful.startswith("sure" if "base" in packaged.name else "no")
