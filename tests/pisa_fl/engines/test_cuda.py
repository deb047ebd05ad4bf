"""The GPU gives what the CPU gives."""

import pytest
import torch

from pisa_fl import compose, prepare

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.parametrize("strategy", ["pisa", "sisa", "nsisa", "sisa_official", "fedavg"])
def test_a_gpus_stacks_follow_the_cpus_clients(strategy):
    def weights(device):
        own = ["strategy.local_epochs=1"] if strategy == "fedavg" else []
        federation = prepare(compose(f"strategy={strategy}", "model=mlp", f"device={device}", *own))
        list(federation.rounds(3))
        federation.load_weights()
        return federation.model.weights.cpu()

    expected = weights("cpu")
    torch.testing.assert_close(weights("cuda"), expected, rtol=1e-2, atol=1e-4)
