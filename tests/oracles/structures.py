"""Neurons and heads by their definition, one weight at a time, and a mask trained together with its weights."""

import itertools
import math
import re


def some_places(shape):
    """Indices of a matrix, or of a kernel's first place."""
    return [(*index, *[0] * (len(shape) - 2)) for index in itertools.product(*map(range, shape[:2]))]


def unit(name, index, shape, shapes, heads):
    """What a weight is pruned with; channels of an attention that ``heads`` does not name are units themselves."""
    row, column = index[:2]
    if found := re.fullmatch(r"(.*\.attn[12])\.to_(q|k|v|out\.0)\.weight", name):
        owner, layer = found.groups()
        channel, channels = (column, shape[1]) if layer == "out.0" else (row, shape[0])
        if owner in heads:
            return owner, math.floor(channel / (channels / heads[owner]))
        return owner, channel
    if name.endswith(".ff.net.2.weight"):
        return name.removesuffix(".net.2.weight"), column
    if name.endswith(".ff.net.0.proj.weight"):
        hidden = shape[0] // 2
        return name.removesuffix(".net.0.proj.weight"), row if row < hidden else row - hidden
    return name, row


def units(shapes, heads):
    """The sets of places that are pruned together."""
    together = {}
    for name, shape in shapes.items():
        for index in some_places(shape):
            together.setdefault(unit(name, index, shape, shapes, heads), set()).add((name, index))
    return {frozenset(places) for places in together.values()}


def kept_within_budget(scores, sizes, budget):
    """1[score > 0] by unit, but pruned from the lowest score on only until the next would exceed the budget."""
    left = math.floor(budget * sum(sizes))
    pruned = set()
    for place in sorted((p for p, score in enumerate(scores) if score <= 0), key=lambda p: (scores[p], p)):
        if sizes[place] > left:
            break
        left -= sizes[place]
        pruned.add(place)
    return [place not in pruned for place in range(len(scores))]


def adam(value, gradient, moments, step, rate):
    """One step of Adam with its usual constants; ``moments`` are changed."""
    moments[0] = 0.9 * moments[0] + 0.1 * gradient
    moments[1] = 0.999 * moments[1] + 0.001 * gradient * gradient
    first, second = moments[0] / (1 - 0.9 ** (step + 1)), moments[1] / (1 - 0.999 ** (step + 1))
    return value - rate * first / (second.sqrt() + 1e-8)


def trained_jointly(unet, names, loss, pruning):
    """Weights and straight-through scores s, with dL/dW = m G and dL/ds = sigmoid'(s) W G, G = dL/d(mW).

    Returns (weight, kept) by name and the losses; the U-Net is left as it was. All names are of matrices.
    """
    parameters = {name: unet.get_parameter(name) for name in names}
    base = {name: value.detach().clone() for name, value in parameters.items()}
    weights = dict(base)
    scores = {name: value * 0 + pruning.initial_score for name, value in base.items()}
    moments = {(name, which): [0.0, 0.0] for name in names for which in "ws"}
    losses = []
    for step in range(pruning.steps):
        for name, parameter in parameters.items():
            parameter.data = weights[name] * (scores[name] > 0)
            parameter.requires_grad_(True)
            parameter.grad = None
        value = loss(step)
        value.backward()
        losses.append(value.item())
        for name, parameter in parameters.items():
            gradient = parameter.grad
            sigmoid = 1 / (1 + (-scores[name]).exp())
            of_score = sigmoid * (1 - sigmoid) * weights[name] * gradient
            of_weight = gradient * (scores[name] > 0)
            scores[name] = adam(scores[name], of_score, moments[name, "s"], step, pruning.learning_rate)
            rate = pruning.finetune_learning_rate
            weights[name] = adam(weights[name], of_weight, moments[name, "w"], step, rate)
    for name, parameter in parameters.items():
        parameter.requires_grad_(False)
        parameter.grad = None
        parameter.data = base[name]
    return {name: (weights[name], scores[name] > 0) for name in names}, losses
