import time
from typing import Any

import pytest
import torch.distributed as dist
from multirank import RanksFailedError, run_ranks

from hetegen_rec.config import ConfigError
from hetegen_rec.distributed.runtime import DistributedError, start_runtime


def _fail_on_rank_1(rank: int) -> None:
    if rank == 1:
        raise KeyError("row group 7")


def _two_ranks() -> dict[str, Any]:
    seen: dict[str, Any] = {}
    with start_runtime("cpu", timeout_seconds=20) as runtime:
        seen["place"] = (runtime.rank, runtime.world_size, runtime.local_world_size, runtime.is_main)
        seen["gathered"] = runtime.gather({"rank": runtime.rank})
        seen["broadcast"] = runtime.broadcast(f"from {runtime.rank}")
        try:
            with runtime.together("reading footers"):
                _fail_on_rank_1(runtime.rank)
        except (KeyError, DistributedError) as error:
            seen["error"] = f"{type(error).__name__}: {error}"
        with runtime.together("nothing fails"):
            seen["alive"] = True
    return seen


def test_ranks_agree_and_a_failure_of_one_is_raised_on_all() -> None:
    first, second = run_ranks(2, _two_ranks)
    assert first["place"] == (0, 2, 2, True)
    assert second["place"] == (1, 2, 2, False)
    assert first["gathered"] == second["gathered"] == [{"rank": 0}, {"rank": 1}]
    assert first["broadcast"] == second["broadcast"] == "from 0"
    assert second["error"] == "KeyError: 'row group 7'"
    assert first["error"] == "PeerFailedError: reading footers failed on rank 1: KeyError: 'row group 7'"
    assert first["alive"]
    assert second["alive"]


def _never_end() -> None:
    time.sleep(600)


def test_helper_ends_ranks_that_hang() -> None:
    with pytest.raises(RanksFailedError, match="not done after 2"):
        run_ranks(2, _never_end, timeout=2)


def test_alone_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with start_runtime("cpu") as runtime:
        assert (runtime.rank, runtime.world_size, runtime.device.type) == (0, 1, "cpu")
        assert runtime.gather(5) == [5]
        with pytest.raises(ValueError, match="bad row"), runtime.together("reading"):
            raise ValueError("bad row")
        with pytest.raises(DistributedError, match="running already"), start_runtime("cpu"):
            pass
    assert not dist.is_initialized()


def test_group_ends_when_the_body_fails() -> None:
    with pytest.raises(RuntimeError, match="body"), start_runtime("cpu"):
        raise RuntimeError("body")
    assert not dist.is_initialized()


def test_cuda_without_a_gpu_names_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"distributed\.device: cuda"), start_runtime("cuda"):
        pass


def test_half_a_launcher_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(DistributedError, match=r"WORLD_SIZE.*MASTER_PORT.*torchrun"), start_runtime("cpu"):
        pass
