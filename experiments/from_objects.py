"""A federation from objects, round by round, as one would in a notebook: `python -m experiments.from_objects`."""

from __future__ import annotations

from functools import partial

from partitioners import DirichletPartitioner, deal
from pisa_fl import Federation
from pisa_fl.data.mnist import mnist_mini
from pisa_fl.federation import seeded
from pisa_fl.models.mlp import mlp
from strategies import Layout, Penalty, Pisa, PisaClient
from strategies.preconditioners import SecondMoment


def main(rounds: int = 10) -> list[float]:
    """SISA on MNIST digits dealt by Dirichlet(0.1); returns the test accuracy of every round."""
    data = mnist_mini(cache=None, mean=0.1307, std=0.3081)
    partitioner = DirichletPartitioner(
        10, seed=0, alpha=0.1, min_examples=10, self_balancing=True, max_redraws=1000
    )
    model = seeded(0, lambda: mlp(data.shape, classes=10, hidden=[100]))
    layout = Layout.of_parameters(model)
    second_moment = partial(
        SecondMoment,
        beta=0.99,
        eps=1e-8,
        floor=0.5,
        moment_of="gradient",
        average="vector",
        bias_correction="exact",
    )
    penalty = Penalty(lr=0.005, momentum=0.95, sigma=None, rho=None, gamma=1.0, grow_every=10)
    federation = Federation(
        data,
        deal(partitioner, data.train_labels),
        model,
        Pisa(layout, second_moment, penalty, lambda_=0.0, align_every=1, alpha="examples"),
        PisaClient(layout, second_moment, penalty, align_every=1, local_steps=1, gradient="mean"),
    )
    accuracies = []
    for metrics in federation.rounds(rounds):
        print(f"round {metrics['round']}: test accuracy {metrics['test_accuracy']:.3f}")
        accuracies.append(float(metrics["test_accuracy"]))
    return accuracies


if __name__ == "__main__":
    main()
