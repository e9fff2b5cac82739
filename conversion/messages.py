"""Parts of sentences that several refusals share."""

from collections.abc import Mapping
from pathlib import Path

from ..errors import UserError


def listed(names: list[str], shown: int = 5) -> str:
    """Names for a sentence: the first few, and how many more there are."""
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def refuse_mismatch(folder: Path, titles: Mapping[str, list[str]]) -> None:
    """Refuse a checkpoint for what is wrong with its tensors: names under titles, if any.

    Raises:
        ValueError: listing them.
    """
    said = [f"{title}: {listed(names)}" for title, names in titles.items() if names]
    if said:
        raise UserError(f"{folder} does not match its config. {'; '.join(said)}.")
