"""Components for `torchx run`, registered under `dist` in place of torchx's own.

`dist.ddp` differs from the built-in one of torchx in four ways: the script may stand as the first
positional argument, as in `torchx run dist.ddp -j 2x8 launch/pretrain.py key=value`; two jobs on one
host do not meet on one fixed port; a replica asks for memory that a sharded job can live in; and torchrun
may start ranks again, on the hosts that are there, and passes Slurm's early notice on to them.
"""

# ruff: noqa: UP006, UP035, UP045 - torchx parses these annotations and knows the old spelling only.

from typing import Dict, List, Optional

import torchx
from torchx import specs
from torchx.components import dist
from torchx.specs.finder import ComponentValidationException

from hetegen_rec.launching.ports import choose_port

# Where torchrun looks for its options when the command line is silent about them.
_MAX_RESTARTS = "PET_MAX_RESTARTS"
_SIGNALS = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"}

# With a store that torchrun shares between attempts, a host that joins later waits for an address in vain,
# and a rank that starts early finds dead ones (pytorch/pytorch#135712).
_NEW_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def ddp(
    *script_args: str,
    script: Optional[str] = None,
    m: Optional[str] = None,
    image: str = torchx.IMAGE,
    name: str = "/",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    j: str = "1x2",
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    max_restarts: int = 0,
    rdzv_port: int = 0,
    rdzv_backend: str = "c10d",
    mounts: Optional[List[str]] = None,
    debug: bool = False,
    tee: int = 3,
) -> specs.AppDef:
    """Runs a script on every rank of one or several hosts, through torchrun.

    Options stand before the script: torchx run dist.ddp -j 2x8 launch/pretrain.py train.max_steps=4

    Args:
        script_args: the script, unless --script or -m names the program, and its arguments
        script: script to run, instead of the first positional argument
        m: Python module to run, instead of a script
        image: image that the job runs in, e.g. of docker; a directory for local schedulers
        name: name of the job, {experiment}/{run}; by default the script's
        h: a registered named resource, instead of cpu, gpu and memMB
        cpu: cores of a replica (a host)
        gpu: GPUs of a replica
        memMB: memory of a replica in MB
        j: [{min_hosts}:]{hosts}x{processes per host}; with min_hosts, hosts may go and join while it runs
        env: environment variables of the job, as K1=V1,K2=V2; OMP_NUM_THREADS is 1 unless given here
        max_retries: times that the scheduler may start the whole job again
        max_restarts: times that torchrun may start the processes again when one fails, within the job
        rdzv_port: port on the first host where the hosts meet; 0 chooses one that is free on this
            machine. Set it where a firewall between hosts opens certain ports only.
        rdzv_backend: how the hosts meet
        mounts: mounts of the container, e.g. type=bind,src=/host,dst=/job,readonly
        debug: set the debugging variables of torch, NCCL and CUDA
        tee: streams that go to the console as well as to files; 0 none, 1 stdout, 2 stderr, 3 both
    """
    arguments = list(script_args)
    if script is None and m is None:
        if not arguments:
            raise ComponentValidationException(
                "no script to run; name it behind the options, as in "
                "`torchx run dist.ddp -j 1x2 launch/pretrain.py`"
            )
        script = arguments.pop(0)
        if arguments[:1] == ["--"]:
            arguments.pop(0)
    env = {**_SIGNALS, **_NEW_STORE, _MAX_RESTARTS: str(max_restarts), **(env or {})}
    try:
        processes_per_host = dist.parse_nnodes(j)[2]
    except ValueError as error:
        raise ComponentValidationException(
            f"-j {j}: no number of hosts and processes; give HOSTSxPROCESSES, as in `-j 2x8`"
        ) from error
    if processes_per_host > 1:
        # The value that torchrun would choose itself, without its warning on every host.
        env.setdefault("OMP_NUM_THREADS", "1")
    return dist.ddp(
        *arguments,
        script=script,
        m=m,
        image=image,
        name=name,
        h=h,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        j=j,
        env=env,
        max_retries=max_retries,
        rdzv_port=rdzv_port or choose_port(),
        rdzv_backend=rdzv_backend,
        mounts=mounts,
        debug=debug,
        tee=tee,
    )
