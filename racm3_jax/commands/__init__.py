"""The subcommands of `racm3`, one module per family, each with `register(commands)`."""
