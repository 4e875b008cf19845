"""The launchers of this project, where Hydra looks for launchers."""
