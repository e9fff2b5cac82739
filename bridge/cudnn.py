"""The first releases of cuDNN whose fused attention supports learnable sinks, as `cudnnGetVersion` numbers them."""

WITH_SINKS = 91301
WITH_PACKED_SINKS = 91800


def spelled(version: int) -> str:
    """A version as it is written, ``9.13.1``."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def number(version: str) -> int:
    """The number of a version such as ``9.19.0.56``."""
    major, minor, patch = (int(part) for part in [*version.split("."), "0", "0"][:3])
    return major * 10000 + minor * 100 + patch
