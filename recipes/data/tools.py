"""Calls, results and definitions of tools, as the chat template takes them.

What it would not write is refused: a call whose arguments have another name would be learned with none.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .json_values import parse_json
from .pictures import UnusableRow

CALL_KEYS = {"type", "id", "index", "function"}
FUNCTION_KEYS = {"name", "arguments", "parameters"}
"""Of a call; Llama's chats name its arguments "parameters"."""
TOOL_KEYS = {"type", "function"}
DEFINITION_KEYS = {"name", "description", "parameters", "strict", "return"}
"""Of a definition; the last two are not part of gpt-oss's chat format."""


def call_of(call: Any) -> dict[str, Any]:
    """The call of a tool, with "id" where it has one.

    Raises:
        UnusableRow: it has no name, its arguments are neither an object nor a text, or other keys hold something.
    """
    given = _without_null(call) if isinstance(call, Mapping) else {}
    function = given.get("function", given)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UnusableRow(f"a call of a tool without a name: {call!r:.80}")
    function = _without_null(function)
    _refuse_keys(given, CALL_KEYS if "function" in given else CALL_KEYS | FUNCTION_KEYS, "a call of a tool")
    if "function" in given:
        _refuse_keys(function, FUNCTION_KEYS, "a call of a tool")
    if len(named := [key for key in ("arguments", "parameters") if key in function]) > 1:
        raise UnusableRow(f"a call of a tool has {' and '.join(named)}")
    arguments = function[named[0]] if named else {}
    if not isinstance(arguments, str | dict):
        raise UnusableRow(f"the arguments of a call are neither an object nor a text: {arguments!r:.40}")
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return made | ({"id": given["id"]} if "id" in given else {})


def name_results(messages: Sequence[dict[str, Any]]) -> None:
    """Give each result the name of the tool that was called, by "tool_call_id" where it has one; and remove the ids.

    Raises:
        UnusableRow: it is not known of which call a result is, its name is that of another tool, or a message calls
            several.
    """
    calls: list[dict[str, Any]] = []
    answered = 0
    for message in messages:
        if made := message.get("tool_calls"):
            if len(made) > 1:
                raise UnusableRow(f"a message calls {len(made)} tools; gpt-oss's chat format has one call in a message")
            calls, answered = (calls if answered == 0 else []) + made, 0
        elif message["role"] == "tool":
            _name_result(message, calls)
            answered += 1
    for message in messages:
        message.pop("tool_call_id", None)
        for call in message.get("tool_calls", ()):
            call.pop("id", None)


def _name_result(message: dict[str, Any], calls: Sequence[dict[str, Any]]) -> None:
    of = [call for call in calls if "id" in call and call["id"] == message.get("tool_call_id")]
    if not of and len(names := {call["function"]["name"] for call in calls}) > 1 and "name" not in message:
        raise UnusableRow(f"a tool message that could be the result of {' or '.join(sorted(names))}")
    called = (of or calls)[-1]["function"]["name"] if calls else None
    if called is None and "name" not in message:
        raise UnusableRow("a tool message without a call before it, and without a name")
    if of and message.get("name", called) not in (called, f"functions.{called}"):
        raise UnusableRow(f'a tool message has the name {message["name"]!r:.40}, and its call that of "{called}"')
    if of and called is not None:
        message["name"] = f"functions.{called}"


def definitions_of(tools: Any) -> list[dict[str, Any]]:
    """Definitions of tools, whose parameters are objects.

    Raises:
        UnusableRow: they are malformed, or have keys that the chat template does not write.
    """
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UnusableRow('"tools" is not a list of objects')
    return [_definition(_without_null(tool)) for tool in tools]


def _definition(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UnusableRow(f"a tool without a name: {tool!r:.80}")
    _refuse_keys(tool, TOOL_KEYS if "function" in tool else TOOL_KEYS | DEFINITION_KEYS, "a tool")
    function = _without_null(function)
    _refuse_keys(function, DEFINITION_KEYS | {"type"}, "a tool")
    if not isinstance(function.get("description", ""), str):
        raise UnusableRow(f'the description of the tool "{function["name"]}" is no text')
    parameters = function.get("parameters", {})
    if isinstance(parameters, str):
        parameters = parse_json(parameters) if parameters.strip() else {}
    _check_schema(parameters, f'the parameters of the tool "{function["name"]}"')
    made = {key: function[key] for key in ("name", "description") if key in function} | {"parameters": parameters}
    return {"type": "function", "function": made}


def _check_schema(schema: Any, what: str) -> None:
    """Refuse what is no JSON schema of an object, a list or a value.

    Raises:
        UnusableRow: it is none.
    """
    if not isinstance(schema, Mapping):
        raise UnusableRow(f"{what} are no object: {schema!r:.40}")
    properties = schema.get("properties") or {}
    if not isinstance(properties, Mapping):
        raise UnusableRow(f'{what} have "properties" that are no object: {properties!r:.40}')
    if schema and not schema.keys() & {"type", "properties"}:
        raise UnusableRow(f'{what} have neither "properties" nor "type": {schema!r:.60}')
    for name, field in properties.items():
        if not isinstance(field, Mapping):
            raise UnusableRow(f'{what} have the property "{name}", which is no object: {field!r:.40}')
        if isinstance(field.get("properties"), Mapping):
            _check_schema(field, f'{what}, "{name}"')
        elif "items" in field and not isinstance(field["items"], Mapping):
            raise UnusableRow(f'{what} have "items" of "{name}" that are no object')


def _refuse_keys(value: Mapping[str, Any], known: set[str], what: str) -> None:
    if unknown := [key for key, held in value.items() if key not in known and held not in ("", [], {})]:
        raise UnusableRow(f"{what} has {', '.join(sorted(unknown))}, and only {', '.join(sorted(known))} are read")


def _without_null(value: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that are null, as all rows of a table have all keys."""
    return {key: held for key, held in value.items() if held is not None}
