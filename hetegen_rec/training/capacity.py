"""`hetegen plan`: a run laid out for a cluster that need not exist, without data, devices or ranks."""

import logging
from dataclasses import dataclass
from pathlib import Path

from torchrec.distributed.types import ShardingPlan

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.hardware import HardwareProfile, load_hardware
from hetegen_rec.config.plan import World
from hetegen_rec.config.run import RunConfig, Stage
from hetegen_rec.config.schema import Schema
from hetegen_rec.data.expected import expected_statistics, values_per_row
from hetegen_rec.data.manifest import MANIFEST_FILE, read_manifest, schema_fingerprint
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.distributed.capacity import (
    Setting,
    cluster_of,
    fits,
    hot_spot,
    largest_rows,
    memory_by_rank,
    step_time,
    traffic_by_collective,
)
from hetegen_rec.distributed.optimizers import attach_table_optimizer
from hetegen_rec.distributed.planning import PlannedTable, PlanningError, make_plan, plan_summary
from hetegen_rec.distributed.traffic import TableLoad, blocks_of, replicated
from hetegen_rec.evaluation.capacity import CapacityReport
from hetegen_rec.models.embedding import table_shapes
from hetegen_rec.models.footprint import Footprint, measure_footprint
from hetegen_rec.models.hetegen import HeteGen
from hetegen_rec.training.setup import model_of

logger = logging.getLogger(__name__)

_ID, _FLOAT, _LENGTH = 8, 4, 4  # bytes


@dataclass(frozen=True)
class _Run:
    """What is planned, besides the rows of a step."""

    config: RunConfig
    stage: Stage
    world: World
    profile: HardwareProfile
    model: HeteGen
    footprint: Footprint
    loads: list[TableLoad]


@dataclass(frozen=True)
class CapacityPlan:
    """A stage laid out for a cluster."""

    stage: Stage
    report: CapacityReport
    sharding: ShardingPlan
    """Where each table goes there."""


def plan_capacity(config: RunConfig, stage: Stage) -> CapacityPlan:
    """Plans the tables of a stage for `plan.world` ranks on `plan.hardware`, and estimates its steps.

    Table sizes come from prepared data where there are any for this schema, else from the schema.

    Raises:
        ConfigError: a table's size is not known, or the world does not fit the hardware or the batch.
        PlanningError: the tables do not fit.
    """
    profile, world = load_hardware(config.plan.hardware), config.plan.parsed_world
    rows = _rows_per_rank(config, world, profile)
    statistics, source = _statistics(config)
    run = _describe(config, stage, statistics, world, profile)
    setting, lines, sharding = _plan(run, rows)
    memory = memory_by_rank(setting, rows)
    largest = _largest_rows(run, setting)
    report = CapacityReport(
        run=config.name,
        stage=stage,
        hardware=config.plan.hardware,
        profile=profile,
        world=config.plan.world,
        sizes_from=source,
        batch_size=rows * world.size,
        precisions=(config.train.precision, setting.forward, setting.backward),
        plan=lines,
        memory=memory,
        cap=setting.cap,
        host_cap=setting.host_cap,
        fits=fits(setting, memory),
        traffic=traffic_by_collective(setting, rows),
        hot_spot=hot_spot(setting),
        time=step_time(setting, rows),
        flops_per_rank=run.footprint.flops.at(rows),
        dense_parameters=run.footprint.parameters,
        largest_batch=largest * world.size,
        time_of_largest=step_time(setting, largest) if largest else None,
    )
    return CapacityPlan(stage, report, sharding)


def table_loads(schema: Schema, statistics: Statistics, model_dim: int) -> list[TableLoad]:
    """What an average row asks of every table."""
    per_row = values_per_row(schema, statistics)
    return [
        TableLoad(
            shape.name,
            shape.num_rows,
            shape.dim,
            num_keys=len(schema.tokens_on(shape.name)),
            ids=sum(per_row[field.name] for field in schema.fields if field.table_name == shape.name),
        )
        for shape in table_shapes(schema, statistics, model_dim)
    ]


def _rows_per_rank(config: RunConfig, world: World, profile: HardwareProfile) -> int:
    if world.local_size > profile.devices_per_host:
        raise ConfigError(
            f"plan.world: {config.plan.world} has {world.local_size} ranks on a host, but the hosts of "
            f"plan.hardware: {config.plan.hardware} have {profile.devices_per_host}; take more hosts"
        )
    batch = config.train.batch_size
    if batch % world.size:
        raise ConfigError(
            f"train.batch_size: {batch} must be divisible by the {world.size} ranks of plan.world: "
            f"{config.plan.world}; set it to {max(1, round(batch / world.size)) * world.size}"
        )
    return batch // world.size


def _statistics(config: RunConfig) -> tuple[Statistics, str]:
    """Of prepared data for this schema, or what the schema says; and which of them."""
    directory = Path(config.data.prepared_dir)
    if not (directory / MANIFEST_FILE).exists():
        reason = "holds no prepared data"
    elif read_manifest(directory).schema_fingerprint == schema_fingerprint(config.features):
        return Statistics.load(directory), "prepared data"
    else:
        reason = "was prepared for another schema"
    logger.info("%s %s: the schema alone says how large tables are", directory, reason)
    return expected_statistics(config.features, config.plan.expected_values), "the schema"


def _describe(
    config: RunConfig, stage: Stage, statistics: Statistics, world: World, profile: HardwareProfile
) -> _Run:
    model = model_of(config, stage, statistics)
    attach_table_optimizer(model.ebc, config.train.table_optimizer, config.stage(stage), profile.device)
    footprint = measure_footprint(model.network, config.features, statistics, profile.device)
    loads = table_loads(config.features, statistics, config.model.dim)
    return _Run(config, stage, world, profile, model, footprint, loads)


def _plan(run: _Run, rows: int) -> tuple[Setting, list[PlannedTable], ShardingPlan]:
    """The plan for so many rows a rank, with what its costs depend on."""
    config, profile = run.config, run.profile
    cluster = cluster_of(profile, run.world, config.distributed)
    plan = make_plan(run.model, config.distributed, cluster, rows)
    setting = Setting(
        world=run.world,
        profile=profile,
        cap=cluster.device_bytes if profile.device == "cuda" else cluster.host_bytes_per_rank,
        host_cap=cluster.host_bytes_per_rank,
        blocks=blocks_of(plan, run.loads),
        copies=replicated(plan, run.loads),
        loads=run.loads,
        footprint=run.footprint,
        table_optimizer=config.train.table_optimizer,
        batch_row_bytes=_row_bytes(config.features, run.loads, len(config.frequencies(run.stage))),
        precision=config.train.precision,
        forward=config.distributed.forward_precision,
        backward=config.distributed.backward_precision,
    )
    return setting, plan_summary(plan, run.model), plan


def _row_bytes(schema: Schema, loads: list[TableLoad], num_frequencies: int) -> float:
    """Bytes of one row of a batch: its ids as a KJT and as `[T]`, `[T]` of each frequency, and itself."""
    per_token = _LENGTH + _ID + num_frequencies * _FLOAT
    of_row = _ID + 2 * _FLOAT  # row id, label and stratum
    return sum(load.ids for load in loads) * _ID + len(schema.tokens) * per_token + of_row


def _largest_rows(run: _Run, setting: Setting) -> int:
    """Rows of the largest step on a rank, in powers of two: past the estimate, then past the planner too."""
    rows = largest_rows(lambda count: fits(setting, memory_by_rank(setting, count)))
    while rows:
        try:
            planned, *_ = _plan(run, rows)
        except PlanningError:
            pass
        else:
            if fits(planned, memory_by_rank(planned, rows)):
                return rows
        rows //= 2
    return 0
