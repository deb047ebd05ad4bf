"""PISA: preconditioned inexact stochastic ADMM, and with it SISA and NSISA.

Zhou, Wang, Luo, Zhu, Li, "Preconditioned inexact stochastic ADMM for deep models", Nature Machine Intelligence
2026, doi 10.1038/s42256-026-01182-3, arXiv 2502.10784, Algorithm 1. Problem: min over w of
sum_i alpha_i F_i(w) + (lambda/2)|w|^2. A round, for every client i that takes part:

    g_i      = stochastic gradient of F_i at w                                               (client)
    w_i      = w - (sigma I + rho Q_i)^-1 (P(g_i) + pi_i)         preconditioned primal step
    pi_i    += sigma (w_i - w)                                    dual step
    w        = sum_i alpha_i (sigma w_i + pi_i) / (sigma + lambda)        consensus          (server)

The server's ledger knows pi_i of every client, which stays in the sum while the client is absent, unless
`forget_after` takes it out: who comes back then begins anew, from pi_i = 0. With consensus `fresh` the sum of w_i is
over those who answered, and everybody's last gradient is kept as well (`strategies.pisa.ledger`).
`preconditioner` decides the method: `Kronecker` is the project's default, `Identity` PISA without preconditioning,
`SecondMoment` SISA, `NewtonSchulz` and `Spectral` NSISA. sigma and rho come from `penalty`.

Who takes the two steps is a matter of the wire, not of the path. `gradient`: clients send g_i alone, keep nothing, and
the ledger steps for them; with `compression` they send it in fewer bytes, and keep what that leaves out for their next
(`strategies.transforms.compression`). `primal`: they take the steps themselves, send w_i, and keep a replica of their
dual; that is needed for more than one local step, or a Q of their own. Where the server is to see sums over clients
alone, the rows stay with the clients (`strategies.pisa.summed`).

Departures from the paper, all an override away from its form (docs/algorithm.md derives them):

*Alignment.* Every `align_every` rounds the statistic that Q is built from is averaged (weights alpha_i), and everybody
has the same Q; `align_every: 0` keeps each client's own. With `lag` 0 it is Q of this round's gradients, for which
the wire `primal` asks twice a round, first for the statistic; with `lag` 1 that of the rounds before: then the
first round only measures, w_i = w and pi_i = 0, if the penalty is automatic.
*Local steps.* `local_steps` K > 1 goes on with the subproblem before the dual step,
w_i -= (sigma I + rho Q)^-1 (P(g_i(w_i)) + pi_i + sigma (w_i - w)), K times in all from w_i = w.
*Friction.* Every round takes a share `friction` of the duals' average away from all of them (`strategies.pisa.ledger`).
*A client's difference.* With h = sum_i alpha_i g_i over everybody's last gradients, h + `difference` (g_i - h) takes
the place of g_i in the primal step: by itself that is 1 where everybody takes part, and less where few do.
*A bound.* No tensor of the consensus moves by more than `bound` of its size in a round (`strategies.pisa.bound`).

Symbols: w `consensus`, w_i `weights`, pi_i `dual`, g_i `gradient`, g_i + pi_i `residual`, lambda `lambda_`.
"""

from strategies.pisa.client import PisaClient
from strategies.pisa.ledger import Ledger
from strategies.pisa.local_client import PisaLocalClient
from strategies.pisa.penalty import Penalty
from strategies.pisa.server import Pisa
from strategies.pisa.summed import PisaSummed
from strategies.pisa.summed_client import PisaSummedClient

__all__ = ["Ledger", "Penalty", "Pisa", "PisaClient", "PisaLocalClient", "PisaSummed", "PisaSummedClient"]
