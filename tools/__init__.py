"""The command line: one script per command. Scripts hold arguments and wiring; `tools.shared` holds what they share."""
