"""Jobs of several processes as a person starts them, from a checkout."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from multirank import ends_of
from tiny_run import tiny_values, write_config, write_tiny

from hetegen_rec.cli import main
from hetegen_rec.launching.exit_codes import LOST_PEER

CHECKOUT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent


def start(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command,
        cwd=CHECKOUT,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_torchx_line_trains_on_two_ranks_with_appended_overrides(tmp_path):
    words = ["--config", str(write_tiny(tmp_path / "run")), "train.max_steps=3", "train.tensorboard=true"]
    job = ["torchx", "run", "dist.ddp", "-j", "1x2", "launch/pretrain.py", *words]
    result = start(job, HOME=str(tmp_path))
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert output.count("step 3 of 3") == 1, output  # rank 0 alone speaks
    assert output.count("Sharding plan") == 1
    for noise in ("FutureWarning", "DeprecationWarning", "is_fx_tracing", "Traceback", "INFO:"):
        assert noise not in output
    stage = tmp_path / "run" / "run" / "pretrain"
    assert (stage / "checkpoints" / "step-3" / "metadata.json").exists()
    assert list((stage / "tensorboard").iterdir())


def scratch(*words: str) -> None:
    """What every rank of `hetegen scratch` does."""
    sys.exit(main(["scratch", *words]))


def error_of_two_ranks(*words: str) -> str:
    """What two ranks say of one error, that of a user, on which both end."""
    ends = ends_of(2, scratch, *words)
    told = "".join(end.output for end in ends)
    assert {end.code for end in ends} in ({2}, {2, LOST_PEER}), told
    assert "Traceback" not in told
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, told
    return errors[0]


def test_many_ranks_tell_of_one_problem_once(tmp_path):
    """A training split with fewer rows than ranks, which all of them find."""
    values = tiny_values(tmp_path / "run")
    raw = tmp_path / "raw"
    raw.mkdir()
    row = {"label": [1], "timestamp": [5], "user_id": [3], "item_id": [4], "segment": ["a"], "intent": [2]}
    row |= {"tags": [["x"]], "price": [1.5], "history": [[4]]}
    values["data"] = {"prepared_dir": str(tmp_path / "prepared")}
    for split in ("train", "valid"):
        values["data"][split] = str(raw / f"{split}.parquet")
        pq.write_table(pa.table(row), values["data"][split])
    config = write_config(tmp_path / "run", values)
    assert "1 row(s) cannot be shared by 2 lanes" in error_of_two_ranks("--config", str(config))
    assert not (tmp_path / "run" / "run" / "scratch").exists()


def test_a_run_directory_that_cannot_be_made_is_named_with_its_key(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert main(["scratch", "--config", str(write_tiny(tmp_path)), f"run_dir={file}"]) == 2
    told = capsys.readouterr().err
    assert f"error: run_dir: {file}: cannot be made or written to" in told


def test_a_rank_that_fails_alone_ends_the_job_with_its_own_words(tmp_path):
    """A row group whose bytes rotted is met by one rank, in the middle of training."""
    words = ["--config", str(write_tiny(tmp_path)), "data.rows_per_group=300"]
    assert main(["prepare", *words]) == 0
    (shard,) = (tmp_path / "prepared" / "train").glob("*.parquet")
    chunk = pq.ParquetFile(shard).metadata.row_group(5).column(0)
    content = bytearray(shard.read_bytes())
    start_of_page = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start_of_page : start_of_page + chunk.total_compressed_size] = (
        b"\xff" * chunk.total_compressed_size
    )
    shard.write_bytes(content)
    assert f"{shard}, row group 5: cannot be read" in error_of_two_ranks(*words)


def test_a_training_that_was_asked_to_stop_goes_on_where_it_was(tmp_path, capsys):
    values = tiny_values(tmp_path)
    values["stages"] = {"scratch": {"epochs": 5, "patience": None}}
    values["checkpoints"] = {"every_steps": 10}
    config, stage = write_config(tmp_path, values), tmp_path / "run" / "scratch"
    command = [sys.executable, "-m", "hetegen_rec.cli", "scratch", "--config", str(config), "--ranks", "2"]
    output = tmp_path / "output.txt"
    with output.open("w") as file, subprocess.Popen(command, cwd=CHECKOUT, stdout=file, stderr=file) as job:
        deadline = time.monotonic() + 120
        while not (stage / "checkpoints" / "step-10" / "metadata.json").exists():
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        assert job.wait(120) == 0, output.read_text()
    assert "stopped by SIGTERM after step " in output.read_text()
    assert not (stage / "done.json").exists()
    assert main(["scratch", "--config", str(config)]) == 0  # on one rank
    assert "scratch goes on from " in capsys.readouterr().err
    assert (stage / "done.json").exists()
