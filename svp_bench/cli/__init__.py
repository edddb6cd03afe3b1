"""The command line: entry point and subcommands."""
