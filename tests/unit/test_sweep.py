"""What a sweep consists of, and what its table says, without a federation."""

import re
from pathlib import Path
from typing import Any

import pytest

from fedfog.cli.experiment import Stack, Sweep, SweepError, run_sweep
from fedfog.cli.results import cell, summarize


def sweep(**fields: Any) -> Sweep:
    return Sweep(**({"name": "s"} | fields))


def test_grid_is_all_combinations_with_each_seed() -> None:
    planned = sweep(
        settings={"rounds": 2},
        grid={
            "partition": ["iid", "dirichlet:0.3"],
            "local": [
                {"name": "Adam"},
                {"name": "SGD", "optimizer": "sgd", "learning_rate": 0.1},
            ],
        },
        seeds=[1, 2],
    ).runs()
    assert [run.name for run in planned] == [
        *("iid_adam_s1", "iid_adam_s2", "iid_sgd_s1", "iid_sgd_s2"),
        *("dirichlet-0-3_adam_s1", "dirichlet-0-3_adam_s2"),
        *("dirichlet-0-3_sgd_s1", "dirichlet-0-3_sgd_s2"),
    ]
    last = planned[-1]
    assert last.labels == {"partition": "dirichlet:0.3", "local": "SGD"}
    assert last.settings == {
        "rounds": 2,
        "partition": "dirichlet:0.3",
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "seed": 2,
    }
    assert planned[0].complete_settings() == planned[2].complete_settings() | {
        "optimizer": "adam",
        "learning_rate": 0.001,
    }


def test_names_differ_and_can_be_names_of_runs() -> None:
    long = ["x" * 60, "x" * 59 + "y", "A b", "a-b", "", -1, 1, True]
    values = [{"name": name, "rounds": 1} for name in long]
    names = [run.name for run in sweep(grid={"axis": values}, seeds=[0, 2**62]).runs()]
    assert len(set(names)) == 2 * len(long)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9_-]*_s\d+", name) for name in names)
    assert max(map(len, names[::2])) <= 55
    assert [run.name for run in sweep(seeds=[7]).runs()] == ["s7"]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"grid": {"k": [1, 2]}}, "k: not a setting of a run"),
        ({"settings": {"seed": 1}}, "seed: not a setting of a run"),
        ({"grid": {"learning_rate": [0.1, -1]}}, "learning_rate = -1"),
        ({"settings": {"optimizer": "rmsprop"}}, "optimizer = 'rmsprop'"),
        ({"settings": {"momentum": 0.9}}, "momentum = 0.9: only OPTIMIZER=sgd has it"),
        ({"grid": {"rounds": [1, 1]}}, "a value stands twice"),
        ({"seeds": [1, 1]}, "a seed stands twice"),
        ({"grid": {"loss": [{"rounds": 1}]}}, "[grid] loss: a column of the results"),
        ({"stack": Stack(kk=1)}, "[stack] kk: unknown"),
        ({"stack": Stack(learning_rate=1)}, "[stack] learning_rate: a setting of a run"),
    ],
)
def test_impossible_sweep_is_told_before_anything_starts(
    fields: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(SweepError, match=re.escape(told)):
        run_sweep(sweep(**fields), tmp_path)
    assert not list(tmp_path.glob("*/stack-*"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seeds = [", "sweep.toml: "),
        ("seeds = []", "seeds: "),
        ("rounds = 3", "rounds: "),
        ("[grid]\nrounds = []", "grid.rounds: "),
        ("[stack]\nclients = 0", "stack.clients: "),
        ("name = 'Über'", "name: "),
    ],
)
def test_error_in_the_file_names_its_place(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    with pytest.raises(SweepError, match=re.escape(told)):
        Sweep.read(path)


def test_summary_is_mean_least_and_largest_over_the_seeds() -> None:
    rows = [
        {"run": f"{axis}_s{seed}", "axis": axis, "seed": seed, "round": round, "accuracy": value}
        for axis, seed, round, value in (
            ("a", 1, 1, 0.5),
            ("a", 1, 2, 0.8),
            ("a", 2, 1, 0.7),
            ("a", 2, 2, 0.9),
            ("b", 1, 1, 0.1),
        )
    ]
    a, b = summarize(rows, ["axis"])
    assert (a["axis"], a["runs"]) == ("a", 2)
    assert (a["accuracy"], a["accuracy_min"], a["accuracy_max"]) == pytest.approx((0.85, 0.8, 0.9))
    assert cell(a, "accuracy") == "0.8500 (0.8000-0.9000)"
    assert cell(b, "accuracy") == "0.1000"
    assert cell(b, "auroc") == "-"
    assert summarize(rows, ["axis"], round=1)[0]["accuracy"] == pytest.approx(0.6)
