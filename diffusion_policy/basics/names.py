"""Valid names of keys and labels, so that each can be a file name, a word of a page and a line of a terminal.

Knows text. Knows no arrays and no files.
"""

import difflib
import re
from collections.abc import Iterable, Sequence

MOST_CHARACTERS = 200
"""In a key or in the label of a mode."""
MOST_INSTRUCTION = 500
"""Characters of the instruction of an episode."""
MOST_INSTRUCTIONS = 1024
"""That a store, or a policy, knows."""
MOST_EMBEDDING = 8192
"""Numbers of the embedding of an instruction."""
_OTHERS = re.compile(r"[^A-Za-z0-9_.-]")


def join_names(path: Iterable[object]) -> str:
    """The key of what lies at a path in nested groups, Dicts or Tuples: `camera.depth`, `joints.0`. A slash within a
    name is a dot as well, and what else a store does not allow in a key is `_`."""
    return ".".join(_OTHERS.sub("_", str(name).replace("/", ".")) for name in path)


def is_label(text: object) -> bool:
    """Whether this is text that can be the label of a mode: on one line, printable, not empty and not too long."""
    return isinstance(text, str) and 0 < len(text) <= MOST_CHARACTERS and text.isprintable()


def is_instruction(text: object) -> bool:
    """Whether this is text that can be an instruction: as a label, but longer."""
    return isinstance(text, str) and 0 < len(text) <= MOST_INSTRUCTION and text.isprintable() and text == text.strip()


def are_instructions(texts: object) -> bool:
    """Whether this is a list of instructions, each of them once."""
    if not isinstance(texts, list) or len(texts) > MOST_INSTRUCTIONS:
        return False
    return all(map(is_instruction, texts)) and len({*texts}) == len(texts)


def nearest_instructions(text: str, known: Sequence[str]) -> str:
    """The end of a message on an unknown instruction: the nearest that are known."""
    near = difflib.get_close_matches(text[:MOST_INSTRUCTION], known, n=3, cutoff=0.0)
    return f"the nearest known are: {'; '.join(map(repr, near))}" if near else "none are known"


def say_instructions() -> str:
    """What `are_instructions` asks for, in words."""
    return (
        f"a list of at most {MOST_INSTRUCTIONS} texts, each once, one line of at most {MOST_INSTRUCTION} printable "
        "characters without blanks around it"
    )
