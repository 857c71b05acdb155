import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_values, write_config

from hetegen_rec.cli import main
from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.loading import load_config
from hetegen_rec.training.capacity import plan_capacity

EXPECTED = {"user_id": 3000, "item_id": 200_000, "segment": 5, "intent": 7, "tags": 20}
INDUSTRIAL = Path(__file__).parents[2] / "configs" / "industrial.yaml"


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    return write_config(tmp_path, {**tiny_values(tmp_path), "plan": {"expected_values": EXPECTED}})


def _plan(path: Path, *words: str) -> dict[str, Any]:
    assert main(["plan", "--config", str(path), *words]) == 0
    found: dict[str, Any] = json.loads((path.parent / "run/plan/plan.json").read_text(encoding="utf-8"))
    return found


def test_a_plan_needs_neither_data_nor_devices(config_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = _plan(config_path, "world=2x4", "hardware=a100", "distributed.device=cuda")
    assert (plan["world"], plan["hardware"]["name"], len(plan["memory_by_rank"])) == ("2x4", "a100", 8)
    assert {line["table"]: line["rows"] for line in plan["tables"]}["item_id"] == 200_002
    assert plan["fits"]
    assert plan["largest_batch_size"] > plan["batch_size"]
    printed = capsys.readouterr().out
    assert "Estimates, not measured" in printed
    assert "embedding backward" in printed
    page = (config_path.parent / "run/plan/plan.html").read_text(encoding="utf-8")
    assert "data:image/svg+xml" in page
    assert "http" not in page  # nothing from elsewhere
    assert (config_path.parent / "run/plan/plan.png").read_bytes().startswith(b"\x89PNG")


def test_hosts_without_devices_are_planned_too(config_path: Path) -> None:
    plan = _plan(config_path, "world=1x4", "hardware=cpu")
    assert "host_device" not in plan["traffic"]
    assert plan["traffic"]["forward"]["inter_host"] == 0


def test_prepared_data_go_before_what_is_expected(config_path: Path) -> None:
    assert main(["prepare", "--config", str(config_path)]) == 0
    plan = _plan(config_path, "world=1x2", "hardware=h100")
    assert plan["table_sizes_from"] == "prepared data"
    assert {line["table"]: line["rows"] for line in plan["tables"]}["item_id"] < 1000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plan.world=2x16", "16 ranks on a host, but the hosts of plan.hardware: h100 have 8"),
        ("plan.world=1x7", "train.batch_size: 240 must be divisible by the 7 ranks .* set it to 238"),
        ("plan.expected_values={user_id: 9}", "fields item_id, segment, intent, tags will have is not known"),
    ],
)
def test_what_cannot_be_planned_names_the_key(config_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_capacity(load_config(config_path, [override]), "pretrain")


def test_an_expected_size_of_something_else_is_refused(config_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"plan\.expected_values\.price. is not a field with"):
        load_config(config_path, ["plan.expected_values.price=9"])


def test_the_industrial_configuration_has_its_fields_and_rows() -> None:
    fields = load_config(INDUSTRIAL).features
    rows = sum((owner.hash_size or owner.num_buckets or 0) + 2 for owner in fields.table_owners)
    assert len(fields.fields) == 68
    assert round(rows / 1e6) == 513
