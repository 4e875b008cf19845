"""How other projects write erased models: one file for each family of formats."""
