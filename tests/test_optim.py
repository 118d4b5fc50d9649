"What the optimizer refuses, and that it does so before the first step."
import math

import pytest
import torch
from torch import nn

from mmie.core import InputError
from mmie.training.optim import Muon, OptimConfig, Schedule, ScheduleKind, orthogonalize


@pytest.mark.parametrize(("settings", "said"), [
    ({"lr": -0.1}, "no lr"), ({"lr": math.nan}, "no lr"), ({"momentum": 1.0}, "no momentum"), ({"weight_decay": -1.0}, "no weight_decay"),
    ({"steps": 0}, "no steps"), ({"scale": "adam"}, "no scale"),
])
def test_muon_refuses_settings(settings: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Muon([nn.Parameter(torch.zeros(2, 2))], **settings) # type: ignore[arg-type]


@pytest.mark.parametrize(("blocks", "said"), [([(3, 3), None], "2 row_blocks for 1"), ([(3, 4)], "don't make a matrix of 6")])
def test_muon_refuses_cuts(blocks: list[object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Muon([{"params": [nn.Parameter(torch.zeros(6, 2))], "row_blocks": blocks}])


@pytest.mark.parametrize(("settings", "said"), [
    ({"kind": "cosin"}, "no schedule is called"), ({"final": -0.1}, "no share of the peak"), ({"final": math.nan}, "no share of the peak"),
    ({"decay": 0.0}, "no share of a run"), ({"warmup": 11}, "does not fit"), ({"warmup": -1}, "does not fit"),
])
def test_schedules_refuse(settings: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Schedule(10, **settings) # type: ignore[arg-type]


@pytest.mark.parametrize("lr", [0, -1e-3, math.nan, None, "fast"])
def test_settings_refuse_rates(lr: object) -> None:
    with pytest.raises(InputError, match="lr"):
        OptimConfig(lr=lr) # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "wsd"])
def test_a_run_of_no_or_one_step(kind: ScheduleKind) -> None:
    for steps in (0, 1):
        assert all(0 <= Schedule(steps, kind=kind)(step) <= 1 for step in range(3))


def test_odd_shapes_are_orthogonalized_or_refused() -> None:
    with pytest.raises(InputError, match="no matrix"):
        orthogonalize(torch.ones(3))
    assert orthogonalize(torch.zeros(0, 4, 5)).shape == (0, 4, 5)
    assert not orthogonalize(torch.zeros(4, 5)).any()
    assert orthogonalize(torch.full((1, 1), 1e-3), dtype=torch.float64).item() == pytest.approx(1, abs=0.4)


@pytest.mark.parametrize("betas", [(0.9, 1.0), (-0.1, 0.9), (0.9,), None])
def test_settings_refuse_averages(betas: object) -> None:
    with pytest.raises(InputError, match="betas"):
        OptimConfig(betas=betas) # type: ignore[arg-type]
