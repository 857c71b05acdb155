"""Hardware profiles: what vendors say of the hosts that a plan is for, and what of it counts as usable."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError, model_validator

from hetegen_rec.config.errors import ConfigError, Section
from hetegen_rec.config.loading import explain, parse_yaml

_GIGA, _TERA = 1e9, 1e12
_OF_DEVICES = ("device_memory_gb", "device_bandwidth_gbs", "intra_host_gbs", "host_device_gbs")
_PROFILES = resources.files("hetegen_rec.config").joinpath("profiles")

Share = Annotated[float, Field(gt=0.0, le=1.0)]


class Assumptions(Section):
    """What software reaches of a vendor's figure. Assumed, not measured; set what you have seen."""

    compute: Share = 0.35
    """Of the peak FLOP/s, by the dense part: small matrices and many element-wise steps."""
    memory: Share = 0.6
    """Of the memory bandwidth, by the lookup and update of table rows at random places."""
    links: Share = 0.7
    """Of the bandwidth of every link, by collectives."""
    activations: Annotated[float, Field(ge=1.0)] = 1.3
    """Peak memory of the network relative to what its forward pass keeps: gradients and temporaries."""
    reserve_gb: NonNegativeFloat = 3.0
    """Device memory that the driver, the collectives and a fragmented allocator keep."""


class HardwareProfile(Section):
    """One kind of host. Giga and tera are powers of ten; bandwidths are of one direction."""

    device: Literal["cpu", "cuda"]
    """`cuda`: figures are per device unless they say host. `cpu`: all are of the host, whose ranks share."""
    fp32_tflops: PositiveFloat
    bf16_tflops: PositiveFloat
    """Dense, without sparsity."""
    inter_host_gbs: PositiveFloat
    """Network, per device; of `cpu` per host."""
    host_memory_gb: PositiveFloat
    host_bandwidth_gbs: PositiveFloat
    devices_per_host: PositiveInt
    """Most ranks on a host."""
    device_memory_gb: PositiveFloat | None = None
    device_bandwidth_gbs: PositiveFloat | None = None
    intra_host_gbs: PositiveFloat | None = None
    """Between two devices of a host, such as NVLink."""
    host_device_gbs: PositiveFloat | None = None
    """Between host and device, such as PCIe."""
    assumptions: Assumptions = Assumptions()

    @model_validator(mode="after")
    def _check(self) -> "HardwareProfile":
        for key in _OF_DEVICES:
            if self.device == "cuda" and getattr(self, key) is None:
                raise ValueError(f"`{key}` is missing; `device: cuda` needs it")
        if self.device == "cpu":
            self._refuse_unused("with `device: cpu`", *_OF_DEVICES)
        return self


@dataclass(frozen=True)
class RankHardware:
    """One rank's share of a host, in bytes, bytes per second and FLOP per second, as vendors state them."""

    flops: float
    memory_bandwidth: float
    """Of the memory that holds its tables."""
    intra_host: float
    inter_host: float
    host_device: float
    """Infinite where tables and network are in the host's memory anyway."""
    host_bandwidth: float


def share_of_rank(profile: HardwareProfile, ranks_per_host: int, precision: str) -> RankHardware:
    """What one rank has.

    Args:
        profile: of the hosts.
        ranks_per_host: that share what belongs to the host.
        precision: of the dense part, `fp32` or `bf16`.
    """
    flops = (profile.bf16_tflops if precision == "bf16" else profile.fp32_tflops) * _TERA
    host = profile.host_bandwidth_gbs * _GIGA / ranks_per_host
    if profile.device == "cpu":
        return RankHardware(
            flops=flops / ranks_per_host,
            memory_bandwidth=host,
            intra_host=host / 2,  # a copy reads and writes
            inter_host=profile.inter_host_gbs * _GIGA / ranks_per_host,
            host_device=float("inf"),
            host_bandwidth=host,
        )
    return RankHardware(
        flops=flops,
        memory_bandwidth=(profile.device_bandwidth_gbs or 0.0) * _GIGA,
        intra_host=(profile.intra_host_gbs or 0.0) * _GIGA,
        inter_host=profile.inter_host_gbs * _GIGA,
        host_device=(profile.host_device_gbs or 0.0) * _GIGA,
        host_bandwidth=host,
    )


def shipped_profiles() -> list[str]:
    """Names that `load_hardware` knows."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _PROFILES.iterdir() if entry.is_file())


def load_hardware(name: str) -> HardwareProfile:
    """A shipped profile, or one from a YAML file.

    Raises:
        ConfigError: there is no such profile, or it is wrong; the message names the key.
    """
    try:
        if name in shipped_profiles():
            text = _PROFILES.joinpath(f"{name}.yaml").read_text(encoding="utf-8")
        else:
            text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.reason
        raise ConfigError(
            f"plan.hardware: {name} is neither a shipped profile ({', '.join(shipped_profiles())}) nor a "
            f"file that can be read: {reason}"
        ) from error
    values = parse_yaml(text, f"plan.hardware: {name}")
    try:
        return HardwareProfile.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, f"plan.hardware: {name}", HardwareProfile)) from error
