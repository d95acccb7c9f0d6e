"""JSON schemas as the grammar's compiler takes them: what says nothing left out, nothing else.

Every change leaves the valid documents exactly as they were (JSON Schema 2020-12); what remains
that the compiler does not know is refused by it.
"""

from typing import Any

SCHEMAS = (
    *("items", "additionalItems", "additionalProperties", "propertyNames", "contains", "not"),
    *("if", "then", "else", "unevaluatedItems", "unevaluatedProperties"),
)
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
COUNTS = tuple(
    f"{end}{what}" for end in ("min", "max") for what in ("Items", "Length", "Properties")
)
IN_PLACE = {  # keys whose schemas may evaluate more of the same document
    *("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "contains"),
    *("$ref", "$dynamicRef", "$recursiveRef", "dependentSchemas", "dependencies"),
}


def plainer(schema: Any) -> Any:
    """Return an equal schema without keys that say nothing, and with simpler ones for others."""
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for key in SCHEMAS:
        if isinstance(made.get(key), dict):
            made[key] = plainer(made[key])
    for key in LISTS:
        if isinstance(made.get(key), list):
            made[key] = [plainer(part) for part in made[key]]
    for key in BY_NAME:
        if isinstance(made.get(key), dict):
            made[key] = {name: plainer(part) for name, part in made[key].items()}
    for key in COUNTS:
        if isinstance(made.get(key), float) and made[key].is_integer():
            made[key] = int(made[key])
    for key in silent(made):
        made.pop(key, None)
    for key, other in (
        ("unevaluatedProperties", "additionalProperties"),
        ("unevaluatedItems", "items"),
    ):
        if key in made and not IN_PLACE & made.keys() and not isinstance(made.get(other), list):
            made.setdefault(other, made.pop(key))
    return made


def silent(schema: dict[str, Any]) -> list[str]:
    """Return keys that allow everything where they stand."""
    keys = [k for k in ("unevaluatedProperties", "unevaluatedItems") if schema.get(k) in (True, {})]
    if schema.get("uniqueItems") is False:
        keys.append("uniqueItems")
    if "contains" not in schema:
        keys += ["minContains", "maxContains"]
    if "if" not in schema:
        keys += ["then", "else"]
    elif not {"then", "else", "unevaluatedProperties", "unevaluatedItems"} & schema.keys():
        keys.append("if")
    return keys
