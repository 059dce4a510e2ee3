"""The subcommands of `askd-hf`, one file each. `main` is the entry point."""
