"""Local SGD on cross-entropies of logits that are changed by how often a client has each class: against label skew.

For logits f (K,) of an example of class y, and n_c the number of a client's training examples of class c, a client
lowers

    -log( exp(a_y) / sum over all c of exp(a_c) ),      a = adjusted(f, n)

in the place of the task's cross-entropy, which has a = f. What `adjusted` is, FedLC and FedRS say. The training loss
that is reported, and every test, are the task's own. The server half is any that takes FedAvg's clients; FedProx's
penalty is obeyed. A task with several labels an example, such as the next character at each place, has the mean over
them, and counts them all.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from strategies.base.beyond_gradients import Forward, Term
from strategies.base.client import Batch, Instruction, Stack, Update
from strategies.base.messages import WEIGHTS, real
from strategies.local_sgd import LocalSgd


class LabelLoss(LocalSgd):
    """Client half: local SGD on the changed loss; the arguments are those of `LocalSgd`."""

    needs_classes = True

    @abstractmethod
    def adjusted(self, logits: Tensor, counts: Tensor) -> Tensor:
        """Logits (..., K) as the loss takes them, of a client that has so many labels of each class, (K,)."""

    def solve(self, stack: Stack, instruction: Instruction, state: Mapping[str, Tensor]) -> Update:
        """Run the local epochs on the changed loss."""
        counts = stack.label_counts()

        def differentiate(weights: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
            given = {"labels": batch.data["targets"], "counts": counts}
            return stack.gradient(weights, batch, Term(self._change, given=given))

        mu = real(instruction.config, "proximal-mu", 0.0)
        start, lr = instruction.arrays[WEIGHTS], self.lr_now(instruction)
        done = self.descend(stack, start, lr, mu, differentiate=differentiate)
        return Update({WEIGHTS: done.weights}, done.loss)

    def _change(self, forward: Forward, given: Mapping[str, Tensor]) -> Tensor:
        """The changed loss less the task's, (B,)."""
        logits, labels = forward.output.float(), given["labels"]

        def loss(logits: Tensor) -> Tensor:
            losses = F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")
            return losses.reshape(len(labels), -1).mean(dim=1)

        return loss(self.adjusted(logits, given["counts"])) - loss(logits)
