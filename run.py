"""Erase a concept, attack the result, judge the pictures: ``python run.py eraser=esd pruning=on``."""

from experiments.command.run import command_line

if __name__ == "__main__":
    command_line()
