"""Structure-aware changes of a JSON tree, a table, tensors and bytes, from a seeded Random."""

import copy
import json
import struct
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa

# Placeholders for text that `json.dumps` would not write.
RAW = {
    "@deep-list@": "[" * 100_000 + "]" * 100_000,
    "@deep-dict@": '{"a":' * 5_000 + "1" + "}" * 5_000,
    "@digits@": "9" * 5_000,
    "@huge@": "1e999",
    "@nan@": "NaN",
    "@infinity@": "-Infinity",
    "@half@": r'"\ud800"',
    "@nothing@": "",
}
INTEGERS = [-1, 0, 1, 2, 255, -(2**31), 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 10**30]
VALUES = [None, True, False, 0.5, -1e308, "", "x", "\u0000", "ü" * 300, [], {}, [None], {"": 0}]
VALUES += [*INTEGERS, *RAW, [0] * 5_000, {str(i): i for i in range(500)}, [[1]], ["a", 1]]


def changed_json(document: Any, random: Random) -> bytes:
    """The document as text after one to three changes of its tree and perhaps one of its text."""
    tree = json.loads(json.dumps(document))
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        tree = _changed_tree(tree, random)
    text = json.dumps(tree, ensure_ascii=random.random() < 0.5)
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    data = text.encode("utf-8", errors="surrogatepass")
    return changed_bytes(data, random) if random.random() < 0.15 else data


def _changed_tree(tree: Any, random: Random) -> Any:
    places = list(_places(tree))
    if not places:
        return _hostile(random)
    holder, key = random.choice(places)
    kind = random.randrange(7)
    if kind <= 2:
        holder[key] = _hostile(random)
    elif kind == 3:
        del holder[key]
    elif kind == 4:  # the value of another place
        other, place = random.choice(places)
        if _size(other[place]) < 1_000:
            holder[key] = json.loads(json.dumps(other[place]))
    elif kind == 5:
        holder[key] = _near(holder[key], random)
    elif isinstance(holder, dict):
        holder[str(key) + random.choice(["", "x", "\u0000"])] = holder.pop(key)
    else:
        holder.append(copy.deepcopy(holder[key]))
    return tree


def _hostile(random: Random) -> Any:
    """One of VALUES, a copy: a change of it is no other case's."""
    return copy.deepcopy(random.choice(VALUES))


def _near(value: Any, random: Random) -> Any:
    """A value like the one that is there."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return random.choice([value + 1, value - 1, -value, value * 1000, value + 2**32])
    if isinstance(value, float):
        return random.choice([-value, value * 1e6, int(value)])
    if isinstance(value, str):
        return random.choice([value[:-1], value + "x", value.upper(), value * 50])
    if isinstance(value, list):
        return random.choice([value[:-1], value + value, value[::-1]])
    return [value]


def _size(value: Any) -> int:
    return len(str(value))


def _places(tree: Any) -> Any:
    """Every (container, key) of a tree."""
    if isinstance(tree, dict):
        for key in tree:
            yield tree, key
            yield from _places(tree[key])
    elif isinstance(tree, list):
        for index in range(min(len(tree), 40)):
            yield tree, index
            yield from _places(tree[index])


def changed_bytes(data: bytes, random: Random) -> bytes:
    """Bytes flipped, cut off, doubled, or a number in them replaced by a hostile one."""
    content = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(content) + 1)
        kind = random.randrange(7)
        if kind == 0 and content:
            content[at % len(content)] ^= 1 << random.randrange(8)
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            del content[at : at + random.randrange(1, 40)]
        elif kind == 3:
            content[at:at] = random.randbytes(random.randrange(1, 40))
        elif kind == 4:
            content[at : at + 8] = struct.pack("<q", _int64(random))
        elif kind == 5:
            content[at : at + 4] = struct.pack("<i", _int64(random) % 2**32 - 2**31)
        else:
            content[at:at] = content[max(0, at - 50) : at]
    return bytes(content)


def _int64(random: Random) -> int:
    return min(max(random.choice(INTEGERS), -(2**63)), 2**63 - 1)


def changed_array(array: np.ndarray, random: Random) -> np.ndarray:
    """The array with some values, its shape or its dtype changed."""
    array = np.array(array)
    kind = random.randrange(8)
    if kind <= 3 and array.size:
        flat = array.reshape(-1)
        for _ in range(random.choice((1, 1, 3))):
            flat[random.randrange(flat.size)] = _value_for(array.dtype, random)
        return array
    if kind == 4:
        return array[:-1] if array.ndim else array
    if kind == 5:
        return np.concatenate((array, array)) if array.ndim else array
    if kind == 6:
        wanted = random.choice(["<i8", "<i4", "u1", "<f4", "<f8", "?", "<u2"])
        with np.errstate(invalid="ignore"):
            return array.astype(wanted)
    return array[::-1].copy() if array.ndim and random.random() < 0.5 else array.reshape(-1)


def _value_for(dtype: np.dtype[Any], random: Random) -> Any:
    if dtype.kind == "f":
        return random.choice([np.nan, np.inf, -np.inf, -1.0, 0.0, 1e30, 0.5])
    if dtype.kind == "b":
        return random.random() < 0.5
    info = np.iinfo(dtype)
    near = [random.randrange(300), *INTEGERS]
    return min(max(random.choice(near), info.min), info.max)


def changed_table(table: pa.Table, random: Random) -> pa.Table:
    """The table with a column dropped, renamed, retyped, or with other values or rows."""
    name = random.choice(table.column_names)
    place = table.column_names.index(name)
    kind = random.randrange(7)
    if kind == 0:
        return table.drop_columns([name])
    if kind == 1:
        names = [n + "x" if n == name else n for n in table.column_names]
        return table.rename_columns(names)
    if kind == 2:
        return table.slice(0, random.choice([0, 1, max(0, table.num_rows - 1)]))
    if kind == 3:
        return pa.concat_tables([table, table])
    column = table.column(name).combine_chunks()
    if kind == 4:
        column = pa.nulls(table.num_rows, column.type)
    elif kind == 5:
        wanted = random.choice([pa.int64(), pa.float64(), pa.string(), pa.int8(), pa.bool_()])
        try:
            column = column.cast(wanted, safe=False)
        except pa.ArrowException:
            column = pa.array(["x"] * table.num_rows)
    else:
        column = _changed_column(column, random)
    return table.set_column(place, name, column)


def _changed_column(column: Any, random: Random) -> Any:
    try:
        values = np.array(column.to_numpy(zero_copy_only=False))
        if values.dtype.kind in "if" and len(values):
            values[random.randrange(len(values))] = _value_for(values.dtype, random)
            return pa.array(values, column.type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        pass
    return pa.array([None] * len(column), column.type)
