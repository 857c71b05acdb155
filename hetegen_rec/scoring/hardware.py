"""The processor that compiled code needs, and whether this machine has it."""

import platform
from pathlib import Path

from hetegen_rec.config.errors import Section

_CPU_INFO = Path("/proc/cpuinfo")
_EXTENSIONS = (
    "sse",
    "ssse",
    "avx",
    "amx",
    "fma",
    "f16c",
    "bmi",
    "popcnt",
    "movbe",
    "vaes",
    "gfni",
    "asimd",
    "sve",
)
"""How the names of instruction sets begin, among the flags that Linux lists."""


class Hardware(Section):
    """A processor, as compiled code sees it."""

    machine: str
    """Such as x86_64."""
    extensions: list[str]
    """Instruction sets, by the names that Linux gives them; empty where it does not say."""

    def missing_on(self, other: "Hardware") -> list[str]:
        """What this processor has and another lacks."""
        if self.machine != other.machine:
            return [self.machine]
        return sorted(set(self.extensions) - set(other.extensions))


def this_hardware() -> Hardware:
    """The processor of this machine."""
    return Hardware(machine=platform.machine(), extensions=sorted(_extensions()))


def _extensions() -> set[str]:
    if not _CPU_INFO.exists():
        return set()
    for line in _CPU_INFO.read_text(encoding="utf-8").splitlines():
        key, _, flags = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return {flag for flag in flags.split() if flag.startswith(_EXTENSIONS)}
    return set()
