"""A job becomes artefacts and a summary: stages, store, pictures, measuring, processes, cost, protocols."""
