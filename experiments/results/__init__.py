"""Summaries become what people look at: screen, grid, tables, figures, trackers, published numbers."""
