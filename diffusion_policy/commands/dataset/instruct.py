"""diffusion-policy dataset instruct: instructions for the episodes of a dataset, in a copy."""

from collections.abc import Sequence

from diffusion_policy.commands.options.dataset import Instruct
from diffusion_policy.commands.terminal import console
from diffusion_policy.config import ConfigError
from diffusion_policy.datasets.instructing import Instructed, instruct
from diffusion_policy.envs.modules import load


def run(options: Instruct) -> Instructed:
    """Copy; returns what was written."""
    texts = parse_instructions(options.instruction)
    encoder = None if options.instruction_encoder is None else load(options.instruction_encoder)
    with console.status("copying"):
        made = instruct(options.store, options.output, texts, encoder)
    for remark in made.remarks:
        console.print(remark)
    for text in made.instructions:
        console.print(f"instruction: {text}")
    console.print(f"{made.told} of {made.episodes} episodes in {options.output} have an instruction")
    return made


def parse_instructions(texts: Sequence[str]) -> dict[str | None, str]:
    """--instruction: texts such as `left=go round the left`, and one without a mode, under None, for all other
    episodes. Raises ConfigError for a mode that is named twice."""
    found: dict[str | None, str] = {}
    for text in texts:
        mode, equals, rest = text.partition("=")
        key = mode.strip() if equals else None
        if key in found:
            whose = "all other episodes" if key is None else f"mode {key!r}"
            raise ConfigError(f"--instruction gives {whose} two texts; got {found[key]!r} and {(rest or text)!r}")
        found[key] = (rest if equals else text).strip()
    return found
