"What a checkpoint refuses to save or to read, each with one sentence and with nothing lost."
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mmie.core import InputError
from mmie.training.checkpoint import _seal, best_checkpoint, checkpoint_info, latest_checkpoint, load_checkpoint, save_checkpoint


@pytest.mark.parametrize(("settings", "said"), [
    ({"step": -1}, "no number of a step"), ({"step": 2.5}, "no number of a step"), ({"step": None}, "no number of a step"),
    ({"step": 10**9}, "no number of a step"), ({"keep_last": None}, "no number of checkpoints"), ({"keep_last": 1.5}, "no number of checkpoints"),
    ({"metric": "low"}, "a str is no metric"), ({"metric": torch.ones(2)}, "a Tensor is no metric"), ({"metric": [1.0]}, "a list is no metric"),
])
def test_wrong_numbers_leave_what_was_there(tmp_path: Path, settings: dict[str, object], said: str) -> None:
    good = save_checkpoint(tmp_path, {"x": 1}, step=1, keep_last=1)
    with pytest.raises(InputError, match=said):
        save_checkpoint(tmp_path, {"x": 2}, **{"step": 2, **settings}) # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == [good.name] and load_checkpoint(good) == {"x": 1}


@pytest.mark.parametrize("metric", [torch.tensor(0.5), np.float32(0.5), 0.5])
def test_numbers_of_all_kinds_are_metrics(tmp_path: Path, metric: float) -> None:
    assert checkpoint_info(save_checkpoint(tmp_path, {}, step=1, metric=metric)).metric == 0.5


@pytest.mark.parametrize("metric", [None, math.nan, math.inf, torch.tensor(math.nan)])
def test_what_says_nothing_is_no_metric(tmp_path: Path, metric: float | None) -> None:
    assert checkpoint_info(save_checkpoint(tmp_path, {}, step=1, metric=metric)).metric is None
    assert best_checkpoint(tmp_path) is None


def test_a_run_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint to read"):
        load_checkpoint(latest_checkpoint(tmp_path)) # type: ignore[arg-type]
    save_checkpoint(tmp_path, {}, step=7)
    with pytest.raises(InputError, match="such as step-000000007"):
        load_checkpoint(tmp_path)
    with pytest.raises(InputError, match="not a whole checkpoint"):
        load_checkpoint(tmp_path / "step-000000008")


@pytest.mark.parametrize("tree", [{"$tensor": []}, {"$tensor": "9"}, {"$float": "lots"}, {"$float": None}, {"$tuple": 3}])
def test_a_strangers_tree_is_refused(tmp_path: Path, tree: object) -> None:
    path = save_checkpoint(tmp_path, {"x": torch.ones(2)}, step=1)
    text = json.dumps({"x": tree})
    (path / "state.json").write_text(text, encoding="utf-8")
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    del manifest["seal"]
    import hashlib
    manifest["files"]["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest | {"seal": _seal(manifest)}), encoding="utf-8")
    with pytest.raises(InputError, match="cannot read the checkpoint"):
        load_checkpoint(path)
