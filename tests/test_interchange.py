"""Tokenizers of others in ours and ours in theirs, id for id; and what happens to files that aren't tokenizers."""
import json
import random
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast, T5Tokenizer

from mmie.core import InputError
from mmie.tokenization.base import check_tokenizer, load_tokenizer
from mmie.tokenization.bpe import BPETokenizer
from mmie.tokenization.corpora import python_docs
from mmie.tokenization.interchange import UnigramTokenizer, WordPieceTokenizer, from_hf, from_tiktoken, to_hf, to_tiktoken
from mmie.tokenization.splitting import GPT2_PATTERN, GPT4_PATTERN, O200K_PATTERN

PATTERNS = {"gpt2": GPT2_PATTERN, "gpt4": GPT4_PATTERN, "o200k": O200K_PATTERN}
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789", " ", "  \n\r\t", "'sStTdDmMlLvVrReE", "_.,:;!?()[]{}<>|#@&%$/\\\"",
    "àéîõüßæøłžſK", "абвгдеёжзийАБВ", "αβγδεζΣς", "אבגדה", "ابتثجحخ", "नमस्तेक्षत्र", "你好世界日本語", "가나다라", "ไทยภาษา",
    "\u0301\u0308\u20dd\ufe0f\u200d\u200b", "🙂👩🏽🚀🇨🇭", "٣४Ⅷ²½", "\0\x01\x1c\x1f\x7f\x85\xa0\u2003\u2028\u3000", "\ufffd\ufeff\U0001f600\U000e0041", "ab", "▁",
]


def strange(generator: random.Random) -> str:
    runs = ["".join(generator.choices(generator.choice(ALPHABETS), k=generator.randint(1, 6))) for _ in range(generator.randint(1, 8))]
    return "".join(run * generator.choice((1, 1, 1, 3)) for run in runs)


FUZZ = [strange(generator) for generator in [random.Random(151)] for _ in range(20_000)]
SOME, LESS = FUZZ[:4000], FUZZ[:2000]


@pytest.fixture(scope="module")
def pages() -> list[str]:
    return [document.text for document in python_docs(["python"])[::12]]


@pytest.fixture(scope="module", params=PATTERNS)
def ours(request: pytest.FixtureRequest, pages: list[str]) -> BPETokenizer:
    return BPETokenizer.train(pages, 1500, pattern=PATTERNS[request.param], special_tokens=["<|user|>", "<|end|>"])


def ids_of(machine: Tokenizer | PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    "Their ids, special tokens in the texts being text, nothing added around them."
    machine = getattr(machine, "backend_tokenizer", machine)
    machine.encode_special_tokens = True
    rows = [row.ids for row in machine.encode_batch_fast(texts, add_special_tokens=False)]
    machine.encode_special_tokens = False
    return rows


def same(mine: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], texts: Sequence[str]) -> None:
    for ids, expected, text in zip(mine, theirs, texts, strict=True):
        assert list(ids) == list(expected), repr(text)


def changed(machine: Tokenizer, **parts: object) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(json.loads(machine.to_str()) | parts))


def model_of(machine: Tokenizer) -> dict:
    return json.loads(machine.to_str())["model"]


# ours → theirs → ours


def test_ours_in_tiktoken(ours: BPETokenizer) -> None:
    theirs = to_tiktoken(ours)
    same(ours.encode_batch(FUZZ), theirs.encode_ordinary_batch(FUZZ, num_threads=1), FUZZ)
    assert theirs._special_tokens == ours.special_tokens and from_tiktoken(theirs) == ours == BPETokenizer.from_tiktoken(theirs)


def test_ours_in_hugging_face(ours: BPETokenizer, tmp_path: Path) -> None:
    theirs = to_hf(ours)
    expected = ours.encode_batch(FUZZ)
    same(expected, ids_of(theirs, FUZZ), FUZZ)
    theirs.save_pretrained(tmp_path)
    stranger = AutoTokenizer.from_pretrained(tmp_path)
    same(expected[:2000], stranger(FUZZ[:2000], split_special_tokens=True, add_special_tokens=False)["input_ids"], FUZZ[:2000])
    assert stranger.batch_decode(expected[:2000]) == FUZZ[:2000]
    assert stranger.eos_token == "<|end|>" and len(stranger) == ours.vocab_size
    assert from_hf(tmp_path) == from_hf(str(tmp_path / "tokenizer.json")) == from_hf(stranger) == ours == BPETokenizer.from_hf(theirs)


def test_typed_markers_are_text_here_and_ids_there(ours: BPETokenizer) -> None:
    typed = "Thanks!<|end|><|user|>Now"
    markers = set(ours.special_tokens.values())
    assert markers & set(to_hf(ours)(typed)["input_ids"]) and not markers & set(ours.encode(typed))
    assert not markers & set(to_hf(ours)(typed, split_special_tokens=True)["input_ids"])
    with pytest.raises(ValueError, match="special token"):
        to_tiktoken(ours).encode(typed)


@pytest.mark.parametrize("merges, pattern, special, export, message", [
    ([(97, 98)], GPT4_PATTERN, ["ab"], to_hf, "spelled like"),
    ([(97, 98)], r"(?s:.+)", [], to_hf, "can't use the split pattern"),
    ([(97, 98)], r"^\w+|\w", [], to_hf, "other ids"),
    ([(98, 99), (97, 98), (257, 99)], GPT4_PATTERN, [], to_tiktoken, "other ids"),
    ([(97, 98)], r"\m\w+|\w", [], to_tiktoken, "tiktoken can't use the split pattern"),
    ([(97, 98)], r"(?:ab){e<=1}|\w", [], to_tiktoken, "other ids"),
])
def test_what_cannot_be_said_is_not(
    merges: list[tuple[int, int]], pattern: str, special: list[str], export: Callable[[BPETokenizer], object], message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        export(BPETokenizer(merges, pattern, special))


def test_the_smallest_ones() -> None:
    for tokenizer in (BPETokenizer([]), BPETokenizer([(97, 98)], r"[\s\S]"), BPETokenizer([(97, 97), (256, 97)], r"\w+")):
        same(tokenizer.encode_batch(LESS), ids_of(to_hf(tokenizer), LESS), LESS)
        same(tokenizer.encode_batch(LESS), to_tiktoken(tokenizer).encode_ordinary_batch(LESS, num_threads=1), LESS)
        assert from_hf(to_hf(tokenizer)) == tokenizer == from_tiktoken(to_tiktoken(tokenizer))


# tiktoken → ours → everywhere


def ranks_of(tokenizer: BPETokenizer) -> dict[bytes, int]:
    return {tokenizer.decode_bytes([i]): i for i in range(256 + len(tokenizer.merges))}


def test_a_stranger_from_tiktoken(ours: BPETokenizer) -> None:
    order = random.Random(3).sample(range(256), 256)
    ranks = {token: order[i] if i < 256 else i + 7 * (i > 700) for token, i in ranks_of(ours).items()} # other bytes, gaps
    special = {"<|endoftext|>": 3000, "<|fim|>": 705, "<|endofprompt|>": 9000}
    encoding = tiktoken.Encoding("stranger", pat_str=ours.pattern, mergeable_ranks=ranks, special_tokens=special)
    mine = from_tiktoken(encoding)
    expected = encoding.encode_ordinary_batch(SOME, num_threads=1)
    same(mine.encode_batch(SOME), expected, SOME)
    assert mine.special_tokens == special and mine.vocab_size == 9001 and mine.encode("a<|fim|>", "all")[-1] == 705
    theirs = to_hf(mine)
    same(ids_of(theirs, SOME), expected, SOME)
    assert theirs.convert_tokens_to_ids(list(special)) == list(special.values()) and theirs.eos_token_id == 3000
    same(to_tiktoken(mine).encode_ordinary_batch(LESS, num_threads=1), expected[:2000], LESS)
    same(from_hf(theirs).encode_batch(LESS), expected[:2000], LESS)


def test_a_word_that_nobody_may_type() -> None:
    with pytest.raises(InputError, match="looks like a word"):
        to_hf(from_tiktoken(tiktoken.Encoding("x", pat_str=GPT4_PATTERN, mergeable_ranks=ranks_of(BPETokenizer([])), special_tokens={"user": 999})))


# Hugging Face → ours → everywhere


def train_bpe(pages: list[str], *steps: object, special: Sequence[str] = (), **options: object) -> Tokenizer:
    machine = Tokenizer(models.BPE(**options))
    machine.pre_tokenizer, machine.decoder = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )
    machine.train_from_iterator(pages, trainer)
    return machine


def split_by(pattern: str) -> tuple[object, object]:
    return pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def gpt2(pages: list[str]) -> Tokenizer:
    machine = train_bpe(pages, pre_tokenizers.ByteLevel(add_prefix_space=False))
    machine.add_special_tokens(["<|endoftext|>"])
    return machine


def roberta(pages: list[str]) -> Tokenizer:
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    machine = train_bpe(pages, pre_tokenizers.ByteLevel(add_prefix_space=False), special=names)
    words = list(model_of(machine)["vocab"])[4:]
    random.Random(2).shuffle(words)
    machine = changed(machine, model=model_of(machine) | {"vocab": {name: i for i, name in enumerate([*names, *words, "madeupword0000"])}})
    machine.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    machine.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return machine


def llama3(pages: list[str]) -> Tokenizer:
    machine = train_bpe(pages, *split_by(LLAMA3))
    vocab, merges = model_of(machine)["vocab"], []
    for word, _ in sorted(vocab.items(), key=lambda item: item[1]):
        merges += [[word[:k], word[k:]] for k in range(1, len(word)) if word[:k] in vocab and word[k:] in vocab]
    assert len(merges) > len(vocab)
    machine = changed(machine, model=model_of(machine) | {"merges": merges, "ignore_merges": True})
    machine.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    return machine


def removing(pages: list[str]) -> Tokenizer: # as converted from tiktoken
    machine = train_bpe(pages, *split_by(LLAMA3))
    steps = json.loads(machine.to_str())["pre_tokenizer"]
    steps["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    return changed(machine, pre_tokenizer=steps)


def old_file(pages: list[str]) -> Tokenizer: # merges as strings
    machine = gpt2(pages)
    return changed(machine, model=model_of(machine) | {"merges": [" ".join(pair) for pair in model_of(machine)["merges"]]})


VARIANTS: dict[str, Callable[[list[str]], Tokenizer]] = {
    "gpt2": gpt2, "roberta": roberta, "llama3": llama3, "removing": removing, "old_file": old_file,
    "gaps": lambda pages: train_bpe(pages, *split_by(r"[a-z]+|\d")),
    "string": lambda pages: train_bpe(pages, pre_tokenizers.Split(" ", "isolated"), split_by(LLAMA3)[1]),
    "uncut": lambda pages: train_bpe([line for page in pages[:4] for line in page.splitlines()], split_by(LLAMA3)[1]),
    "o200k": lambda pages: train_bpe(pages, *split_by(O200K_PATTERN)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_strangers_from_hugging_face(name: str, pages: list[str], tmp_path: Path) -> None:
    machine = VARIANTS[name](pages)
    mine, texts = from_hf(machine), [*SOME, *pages[:3]]
    expected = ids_of(machine, texts)
    same(mine.encode_batch(texts), expected, texts)
    same(ids_of(to_hf(mine), texts), expected, texts)
    assert [mine.decode(row) for row in expected[:2000]] == LESS
    assert mine.special_tokens == {token["content"]: token["id"] for token in json.loads(machine.to_str())["added_tokens"]}
    mine.save(tmp_path)
    assert load_tokenizer(tmp_path) == mine and isinstance(mine, BPETokenizer)
    same(from_hf(to_hf(mine)).encode_batch(LESS), expected[:2000], LESS)
    if name == "roberta":
        with pytest.raises(InputError, match="order of the merges"):
            to_tiktoken(mine)
    elif name != "gaps": # tiktoken has no gaps, and learns the pattern with one alternative more
        same(to_tiktoken(mine).encode_ordinary_batch(LESS, num_threads=1), expected[:2000], LESS)


def test_a_normalizer_is_left_out_only_when_asked(pages: list[str]) -> None:
    machine = train_bpe(pages, *split_by(LLAMA3.replace("{1,3}", "")))
    machine.normalizer = normalizers.NFC()
    with pytest.raises(InputError, match=r"normalizer \(NFC\).*skip_normalizer"):
        from_hf(machine)
    texts = [unicodedata.normalize("NFC", text) for text in SOME]
    same(from_hf(machine, skip_normalizer=True).encode_batch(texts), ids_of(machine, texts), texts)


def test_a_space_in_front_is_left_out_only_when_asked(pages: list[str]) -> None:
    machine = train_bpe(pages, pre_tokenizers.ByteLevel(add_prefix_space=True))
    with pytest.raises(InputError, match="add_prefix_space"):
        from_hf(machine)
    texts = [f" {text}" for text in LESS]
    same(from_hf(machine, skip_normalizer=True).encode_batch(texts), ids_of(machine, texts), texts)


def test_added_tokens_that_are_not_special(pages: list[str]) -> None:
    machine = gpt2(pages)
    machine.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<tool>s", normalized=False)])
    with pytest.warns(UserWarning, match="'<tool>', '<tool>s'"):
        mine = from_hf(machine)
    texts = [f"{text}<tool>{text}<tool>s<|endoftext|>" for text in LESS]
    same([mine.encode(text, {"<tool>", "<tool>s"}) for text in texts], ids_of(machine, texts), texts)


def test_a_token_out_of_reach(pages: list[str]) -> None:
    machine = gpt2(pages)
    model = model_of(machine)
    model["vocab"] |= {"zyx": 2000}
    with pytest.raises(InputError, match="'zyx' is out of reach"):
        from_hf(changed(machine, model=model))
    machine = changed(machine, model=model | {"ignore_merges": True})
    same(from_hf(machine).encode_batch(["zyx", "azyx"]), ids_of(machine, ["zyx", "azyx"]), ["zyx", "azyx"])


@pytest.mark.parametrize("parts, message", [
    ({"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}}, "joins characters, not bytes"),
    ({"pre_tokenizer": None}, "joins characters"),
    ({"model": {"dropout": 0.1}}, "dropout"),
    ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
    ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "Lowercase"}]}}, r"NFD \+ Lowercase"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, {"type": "ByteLevel"}]}}, "several steps"),
    ({"model": {"vocab": {"a": 0, "b": 1}, "merges": []}}, "254 bytes have no token"),
    ({"model": {"merges": [["zz", "q"]]}}, "damaged"),
    ({"model": {"merges": None}}, "damaged"),
    ({"model": {"vocab": []}}, "damaged"),
    ({"model": {"type": "WordLevel"}}, "its model is WordLevel"),
    ({"model": {"type": ["BPE"]}}, "its model is"),
    ({"model": None}, "has no model"),
    ({"added_tokens": [{"content": "the", "id": 5, "special": True}]}, "ordinary token, too"),
    ({"added_tokens": [{"id": 5}]}, "damaged"),
    ({"added_tokens": [{"content": "<x>", "id": 5, "special": True}]}, "taken"),
])
def test_what_cannot_be_read_is_named(parts: dict[str, object], message: str, pages: list[str], tmp_path: Path) -> None:
    data = json.loads(gpt2(pages[:3]).to_str())
    for name, part in parts.items():
        data[name] = data[name] | part if name == "model" and isinstance(part, dict) else part
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        from_hf(tmp_path)


def test_digits_first_then_gpt2(pages: list[str], tmp_path: Path) -> None:
    machine = train_bpe(pages, pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False))
    texts = [*LESS, "a  1   b", "\n\n 12\t3 \u0663\u00bd x's5's", "1 2  3", "  ", " 7"]
    mine = from_hf(machine)
    same(mine.encode_batch(texts), ids_of(machine, texts), texts)
    same(ids_of(to_hf(mine), texts), ids_of(machine, texts), texts)


def test_control_characters_without_a_token(pages: list[str], tmp_path: Path) -> None:
    machine = train_bpe(pages, pre_tokenizers.ByteLevel(add_prefix_space=False))
    assert {chr(256 + 4), chr(256 + 22)} <= set(pre_tokenizers.ByteLevel.alphabet()) # how bytes 4 and 22 are spelled
    vocab = {word: i for word, i in model_of(machine)["vocab"].items() if word not in (chr(256 + 4), chr(256 + 22))}
    machine = changed(machine, model=model_of(machine) | {"vocab": vocab})
    mine = from_hf(machine)
    texts = [text for text in LESS if not set(text) & {"\x04", "\x16"}]
    assert mine.lost == b"\x04\x16"
    same(mine.encode_batch(texts), ids_of(machine, texts), texts)
    assert machine.decode(machine.encode("a\x04b").ids) == "ab" # theirs loses it
    for refuse in (lambda: mine.encode("a\x04b"), lambda: mine.encode_batch(["x", "a\x16b"]), lambda: mine.encode_arrays(["a\x04"], workers=2)):
        with pytest.raises(InputError, match="has no token for"):
            refuse()
    with pytest.raises(InputError, match="byte 0x04"):
        to_tiktoken(mine)
    mine.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again == mine and again.lost == mine.lost and from_hf(to_hf(mine)).lost == mine.lost


def test_a_pattern_that_means_something_else_there(pages: list[str]) -> None:
    with pytest.raises(InputError, match="other ids"):
        from_hf(train_bpe(pages, *split_by(r"^\w+|\w")))


def test_llama2_is_called_by_its_name(tmp_path: Path) -> None:
    machine = Tokenizer(models.BPE(vocab={"▁": 0, "a": 1}, merges=[], byte_fallback=True, unk_token="▁"))
    machine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    with pytest.raises(InputError, match="byte_fallback, as in Llama 2"):
        from_hf(machine)


@pytest.mark.parametrize("content, message", [
    (b'{"version": "1.0", "model": {"type": "B', "damaged, or no JSON"), (b"", "no JSON"), (b"\xff\xfe\x00", "damaged"),
    (b"[]", "has no model"), (b'{"a": 1}', "has no model"), (b"null", "has no model"),
])
def test_damaged_files(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    for where in (tmp_path, path, str(path)):
        with pytest.raises(InputError, match=message):
            from_hf(where)


def test_every_truncation_is_an_error(pages: list[str], tmp_path: Path) -> None:
    whole = gpt2(pages[:2]).to_str()
    path = tmp_path / "tokenizer.json"
    for size in random.Random(4).sample(range(len(whole)), 40):
        path.write_text(whole[:size], encoding="utf-8")
        with pytest.raises(InputError):
            from_hf(path)


def test_other_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no tokenizer"):
        from_hf(tmp_path)
    BPETokenizer([]).save(tmp_path)
    with pytest.raises(InputError, match="load_tokenizer"):
        from_hf(tmp_path)
    with pytest.raises(InputError, match="No such file"):
        from_hf(tmp_path / "nothing.json")
    for wrong in (None, 42, {"model": {}}, BPETokenizer([])):
        with pytest.raises(InputError, match="no fast tokenizer"):
            from_hf(wrong)
    with pytest.raises(InputError, match="expected a tiktoken"):
        from_tiktoken(BPETokenizer([]))


# WordPiece and unigram


def compare_with(machine: Tokenizer, mine: WordPieceTokenizer | UnigramTokenizer, texts: Sequence[str], unknown: str | None = None) -> None:
    machine.encode_special_tokens = True
    for text, row in zip(texts, machine.encode_batch(texts, add_special_tokens=False), strict=True):
        assert mine.encode(text) == row.ids, repr(text)
        assert mine.offsets(text) == row.offsets, repr(text)
        back = machine.decode(row.ids, skip_special_tokens=False)
        assert mine.decode(row.ids) == (back.replace(unknown, "⁇") if unknown else back), repr(text)


@pytest.mark.parametrize("options", [
    {}, {"do_lower_case": False}, {"strip_accents": False}, {"do_lower_case": False, "strip_accents": True}, {"tokenize_chinese_chars": False},
])
def test_wordpiece(options: dict[str, bool], pages: list[str], tmp_path: Path) -> None:
    machine = BertTokenizer(**options).backend_tokenizer
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    machine.train_from_iterator([*pages, *FUZZ[::40]], trainers.WordPieceTrainer(vocab_size=2000, special_tokens=names, show_progress=False))
    mine = from_hf(machine)
    assert isinstance(mine, WordPieceTokenizer) and mine.special_tokens == {"[PAD]": 0, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4} and mine.unknown_id == 1
    compare_with(machine, mine, [*(SOME if not options else LESS), *pages[:3], "x" * 99, "x" * 100, "x" * 101], "[UNK]")
    check_tokenizer(mine, pages[:1])
    PreTrainedTokenizerFast(tokenizer_object=machine).save_pretrained(tmp_path)
    assert from_hf(tmp_path) == mine


def train_unigram(pages: list[str]) -> Tokenizer:
    machine = T5Tokenizer(extra_ids=0).backend_tokenizer
    options = {"vocab_size": 1500, "special_tokens": ["<pad>", "</s>", "<unk>"], "unk_token": "<unk>", "show_progress": False}
    machine.train_from_iterator(pages, trainers.UnigramTrainer(**options))
    return machine


@pytest.fixture(scope="module")
def t5(pages: list[str]) -> Tokenizer:
    return train_unigram(pages)


def test_unigram(t5: Tokenizer, pages: list[str], tmp_path: Path) -> None:
    mine = from_hf(t5)
    assert isinstance(mine, UnigramTokenizer) and mine.special_tokens == {"<pad>": 0, "</s>": 1} and mine.unknown_id == 2
    compare_with(t5, mine, [*SOME, *pages[:3]], "<unk>")
    check_tokenizer(mine, pages[:1])
    mine.save(tmp_path)
    assert load_tokenizer(tmp_path) == mine


@pytest.mark.parametrize("options", [
    {}, {"split": False}, {"prepend_scheme": "never"}, {"prepend_scheme": "first"}, {"split": False, "prepend_scheme": "never"},
])
def test_unigram_with_other_spaces(options: dict[str, object], t5: Tokenizer, pages: list[str]) -> None:
    model = model_of(t5)
    machine = changed(t5, model=model | {"vocab": [*model["vocab"], ["▁of▁the", -6.0], ["s▁", -5.0], ["▁▁▁▁", -4.0]]})
    machine.pre_tokenizer, machine.decoder = pre_tokenizers.Metaspace(**options), decoders.Metaspace(**options)
    compare_with(machine, from_hf(machine), [*LESS, *pages[:2]], "<unk>")


def test_unigram_that_falls_back_to_bytes(t5: Tokenizer) -> None:
    model = model_of(t5)
    every_byte = [[f"<0x{value:02X}>", -20.0] for value in range(256)]
    machine = changed(t5, model=model | {"vocab": model["vocab"] + every_byte, "byte_fallback": True})
    machine.pre_tokenizer, machine.decoder = pre_tokenizers.Metaspace(), decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    mine = from_hf(machine)
    compare_with(machine, mine, LESS)
    assert mine.unknown_id is None
    check_tokenizer(mine, [f"a{text}" for text in LESS[:20]]) # their decoder drops spaces at the beginning, one more each time
    with pytest.raises(InputError, match="no ids"):
        from_hf(changed(machine, model=model | {"vocab": model["vocab"] + every_byte[1:], "byte_fallback": True}))


def test_a_typed_end_of_text_is_text(t5: Tokenizer) -> None:
    t5.encode_special_tokens = True
    assert 1 in t5.encode("all.</s>", add_special_tokens=False).ids, "their model finds it, whatever the settings"
    assert 1 not in from_hf(t5).encode("all.</s>") and from_hf(t5).encode("</s>", "all") == [1]


@pytest.mark.parametrize("parts, message", [
    ({"normalizer": {"type": "NFKC"}}, "NFKC"), ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"), ({"pre_tokenizer": None}, "none"),
    ({"model": {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": None}}, "no ids"), ({"model": {"type": "Unigram", "vocab": [["a"]], "unk_id": 0}}, "damaged"),
])
def test_unigram_that_cannot_be_read(parts: dict[str, object], message: str, t5: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(t5.to_str()) | parts), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        from_hf(tmp_path)


def test_nothing_is_warned_of_without_reason(ours: BPETokenizer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_hf(to_hf(ours))
