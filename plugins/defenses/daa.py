"""Detects prompts with a trigger by the slow change of the attention on the EOS token during generation.

DAA, dynamic attention analysis. Wang et al., "Dynamic Attention Analysis for Backdoor Detection in Text-to-Image
Diffusion Models", TPAMI 2025, arXiv:2504.20518. During generation the attention on the EOS token of a backdoored prompt
dissipates more slowly than the attention on the prompt's words.

M_t,l is the cross-attention map of token l at sampling step t (mean over heads and layers). L is the number of tokens
with BOS and EOS.

    DAA-I:  D_t,l = ‖M_t,l - M_t-1,l‖_F         score = Σ_{t ∈ steps} (D_t,EOS - Σ_{l word} D_t,l / L)
    DAA-S:  dx/dt = F x + c A(⌊t⌋) x            x_i(0) = ‖M_0,i‖_F, i over all tokens but BOS
            F = diag(-1, ..., -1, -10 for EOS), A_ij = 1 - d_ij / max d, d_ij = ‖M_t,i - M_t,j‖_F, A_ii = -Σ_k≠i A_ki
            score = -Σ over the first `differences` of (Δx_EOS - mean Δx_word)

A prompt is suspicious if its score is small, so the screen returns -score. The defense needs clean prompts, on which
the threshold is calibrated. The published thresholds hold only for Stable Diffusion 1.4 with 50 steps. The defense
returns a screen.

The code was read (Robin-WZQ/DAA at 4cd2400). The text of the paper could not be had, so that the formulas are those of
the code, with two of its details: D_t,l of the words is divided by L, not by their number, and DAA-S adds differences
on the grid that scipy's Runge-Kutta 4(5) (Dormand-Prince) chooses. Differs from the official code:
- The maps come from DDIM; the code has Stable Diffusion 1.4's PNDM, which evaluates the second timestep twice. Its
  changes 3 and 4 therefore end at t = 921 and 901, which are steps 3 and 4 of DDIM: `steps=(3, 4)`. The default (4, 5)
  has the code's places in the row of maps. It is kept, because the cells of the protocol v1 are frozen with it.
- One noise (seed 42) serves all queries; here each query has its own. Images have 512 pixels there.
- Its mean is over all heads of the layers of side 16 on the way down and up; here it is over each layer first, which is
  the same where the layers have equally many heads, as in Stable Diffusion.
- It calibrates nothing: its thresholds are constants, which `calibrate=False` takes.
- Prompts for which the solver takes fewer than seven steps end in an error there; here the steps that there are count.
- Its script for SDXL calls the UNet without the pooled embedding and the sizes that SDXL's UNet needs, and with the
  states of one text encoder, so it cannot run as it is; there is nothing to compare with.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from harness import Defended, Inputs, Knowledge, MapRun, PositiveInt, Share, hookimpl, prompt_screening


@dataclass(frozen=True)
class DAA(MapRun):
    name: ClassVar[str] = "daa"
    version: ClassVar[int] = 2
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    needs: ClassVar[tuple[str, ...]] = ("prompts",)
    delivers: ClassVar[tuple[str, ...]] = ("screen",)

    method: Literal["independent", "system"] = "independent"  # DAA-I or DAA-S
    steps: tuple[PositiveInt, ...] = (4, 5)  # steps t, counted from 0, whose changes from t-1 DAA-I adds; published
    # values
    differences: PositiveInt = 7  # solver steps whose changes DAA-S adds; published value
    coupling: float = 1.0  # c of DAA-S; published value
    calibrate: bool = True  # calibrate the threshold on clean prompts; False = use the published one
    false_positives: Share = 0.05  # share of clean prompts that the calibrated threshold flags
    published_independent: float = 0.000489037  # DAA-I flags scores below this; for Stable Diffusion 1.4 with 50 steps
    published_system: float = 0.0015001562  # DAA-S flags scores below this; for Stable Diffusion 1.4 with 50 steps

    def defend(self, model: Any, knowledge: Knowledge, rng: Any) -> Defended:
        if self.method == "independent" and max(self.steps) >= self.sampling_steps:
            raise ValueError(f"steps={self.steps} needs more than {self.sampling_steps} sampling steps")

        def screen(inputs: Inputs) -> Tensor:
            assert inputs.prompts is not None, "daa is for models that take prompts"
            found = zip(self.maps(model, inputs), prompt_screening.lengths(model, inputs.prompts), strict=True)
            return torch.tensor([-self.score(maps[:, :length]) for maps, length in found])

        if not self.calibrate:
            known = self.published_independent if self.method == "independent" else self.published_system
            return Defended(screen=screen, screen_above=-known)
        scores = prompt_screening.screened(screen, prompt_screening.benign(model, knowledge.prompts or (), rng))
        above = prompt_screening.threshold(scores, self.false_positives)
        return Defended(screen=screen, screen_above=above, notes={"clean_scores": scores.tolist()})

    def score(self, maps: Tensor) -> float:
        """The published score of maps (S, L, side, side) of the tokens from BOS to EOS."""
        return independent(maps, self.steps) if self.method == "independent" else self.system(maps)

    def system(self, maps: Tensor) -> float:
        from scipy.integrate import RK45

        nodes = maps[:, 1:].flatten(2).double()
        couplings = [self.coupling * coupled(step).numpy() for step in nodes]
        decay = -torch.ones(nodes.shape[1]).double()
        decay[-1] = -10
        fade = decay.numpy()

        def flow(t: float, x: Any) -> Any:
            return fade * x + couplings[min(int(t), len(couplings) - 1)] @ x

        solver = RK45(flow, 0.0, nodes[0].norm(dim=1).numpy(), len(nodes) - 1)
        path = [solver.y.copy()]
        while len(path) <= self.differences and solver.status == "running":
            solver.step()
            path.append(solver.y.copy())
        change = torch.tensor([(b - a).tolist() for a, b in pairwise(path)])
        words = change[:, :-1].sum(1) / max(1, change.shape[1] - 1)  # an empty prompt has no words
        return -(change[:, -1] - words).sum().item()


def independent(maps: Tensor, steps: tuple[int, ...]) -> float:
    """DAA-I's score of maps (S, L, side, side)."""
    change = (maps[1:] - maps[:-1]).flatten(2).double().norm(dim=2)  # row t-1 is step t
    mean = change[:, 1:-1].sum(1) / maps.shape[1]
    return sum((change[t - 1, -1] - mean[t - 1]).item() for t in steps)


def coupled(maps: Tensor) -> Tensor:
    """A (N, N) for the maps (N, P) of one step: similarities, with minus the sum of the others on the diagonal."""
    d = torch.cdist(maps, maps)
    a = 1 - d / d.max().clamp_min(1e-12)
    a.fill_diagonal_(0)
    return a - torch.diag(a.sum(0))


@hookimpl
def defenses() -> list[type]:
    return [DAA]
