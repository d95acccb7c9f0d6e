"""Stages strung together: recipes, caching, resume, and the public stage functions."""
