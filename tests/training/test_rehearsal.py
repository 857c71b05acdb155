"""Plans for devices, tried on gloo ranks of this machine."""

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_run import tiny_values, write_config

from hetegen_rec.cli import main
from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.loading import load_config
from hetegen_rec.training.capacity import plan_capacity
from hetegen_rec.training.rehearsal import rehearse

EXPECTED = {"user_id": 3000, "item_id": 200_000, "segment": 50, "intent": 7, "tags": 20}
TABLES = {
    "user_id": {"sharding": "row_wise"},
    "item_id": {"sharding": "table_row_wise", "kernel": "fused_uvm"},
    "segment": {"sharding": "grid_shard"},
    "intent": {"sharding": "data_parallel"},
    "price": {"sharding": "column_wise"},
    "tags": {"sharding": "table_column_wise"},
}


def _config(directory: Path, **sections: Any) -> Path:
    values = {
        **tiny_values(directory),
        "plan": {"world": "2x2", "hardware": "h100", "expected_values": EXPECTED},
        "distributed": {"device": "cuda", "tables": TABLES},
        **sections,
    }
    values["model"] = {**values["model"], "reconstruction": {"full_softmax_max": 40}}
    return write_config(directory, values)


def test_a_plan_is_rehearsed_on_its_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = {**tiny_values(tmp_path)["train"], "table_optimizer": "adam"}
    assert main(["plan", "--config", str(_config(tmp_path, train=train)), "--rehearse", "100"]) == 0
    found = json.loads((tmp_path / "run/plan/rehearsal.json").read_text(encoding="utf-8"))
    run = {one["planned"]["table"]: one for one in found["tables"]}
    assert {name: (one["sharding"], one["kernel"], one["ranks"]) for name, one in run.items()} == {
        name: (one["planned"]["sharding"], run[name]["kernel"], one["planned"]["ranks"])
        for name, one in run.items()
    }
    assert {name: run[name]["sharding"] for name in TABLES} == {
        name: wanted["sharding"] for name, wanted in TABLES.items()
    }
    assert {name: one["rows"] for name, one in run.items()} == {
        "user_id": 44,  # a multiple of the ranks, above the size of a full softmax
        "item_id": 2002,
        "segment": 44,
        "intent": 9,
        "tags": 22,
        "price": 10,
    }
    assert run["item_id"]["not_run"] == "kernel fused_uvm does not exist on CPUs; run as fused"
    assert [name for name, one in run.items() if one["not_run"]] == ["item_id"]
    assert [len(step) for step in found["losses"]] == [4, 4]
    assert found["problems"] == []
    vectors = found["traffic"]["looked-up rows and gradients"]
    assert vectors["predicted"] == vectors["counted"]
    assert vectors["counted"][1] > 0
    printed = capsys.readouterr().out
    assert "planned, not run" in printed
    assert "table optimizer adam has no CPU kernel, run with rowwise_adagrad" in printed


@pytest.mark.parametrize("factor", ["0", "-5"])
def test_a_factor_that_divides_nothing_is_refused(
    tmp_path: Path, factor: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--config", str(_config(tmp_path)), f"--rehearse={factor}"]) != 0
    assert f"--rehearse: {factor} is not what rows of tables can be divided by" in capsys.readouterr().err


def test_ranks_that_do_not_fit_here_are_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(_config(tmp_path))
    planned = plan_capacity(config, "pretrain")

    class Memory:
        available = 10**9

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    with pytest.raises(ConfigError, match=r"--rehearse: 100: 4 ranks .* 1\.2 GB, but 1\.0 GB .* plan\.world"):
        rehearse(config, planned, 100)
