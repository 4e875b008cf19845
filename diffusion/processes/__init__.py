"""How pictures become noise and noise pictures: the process that a network was trained to undo."""
