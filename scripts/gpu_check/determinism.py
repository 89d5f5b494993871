"""Two runs of a few steps from one seed, dropout on: equal to the bit?

python -m scripts.gpu_check.determinism OUT
"""

from __future__ import annotations

import sys

import torch

from benchmarks.peers.agreement import weights_of
from benchmarks.peers.ours import HubertFast
from benchmarks.training import TrainingStep
from scripts.gpu_check.facts import facts_of_process
from scripts.gpu_check.models import DTYPE, architecture, full_batches, leave_out_broken, setting

_STEPS = 3


def main() -> int:
    facts = facts_of_process()
    leave_out_broken(facts)
    chosen = setting(architecture("base"), DTYPE)
    batches, runs = full_batches(chosen.architecture, _STEPS), []
    for _ in range(2):
        model = HubertFast().build(chosen, weights_of(chosen))
        step = TrainingStep(model)
        torch.manual_seed(7)
        for batch in batches:
            step(batch, chosen.dtype)
        moments = {
            f"{name} (moment)": step.optimizer.state[each]["exp_avg"].clone()
            for name, each in model.module.named_parameters()
        }
        runs.append({name: each.detach().clone() for name, each in model.module.named_parameters()} | moments)
    differing = [name for name in runs[0] if not torch.equal(runs[0][name], runs[1][name])]
    finite = all(each.isfinite().all() for each in runs[0].values())
    facts.note(
        "determinism",
        steps=_STEPS,
        equal=not differing,
        finite=bool(finite),
        count=len(differing),
        differing=differing[:12],
    )
    return int(bool(differing) or not finite)


if __name__ == "__main__":
    sys.exit(main())
