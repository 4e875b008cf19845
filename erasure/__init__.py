"""Erasing: a model and a concept in, an edit out."""
