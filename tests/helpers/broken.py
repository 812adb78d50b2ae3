"""Random damage to texts and values, as by a bad disk, another program or an attacker."""

from __future__ import annotations

import copy

ODD = [
    None,
    True,
    -1,
    0,
    2**70,
    0.0,
    -0.5,
    1e-300,
    1e300,
    float("inf"),
    float("nan"),
    "",
    "nan",
    "1",
    "dynamic",
    "../../etc/passwd",
    "__import__('os')",
    "<script>alert(1)</script>",
    "$\\frac{1}{$",
    "[bold]x[/wrong]",
    "\x1b[31m\x00\ud800",
    "9" * 5000,
    [],
    [[[]]],
    {},
    {"scale": 1.0},
]
BITS = [
    b"\x00",
    b"\xff\xfe",
    b"\n",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b"=",
    b"1e999",
    b"NaN",
    b"-",
    b"\\ud800",
    b"#",
    b"[" * 3000,
]


def bytes_of(random, content):
    """Returns the bytes with some removed, repeated, replaced or inserted."""
    for _ in range(random.choice((1, 1, 2, 5))):
        begin, end = sorted(random.randrange(len(content) + 1) for _ in range(2))
        end = min(end, begin + random.choice((1, 8, 400)))
        bit = random.choice((b"", random.choice(BITS), content[begin:end] * 2, bytes([random.randrange(256)])))
        content = content[:begin] if random.random() < 0.1 else content[:begin] + bit + content[end:]
    return content


def value_of(random, value):
    """Returns a copy of nested dictionaries and lists with an odd value, or with an entry added or removed."""
    value = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 2))):
        inner, place = random.choice([*_places(value)])
        way = random.randrange(4)
        if way == 0:
            del inner[place]
        elif way == 1 and isinstance(inner, dict):
            inner[random.choice(("scale", "rule", "like", "unknown", "steps", ""))] = copy.deepcopy(random.choice(ODD))
        else:
            inner[place] = copy.deepcopy(random.choice(ODD))
        if not value:
            break
    return value


def _places(value):
    for place in [*value] if isinstance(value, dict) else range(len(value)):
        yield value, place
        if isinstance(value[place], (dict, list)) and value[place]:
            yield from _places(value[place])
