"""What judges by CLIP and by classifiers say, in float64 from the formulas, one picture at a time."""

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of ``logits``, [n]."""
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def cosines(picture: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Cosine of one feature vector with each of ``others``, [n, width]."""
    return np.array(
        [float(picture @ other) / np.sqrt(float(picture @ picture) * float(other @ other)) for other in others]
    )


def rank(values: np.ndarray, index: int) -> int:
    """How many of ``values`` are larger than the one at ``index``."""
    return sum(bool(value > values[index]) for value in values)
