"""FID and CLIP score from their formulas in float64."""

import math

import numpy as np
from scipy.linalg import sqrtm


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)) of two feature sets [n, d]."""
    means, covariances = [], []
    for features in (first.astype(np.float64), second.astype(np.float64)):
        mean = sum(features) / len(features)
        covariance = np.zeros((features.shape[1],) * 2)
        for row in features:
            covariance += np.outer(row - mean, row - mean)
        means.append(mean)
        covariances.append(covariance / (len(features) - 1))
    root = sqrtm(covariances[0] @ covariances[1])
    distance = sum((means[0] - means[1]) ** 2) + np.trace(covariances[0]) + np.trace(covariances[1])
    return float(distance - 2 * np.trace(root).real)


def clip_score(image_features: np.ndarray, text_features: np.ndarray) -> list[float]:
    """max(100 cos, 0) of each pair of rows."""
    scores = []
    for image, text in zip(image_features.astype(np.float64), text_features.astype(np.float64), strict=True):
        dot = sum(x * y for x, y in zip(image, text, strict=True))
        lengths = math.sqrt(sum(x * x for x in image)) * math.sqrt(sum(y * y for y in text))
        scores.append(max(100 * dot / lengths, 0.0))
    return scores


def kernel_distance(first: np.ndarray, second: np.ndarray) -> float:
    """The unbiased MMD^2 of two feature sets [n, d] under the kernel (x.y / d + 1)^3."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (sum(a * b for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3

    first, second = first.astype(np.float64), second.astype(np.float64)
    n, m = len(first), len(second)
    within = sum(kernel(first[i], first[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within += sum(kernel(second[i], second[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within - 2 * sum(kernel(x, y) for x in first for y in second) / (n * m)
