"""Peers: what they are told, and turns of a process of its own."""

import sys
from contextlib import ExitStack

import pytest

from benchmarks.throughput.click_log import write_click_log
from benchmarks.throughput.peers.process import PeerProcess, fuxictr_settings
from benchmarks.throughput.scenario import cases_of, load_scenario

LOOP = """
import json, sys
print("some library greets", flush=True)
print("ready", flush=True)
for number, _ in enumerate(sys.stdin):
    print(json.dumps({"seconds": [number + 0.5] * 2, "cpu_seconds": 0.25}), flush=True)
"""


def test_a_peer_takes_a_turn_whenever_it_is_told_and_ends_with_the_stack():
    with ExitStack() as stack:
        peer = PeerProcess([sys.executable, "-c", LOOP], stack)
        assert [peer.turn().seconds for _ in range(2)] == [[0.5, 0.5], [1.5, 1.5]]
        process = peer._process
        assert process.poll() is None
    assert process.poll() == 0


def test_a_peer_that_ends_is_told_with_its_exit_code():
    with ExitStack() as stack, pytest.raises(RuntimeError, match="exit code 3"):
        PeerProcess([sys.executable, "-c", "raise SystemExit(3)"], stack)


def test_a_peer_gets_the_sizes_of_the_model_that_it_stands_beside(tmp_path):
    small = ["log.fields=3", "log.table_rows=300", "log.rows=64", "train.batch_size=32"]
    ours, peer = cases_of(load_scenario("peers"), small)[2:4]
    assert (ours.measure, peer.measure, peer.against) == ("trainer", "fuxictr", ours.name)
    assert ours.config == peer.config
    settings = fuxictr_settings(peer, write_click_log(peer.log, tmp_path / "log.parquet"), 6, tmp_path)
    assert settings["model"] == "dcnv2"
    assert settings["fields"] == ["id_00", "id_01", "id_02"]
    assert (settings["table_rows"], settings["dim"], settings["batch_size"]) == (102, 16, 32)
    assert (settings["hidden"], settings["num_layers"], settings["steps"]) == ([256, 128, 64], 3, 6)
