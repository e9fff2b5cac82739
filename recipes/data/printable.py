"""Texts of data in messages: without what a terminal would carry out or cannot print."""

import re

LONGEST_REASON = 400
"""Characters of a reason; what it quotes may be as long as an image in base64."""
UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufffe\uffff\ud800-\udfff]"
)


def printable(text: str) -> str:
    """A text with visible signs for control characters, for those that change the direction, and half surrogates."""

    def sign(match: re.Match[str]) -> str:
        code = ord(match[0])
        return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else f"\\u{code:04x}"

    return UNPRINTABLE.sub(sign, text)


def reason_of(error: Exception) -> str:
    """The message of an error as a reason: printable, and of a limited length."""
    text = printable(str(error))
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}…"
