"""The subcommands of `racm3`, one module a family; each has `register(commands)`."""
