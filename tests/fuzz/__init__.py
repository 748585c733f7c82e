"""Coverage-guided fuzzing of everything that reads bytes of others. See `tests.fuzz.__main__` for the command."""
