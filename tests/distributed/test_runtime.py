import os
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from multirank import RanksFailedError, run_ranks
from torch._C._distributed_c10d import HashStore

from hetegen_rec.config import ConfigError
from hetegen_rec.distributed import runtime as runtime_module
from hetegen_rec.distributed.meeting import MeetingError
from hetegen_rec.distributed.runtime import DistributedError, LostPeerError, describe_loss, start_runtime


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


def _restarted_on_one_host() -> tuple[str, int]:
    """Rank 1 stands on a host that was added to the job after the first restart."""
    rank = int(os.environ["RANK"])
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(1 - rank)
    os.environ["TORCHELASTIC_RUN_ID"] = "job-7"
    with start_runtime("cpu", timeout_seconds=20) as runtime:
        return runtime.job_id, runtime.restart_count


def test_ranks_agree_on_restarts_although_hosts_count_their_own() -> None:
    assert run_ranks(2, _restarted_on_one_host) == [("job-7", 1), ("job-7", 1)]


def _unnamed() -> str:
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    with start_runtime("cpu", timeout_seconds=20) as runtime:
        return runtime.job_id


def test_a_job_without_a_name_is_no_other_one() -> None:
    first, second = run_ranks(2, _unnamed)
    assert first == second
    assert run_ranks(1, _unnamed) != [first]


def _meet_nobody() -> str:
    os.environ["WORLD_SIZE"] = "3"
    try:
        with start_runtime("cpu", timeout_seconds=2 - 60):  # a minute is added
            return ""
    except LostPeerError as error:
        return str(error)


def test_ranks_that_do_not_come_are_no_traceback() -> None:
    (told,) = run_ranks(1, _meet_nobody)
    assert told.startswith("the ranks of the job did not come together: ")
    assert "1/3" in told


GLOO = "[/a/gloo/transport/tcp/"


@pytest.mark.parametrize(
    ("error", "loss"),
    [
        (
            RuntimeError(
                f"{GLOO}pair.cc:5] Connection closed by peer [::1]:3. This is typically caused by a"
            ),
            "Connection closed by peer [::1]:3",
        ),
        (
            RuntimeError(f"{GLOO}unbound_buffer.cc:81] Timed out waiting 20000ms for recv operation"),
            "Timed out waiting 20000ms for recv operation",
        ),
        (
            RuntimeError(f"Gloo connectFullMesh failed with {GLOO}pair.cc:1] Connection refused"),
            "Connection refused",
        ),
        (dist.DistNetworkError("the server is gone"), "the server is gone"),
        (MeetingError("rank 0 did not answer"), "rank 0 did not answer"),
        (
            dist.DistBackendError(
                "NCCL error in: a.cpp:5, remote process exited or there was a network error"
            ),
            "NCCL error in: a.cpp:5, remote process exited or there was a network error",
        ),
        (dist.DistBackendError("NCCL error in: a.cpp:5, invalid usage"), None),
        (RuntimeError("shapes do not fit: [3] and [4]"), None),
        (ValueError("unknown field"), None),
    ],
)
def test_loss_of_a_rank_is_told_from_other_errors(error, loss) -> None:
    assert describe_loss(error) == loss


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


def _store_that(add: Callable[[], int]) -> Any:
    return SimpleNamespace(add=lambda key, count: add())


def _unreachable() -> int:
    raise dist.DistNetworkError("Broken pipe")


def _cut_off() -> int:
    time.sleep(60)
    return 7


@pytest.mark.parametrize(
    ("add", "is_first"), [(lambda: 1, True), (lambda: 2, False), (_unreachable, True), (_cut_off, True)]
)
def test_the_first_rank_that_fails_tells_and_any_that_cannot_ask(add, is_first, monkeypatch) -> None:
    monkeypatch.setattr(runtime_module, "_STORE_SECONDS", 0.2)
    with start_runtime("cpu") as runtime:
        monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: _store_that(add))
        assert runtime.is_first_to_fail() == is_first


def test_groups_that_others_make_have_the_time_of_the_job() -> None:
    with start_runtime("cpu", timeout_seconds=77):
        for backend in ("gloo", "nccl"):
            found = dist.distributed_c10d._get_default_timeout(dist.Backend(backend))
            assert found.total_seconds() == 77 + 60


def test_ranks_with_other_devices_than_rank_0_do_not_join() -> None:
    store = HashStore()
    require = runtime_module._require_backend_of_rank_0
    require(store, 0, "nccl")
    require(store, 1, "nccl")
    with pytest.raises(ConfigError, match=r"rank 2 on .* would join through gloo, but rank 0 through nccl"):
        require(store, 2, "gloo")


def test_a_failed_rank_leaves_where_groups_end_together(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    with start_runtime("cpu") as runtime:
        on_devices = replace(runtime, device=torch.device("cuda", 0))
        for one in (runtime, replace(runtime, world_size=2), on_devices):
            one.leave(2)
        assert codes == []
        replace(on_devices, world_size=2).leave(2)
    assert codes == [2]


def test_group_ends_when_the_body_fails() -> None:
    with pytest.raises(RuntimeError, match="body"), start_runtime("cpu"):
        raise RuntimeError("body")
    assert not dist.is_initialized()


@pytest.mark.parametrize("variable", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_pinned_buffers_keep_their_size_unless_the_environment_says_otherwise(variable, monkeypatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setattr("torch._C._accelerator_setAllocatorSettings", told.append)
    if variable is not None:
        monkeypatch.setenv(variable, "expandable_segments:True")
    assert runtime_module._choose_device("auto", 1, 2) == torch.device("cuda", 1)
    assert told == ([] if variable else [runtime_module._PINNED_SIZES])


def test_pinned_buffers_that_are_not_rounded_are_not_used_again() -> None:
    limits = dict(setting.split(":") for setting in runtime_module._PINNED_SIZES.split(","))
    assert set(limits) == {"pinned_max_round_threshold_mb", "pinned_max_cached_size_mb"}
    (limit,) = {int(megabytes) for megabytes in limits.values()}
    assert limit.bit_count() == 1  # else sizes just below it would be rounded beyond it
    for name in limits:  # torch passes over names that it does not know, whatever their value
        with pytest.raises(ValueError, match="stoull"):
            torch._C._accelerator_setAllocatorSettings(f"{name}:many")


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
