"""`torchx run dist.ddp`: what the component returns, and that a job of two hosts runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torchx.specs import AppDef
from torchx.specs.builders import materialize_appdef
from torchx.specs.finder import ComponentValidationException, get_component, get_components

from hetegen_rec.launching import components, ports

CHECKOUT = Path(__file__).parents[2]

PROBE = """
import sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
print(f"rank {dist.get_rank()} counts {int(total)} ranks, arguments {sys.argv[1:]}", flush=True)
dist.destroy_process_group()
"""


def build(*arguments: str) -> AppDef:
    """The job that `torchx run dist.ddp ARGUMENTS` would submit."""
    return materialize_appdef(components.ddp, list(arguments))


def command(app: AppDef) -> str:
    flag, text = app.roles[0].args
    assert flag == "-c"
    return text


def test_first_positional_argument_is_the_script():
    app = build("-j", "2x8", "launch/pretrain.py", "--config", "configs/a.yaml", "train.max_steps=4")
    assert app.name == "pretrain"
    assert app.roles[0].num_replicas == 2
    assert "--nnodes 2 --nproc_per_node 8" in command(app)
    assert command(app).endswith("launch/pretrain.py --config configs/a.yaml train.max_steps=4")


@pytest.mark.parametrize(
    "arguments",
    [
        ("launch/pretrain.py", "--", "--config", "a.yaml", "x=1"),
        ("--", "launch/pretrain.py", "--config", "a.yaml", "x=1"),
        ("--script", "launch/pretrain.py", "--", "--config", "a.yaml", "x=1"),
    ],
)
def test_separator_never_reaches_the_script(arguments):
    assert command(build("-j", "1x2", *arguments)).endswith(" launch/pretrain.py --config a.yaml x=1")


def test_arguments_with_spaces_stay_whole():
    assert command(build("job.py", "name=two words")).endswith("job.py 'name=two words'")


def test_module_may_stand_in_place_of_a_script():
    assert command(build("-m", "package.main", "--", "--fast")).endswith("-m package.main --fast")


def test_missing_script_is_a_clear_error():
    with pytest.raises(ComponentValidationException, match="no script to run"):
        build("-j", "1x2")


@pytest.mark.parametrize("j", ["2by8", "x8", ""])
def test_malformed_size_of_the_job_is_a_clear_error(j):
    with pytest.raises(ComponentValidationException, match=f"-j {j}: no number of hosts and processes"):
        components.ddp("launch/pretrain.py", j=j)


def test_one_host_leaves_the_port_to_torchrun():
    assert "--rdzv_endpoint localhost:0" in command(build("-j", "1x2", "job.py"))


def test_two_jobs_on_one_host_meet_on_different_ports(monkeypatch):
    chosen = iter([20_001, 20_002])
    monkeypatch.setattr(components, "choose_port", lambda: next(chosen))
    first, second = (build("-j", "2x1", "job.py") for _ in range(2))
    assert ":20001 " in command(first)
    assert ":20002 " in command(second)
    assert second.roles[0].port_map == {"c10d": 20_002}


def test_port_can_be_fixed():
    assert ":29511 " in command(build("-j", "2x1", "--rdzv_port", "29511", "job.py"))


def test_elastic_range_and_resources_reach_the_scheduler():
    app = build("-j", "1:4x2", "--cpu", "8", "--gpu", "2", "--memMB", "64000", "--max_retries", "3", "job.py")
    role = app.roles[0]
    assert (role.min_replicas, role.num_replicas, role.max_retries) == (1, 4, 3)
    assert (role.resource.cpu, role.resource.gpu, role.resource.memMB) == (8, 2, 64000)
    assert "--nnodes 1:4" in command(app)


def test_given_environment_wins_over_the_default():
    assert build("-j", "1x2", "job.py").roles[0].env["OMP_NUM_THREADS"] == "1"
    assert build("-j", "1x2", "--env", "OMP_NUM_THREADS=3", "job.py").roles[0].env["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in build("-j", "1x1", "job.py").roles[0].env


def test_restarts_are_torchruns_and_not_the_schedulers():
    role = build("-j", "1:2x1", "--max_restarts", "3", "job.py").roles[0]
    assert (role.env["PET_MAX_RESTARTS"], role.max_retries) == ("3", 0)
    assert build("-j", "1x2", "job.py").roles[0].env["PET_MAX_RESTARTS"] == "0"


@pytest.mark.parametrize(
    "name", ["PET_SIGNALS_TO_HANDLE", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "PET_MAX_RESTARTS"]
)
def test_settings_of_torchrun_may_be_given_too(name):
    assert build("-j", "1x2", "--env", f"{name}=given", "job.py").roles[0].env[name] == "given"


def test_chosen_port_is_free_and_no_port_of_outgoing_connections(monkeypatch):
    busy = []

    def is_free(port: int) -> bool:
        busy.append(port)
        return len(busy) > 3

    monkeypatch.setattr(ports, "_is_free", is_free)
    assert ports.choose_port() == busy[3]
    assert all(1024 < port < 32_768 for port in busy)


def test_no_free_port_is_an_error(monkeypatch):
    monkeypatch.setattr(ports, "_is_free", lambda port: False)
    with pytest.raises(OSError, match="is free"):
        ports.choose_port()


def test_registered_beside_the_components_of_torchx():
    assert get_component("dist.ddp").fn is components.ddp
    assert {"dist.spmd", "utils.echo", "utils.python"} <= set(get_components())


def test_two_hosts_of_two_ranks_run_from_a_checkout(tmp_path):
    shutil.copy(CHECKOUT / ".torchxconfig", tmp_path)
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "probe.py").write_text(PROBE)
    programs = Path(sys.executable).parent
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["torchx", "run", "dist.ddp", "-j", "2x2", "launch/probe.py", "--config", "a.yaml", "key=value"],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    for rank in range(4):
        assert f"rank {rank} counts 4 ranks, arguments ['--config', 'a.yaml', 'key=value']" in output
    assert "OMP_NUM_THREADS" not in output
