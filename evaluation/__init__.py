"""Evaluation: pictures and texts in, numbers out."""
