"""Judges say whether a picture shows the concept."""
