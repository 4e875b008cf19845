"""Judges: is the concept in the picture?"""
