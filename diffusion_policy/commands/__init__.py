"""The programs of the command line, one file a verb, each with a function `run(options)`, and what they share. What a
verb can be told stands in `options`, under the same name, where --help reads it without torch."""
