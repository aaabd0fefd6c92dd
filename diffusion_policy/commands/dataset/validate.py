"""diffusion-policy dataset validate: every problem of a dataset."""

import json
from typing import Any

from diffusion_policy.commands.interrupts import Failed
from diffusion_policy.commands.options.dataset import Validate
from diffusion_policy.commands.terminal import console, out
from diffusion_policy.datasets.validate import validate


def run(options: Validate) -> list[dict[str, Any]]:
    """Print the findings; raises Failed when one is serious."""
    with console.status("checking"):
        findings = validate(options.store)
    rows = [finding._asdict() for finding in findings]
    if options.json:
        out.print_lines(json.dumps(rows, indent=2))
    else:
        for finding in findings:
            out.print(f"{'problem' if finding.serious else 'note'}: {finding.path}: {finding.what}")
    serious = sum(finding.serious for finding in findings)
    if serious:
        raise Failed(f"{options.store}: {serious} problem{'s' if serious > 1 else ''}")
    console.print(f"{options.store}: no problems")
    return rows
