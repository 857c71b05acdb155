"""A sharding plan, as it is printed."""

from rich.console import Console

from hetegen_rec.distributed.planning import PlannedTable
from hetegen_rec.evaluation.capacity import plan_table


def test_a_table_on_many_ranks_is_a_short_line():
    plan = [
        PlannedTable("item", 1_000_000, 16, "row_wise", "fused", tuple(range(256)), 61.04),
        PlannedTable("user", 500, 16, "column_wise", "fused", (3, 7), 0.03),
    ]
    console = Console(width=100)
    with console.capture() as capture:
        console.print(plan_table(plan, "Sharding plan"))
    printed = capture.get()
    assert "0-255" in printed
    assert "3, 7" in printed
    assert len(printed.splitlines()) == 7
