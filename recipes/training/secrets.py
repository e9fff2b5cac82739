"""Values of secrets, such as API keys, do not reach a script, a log or a page."""

import re
from collections.abc import Mapping
from typing import Any

_SECRET_NAME = re.compile(r"api_?key|password|passwd|secret|credential|auth|access_key|(^|[._-])token$", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
HIDDEN = "(not shown)"


def without_secret(key: str, value: Any) -> Any:
    """The value of a setting; hidden where the key is that of a secret, and without the user in a URL."""
    if value and _SECRET_NAME.search(key):
        return HIDDEN
    if isinstance(value, str):
        return _USER_IN_URL.sub(HIDDEN, value)
    if isinstance(value, Mapping):
        return {name: without_secret(str(name), item) for name, item in value.items()}
    return [without_secret("", item) for item in value] if isinstance(value, list) else value
