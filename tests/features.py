"""The table of features in docs/parallelism.md, parsed."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "parallelism.md"


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    feature: str
    model: dict[str, Any]
    ddp: dict[str, Any]
    torch: str
    transformer_engine: str

    @classmethod
    def read(cls, line: str) -> "Row":
        feature, settings, torch, engine = (cell.strip() for cell in line.strip("| \n").split("|"))
        fields: dict[str, dict[str, Any]] = {"model": {}, "ddp": {}}
        for owner, name, value in re.findall(r"`(model|ddp)\.(\w+)=(.+?)`", settings):
            fields[owner][name] = ast.literal_eval(value)
        return cls(feature, **fields, torch=torch, transformer_engine=engine)


ROWS = [
    Row.read(line)
    for line in PAGE.read_text().partition("## What works where")[2].partition("\n## ")[0].splitlines()
    if re.match(r"\|.*`(model|ddp)\.", line)
]


def rows(**said: str) -> list:
    """The rows with these words in their columns."""
    return [
        pytest.param(row, id=row.feature)
        for row in ROWS
        if all(getattr(row, column) == word for column, word in said.items())
    ]
