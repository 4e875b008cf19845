"""Where a U-Net looks at a concept, one layer, head, token and pixel at a time."""

Heads = list[list[list[float]]]
"""Attention probabilities of a layer by head, pixel and token."""


def stretched_map(layers: list[Heads], tokens: list[int], size: tuple[int, int]) -> list[list[float]]:
    """The mean probability of ``tokens`` at every pixel, over layers and heads; the least is made 0, the largest 1."""
    values = []
    for pixel in range(size[0] * size[1]):
        seen = [row[pixel][token] for heads in layers for row in heads for token in tokens]
        values.append(sum(seen) / len(seen))
    least, largest = min(values), max(values)
    stretched = [(value - least) / (largest - least) for value in values]
    return [stretched[row * size[1] : (row + 1) * size[1]] for row in range(size[0])]
