"""Records of the formats in use to `Row`s: which keys a record may have, and every reason to refuse it.

A chat is in "messages", "conversations" or "conversation", with "role" and "content" or "from" and "value"; or in
"texts", with "user" and "assistant". Its images are parts of messages, or "image" or "images" of the record, whose
places are marks (`<image>`) or bare parts ({"type": "image"}); without either they stand in front of the first message
of the user. A text is in "text", and its images in "image" or "images".

A key whose value is null counts as absent. Other keys are ignored, except those that look like media, those that look
like a misspelt key of ours, and those of an answer or an instruction that is nowhere in the row: a model would learn
less than it was given, or what it should not say.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

from ...bridge.hf.processing_gpt_oss_vision import IMAGE_TAG
from .json_values import parse_json, texts_in
from .pictures import Picture, Pictures, UnusableRow, from_base64
from .rows import Row
from .tools import call_of, definitions_of, name_results

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")} | {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}
"""Names of roles in the formats, and ours."""

CHATS = ("messages", "conversations", "conversation")
KEYS = (*CHATS, "texts", "text", "image", "images", "system", "tools")
MESSAGE_KEYS = {"role", "content", "thinking", "name", "tool_calls", "tool_call_id"}
"""What a message may have; the template takes no other key."""
RENAMED = {"from": "role", "value": "content", "reasoning_content": "thinking"}
MEDIA = ("image", "img", "picture", "photo", "pixel", "media", "video", "audio")
"""How the names of keys begin that look like media."""
DESCRIBES = ("_id", "_ids", "_width", "_height", "_size", "_sizes", "_hash", "_source", "_license", "_min", "_ratings")
"""How the names of keys end that describe media."""
NAMES = ("id", "key", "source")
"""Keys of names of a row."""
ORIGINS = ("url", "name", "path")
"""How keys end that may hold the origin of a row's image."""
REFERENCES = ("image", "path", "url", "base64", "source", "image_url")
"""Keys of a part that hold its image."""
ENDINGS = tuple(
    f".{ending}"
    for kind in (
        "jpg jpeg jpe jfif png webp gif bmp tif tiff avif heic svg",
        "mp4 webm avi mov mkv mpg mpeg wmv m4v",
        "wav mp3 flac ogg opus aac m4a",
    )
    for ending in kind.split()
)
"""Of names of media."""
EMBEDDED = ("data:image/", "data:video/", "data:audio/", "/9j/", "iVBORw0KGgo")
"""How media begin that are written as texts; the last two are JPEG and PNG in base64."""
ANSWER_TEXTS = (
    "answer",
    "answers",
    "completion",
    "instruction",
    "label",
    "output",
    "prompt",
    "question",
    "response",
    "target",
)
"""Keys of questions and answers. They may repeat what the row has; other texts would not be learned."""
SYSTEM_TEXTS = ("system_message", "system_prompt")
"""Keys of system messages."""
PREFERENCES = ("chosen", "rejected", "kto_tag")
"""Keys of rows that say which answers are better: others must not be learned."""
ABOUT_PARTS = {"annotations", "cache_control", "detail", "format", "id", "media_type", "mime_type"}
"""Keys of parts that are not read, and hold no text for the model."""
SIMILAR = 0.8
"""From which similarity a key is taken for a misspelt one."""


def parse_record(record: Any, pictures: Pictures, *, for_training: bool = True) -> Row:
    """The row of a record. It is not checked whether its images exist.

    Args:
        record: a JSON object, whose images may be bytes too.
        pictures: where images are looked up.
        for_training: whether a chat needs an answer.

    Raises:
        UnusableRow: an unknown shape, media that is not read, or an image that cannot be named so.
    """
    if not isinstance(record, dict):
        raise UnusableRow('neither an object with "messages" nor one with "text"')
    record = {key: value for key, value in record.items() if value is not None}
    for name in (*CHATS, "texts"):
        if name in record:  # a column of Parquet or CSV often has it as text
            record[name] = _parsed(record[name], json.dumps(name))
    _refuse_other_keys(record)
    images = [pictures.find(image) for image in _listed(record)]
    row = _parsed_row(record, images, pictures, for_training)
    _refuse_named_media(record, beside_images=bool(row.images))
    _refuse_unread_texts(record, row)
    return row


def _parsed_row(record: Mapping[str, Any], images: list[Picture], pictures: Pictures, for_training: bool) -> Row:
    match [name for name in (*CHATS, "texts") if name in record]:
        case []:
            return _text_row(record, images)
        case ["texts" as name]:
            shape, messages = "texts", list(_turns(record["texts"]))
        case [name]:
            shape, messages = _shape(name, record), _messages(record[name], name)
        case several:
            raise UnusableRow(f"several chats, in {' and '.join(map(json.dumps, several))}")
    if "system" in record and (system := _text_of(record["system"], "system")).strip():
        if messages[0]["role"] == "system":
            raise UnusableRow('a system message, and "system"')
        messages.insert(0, {"role": "system", "content": system})
    name_results(messages)
    messages, placed = _place_images([_with_parts(message) for message in messages], images, pictures)
    if for_training:
        _refuse_without_answer(messages)
    return Row(
        messages=messages,
        images=placed,
        tools=_tools(record, messages),
        shape=shape,
        left_out=tuple(_left_out(record, name)),
    )


def has_own_images(record: Mapping[str, Any]) -> bool:
    """Whether a record names images itself, in "image", "images" or parts of its messages."""
    if any(record.get(key) not in (None, "", []) for key in ("image", "images")):
        return True
    messages = next((record[name] for name in CHATS if isinstance(record.get(name), list | tuple)), [])
    contents = (message.get("content", message.get("value")) for message in messages if isinstance(message, dict))
    parts = (part for content in contents if isinstance(content, list | tuple) for part in content)
    return any(isinstance(part, dict) and any(part.get(key) is not None for key in REFERENCES) for part in parts)


def _shape(name: str, record: Mapping[str, Any]) -> str:
    """What a chat is called when it is counted."""
    if name == "conversations":
        return "LLaVA" if "image" in record or "images" not in record else "ShareGPT"
    return f"{name} with images" if "images" in record or "image" in record else name


def _refuse_other_keys(record: Mapping[str, Any]) -> None:
    """Refuse keys that look like media and are not read, and keys that look like ours.

    Raises:
        UnusableRow: there are such keys.
    """
    others = [key for key in record if key not in KEYS]
    if unread := [key for key in others if _is_media(key, record[key]) or _has_bytes(record[key])]:
        raise UnusableRow(f'{", ".join(map(json.dumps, unread))} is not read; images are given as parts or as "images"')
    for key in others:
        if (meant := _meant(key)) is not None:
            raise UnusableRow(f'{json.dumps(key)} is not read; is "{meant}" meant?')


def _left_out(record: Mapping[str, Any], name: str) -> Iterator[str]:
    """The keys of a record, and of its messages, that are not read; `name` is that of its chat or text."""
    read = {name, "image", "images"} | (set() if name == "text" else {"system", "tools"})
    yield from (key for key in record if key not in read)
    if name == "texts":
        others = (key for turn in record[name] for key in turn if key not in ("user", "assistant"))
        yield from (f"{key} of turns" for key in dict.fromkeys(others))


def _refuse_named_media(record: Mapping[str, Any], *, beside_images: bool) -> None:
    """Refuse names of media under keys that are not read; beside images, some keys may say where these are from.

    Raises:
        UnusableRow: there are such keys.
    """
    for key, value in record.items():
        describes = key in NAMES or key.endswith(DESCRIBES) or (beside_images and key.endswith(ORIGINS))
        if key not in KEYS and not describes and _names_media(value):
            raise UnusableRow(
                f'{json.dumps(key)} names media and is not read; images are given as parts or as "images"'
            )


def _is_media(key: str, value: Any) -> bool:
    looks_like_media = key.lower().startswith(MEDIA) and not key.lower().endswith(DESCRIBES)
    return looks_like_media and not _is_empty(value)


def _has_bytes(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_bytes, value.values()))
    return isinstance(value, bytes) or (isinstance(value, list | tuple) and any(map(_has_bytes, value)))


def _refuse_unread_texts(record: Mapping[str, Any], row: Row) -> None:
    """Refuse a row with a question, an answer or a system message under a key that is not read, unless the row has it.

    Raises:
        UnusableRow: it has one.
    """
    others = [key for key in record if key not in KEYS and not _is_empty_text(record[key])]
    if preferences := [key for key in others if key in PREFERENCES]:
        raise UnusableRow(f"{', '.join(map(json.dumps, preferences))} is not read: rows of preferences are not learned")
    if row.messages is not None and isinstance(record.get("label"), bool):
        raise UnusableRow('"label" is not read: rows of preferences are not learned')
    unread = [key for key in others if key in (*ANSWER_TEXTS, *SYSTEM_TEXTS)]
    if not unread:
        return
    parts = [part for message in row.messages or () for part in message["content"] if part["type"] == "text"]
    held = "\n".join([row.text or "", *(part["text"] for part in parts)])
    for key in unread:
        texts = [text.replace(IMAGE_TAG, "").strip() for text in texts_in(record[key])]
        if texts and not any(text in held for text in texts):
            raise UnusableRow(f"{json.dumps(key)} is not read, and its text is not in the row")


def _is_empty_text(value: Any) -> bool:
    return isinstance(value, str | Sequence | Mapping) and not value


def _names_media(value: Any) -> bool:
    if isinstance(value, str):
        if value.startswith(("http://", "https://")):
            value = value.partition("#")[0].partition("?")[0]
        return value[-5:].lower().endswith(ENDINGS) or value.startswith(EMBEDDED)
    if isinstance(value, dict):
        return any(map(_names_media, value.values()))
    return isinstance(value, list | tuple) and any(map(_names_media, value))


def _is_empty(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str | Sequence | Mapping) and not value)


@lru_cache(maxsize=1024)
def _meant(key: str) -> str | None:
    """The key of ours that another one looks like."""
    if key.startswith(tuple(f"{known}_" for known in KEYS)):
        return None
    near = (known for known in KEYS if abs(len(key) - len(known)) <= 2)
    return next((known for known in near if SequenceMatcher(None, key.lower(), known).ratio() >= SIMILAR), None)


def _listed(record: Mapping[str, Any]) -> list[Any]:
    """The images of a record.

    Raises:
        UnusableRow: both keys are used, or one of them holds something else.
    """
    given = [record[key] for key in ("image", "images") if not _is_empty_text(record.get(key, ()))]
    if len(given) > 1:
        raise UnusableRow('images in "image" and in "images"')
    images = given[0] if given else []
    if not isinstance(images, list | tuple):
        images = [images]
    if any(image is None for image in images):
        raise UnusableRow('"images" holds null')
    return list(images)


def _text_row(record: Mapping[str, Any], images: list[Picture]) -> Row:
    match record:
        case {"text": str(text)}:
            shape = "text with images" if images else "text"
            return Row(text=text, images=tuple(images), shape=shape, left_out=tuple(_left_out(record, "text")))
        case {"text": _}:
            raise UnusableRow('"text" is no text')
    raise UnusableRow('neither an object with "messages" nor one with "text"')


def _turns(texts: Any) -> Iterator[dict[str, Any]]:
    """The messages of Cauldron's and FineVision's turns."""
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(turn, dict) for turn in texts):
        raise UnusableRow('"texts" is not a list of objects')
    for turn in texts:
        for role in ("user", "assistant"):
            if not isinstance(turn.get(role), str):
                raise UnusableRow(f'a turn of "texts" without "{role}"')
            yield {"role": role, "content": turn[role]}
        _refuse_media_beside(turn, ("user", "assistant"), 'a turn of "texts"')
        for key in ("system", *ANSWER_TEXTS, *SYSTEM_TEXTS, *PREFERENCES):
            if not _is_empty_text(turn.get(key, "")):
                raise UnusableRow(f'a turn of "texts" has {json.dumps(key)}, which is not read')


def _messages(messages: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list | tuple) or not messages or not all(isinstance(each, dict) for each in messages):
        raise UnusableRow(f'"{name}" is not a list of objects')
    return [_message(message) for message in messages]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with our keys and roles."""
    given = {key: value for key, value in message.items() if value is not None}
    message = {RENAMED.get(key, key): value for key, value in given.items()}
    for key, value in given.items():
        if key in RENAMED and given.get(RENAMED[key], value) != value:
            raise UnusableRow(f"a message has {RENAMED[key]} and {key}")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise UnusableRow(f"unknown role {role!r:.40}")
    if unknown := message.keys() - MESSAGE_KEYS:
        known = ", ".join(sorted(MESSAGE_KEYS))
        raise UnusableRow(f"a message has {', '.join(sorted(unknown))}, and only {known} are read")
    if not all(isinstance(message.get(key, ""), str) for key in ("thinking", "name")):
        raise UnusableRow('"thinking" and "name" must be texts')
    message["role"] = ROLES[role]
    if role == "function_call":
        if message.get("tool_calls"):
            raise UnusableRow("a function_call with tool_calls")
        message["tool_calls"] = [call_of(_parsed(message.pop("content", None), "a function_call"))]
    elif calls := message.pop("tool_calls", None):
        if message["role"] != "assistant" or not isinstance(calls, list | tuple):
            raise UnusableRow("tool_calls are a list, of an assistant's message")
        message["tool_calls"] = [call_of(call) for call in calls]
    return message


def _tools(record: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> list[Any] | None:
    """The definitions of tools; a text is parsed."""
    tools = _parsed(record["tools"], '"tools"') if "tools" in record else None
    if not tools:
        return None
    tools = definitions_of(tools)
    if messages[0]["role"] != "system":
        raise UnusableRow('"tools" without a system message, for which the chat template would write today\'s date')
    return tools


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value) if value.strip() else None
    except UnusableRow as error:
        raise UnusableRow(f"{what}: {error}") from error


def _text_of(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise UnusableRow(f'"{name}" is no text')
    return value


def _with_parts(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is a list of parts."""
    content = message.get("content", [] if "tool_calls" in message else None)
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise UnusableRow('"content" is neither a text nor a list of parts')
    return message | {"content": [_part(part) for part in content]}


def _part(part: Any) -> dict[str, Any]:
    """A part as {"type": "text", "text"}, or {"type": "image"} with the image as "image" unless the record has it."""
    if isinstance(part, dict):  # of a table, whose rows all have all keys
        part = {key: value for key, value in part.items() if value is not None}
    found = _read_part(part)
    if isinstance(part, dict):
        _refuse_media_beside(part, REFERENCES if found["type"] == "image" else (), "a part")
        if found["type"] == "image" and len(own := [key for key in REFERENCES if key in part]) > 1:
            raise UnusableRow(f"an image part has {' and '.join(map(json.dumps, own))}")
        _refuse_text_beside(part, REFERENCES if found["type"] == "image" else ("text",), f"a part of {found['type']}")
    return found


def _refuse_text_beside(part: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    """Refuse a text under a key of a part that is not read.

    Raises:
        UnusableRow: there is one.
    """
    for key, value in part.items():
        if key not in (*known, "type", *ABOUT_PARTS) and isinstance(value, str) and value:
            raise UnusableRow(f"{what} has {json.dumps(key)}, which is not read")


def _read_part(part: Any) -> dict[str, Any]:
    match part:
        case str():
            return {"type": "text", "text": part}
        case {"type": "text" | "input_text" | "output_text", "text": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "image_url", "image_url": {"url": str(url)} | str(url)} | {
            "type": "input_image",
            "image_url": url,
        }:
            return {"type": "image", "image": url}
        case {"type": "image", "source": {"type": "base64", "data": str(data)}} | {
            "type": "image",
            "base64": str(data),
        }:
            return {"type": "image", "image": from_base64(data.partition(",")[2] if data.startswith("data:") else data)}
        case {"type": "image", "source": {"type": "url", "url": str(url)}}:
            return {"type": "image", "image": url}
        case {"type": "image", "image": image} | {"type": "image", "path": image} | {"type": "image", "url": image}:
            return {"type": "image", "image": image}
        case {"type": "image"} if part.keys() <= {"type", "text", "index"}:
            return {key: part[key] for key in ("type", "index") if key in part}
    raise UnusableRow(f"neither a text part nor an image part of a format that is read: {part!r:.80}")


def _refuse_media_beside(value: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    """Refuse media under keys that are not known.

    Raises:
        UnusableRow: there are some.
    """
    for key, held in value.items():
        if key not in (*known, "type", "text") and (_is_media(key, held) or _names_media(held) or _has_bytes(held)):
            raise UnusableRow(f"{what} has {json.dumps(key)}, which is not read")


def _place_images(
    messages: list[dict[str, Any]], images: list[Picture], pictures: Pictures
) -> tuple[list[dict[str, Any]], tuple[Picture, ...]]:
    """Messages whose image parts are all {"type": "image"}, and the images in their order.

    Raises:
        UnusableRow: images, and places for them, differ in number.
    """
    parts = [part for message in messages for part in message["content"]]
    own = sum("image" in part for part in parts)
    bare = [part.pop("index", None) for part in parts if part["type"] == "image" and "image" not in part]
    if any(index is not None for index in bare) and bare != [*range(len(bare))]:
        raise UnusableRow(f"image parts with the indices {bare}, and images are read in their order")
    marks = sum(part["text"].count(IMAGE_TAG) for part in parts if part["type"] == "text") if images else 0
    if own and images:
        raise UnusableRow(f'{own} images in parts of messages, and {len(images)} in "images"')
    if images and not bare and not marks:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise UnusableRow(f"{len(images)} images, and no message of the user")
        first["content"] = [{"type": "image"}] * len(images) + first["content"]
    elif (places := len(bare) + marks) != len(images):
        raise UnusableRow(
            f"{places} places for images ({marks} times {IMAGE_TAG}, {len(bare)} parts), and {len(images)} images"
        )
    rest, placed = iter(images), []
    for message in messages:
        content = []
        for part in message["content"]:
            for piece in _split(part) if images else [part]:
                if piece["type"] == "image":
                    placed.append(pictures.find(piece["image"]) if "image" in piece else next(rest))
                    piece = {"type": "image"}
                content.append(piece)
        message["content"] = content
    return messages, tuple(placed)


def _split(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A text part, cut at its marks."""
    if part["type"] != "text":
        yield part
        return
    for number, text in enumerate(part["text"].split(IMAGE_TAG)):
        if number:
            yield {"type": "image"}
        if text:
            yield {"type": "text", "text": text}


def _refuse_without_answer(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a chat in which nothing can be learned."""
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise UnusableRow("no assistant message to learn")
    for message in answers:
        texts = (part["text"] for part in message["content"] if part["type"] == "text")
        if "tool_calls" not in message and not any(text.strip() for text in texts):
            raise UnusableRow("an assistant message without text")
