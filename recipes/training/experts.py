"""Tokens per expert and modality in a file of the run: of the last interval, and how routing has changed until then."""

import json
from pathlib import Path
from typing import Any

import torch

from ...bridge.mcore.router_statistics import MODALITIES, entropy, overlap

EXPERTS = "experts.json"


def keep_expert_counts(folder: Path, counts: torch.Tensor, step: int) -> None:
    """Replace the counts in ``experts.json`` and add a step to its history.

    The history has a row per log interval: the step; of text and visual tokens, the entropy as a share of that of
    equal loads; and their overlap; means over all layers, None for a modality without tokens.

    Args:
        folder: of the run.
        counts: ``[layers, 2, experts]``, text before visual.
        step: the last of the interval. Steps from it on, of a run that was killed, are dropped.
    """
    experts = torch.tensor(float(counts.shape[-1]))
    means = [(entropy(counts[:, index]) / experts.log()).mean().item() for index in range(len(MODALITIES))]
    row = [step, *(_rounded(mean) for mean in (*means, overlap(counts).mean().item()))]
    history = [each for each in read_expert_counts(folder).get("history", []) if each[0] < step]
    content = {"step": step, "tokens_per_expert": counts.tolist(), "history": [*history, row]}
    partial = folder / f"{EXPERTS}.partial"
    partial.write_text(json.dumps(content))
    partial.replace(folder / EXPERTS)


def read_expert_counts(folder: Path) -> dict[str, Any]:
    """What `keep_expert_counts` has written; nothing before the first interval."""
    file = folder / EXPERTS
    return json.loads(file.read_text()) if file.exists() else {}


def _rounded(value: float) -> float | None:
    return None if value != value else round(value, 4)
