"""Euclidean projection on the probability simplex by its optimality condition, in plain Python floats."""


def project_row(row: list[float]) -> list[float]:
    """max(p - theta, 0), with theta found by halving an interval that holds it until it cannot be halved."""
    low, high = min(row) - 1.0, max(row)
    while True:
        theta = (low + high) / 2
        if theta in (low, high):
            return [max(value - theta, 0.0) for value in row]
        if sum(max(value - theta, 0.0) for value in row) > 1.0:
            low = theta
        else:
            high = theta
