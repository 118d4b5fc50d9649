"Rectangles from texts of any lengths: nothing lost, nothing twice, nothing over the budget."
import subprocess
import sys
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmie.core import InputError
from mmie.tokenization.base import as_tensors, budget_batches, pack, pad, truncate

ROWS = st.lists(st.lists(st.integers(0, 99), max_size=12), max_size=9)
LENGTHS = st.lists(st.integers(0, 40), max_size=60)


@given(rows=ROWS, side=st.sampled_from(["left", "right"]), extra=st.integers(0, 3))
def test_padding_adds_and_a_mask_takes_away(rows: list[list[int]], side: str, extra: int) -> None:
    length = max(map(len, rows), default=0) + extra
    ids, mask = pad(rows, 7, length, side) # type: ignore[arg-type]
    assert ids.shape == mask.shape == (len(rows), length) and ids.dtype == np.int64 and mask.dtype == bool
    assert [row[real].tolist() for row, real in zip(ids, mask, strict=True)] == rows
    assert (ids[~mask] == 7).all()
    for real in mask:
        assert real.tolist() == sorted(real.tolist(), reverse=side == "right"), "all padding on one side"


@given(row=st.lists(st.integers(0, 99), max_size=12), length=st.integers(0, 15))
def test_truncating_keeps_an_end(row: list[int], length: int) -> None:
    assert truncate(row, length) == row[:length]
    assert truncate(row, length, "left") == (row[-length:] if length else [])


@given(lengths=LENGTHS, room=st.integers(0, 200))
def test_batches_keep_to_their_budget(lengths: list[int], room: int) -> None:
    budget = max([1, *lengths]) + room
    batches = budget_batches(lengths, budget)
    assert sorted(chain.from_iterable(batches)) == list(range(len(lengths))), "each text once"
    assert all(batch and len(batch) * max(lengths[i] for i in batch) <= budget for batch in batches)
    assert batches == budget_batches(tuple(lengths), budget)
    in_order = [lengths[i] for batch in batches for i in batch]
    assert in_order == sorted(lengths, reverse=True), "the longest first"
    for batch in batches[:-1]:
        assert (len(batch) + 1) * lengths[batch[0]] > budget or lengths[batch[0]] == 0, "no batch could take one more"


@given(lengths=LENGTHS.filter(lambda lengths: max(lengths, default=0) > 0))
def test_a_text_above_the_budget_is_refused(lengths: list[int]) -> None:
    with pytest.raises(InputError):
        budget_batches(lengths, max(lengths) - 1)


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_of_nothing_is_refused(budget: int) -> None:
    with pytest.raises(InputError):
        budget_batches([0], budget)


@settings(max_examples=300)
@given(rows=ROWS, length=st.integers(1, 10), eos=st.none() | st.just(100), fill=st.none() | st.just(101))
def test_packing_is_chaining_and_cutting(rows: list[list[int]], length: int, eos: int | None, fill: int | None) -> None:
    ids, numbers = pack(rows, length, eos_id=eos, pad_id=fill)
    assert ids.shape == numbers.shape and ids.shape[1] == length and ids.dtype == numbers.dtype == np.int64
    chained = [(i, at) for at, row in enumerate(rows) for i in [*row, *([] if eos is None else [eos])]]
    packed = list(zip(ids.ravel().tolist(), numbers.ravel().tolist(), strict=True))
    if fill is None:
        assert packed == chained[: len(chained) - len(chained) % length], "what fills no row is left out"
    else:
        assert packed[: len(chained)] == chained and set(packed[len(chained) :]) <= {(fill, -1)}
        assert len(packed) - len(chained) < length


@given(rows=ROWS, length=st.integers(1, 10))
def test_packing_reads_any_kind_of_row(rows: list[list[int]], length: int) -> None:
    expected = pack(rows, length, eos_id=5, pad_id=0)
    for again in (pack(iter(rows), length, eos_id=5, pad_id=0), pack([np.array(row, dtype=np.int64) for row in rows], length, eos_id=5, pad_id=0)): # type: ignore[misc]
        assert all(np.array_equal(a, b) for a, b in zip(expected, again, strict=True))


def test_tensors_share_the_memory() -> None:
    ids, mask = pad([[1, 2], [3]], 0)
    tensor, real = as_tensors(ids, mask)
    assert tensor.dtype == torch.int64 and real.dtype == torch.bool
    ids[0, 0] = 9
    assert tensor[0, 0] == 9


def test_arrays_need_no_torch() -> None:
    code = "import sys; from mmie.tokenization.base import pad; pad([[1]], 0); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
