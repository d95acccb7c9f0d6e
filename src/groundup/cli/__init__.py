"""The command line: flags from config dataclasses, errors in one line."""
