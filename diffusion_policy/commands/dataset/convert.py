"""diffusion-policy dataset convert: a copy in another format."""

import itertools

from diffusion_policy.commands.options.dataset import Convert
from diffusion_policy.commands.stores import parse_angles
from diffusion_policy.commands.terminal import console
from diffusion_policy.datasets.convert import read, write
from diffusion_policy.datasets.demonstration import Demonstration

MOST_LINES = 50
"""So many things that are left out have a line each."""


def run(options: Convert) -> int:
    """Copy; returns the number of episodes."""
    source = read(options.store, options.source_format, options.observation, options.action)
    if options.angles:
        angles = parse_angles(options.angles, (*source.observation_keys, source.action_key))
        declared = {key: list(columns) for key, columns in angles.items()}
        source = source._replace(attributes=source.attributes | {"angles": declared})
    for remark in source.remarks:
        console.print(remark)
    try:
        with console.status("copying") as status:
            copied = itertools.count(1)

            def show(_: Demonstration) -> None:
                status.update(f"copying, {next(copied)} episodes")

            count = write(source, options.output, options.output_format, show)
    finally:
        for name, why in itertools.islice(source.left_out.items(), MOST_LINES):
            console.print(f"left out {name}: {why}")
        if len(source.left_out) > MOST_LINES:
            console.print(f"left out {len(source.left_out) - MOST_LINES} more")
    console.print(f"{count} episodes in {options.output}")
    return count
