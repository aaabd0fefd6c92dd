"""What each verb of the command line can be told, one file a verb: frozen dataclasses that validate themselves.

Nothing here imports torch, a simulator or a store: `--help` reads these files alone. The program itself stands in
`diffusion_policy.commands`, under the same name, and is imported when it runs.
"""
