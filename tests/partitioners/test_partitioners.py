"""Who gets which examples: promises all partitioners share, and each one's own structure."""

import warnings
from collections.abc import Callable

import flwr_datasets.partitioner as flower
import numpy as np
import pytest
from datasets import Dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import partitioners as p

REDRAW = {"min_examples": 10, "max_redraws": 20_000}
TEN_CLASSES = np.repeat(np.arange(10), 1000)  # sorted by label, the order that exposes a missing shuffle

MAKERS: dict[str, Callable[[int, int], p.IndexPartitioner]] = {
    "iid": lambda clients, seed: p.IidPartitioner(clients, seed),
    "label_skew": lambda clients, seed: p.LabelSkewPartitioner(clients, seed, 2),
    "dirichlet": lambda clients, seed: p.DirichletPartitioner(clients, seed, 0.5, 1, True, 20_000),
    "dirichlet_unbalanced": lambda clients, seed: p.DirichletPartitioner(
        clients, seed, 0.5, 1, False, 20_000
    ),
    "shards": lambda clients, seed: p.ShardsPartitioner(clients, seed, 2),
    "quantity": lambda clients, seed: p.QuantityPartitioner(clients, seed, 0.5, 1, 20_000),
    "feature_noise": lambda clients, seed: p.FeatureNoisePartitioner(clients, seed, 0.1),
}


def counts(partition, labels):
    """Examples of each class at each client, shape (clients, classes), counted one by one."""
    table = np.zeros((len(partition), labels.max() + 1), dtype=int)
    for client, indices in enumerate(partition):
        for index in indices:
            table[client, labels[index]] += 1
    return table


def flower_deal(partitioner, labels):
    """A Flower partitioner's deal, read without this package."""
    partitioner.dataset = Dataset.from_dict({"index": np.arange(len(labels)), "label": labels})
    return [list(partitioner.load_partition(client)["index"]) for client in range(partitioner.num_partitions)]


def as_lists(partition):
    return [indices.tolist() for indices in partition]


def as_sets(partition):
    """Who gets what, whatever the order."""
    return [set(map(int, indices)) for indices in partition]


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_example_is_dealt_once_and_nobody_is_empty(name, data):
    num_classes = data.draw(st.integers(1, 6))
    clients = data.draw(st.integers(1, 8))
    assume(name != "label_skew" or 2 <= num_classes <= 2 * clients)
    sizes = data.draw(st.lists(st.integers(20, 60), min_size=num_classes, max_size=num_classes))
    labels = np.array(data.draw(st.permutations(np.repeat(range(num_classes), sizes).tolist())))
    seed = data.draw(st.integers(0, 2**32))

    partition = p.deal(MAKERS[name](clients, seed), labels)

    assert len(partition) == clients
    assert all(len(indices) > 0 and indices.dtype == np.int64 for indices in partition)
    assert sorted(np.concatenate(partition).tolist()) == list(range(len(labels)))
    assert as_lists(partition) == as_lists(p.deal(MAKERS[name](clients, seed), labels))


@pytest.mark.parametrize("name", MAKERS)
def test_another_seed_is_another_deal(name):
    deals = [p.deal(MAKERS[name](10, seed), TEN_CLASSES) for seed in range(5)]
    assert len({str(as_lists(partition)) for partition in deals}) == 5


@pytest.mark.parametrize("name", MAKERS)
def test_load_partition_gives_the_rows_that_deal_gives(name):
    partition = p.deal(MAKERS[name](5, 3), TEN_CLASSES)
    assert flower_deal(MAKERS[name](5, 3), TEN_CLASSES) == as_lists(partition)


@pytest.mark.parametrize("name", MAKERS)
def test_a_client_does_not_see_its_classes_one_after_the_other(name):
    partition = p.deal(MAKERS[name](5, 3), TEN_CLASSES)
    for table in counts(partition, TEN_CLASSES):
        assert (table > 0).sum() >= 2, "this deal gives a client one class, where order shows nothing"
    for indices in partition:
        runs = 1 + np.count_nonzero(np.diff(TEN_CLASSES[indices]))
        shares = np.bincount(TEN_CLASSES[indices]) / len(indices)
        # In random order two neighbours are of one class with probability sum of the squared shares.
        expected = len(indices) * (1 - (shares**2).sum())
        assert runs > 0.8 * expected


@pytest.mark.parametrize("name", MAKERS)
def test_the_global_random_state_stays_as_it_is(name):
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    p.deal(MAKERS[name](5, 0), TEN_CLASSES)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


@pytest.mark.parametrize("name", MAKERS)
def test_more_clients_than_examples(name):
    with pytest.raises(
        ValueError, match=r"num_partitions=11 is more than the 10 examples: lower num_partitions"
    ):
        p.deal(MAKERS[name](11, 0), np.arange(10))


# --- iid


def test_iid_is_an_even_split_of_shuffled_data():
    partition = p.deal(p.IidPartitioner(7, 0), TEN_CLASSES)
    assert sorted(map(len, partition)) == [1428] * 3 + [1429] * 4
    # Hypergeometric: 143 of a class expected at a client, standard deviation 10.5.
    assert (abs(counts(partition, TEN_CLASSES) - 1000 / 7) < 60).all()


def test_iid_is_flowers_on_shuffled_data():
    order = np.random.default_rng(4).permutation(103)
    theirs = flower.IidPartitioner(10)
    theirs.dataset = Dataset.from_dict({"index": order})
    ours = p.deal(p.IidPartitioner(10, 4), np.zeros(103, dtype=int))
    assert as_sets(ours) == [set(theirs.load_partition(client)["index"]) for client in range(10)]


# --- label skew


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_label_skew_is_niid_benchs(data):
    num_classes = data.draw(st.integers(1, 8))
    classes_per_client = data.draw(st.integers(1, num_classes))
    clients = data.draw(st.integers(-(-num_classes // classes_per_client), 12))
    labels = np.repeat(np.arange(num_classes), data.draw(st.integers(12, 40)))
    seed = data.draw(st.integers(0, 1000))

    table = counts(p.deal(p.LabelSkewPartitioner(clients, seed, classes_per_client), labels), labels)

    held = table > 0
    assert (held.sum(axis=1) == classes_per_client).all()
    assert all(held[client, client % num_classes] for client in range(clients))
    for class_ in range(num_classes):
        shares = table[held[:, class_], class_]
        assert shares.sum() == (labels == class_).sum()
        assert shares.max() - shares.min() <= 1


@pytest.mark.parametrize(("clients", "classes_per_client"), [(10, 1), (10, 2), (10, 10), (37, 3), (12, 9)])
def test_label_skew_draws_the_classes_flower_draws(clients, classes_per_client):
    theirs = flower.PathologicalPartitioner(
        clients, "label", classes_per_client, "first-deterministic", seed=5
    )
    ours = p.LabelSkewPartitioner(clients, 5, classes_per_client)
    assert (
        counts(p.deal(ours, TEN_CLASSES), TEN_CLASSES)
        == counts(flower_deal(theirs, TEN_CLASSES), TEN_CLASSES)
    ).all()


def test_label_skew_draws_the_other_classes_uniformly():
    table = counts(p.deal(p.LabelSkewPartitioner(5000, 0, 2), TEN_CLASSES.repeat(5)), TEN_CLASSES.repeat(5))
    held = (table > 0).reshape(500, 10, 10).sum(axis=0)  # (first class, class)
    assert (held.diagonal() == 500).all()
    others = held[~np.eye(10, dtype=bool)]
    assert (abs(others - 500 / 9) < 6 * np.sqrt(500 / 9 * 8 / 9)).all()


def test_label_skew_shuffles_a_class_before_splitting_it():
    first, second = p.deal(p.LabelSkewPartitioner(2, 0, 1), np.zeros(100, dtype=int))
    assert max(first) > min(second)
    assert max(second) > min(first)


def test_label_skew_takes_any_labels():
    labels = np.array([7, -3, 7, -3])
    assert as_sets(p.deal(p.LabelSkewPartitioner(2, 0, 1), labels)) == [{1, 3}, {0, 2}]


@pytest.mark.parametrize(
    ("clients", "classes_per_client", "sentence"),
    [
        (10, 11, r"classes_per_client=11 is more than the 10 classes there are: lower it"),
        (
            4,
            2,
            r"num_partitions=4 with classes_per_client=2 cannot hold all 10 classes: "
            r"raise num_partitions or classes_per_client",
        ),
        (
            10,
            10,
            r"class 0 has 5 examples but 10 clients hold it: lower num_partitions or classes_per_client",
        ),
    ],
)
def test_label_skew_refuses(clients, classes_per_client, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        p.deal(p.LabelSkewPartitioner(clients, 0, classes_per_client), np.repeat(np.arange(10), 5))


# --- Dirichlet and quantity


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("clients", "alpha"), [(10, 0.05), (10, 0.1), (10, 0.5), (10, 1), (100, 0.1)])
def test_dirichlet_succeeds_where_papers_use_it(clients, alpha, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        partition = p.deal(p.DirichletPartitioner(clients, seed, alpha, 10, True, 20_000), TEN_CLASSES)
    assert min(map(len, partition)) >= 10
    assert sum(map(len, partition)) == 10_000


@pytest.mark.parametrize("self_balancing", [True, False])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 5.0])
def test_dirichlet_numbers_are_flowers(alpha, self_balancing):
    labels = np.random.default_rng(0).integers(0, 10, 3001)
    theirs = flower.DirichletPartitioner(
        7, "label", alpha, min_partition_size=10, self_balancing=self_balancing, seed=2
    )
    ours = p.DirichletPartitioner(7, 2, alpha, **REDRAW, self_balancing=self_balancing)
    difference = counts(p.deal(ours, labels), labels) - counts(flower_deal(theirs, labels), labels)
    # Rounding leaves Flower's last client the odd example of a class that balancing has closed to it.
    assert abs(difference).max() <= self_balancing


def test_dirichlet_redraws_as_flower_does():
    with warnings.catch_warnings(record=True) as redraws:
        warnings.simplefilter("always")
        theirs = flower_deal(
            flower.DirichletPartitioner(10, "label", 0.05, min_partition_size=10, seed=3), TEN_CLASSES
        )
    assert len(redraws) > 0
    ours = p.deal(p.DirichletPartitioner(10, 3, 0.05, **REDRAW, self_balancing=False), TEN_CLASSES)
    assert (counts(ours, TEN_CLASSES) == counts(theirs, TEN_CLASSES)).all()


def test_self_balancing_gives_nothing_more_to_a_client_that_has_its_even_share():
    for seed in range(20):
        partition = p.deal(p.DirichletPartitioner(10, seed, 0.1, **REDRAW, self_balancing=True), TEN_CLASSES)
        table = counts(partition, TEN_CLASSES)
        before = np.cumsum(table, axis=1) - table
        assert (table[before >= 1000] == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_self_balancing_redraws_when_a_class_finds_no_client(seed):
    # So small an alpha gives every class whole to one client, so that a repeated winner leaves nobody.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        partition = p.deal(
            p.DirichletPartitioner(3, seed, 1e-9, **REDRAW, self_balancing=True), np.arange(300) % 3
        )
    assert sorted(map(len, partition)) == [100, 100, 100]


def test_smaller_alpha_is_more_skewed():
    def largest_share(alpha):
        partition = p.deal(p.DirichletPartitioner(10, 0, alpha, **REDRAW, self_balancing=True), TEN_CLASSES)
        return (counts(partition, TEN_CLASSES).max(axis=1) / [len(indices) for indices in partition]).mean()

    assert largest_share(0.05) > largest_share(0.5) > largest_share(100)


def test_quantity_has_dirichlet_sizes_and_iid_labels():
    partition = p.deal(p.QuantityPartitioner(10, 1, 0.5, **REDRAW), TEN_CLASSES)
    rng = np.random.default_rng(1)
    while True:  # NIID-Bench's lines, with the minimum taken after rounding
        proportions = rng.dirichlet(np.full(10, 0.5))
        bounds = (np.cumsum(proportions) * 10_000).astype(int)[:-1]
        sizes = np.diff([0, *bounds, 10_000])
        if sizes.min() >= 10:
            break
    assert [len(indices) for indices in partition] == sizes.tolist()
    for row in counts(partition, TEN_CLASSES):
        expected = row.sum() / 10
        assert (abs(row - expected) < 5 * np.sqrt(expected) + 1).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda clients, alpha, **k: p.DirichletPartitioner(clients, 0, alpha, **k, self_balancing=True),
        lambda clients, alpha, **k: p.QuantityPartitioner(clients, 0, alpha, **k),
    ],
    ids=["dirichlet", "quantity"],
)
def test_dirichlet_and_quantity_refuse(make):
    with pytest.raises(ValueError, match=r"^alpha must be positive, got -1$"):
        make(10, -1, **REDRAW)
    with pytest.raises(ValueError, match=r"^min_examples must be a whole number of at least 1, got 0$"):
        make(10, 0.5, min_examples=0, max_redraws=1)
    with pytest.raises(
        ValueError,
        match=r"^num_partitions=1001 with min_examples=10 need more than the 10000 examples there are: "
        r"lower num_partitions or min_examples$",
    ):
        p.deal(make(1001, 0.5, min_examples=10, max_redraws=10**9), TEN_CLASSES)
    with pytest.raises(
        ValueError,
        match=r"^101 draws never gave each of num_partitions=100 its min_examples=10: raise "
        r"alpha=0.01 or max_redraws, or lower num_partitions or min_examples$",
    ):
        p.deal(make(100, 0.01, min_examples=10, max_redraws=100), TEN_CLASSES)


# --- shards


@settings(max_examples=40, deadline=None)
@given(
    clients=st.integers(1, 8),
    each=st.integers(1, 4),
    labels=st.lists(st.integers(0, 4), min_size=32, max_size=90),
)
def test_shards_are_consecutive_in_label_order(clients, each, labels):
    labels = np.array(labels)
    partition = p.deal(p.ShardsPartitioner(clients, 0, each), labels)
    ranked = sorted(range(len(labels)), key=lambda index: (labels[index], index))
    small, larger = divmod(len(labels), clients * each)
    owner = {index: client for client, indices in enumerate(partition) for index in indices}
    received = [0] * clients
    start = 0
    for shard in range(clients * each):
        stop = start + small + (shard < larger)
        (client,) = {owner[index] for index in ranked[start:stop]}
        received[client] += 1
        start = stop
    assert received == [each] * clients


def test_shards_are_flowers_where_all_are_equal():
    labels = np.random.default_rng(1).integers(0, 10, 600)
    theirs = flower.ShardPartitioner(10, "label", num_shards_per_partition=3, seed=6)
    assert as_sets(p.deal(p.ShardsPartitioner(10, 6, 3), labels)) == as_sets(flower_deal(theirs, labels))


def test_shards_refuse():
    with pytest.raises(
        ValueError,
        match=r"^num_partitions=5 with shards_per_client=3 need more than the 10 examples there are: "
        r"lower num_partitions or shards_per_client$",
    ):
        p.deal(p.ShardsPartitioner(5, 0, 3), np.zeros(10, dtype=int))


# --- feature noise


def test_feature_noise_grows_linearly_in_standard_deviation():
    partitioner = p.FeatureNoisePartitioner(4, 0, 0.2)
    assert [partitioner.noise_std(client) for client in range(4)] == pytest.approx([0, 0.05, 0.1, 0.15])
    same = p.deal(p.IidPartitioner(4, 0), TEN_CLASSES)
    assert as_lists(p.deal(partitioner, TEN_CLASSES)) == as_lists(same)


# --- arguments


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: p.IidPartitioner(0, 0), "num_partitions must be a whole number of at least 1, got 0"),
        (lambda: p.IidPartitioner(2.5, 0), "num_partitions must be a whole number of at least 1, got 2.5"),
        (lambda: p.IidPartitioner(True, 0), "num_partitions must be a whole number of at least 1, got True"),
        (lambda: p.IidPartitioner(2, -1), "seed must be a whole number of at least 0, got -1"),
        (
            lambda: p.LabelSkewPartitioner(2, 0, 0),
            "classes_per_client must be a whole number of at least 1, got 0",
        ),
        (
            lambda: p.ShardsPartitioner(2, 0, 0),
            "shards_per_client must be a whole number of at least 1, got 0",
        ),
        (
            lambda: p.DirichletPartitioner(2, 0, 0, **REDRAW, self_balancing=True),
            "alpha must be positive, got 0",
        ),
        (
            lambda: p.DirichletPartitioner(2, 0, "many", **REDRAW, self_balancing=True),
            "alpha must be positive, got 'many'",
        ),
        (lambda: p.QuantityPartitioner(2, 0, np.nan, **REDRAW), "alpha must be positive, got nan"),
        (
            lambda: p.QuantityPartitioner(2, 0, 1.0, min_examples=1, max_redraws=-1),
            "max_redraws must be a whole number of at least 0, got -1",
        ),
        (
            lambda: p.FeatureNoisePartitioner(2, 0, -0.1),
            "sigma must be zero or positive, got -0.1",
        ),
    ],
)
def test_impossible_arguments(make, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make()
    assert str(error.value) == sentence
