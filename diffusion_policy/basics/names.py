"""Valid names of keys and labels, so that each can be a file name, a word of a page and a line of a terminal.

Knows text. Knows no arrays and no files.
"""

import re
from collections.abc import Iterable

MOST_CHARACTERS = 200
"""In a key or in the label of a mode."""
_OTHERS = re.compile(r"[^A-Za-z0-9_.-]")


def join_names(path: Iterable[object]) -> str:
    """The key of what lies at a path in nested groups, Dicts or Tuples: `camera.depth`, `joints.0`. A slash within a
    name is a dot as well, and what else a store does not allow in a key is `_`."""
    return ".".join(_OTHERS.sub("_", str(name).replace("/", ".")) for name in path)


def is_label(text: object) -> bool:
    """Whether this is text that can be the label of a mode: on one line, printable, not empty and not too long."""
    return isinstance(text, str) and 0 < len(text) <= MOST_CHARACTERS and text.isprintable()
