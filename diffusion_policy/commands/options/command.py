"""What the options of all verbs have in common: they can be run."""

import importlib
from typing import Any, ClassVar


class Command:
    """Options of a verb. `run` imports the module `program` and calls its `run` with them."""

    program: ClassVar[str]

    def run(self) -> Any:
        """Do what the options say; what it raises and returns is said by the program's own `run`."""
        return importlib.import_module(self.program).run(self)
