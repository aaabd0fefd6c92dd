"""The verbs of `diffusion-policy dataset`, a program a file: they look at demonstrations, check them, bring them in and
out, join, cut and mend them. Their options stand in `commands.options.dataset`."""
