from pathlib import Path

import pytest

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.hardware import load_hardware, share_of_rank, shipped_profiles
from hetegen_rec.config.plan import PlanConfig, World

CUDA = """
device: cuda
device_memory_gb: 10.0
device_bandwidth_gbs: 100.0
fp32_tflops: 1.0
bf16_tflops: 2.0
intra_host_gbs: 20.0
inter_host_gbs: 4.0
host_device_gbs: 8.0
host_memory_gb: 64.0
host_bandwidth_gbs: 80.0
devices_per_host: 4
"""


def test_every_shipped_profile_loads_and_names_its_sources() -> None:
    assert shipped_profiles() == ["a100", "cpu", "h100", "h200"]
    directory = Path(__file__).parents[2] / "hetegen_rec" / "config" / "profiles"
    for name in shipped_profiles():
        assert load_hardware(name).host_memory_gb > 0
        lines = (directory / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        figures = [line for line in lines if not line.startswith(("#", "device:"))]
        assert all(" # " in line for line in figures), name


def test_a_rank_of_a_device_has_the_device_and_its_share_of_the_host(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(CUDA, encoding="utf-8")
    rank = share_of_rank(load_hardware(str(path)), 4, "bf16")
    assert (rank.flops, rank.memory_bandwidth, rank.inter_host) == (2e12, 100e9, 4e9)
    assert rank.host_bandwidth == 20e9


def test_ranks_of_a_host_without_devices_share_all_of_it() -> None:
    profile = load_hardware("cpu")
    one, four = share_of_rank(profile, 1, "fp32"), share_of_rank(profile, 4, "fp32")
    assert one.flops == 4 * four.flops
    assert one.inter_host == 4 * four.inter_host


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("fp32_tflops: 1.0", "fp32_tflops: fast"), "fp32_tflops: .*'fast'"),
        (("host_memory_gb: 64.0", ""), "host_memory_gb: is missing"),
        (("intra_host_gbs: 20.0", ""), "`intra_host_gbs` is missing; `device: cuda` needs it"),
        (
            ("inter_host_gbs", "inter_hosts_gbs"),
            "inter_hosts_gbs: unknown key .*did you mean `inter_host_gbs`",
        ),
        (("device: cuda", "device: cpu"), "`device_memory_gb: 10.0` has no effect with `device: cpu`"),
    ],
)
def test_a_wrong_profile_names_file_and_key(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(CUDA.replace(*change), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"(?s)plan.hardware: .*mine.yaml.*{message}"):
        load_hardware(str(path))


def test_an_unknown_profile_lists_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match=r"plan\.hardware: b900 is neither .*a100, cpu, h100, h200"):
        load_hardware("b900")


def test_a_profile_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"# \xe9\n" + CUDA.encode())
    with pytest.raises(ConfigError, match=r"mine\.yaml is neither .* nor a file that can be read: invalid"):
        load_hardware(str(path))


@pytest.mark.parametrize("world", ["8", "2x", "0x8", "2x8x2", "two"])
def test_a_world_is_hosts_times_ranks(world: str) -> None:
    assert PlanConfig(world="2x8").parsed_world == World(2, 8)
    with pytest.raises(ValueError, match="HOSTSxRANKS"):
        PlanConfig(world=world)
