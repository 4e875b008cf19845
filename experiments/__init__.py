"""Experiments: jobs, their artefacts, tracking, tables."""
