"""One file per erasing method."""
