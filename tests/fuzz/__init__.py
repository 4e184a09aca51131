"""Fuzzing of everything that reads a file from outside: `make fuzz`, and a short run among the tests."""
