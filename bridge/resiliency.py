"""Whether a version of nvidia-resiliency-ext is one that Megatron-Core takes: standard library only, for launchers."""

from importlib.metadata import PackageNotFoundError, version

PACKAGE = "nvidia-resiliency-ext"
LEAST = (0, 6)
"""On an older one the import of Megatron-Core 0.19.2 fails: it has no ``__version__``.

pip takes 0.4.1 where the libc is older than 2.39.
"""


def installed() -> str | None:
    """The version in this Python; None where there is none."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


def is_too_old(found: str) -> bool:
    """Whether Megatron-Core fails on this version."""
    return tuple(map(int, found.split(".")[:2])) < LEAST
