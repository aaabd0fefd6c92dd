"""diffusion-policy dataset goals: what each episode came to becomes its goal, in a copy of the dataset."""

from diffusion_policy.commands.options.dataset import AddGoals
from diffusion_policy.commands.terminal import console
from diffusion_policy.config import parse_source
from diffusion_policy.datasets.goals import Aimed, add_goals


def run(options: AddGoals) -> Aimed:
    """Copy; returns what was written."""
    goals = dict(parse_source(text) for text in options.goal)
    with console.status("copying"):
        made = add_goals(options.store, options.output, goals)
    for remark in made.remarks:
        console.print(remark)
    console.print(f"{made.episodes} episodes in {options.output}, with {', '.join(goals)}")
    return made
