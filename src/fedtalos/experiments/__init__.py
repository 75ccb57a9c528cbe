"""One module per command: each reads its config, calls training and leaves its records."""
