"""A job of two nodes whose cable is cut in the middle of training, and mended."""

import json
import re
import subprocess
import time
from pathlib import Path

import pytest
from tiny_run import tiny_values, write_config
from two_nodes import Nodes, two_nodes, why_not

TIMEOUT_SECONDS = 10
LIMIT_SECONDS = 150  # for one start of the job, on a busy machine


def write_run(directory: Path) -> Path:
    values = tiny_values(directory)
    values["stages"] = {"scratch": {"epochs": 8, "patience": None}}
    values["checkpoints"] = {"every_steps": 20}
    values["distributed"] = {"timeout_seconds": TIMEOUT_SECONDS, "device": "cpu"}
    return write_config(directory, values)


def start(nodes: Nodes, config: Path, attempt: str) -> list[subprocess.Popen[bytes]]:
    words = ["launch/scratch.py", "--config", str(config)]
    return [
        node.torchrun(words, config.parent / f"{attempt}-{node.index}.txt")
        for node in (nodes.first, nodes.second)
    ]


def wait_for_step(stage: Path, step: int) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (stage / f"checkpoints/step-{step}/metadata.json").exists():
        assert time.monotonic() < deadline, f"no checkpoint of step {step}"
        time.sleep(0.1)


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_both_nodes_tell_of_a_cut_cable_and_the_same_commands_go_on(tmp_path):
    config, stage = write_run(tmp_path), tmp_path / "run" / "scratch"
    with two_nodes() as nodes:
        agents = start(nodes, config, "first")
        wait_for_step(stage, 40)
        nodes.cut()
        codes = [agent.wait(LIMIT_SECONDS) for agent in agents]
        outputs = [(tmp_path / f"first-{index}.txt").read_text() for index in range(2)]
        for rank, (code, output) in enumerate(zip(codes, outputs, strict=True)):
            assert code != 0, output
            assert re.search(rf"error: rank {rank} (stood still for|lost another rank)", output), output
        assert not (stage / "done.json").exists()

        nodes.mend()
        agents = start(nodes, config, "second")
        codes = [agent.wait(LIMIT_SECONDS) for agent in agents]
    outputs = [(tmp_path / f"second-{index}.txt").read_text() for index in range(2)]
    assert codes == [0, 0], "\n".join(outputs)
    assert "scratch goes on from " in outputs[0]
    assert json.loads((stage / "done.json").read_text())["steps"] == 80
