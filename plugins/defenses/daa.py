"""DAA, dynamic attention analysis: "Dynamic Attention Analysis for Backdoor Detection in Text-to-Image Diffusion
Models", Wang et al., TPAMI 2025, arXiv:2504.20518. While an image is generated, the attention on
the EOS token of a backdoored prompt dissipates more slowly than on the prompt's words.

M_t,l is the cross-attention map of token l at sampling step t (mean over heads and layers), L tokens with BOS and EOS.

    DAA-I:  D_t,l = ‖M_t,l - M_t-1,l‖_F         score = Σ_{t ∈ steps} (D_t,EOS - Σ_{l word} D_t,l / L)
    DAA-S:  dx/dt = F x + c A(⌊t⌋) x            x_i(0) = ‖M_0,i‖_F, i over all tokens but BOS
            F = diag(-1, ..., -1, -10 for EOS), A_ij = 1 - d_ij / max d, d_ij = ‖M_t,i - M_t,j‖_F, A_ii = -Σ_k≠i A_ki
            score = -Σ over the first `differences` of (Δx_EOS - mean Δx_word)

A prompt is suspicious where its score is small, so the screen gives -score. Needs clean prompts, on which the
threshold is calibrated; the published ones hold for Stable Diffusion 1.4 with 50 steps alone. Returns a screen.

Checked against Robin-WZQ/DAA at 4cd2400 (its DAA-I read there at 1f99d4a, where entries 3 and 4 of the changes from
step 0 on are added, so t is 4 and 5); the paper's text was not at hand, so division by L, not by the number of words,
and the solver's own time grid (Runge-Kutta 4(5), scipy's tolerances) are the code's.
Differs from the code: maps are made by DDIM; the threshold is calibrated unless `calibrate` is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from harness.hookspecs import hookimpl
from harness.noise_backdoor import Steps
from harness.text_detection import MapRun, Share, benign, lengths, screened, threshold
from harness.types import Defended, Inputs, Knowledge


@dataclass(frozen=True)
class DAA(MapRun):
    name: ClassVar[str] = "daa"
    version: ClassVar[int] = 2
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    needs: ClassVar[tuple[str, ...]] = ("prompts",)
    delivers: ClassVar[tuple[str, ...]] = ("screen",)

    method: Literal["independent", "system"] = "independent"  # DAA-I or DAA-S
    steps: tuple[Steps, ...] = (4, 5)  # t, counted from 0, whose changes from t-1 DAA-I adds; published
    differences: Steps = 7  # solver steps whose changes DAA-S adds; published
    coupling: float = 1.0  # c of DAA-S; published
    calibrate: bool = True  # threshold from clean prompts; False: the published one
    false_positives: Share = 0.05  # share of clean prompts that the calibrated threshold flags
    published_independent: float = 0.000489037  # DAA-I flags scores below; SD 1.4, 50 steps
    published_system: float = 0.0015001562  # DAA-S flags scores below; SD 1.4, 50 steps

    def defend(self, model: Any, knowledge: Knowledge, rng: Any) -> Defended:
        if self.method == "independent" and max(self.steps) >= self.sampling_steps:
            raise ValueError(f"steps={self.steps} needs more than {self.sampling_steps} sampling steps")

        def screen(inputs: Inputs) -> Tensor:
            assert inputs.prompts is not None, "daa is for models that take prompts"
            found = zip(self.maps(model, inputs), lengths(model, inputs.prompts), strict=True)
            return torch.tensor([-self.score(maps[:, :length]) for maps, length in found])

        if not self.calibrate:
            known = self.published_independent if self.method == "independent" else self.published_system
            return Defended(screen=screen, screen_above=-known)
        scores = screened(screen, benign(model, knowledge.prompts or (), rng))
        above = threshold(scores, self.false_positives)
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
        words = change[:, :-1].sum(1) / max(1, change.shape[1] - 1)  # an empty prompt has none
        return -(change[:, -1] - words).sum().item()


def independent(maps: Tensor, steps: tuple[int, ...]) -> float:
    """DAA-I's score of maps (S, L, side, side)."""
    change = (maps[1:] - maps[:-1]).flatten(2).double().norm(dim=2)  # row t-1 is step t
    mean = change[:, 1:-1].sum(1) / maps.shape[1]
    return sum((change[t - 1, -1] - mean[t - 1]).item() for t in steps)


def coupled(maps: Tensor) -> Tensor:
    """A (N, N) of one step's maps (N, P): similarities, with minus the sum of the others on the diagonal."""
    d = torch.cdist(maps, maps)
    a = 1 - d / d.max().clamp_min(1e-12)
    a.fill_diagonal_(0)
    return a - torch.diag(a.sum(0))


@hookimpl
def defenses() -> list[type]:
    return [DAA]
