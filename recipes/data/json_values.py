"""Values of JSON texts, of which no key is lost."""

import json
from collections.abc import Iterator
from typing import Any

from .pictures import UnusableRow


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        UnusableRow: it is malformed, or an object has a key twice.
    """
    try:
        text = content if isinstance(content, str) else content.decode(json.detect_encoding(content), "surrogatepass")
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise UnusableRow(f"malformed JSON ({error})") from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise UnusableRow(f"the key {json.dumps(next(key for key in keys if keys.count(key) > 1))} is there twice")
    return record


DECODER = json.JSONDecoder(object_pairs_hook=_without_repetition)
"""`json.loads` would make one for each text."""


def texts_in(value: Any) -> Iterator[str]:
    """The texts within a value of JSON; keys are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for held in value.values() if isinstance(value, dict) else value:
            yield from texts_in(held)
