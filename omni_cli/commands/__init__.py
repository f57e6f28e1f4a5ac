"""Typer and nothing else: parse, one call into a stage, print."""
