"""Records what the official codes with multipliers compute, in float64, into ``official_constraints.json``.

``test_constraints.py`` compares. Run by hand, with torch and cooper-optim 1.0.1 installed:
``python -m tests.golden.record_constraints FOLDER``, where FOLDER contains clones of these GitHub repositories:

* crowsonkb/mdmm at 00ff4b32eba0;
* HiPerSimLab/PECANN-CAPU at bca54a9f80d4.

Cooper's and mdmm's are whole descents on :func:`losses_of`; PECANN-CAPU's are calls with given losses.
"""

import json
import sys
from pathlib import Path

import cooper
import torch
from cooper.multipliers import DenseMultiplier
from cooper.penalty_coefficients import DensePenaltyCoefficient

FILE = Path(__file__).with_name("official_constraints.json")
START, STEP_SIZE, N_STEPS = (0.1, -0.3), 0.02, 60
UPPER, EXACT = (1.2, 3.0), 0.2
RATE, DAMPING = 0.3, 2.0


def losses_of(x):
    """An objective, two losses with the upper bounds above, and one that is to be met exactly."""
    return (x[0] - 2) ** 2 + (x[1] - 1) ** 2, x[0] + x[1], x[0], x[0] * x[1]


class Problem(cooper.ConstrainedMinimizationProblem):
    def __init__(self, formulation, **penalty):
        super().__init__()
        kinds = {"upper": (cooper.ConstraintType.INEQUALITY, 2), "exact": (cooper.ConstraintType.EQUALITY, 1)}
        for name, (kind, n) in kinds.items():
            coefficients = {key: DensePenaltyCoefficient(torch.full((n,), x)) for key, x in penalty.items()}
            multiplier = DenseMultiplier(num_constraints=n, dtype=torch.float64)
            setattr(self, name, cooper.Constraint(kind, formulation, multiplier, **coefficients))

    def compute_cmp_state(self, x):
        objective, first, second, exact = losses_of(x)
        upper = cooper.ConstraintState(violation=torch.stack([first, second]) - torch.tensor(UPPER))
        exact = cooper.ConstraintState(violation=(exact - EXACT)[None])
        return cooper.CMPState(objective, {self.upper: upper, self.exact: exact})


def by_cooper(optimizer, formulation=cooper.formulations.Lagrangian, dual=torch.optim.SGD, settings=None, **penalty):
    problem, x = Problem(formulation, **penalty), torch.tensor(START, requires_grad=True)
    primal = torch.optim.SGD([x], lr=STEP_SIZE)
    ascent = dual(problem.dual_parameters(), lr=RATE, maximize=True, **settings or {})
    both = optimizer(problem, primal_optimizers=primal, dual_optimizers=ascent)
    path = []
    for _ in range(N_STEPS):
        both.roll(compute_cmp_state_kwargs={"x": x})
        multipliers = torch.cat([problem.upper.multiplier.weight, problem.exact.multiplier.weight])
        path.append((x.tolist(), multipliers.tolist()))
    return in_columns(path)


def by_mdmm():
    """The equality alone; its multiplier is of the other sign."""
    import mdmm

    x = torch.tensor(START, requires_grad=True)
    constraints = mdmm.MDMM([mdmm.EqConstraint(lambda: losses_of(x)[3], EXACT, damping=DAMPING)])
    optimizer = torch.optim.SGD([{"params": [x], "lr": STEP_SIZE}, {"params": [constraints[0].lmbda], "lr": RATE}])
    path = []
    for _ in range(N_STEPS):
        optimizer.zero_grad()
        constraints(losses_of(x)[0]).value.backward()
        # mdmm gives a negative step size, which torch refuses by now.
        constraints[0].lmbda.grad.neg_()
        optimizer.step()
        path.append((x.tolist(), [-constraints[0].lmbda.item()]))
    return in_columns(path)


def by_capu(eta, n_calls=40):
    from pecann_capu import PECANNState, PECANNTrainer

    torch.manual_seed(0)
    # Losses that fall and come to rest, again and again.
    fall = 0.5 ** torch.minimum(torch.arange(n_calls) % 10, torch.tensor(4))[:, None]
    losses = (fall * torch.exp(0.1 * torch.randn(n_calls, 3))).requires_grad_()
    trainer = PECANNTrainer(None, torch.tensor(eta)[:, None])
    ones = lambda: torch.ones((2, 1))
    state = PECANNState(ones(), ones(), torch.zeros((2, 1)), torch.tensor(float("inf")))
    found = {"eta": eta, "losses": losses.tolist(), "values": [], "weights": []}
    found |= {"multipliers": [], "penalties": [], "squares": []}
    for row in losses:
        objective, constrained = row[0], row[1:, None]
        rest = trainer.augmented_lagrangian(objective, constrained, state).detach()
        trainer.update_alm(state, constrained.detach(), rest)
        value = trainer.augmented_lagrangian(objective, constrained, state)  # what is descended on next
        found["values"].append(value.item())
        found["weights"].append(torch.autograd.grad(value, losses, retain_graph=True)[0].sum(0).tolist())
        for name, x in {"multipliers": state.Lambda, "penalties": state.Mu, "squares": state.Bar_v}.items():
            found[name].append(x[:, 0].tolist())
    return found


def in_columns(path):
    points, multipliers = zip(*path, strict=True)
    return {"points": points, "multipliers": multipliers}


def record():
    dual_first, together = cooper.optim.AlternatingDualPrimalOptimizer, cooper.optim.SimultaneousOptimizer
    return {
        "setting": {"start": START, "step_size": STEP_SIZE, "upper": UPPER, "exact": EXACT, "lr": RATE},
        "descents": {
            "dual first": by_cooper(dual_first),
            "simultaneous": by_cooper(together),
            "augmented": by_cooper(dual_first, cooper.formulations.AugmentedLagrangian, penalty_coefficient=DAMPING),
            "nuPI": by_cooper(dual_first, dual=cooper.optim.nuPI, settings={"Kp": 4.0, "ema_nu": 0.3}),
            "nuPI simultaneous": by_cooper(together, dual=cooper.optim.nuPI, settings={"Kp": 2.0}),
            "mdmm": by_mdmm(),
        },
        "capu": by_capu([0.2, 1.0]),
    }


def rounded(tree):
    """Numbers to eleven digits."""
    if isinstance(tree, dict):
        return {name: rounded(value) for name, value in tree.items()}
    return [rounded(value) for value in tree] if isinstance(tree, list | tuple) else float(f"{tree:.11g}")


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    folder = Path(sys.argv[1])
    sys.path[:0] = [str(folder / "mdmm"), str(folder / "PECANN-CAPU")]
    FILE.write_text(json.dumps(rounded(record()), separators=(",", ":")) + "\n")
