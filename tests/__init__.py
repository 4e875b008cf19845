"""Tests; a package, so that none that a dependency installs under this name is taken for it."""
