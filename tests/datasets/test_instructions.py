import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from diffusion_policy.basics.names import MOST_EMBEDDING, MOST_INSTRUCTION, MOST_INSTRUCTIONS
from diffusion_policy.datasets.combine import merge, split
from diffusion_policy.datasets.convert import convert, read, write
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.instructing import encode, instruct
from diffusion_policy.datasets.repair import repair
from diffusion_policy.datasets.storage import StoreError
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.datasets.validate import validate

TEXTS = {"left": "go round the left", "right": "pass it on the right side"}


def count_letters(text: str) -> list[float]:
    return [text.count(letter) for letter in "lrt"]


def make(path: Path, seeds: range = range(4), **attributes) -> Path:
    with EpisodeStore.create(path, attributes, [*TEXTS]) as store:
        for seed in seeds:
            data = {key: np.full((seed + 2, 2), seed, np.float32) for key in ("state", "action")}
            store.append([Demonstration(data, seed, [*TEXTS, None][seed % 3], True)])
    return path


def told(location: Path) -> list[tuple[str | None, list[float] | None]]:
    """Of each episode its instruction and the embedding of that."""
    episodes = EpisodeStore.open(location).episodes()
    embeddings = [(e.instruction, e.instruction_embedding) for e in episodes]
    return [(text, None if row is None else row.tolist()) for text, row in embeddings]


@pytest.fixture
def instructed(tmp_path: Path) -> Path:
    """A store of four episodes, of which the third has no instruction."""
    made = instruct(make(tmp_path / "plain.zarr"), tmp_path / "told.zarr", TEXTS, count_letters)
    assert made == (4, 3, tuple(TEXTS.values()), ())
    return tmp_path / "told.zarr"


def test_episodes_are_told_the_text_of_their_mode(instructed: Path) -> None:
    of_left, of_right = ((text, count_letters(text)) for text in TEXTS.values())
    assert told(instructed) == [of_left, of_right, (None, None), of_left]
    store = EpisodeStore.open(instructed)
    assert store.attributes["instruction_embedding"]["size"] == 3
    assert store.attributes["instruction_embedding"]["encoder"].endswith(":count_letters")
    assert store.instruction_indices().tolist() == [0, 1, -1, 0]
    assert [finding for finding in validate(instructed) if finding.serious] == []


def test_a_store_without_instructions_has_no_arrays_of_them(tmp_path: Path) -> None:
    store = EpisodeStore.open(make(tmp_path / "a.zarr"))
    assert store.arrays.names("meta") == [
        "episode_crc32c", "episode_ends", "episode_mode", "episode_seed", "episode_success",
    ]  # fmt: skip
    assert store.episode_instructions() == [None] * 4
    assert store.instruction_embeddings() is None
    assert {"instructions", "instruction_embedding"}.isdisjoint(store.attributes)


def test_one_text_is_for_all_other_episodes_and_without_it_they_keep_theirs(instructed: Path, tmp_path: Path) -> None:
    made = instruct(instructed, tmp_path / "b.zarr", {"left": "turn left"})
    assert made.remarks == ("the embeddings of instructions are left out: they need an encoder",)
    assert [text for text, _ in told(tmp_path / "b.zarr")] == ["turn left", TEXTS["right"], None, "turn left"]
    instruct(instructed, tmp_path / "c.zarr", {"left": "turn left", None: "go on"})
    assert [text for text, _ in told(tmp_path / "c.zarr")] == ["turn left", "go on", "go on", "turn left"]
    assert EpisodeStore.open(tmp_path / "c.zarr").instructions == ("turn left", "go on")
    instruct(tmp_path / "b.zarr", tmp_path / "d.zarr", {}, count_letters)
    assert told(tmp_path / "d.zarr")[0] == ("turn left", count_letters("turn left"))


def test_what_is_appended_to_an_instructed_store_is_told_as_well(instructed: Path) -> None:
    data = {key: np.zeros((3, 2), np.float32) for key in ("state", "action")}
    text = TEXTS["right"]
    with EpisodeStore.append_to(instructed) as store:
        store.append([Demonstration(data, 9, instruction=text, instruction_embedding=np.float32(count_letters(text)))])
        store.append([Demonstration(data, 10)])
        for episode, message in (
            (Demonstration(data, 11, instruction="pass it on the rigt"), "nearest known are: 'pass it on the right"),
            (Demonstration(data, 11, instruction=text), r"needs an embedding of shape \(3,\); got none"),
            (Demonstration(data, 11, None, None, None, text, np.ones(2, np.float32)), r"got \(2,\)"),
        ):
            with pytest.raises(StoreError, match=message):
                store.append([episode])
        broken = np.full(3, np.nan, np.float32)
        with pytest.raises(StoreError, match="must hold finite numbers"):
            store.append([Demonstration(data, 11, instruction=text, instruction_embedding=broken)])
    assert told(instructed)[4:] == [(text, count_letters(text)), (None, None)]
    assert [finding for finding in validate(instructed) if finding.serious] == []


def test_a_store_without_embeddings_takes_none(tmp_path: Path) -> None:
    with EpisodeStore.create(tmp_path / "a.zarr", {"instructions": ["go"]}, []) as store:
        data = {key: np.zeros((3, 2), np.float32) for key in ("state", "action")}
        with pytest.raises(StoreError, match="keeps no embeddings"):
            store.append([Demonstration(data, instruction="go", instruction_embedding=np.ones(2, np.float32))])
        store.append([Demonstration(data, instruction="go")])
    with EpisodeStore.create(tmp_path / "b.zarr", {}, []) as store, pytest.raises(StoreError, match="none are known"):
        store.append([Demonstration(data, instruction="go")])


def test_tasks_are_merged_with_the_instructions_of_all(instructed: Path, tmp_path: Path) -> None:
    instruct(make(tmp_path / "b.zarr", range(4, 6)), tmp_path / "c.zarr", {None: "go on"}, count_letters)
    assert merge([instructed, tmp_path / "c.zarr"], tmp_path / "all.zarr").remarks == ()
    assert told(tmp_path / "all.zarr") == [*told(instructed), *[("go on", count_letters("go on"))] * 2]
    merge([tmp_path / "b.zarr", instructed], tmp_path / "some.zarr")
    assert told(tmp_path / "some.zarr") == [(None, None), (None, None), *told(instructed)]
    instruct(tmp_path / "b.zarr", tmp_path / "d.zarr", {None: "go on"})
    (remark,) = merge([instructed, tmp_path / "d.zarr"], tmp_path / "texts.zarr").remarks
    assert "embeddings of instructions are left out: not all stores have them of the same encoder" in remark
    assert [text for text, _ in told(tmp_path / "texts.zarr")][-3:] == [TEXTS["left"], "go on", "go on"]
    assert [finding for finding in validate(tmp_path / "all.zarr") if finding.serious] == []


def test_copies_parts_and_mended_stores_keep_instructions(instructed: Path, tmp_path: Path) -> None:
    convert(instructed, tmp_path / "b.zarr.zip")
    assert told(tmp_path / "b.zarr.zip") == told(instructed)
    split(instructed, (tmp_path / "c.zarr", tmp_path / "d.zarr"), 0.5, 0)
    both = [*told(tmp_path / "c.zarr"), *told(tmp_path / "d.zarr")]
    assert sorted(map(str, both)) == sorted(map(str, told(instructed)))
    assert repair(instructed).left == ()


@pytest.mark.parametrize("suffix", ["npz", "hdf5", "minari", "lerobot"])
def test_other_formats_keep_the_texts_and_say_that_embeddings_are_left_out(
    instructed: Path, tmp_path: Path, suffix: str
) -> None:
    source = read(instructed)
    write(source, tmp_path / f"b.{suffix}")
    assert "keeps the texts alone" in source.left_out["the embeddings of instructions"]
    convert(tmp_path / f"b.{suffix}", tmp_path / "c.zarr")
    assert told(tmp_path / "c.zarr") == [(text, None) for text, _ in told(instructed)]


def test_instructions_are_the_tasks_of_lerobot(instructed: Path, tmp_path: Path) -> None:
    convert(instructed, tmp_path / "b.lerobot")
    for ours in (tmp_path / "b.lerobot/meta").glob("diffusion_policy.*"):
        ours.unlink()
    convert(tmp_path / "b.lerobot", tmp_path / "c.zarr")
    rest = "demonstrations"  # of the episode without one
    assert EpisodeStore.open(tmp_path / "c.zarr").instructions == (*TEXTS.values(), rest)
    assert [text for text, _ in told(tmp_path / "c.zarr")] == [TEXTS["left"], TEXTS["right"], rest, TEXTS["left"]]


@pytest.mark.parametrize(
    "texts, message",
    [
        ({"lft": "go"}, "there is no mode 'lft'; the modes are left, right"),
        ({None: ""}, f"an instruction is one line of at most {MOST_INSTRUCTION} printable"),
        ({None: "a\nb"}, "an instruction is one line"),
        ({None: " go"}, "without blanks around it"),
        ({None: "x" * (MOST_INSTRUCTION + 1)}, "an instruction is one line"),
        ({}, "has no instructions to encode"),
    ],
)
def test_texts_that_cannot_be_instructions_are_refused(tmp_path: Path, texts: dict, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        instruct(make(tmp_path / "a.zarr"), tmp_path / "b.zarr", texts)
    assert not (tmp_path / "b.zarr").exists()


@pytest.mark.parametrize(
    "encoder, message",
    [
        (lambda text: text, "failed for 'go'"),
        (lambda text: [1.0] * len(text), "as many for each text; got shape"),
        (lambda text: [np.nan], "must give a row of 1 to"),
        (lambda text: [], "must give a row of 1 to"),
        (lambda text: [0.0] * (MOST_EMBEDDING + 1), "must give a row of 1 to"),
        (lambda text: [1.0], "gives 'go' and 'stop' the same numbers; word one differently"),
    ],
)
def test_encoders_that_give_no_row_of_numbers_or_cannot_tell_texts_apart_are_refused(
    encoder: Callable, message: str
) -> None:
    with pytest.raises(StoreError, match=message):
        encode(encoder, ["go", "stop"])


def test_a_row_within_a_batch_of_one_is_taken_as_encoders_give_it() -> None:
    assert encode(lambda text: [count_letters(text)], ["left", "right"]).tolist() == [[1, 0, 1], [0, 1, 1]]


def put(path: Path, name: str, value: object) -> None:
    zarr.open_group(path, mode="r+").attrs[name] = value


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("instructions", ["x" * (MOST_INSTRUCTION + 1)], "must be a list of at most 1024 texts"),
        ("instructions", [f"{i}" for i in range(MOST_INSTRUCTIONS + 1)], "must be a list of at most 1024 texts"),
        ("instructions", ["a", "a"], "each once"),
        ("instructions", "go", "must be a list"),
        ("instruction_embedding", {"size": 0}, "a size from 1 to"),
        ("instruction_embedding", {"size": MOST_EMBEDDING + 1}, "a size from 1 to"),
        ("instruction_embedding", {"size": 3, "encoder": 3}, "the name of an encoder"),
    ],
)
def test_stores_that_promise_too_much_are_refused(instructed: Path, name: str, value: object, message: str) -> None:
    put(instructed, name, value)
    with pytest.raises(StoreError, match=message):
        EpisodeStore.open(instructed)


def test_validate_names_instructions_and_embeddings_that_are_not_those_promised(instructed: Path) -> None:
    group = zarr.open_group(instructed, mode="r+")
    group["meta/episode_instruction"][1] = 7
    group["meta/episode_instruction_embedding"][3] = 7  # pyright: ignore
    found = {(finding.path, finding.what) for finding in validate(instructed)}
    assert ("meta/episode_instruction", "episode 1 has the instruction 7; there are 2") in found
    assert (
        "meta/episode_instruction_embedding",
        "episode 3 has another embedding of 'go round the left' than episode 0",
    ) in found
    assert any("is not what was written" in what for _, what in found)
    put(instructed, "instruction_embedding", {"size": 4})
    assert any("must be finite rows of 4 float32" in finding.what for finding in validate(instructed))
    shutil.rmtree(instructed / "meta/episode_instruction")
    found = {finding.path: finding.what for finding in validate(instructed)}
    assert "is missing, or unreadable" in found["meta/episode_instruction"]
