"""The verbs of the CLI, one file each: a frozen dataclass of options whose `run` joins the parts and prints."""
