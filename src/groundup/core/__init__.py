"""Shared nouns, errors, atomic files, run folders, metrics, device: what every stage needs."""
