"""Gives the episodes of a dataset instructions, texts that say what is to be done, and the embeddings of these.

Knows stores and conversion. Knows no language model: an encoder is whatever makes a row of numbers of a text.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_policy.basics.names import MOST_EMBEDDING, MOST_INSTRUCTION, is_instruction
from diffusion_policy.basics.text import error_line
from diffusion_policy.datasets.convert import read, write
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.formats.format import Source
from diffusion_policy.datasets.storage import StoreError

Encoder = Callable[[str], Any]
"""Text → numbers, (E,) of any kind."""


class Instructed(NamedTuple):
    """What has been written."""

    episodes: int
    told: int
    """Episodes that have an instruction."""
    instructions: tuple[str, ...]
    remarks: tuple[str, ...]


def instruct(
    location: str | Path, target: Path, texts: Mapping[str | None, str], encoder: Encoder | None = None
) -> Instructed:
    """Copy a dataset into a new store, in which each episode of a mode has that mode's text; the text of None is that
    of all other episodes. Without it they keep the instruction that they have. `encoder` makes an embedding of each
    text, which the store keeps. Raises StoreError for modes that the dataset does not have, for texts that cannot be
    instructions, and where the encoder tells two texts not apart."""
    source = read(location)
    _require_texts(source, texts)
    known = tuple(dict.fromkeys([*texts.values(), *_kept(source, location, texts)]))
    if not known:
        raise StoreError(f"{location} has no instructions to encode; give some with --instruction")
    embeddings = None if encoder is None else dict(zip(known, encode(encoder, known), strict=True))
    attributes = {**source.attributes, "instructions": list(known)}
    lost = attributes.pop("instruction_embedding", None) is not None and encoder is None
    if embeddings is not None:
        size = len(embeddings[known[0]])
        attributes["instruction_embedding"] = {"size": size, "encoder": name_of_encoder(encoder)}
    told = 0

    def episodes() -> Iterator[Demonstration]:
        nonlocal told
        for episode in source.episodes:
            text = _text_of(episode, texts)
            told += text is not None
            embedding = None if embeddings is None or text is None else embeddings[text]
            yield episode._replace(instruction=text, instruction_embedding=embedding)

    count = write(source._replace(attributes=attributes, episodes=episodes()), Path(target), "zarr")
    remarks = ("the embeddings of instructions are left out: they need an encoder",) if lost else ()
    return Instructed(count, told, known, source.told + remarks)


def encode(encoder: Encoder, texts: Sequence[str]) -> np.ndarray:
    """The embeddings of some texts, (texts, E) float32; raises StoreError for an encoder that fails, that gives no
    finite row of numbers of one length, or that gives two texts the same."""
    rows: list[np.ndarray] = []
    name = name_of_encoder(encoder)
    for text in texts:
        try:
            row = np.asarray(encoder(text), np.float32)
        except Exception as error:
            raise StoreError(f"the instruction encoder {name} failed for {text!r:.100}: {error_line(error)}") from error
        row = row[0] if row.ndim == 2 and len(row) == 1 else row
        like = rows[0].shape if rows else (row.size,)
        if row.ndim != 1 or row.shape != like or not 1 <= row.size <= MOST_EMBEDDING or not np.isfinite(row).all():
            needs = f"a row of 1 to {MOST_EMBEDDING} finite numbers, as many for each text"
            raise StoreError(f"the instruction encoder {name} must give {needs}; got shape {row.shape}")
        same = next((other for other, known in zip(texts, rows, strict=False) if np.array_equal(known, row)), None)
        if same is not None:
            both = f"{same!r:.100} and {text!r:.100}"
            raise StoreError(f"the instruction encoder {name} gives {both} the same numbers; word one differently")
        rows.append(row)
    return np.stack(rows)


def name_of_encoder(encoder: Any) -> str:
    """What an encoder is called, as far as it can be told."""
    return f"{getattr(encoder, '__module__', '')}:{getattr(encoder, '__qualname__', type(encoder).__name__)}"[:200]


def _text_of(episode: Demonstration, texts: Mapping[str | None, str]) -> str | None:
    return texts.get(episode.mode, texts.get(None, episode.instruction))


def _kept(source: Source, location: str | Path, texts: Mapping[str | None, str]) -> tuple[str, ...]:
    """The instructions of a dataset that some of its episodes keep."""
    before: Sequence[str] = source.attributes.get("instructions", ())
    if not before or None in texts:
        return ()
    used = {_text_of(episode, texts) for episode in read(location).episodes}
    return tuple(text for text in before if text in used)


def _require_texts(source: Source, texts: Mapping[str | None, str]) -> None:
    """Raise StoreError for modes that are not there, and for texts that cannot be instructions."""
    for mode, text in texts.items():
        if mode is not None and mode not in source.modes:
            raise StoreError(f"there is no mode {mode!r:.100}; the modes are {', '.join(source.modes) or 'none'}")
        if not is_instruction(text):
            allowed = f"one line of at most {MOST_INSTRUCTION} printable characters without blanks around it"
            raise StoreError(f"an instruction is {allowed}; got {text!r:.100}")
