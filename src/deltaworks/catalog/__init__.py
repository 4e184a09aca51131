"""What exists, what is known about it, and where it came from."""
