"""One file a command group; no logic of its own."""
