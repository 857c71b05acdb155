"""The back end `aoti`: compiled for one kind of processor, and the same scores."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from compiled_artifact import doctored
from tiny_artifact import raw_rows

from hetegen_rec.export.compile import require_compilers
from hetegen_rec.main import main
from hetegen_rec.scoring.errors import ArtifactError
from hetegen_rec.scoring.hardware import Hardware, this_hardware
from hetegen_rec.scoring.scorer import Scorer


@pytest.mark.parametrize("num_rows", [1, 2, 7, 512, 5000])
def test_scores_as_the_portable_network_does(num_rows, compiled):
    rows = raw_rows(num_rows)
    found = Scorer.load(compiled.root, backend="aoti").score(rows)
    expected = Scorer.load(compiled.root, backend="aten").score(rows)
    assert num_rows < 10 or expected.std() > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


def test_is_preferred_where_it_can_run(compiled):
    assert Scorer.load(compiled.root).backend == "aoti"


def test_scores_do_not_depend_on_the_number_of_threads(compiled):
    scorer, rows, threads = Scorer.load(compiled.root, backend="aoti"), raw_rows(600), torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(scorer.score(rows))
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_allclose(found[1:], [found[0]] * 2, atol=1e-6, rtol=0)


def test_threads_may_score_at_the_same_time(compiled):
    scorer = Scorer.load(compiled.root, backend="aoti")
    batches = [scorer.ids(raw_rows(50 + seed, seed)) for seed in range(16)]
    expected = [scorer.score_ids(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(scorer.score_ids, batches))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_compiling_leaves_no_temporary_files(compiled):
    assert compiled.left_over == []


def _of_another_processor(manifest: dict[str, Any]) -> None:
    manifest["backends"]["aoti"]["hardware"]["extensions"].append("avx1024")


def _of_another_machine(manifest: dict[str, Any]) -> None:
    manifest["backends"]["aoti"]["hardware"]["machine"] = "riscv128"


def _of_another_torch(manifest: dict[str, Any]) -> None:
    manifest["backends"]["aoti"]["libraries"]["torch"] = "2.1.0"


REFUSED = {
    "instruction set": (_of_another_processor, "compiled for another processor, with avx1024"),
    "architecture": (_of_another_machine, "compiled for another processor, with riscv128"),
    "torch": (_of_another_torch, r"compiled with torch 2\.1\.0, but .* is installed"),
}


@pytest.mark.parametrize(("change", "told"), REFUSED.values(), ids=list(REFUSED))
def test_refuses_what_it_was_not_compiled_for(
    change: Callable[[dict[str, Any]], None], told: str, compiled, tmp_path, capsys
):
    root = doctored(compiled, tmp_path, change)
    with pytest.raises(ArtifactError, match=told):
        Scorer.load(root, backend="aoti")
    assert Scorer.load(root).backend == "aten"  # which runs anywhere

    pq.write_table(pa.Table.from_pylist(raw_rows(3)), tmp_path / "rows.parquet")
    files = [str(tmp_path / "rows.parquet"), str(tmp_path / "scores.parquet")]
    assert main(["score", "--backend", "aoti", str(root), *files]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_says_so_where_no_back_end_can_run(compiled, tmp_path):
    def only_a_foreign_one(manifest: dict[str, Any]) -> None:
        _of_another_processor(manifest)
        del manifest["backends"]["aten"]

    with pytest.raises(ArtifactError, match=r"no back end can run here: aoti: .* avx1024"):
        Scorer.load(doctored(compiled, tmp_path, only_a_foreign_one))


def test_an_export_without_a_compiler_is_refused_before_it_begins(rich_run, tmp_path, capsys):
    target = tmp_path / "artifact"
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert rich_run.hetegen("export", "export.backends=[aten,aoti]", "--output", str(target)) == 2
        require_compilers(["aten", "fbgemm"])  # need none
    error = capsys.readouterr().err
    assert "error: `export.backends` names aoti" in error
    assert "install g++" in error
    assert not target.exists()


HARDWARE = {
    "the same": (Hardware(machine="x86_64", extensions=["avx", "avx2"]), []),
    "a larger one": (Hardware(machine="x86_64", extensions=["amx_bf16", "avx", "avx2"]), []),
    "a smaller one": (Hardware(machine="x86_64", extensions=["avx"]), ["avx2"]),
    "another architecture": (Hardware(machine="aarch64", extensions=["asimd"]), ["x86_64"]),
}


@pytest.mark.parametrize(("other", "missing"), HARDWARE.values(), ids=list(HARDWARE))
def test_what_another_processor_lacks(other, missing):
    assert Hardware(machine="x86_64", extensions=["avx", "avx2"]).missing_on(other) == missing


def test_a_machine_lacks_nothing_of_itself():
    assert this_hardware().missing_on(this_hardware()) == []
