"""The `eva02-at` command line: one module a command, dispatched by `main`."""
