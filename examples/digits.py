"""Train a small classifier of handwritten digits with and without BatchNorm, in NumPy and numbanorm alone.

    python examples/digits.py [picture.png]

Both networks start from the same weights and see the same batches. BatchNorm keeps what reaches the ReLU at mean 0 and
variance 1 however far a step went. At an ordinary learning rate, 0.5, it learns faster, and on these easy data both end
up equally good; at a large one, 1.5, the network without it stumbles.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import numbanorm as nn

HIDDEN, EPOCHS, BATCH = 64, 10, 64
LEARNING_RATES = (0.5, 1.5)


class Network:
    """Two layers: pixels -> linear -> norm, if there is one -> ReLU -> linear -> scores of the ten digits."""

    def __init__(self, norm: nn.BatchNorm | None, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.norm = norm
        self.parameters = {
            "w1": rng.normal(0, np.sqrt(2 / 64), (64, HIDDEN)).astype(np.float32),
            "b1": np.zeros(HIDDEN, np.float32),
            "w2": rng.normal(0, np.sqrt(2 / HIDDEN), (HIDDEN, 10)).astype(np.float32),
            "b2": np.zeros(10, np.float32),
        }
        if norm is not None:
            # The norm's bias takes the place of the first layer's. Its arrays are shared: a step below changes both.
            del self.parameters["b1"]
            self.parameters |= {"gamma": norm.weight, "beta": norm.bias}

    def scores(self, x: np.ndarray) -> np.ndarray:
        p = self.parameters
        hidden = x @ p["w1"]
        hidden = hidden + p["b1"] if self.norm is None else self.norm(hidden)
        self.input, self.active = x, np.maximum(hidden, 0)
        return self.active @ p["w2"] + p["b2"]

    def gradients(self, dscores: np.ndarray) -> dict[str, np.ndarray]:
        """Return the parameters' gradients for the last call of `scores`."""
        dhidden = (dscores @ self.parameters["w2"].T) * (self.active > 0)
        found = {"w2": self.active.T @ dscores, "b2": dscores.sum(0)}
        if self.norm is None:
            found["b1"] = dhidden.sum(0)
        else:
            dhidden = self.norm.backward(dhidden)
            found |= {"gamma": self.norm.grad["weight"], "beta": self.norm.grad["bias"]}
        return found | {"w1": self.input.T @ dhidden}


def cross_entropy(scores: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the loss, averaged over the batch, and its gradient."""
    shifted = scores - scores.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    rows = np.arange(len(labels))
    dscores = np.exp(log_p)
    dscores[rows, labels] -= 1
    return -float(log_p[rows, labels].mean()), dscores / len(labels)


class Data(NamedTuple):
    x: np.ndarray
    labels: np.ndarray


def load() -> tuple[Data, Data]:
    """Return 1437 digits to learn from and 360 to test with."""
    x, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, labels = (x[order] / 16).astype(np.float32), labels[order]
    return Data(x[:1437], labels[:1437]), Data(x[1437:], labels[1437:])


def train(network: Network, data: Data, learning_rate: float) -> list[float]:
    """Descend along the gradient; return the average loss of every epoch."""
    rng = np.random.default_rng(1)
    losses = []
    for _ in range(EPOCHS):
        order = rng.permutation(len(data.x))[: len(data.x) // BATCH * BATCH]
        epoch = []
        for batch in order.reshape(-1, BATCH):
            loss, dscores = cross_entropy(network.scores(data.x[batch]), data.labels[batch])
            epoch.append(loss)
            for name, gradient in network.gradients(dscores).items():
                network.parameters[name] -= learning_rate * gradient
        losses.append(float(np.mean(epoch)))
    return losses


def evaluate(network: Network, data: Data) -> tuple[float, float]:
    """Return loss and accuracy."""
    scores = network.scores(data.x)
    return cross_entropy(scores, data.labels)[0], float(np.mean(scores.argmax(1) == data.labels))


def check_gradients(network: Network, data: Data, step: float = 1e-5) -> float:
    """Return the largest error of the gradients against finite differences, as a share of each gradient's scale."""
    x, labels = data.x.astype(np.float64), data.labels
    network.parameters = {name: value.astype(np.float64) for name, value in network.parameters.items()}
    if network.norm is not None:
        network.norm.weight, network.norm.bias = network.parameters["gamma"], network.parameters["beta"]
    found = network.gradients(cross_entropy(network.scores(x), labels)[1])
    rng = np.random.default_rng(2)
    worst = 0.0
    for name, value in network.parameters.items():
        for index in zip(*(rng.integers(0, n, 20) for n in value.shape), strict=True):
            kept, around = value[index], []
            for moved in (kept + step, kept - step):
                value[index] = moved
                around.append(cross_entropy(network.scores(x), labels)[0])
            value[index] = kept
            slope = (around[0] - around[1]) / (2 * step)
            worst = max(worst, abs(found[name][index] - slope) / float(np.abs(found[name]).max()))
    return worst


def plot(losses: dict[tuple[str, float], list[float]], path: Path) -> None:
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    panels = figure.subplots(1, len(LEARNING_RATES), sharey=True)
    for axes, rate in zip(panels, LEARNING_RATES, strict=True):
        for name, colour in (("plain", "#6b6b6b"), ("BatchNorm", "#d1495b")):
            values = losses[name, rate]
            axes.plot(range(1, EPOCHS + 1), values, color=colour, linewidth=2)
            axes.annotate(name, (EPOCHS, values[-1]), (5, 0), textcoords="offset points", color=colour, va="center")
        axes.set(yscale="log", xlabel="epoch", title=f"learning rate {rate}", xlim=(1, 1.35 * EPOCHS))
        axes.set_xticks([1, EPOCHS // 2, EPOCHS])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("training loss")
    figure.savefig(path, dpi=120)


def main(path: Path) -> tuple[float, dict[tuple[str, float], list[float]]]:
    """Print the tables and write the picture; return the worst gradient's error and all training losses."""
    learn, test = load()
    few = Data(learn.x[:32], learn.labels[:32])
    worst = max(check_gradients(Network(norm), few) for norm in (None, nn.BatchNorm(HIDDEN)))
    print(f"gradients against finite differences: largest relative error {worst:.1e}\n")

    losses = {}
    print(f"{'learning':<9}{'':<24}{'train':>8}{'train':>10}{'test':>8}{'test':>10}")
    print(f"{'rate':<9}{'network':<24}{'loss':>8}{'accuracy':>10}{'loss':>8}{'accuracy':>10}")
    for rate in LEARNING_RATES:
        for name, norm in (("plain", None), ("BatchNorm", nn.BatchNorm(HIDDEN))):
            network = Network(norm)
            losses[name, rate] = train(network, learn, rate)
            if norm is None:
                show(rate, name, network, learn, test)
            else:
                norm.eval()
                show(rate, f"{name}, eval()", network, learn, test)
                norm.train()
                show(rate, f"{name}, still train()", network, learn, test)
    print("\nTest in eval() mode: with the running statistics a digit's scores depend on that digit alone.")
    print("Left in train() mode, they depend on the other digits of the batch too.")

    plot(losses, path)
    print(f"\nwrote {path}")
    return worst, losses


def show(rate: float, name: str, network: Network, learn: Data, test: Data) -> None:
    """Print one row of the table."""
    (loss, accuracy), (test_loss, test_accuracy) = evaluate(network, learn), evaluate(network, test)
    print(f"{rate:<9}{name:<24}{loss:>8.4f}{accuracy:>10.1%}{test_loss:>8.4f}{test_accuracy:>10.1%}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".png"))
