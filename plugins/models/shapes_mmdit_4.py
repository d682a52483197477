"""shapes-mmdit-4: shapes-mmdit distilled to four sampling steps, with guidance built in.

Its transformer was trained by PeRFlow (arXiv:2405.07510; harness.methods.piecewise_flow) on trajectories of
shapes-mmdit with guidance 3, for training captions. All other parts, the judge, CLIP and the neutral words are those of
shapes-mmdit, read where it has them; the folder of this model has the transformer alone. It is sampled with
`flow-euler(steps=4, guidance=1.0)`, which is four network evaluations; more guidance would guide it twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import load_file, save_file
from torch import Tensor

from harness import (
    CaptionedShapes,
    DiffusionModel,
    Family,
    FlowEuler,
    Inputs,
    captioned_shapes,
    checkpoint,
    draw,
    generator,
    hookimpl,
    image_noise,
    image_seeds,
    interrupted,
    minimize,
    piecewise_flow,
    shapes,
)

TEACHER = "shapes-mmdit"
WEIGHTS = "transformer.safetensors"  # in half precision
STEPS = 4  # of the student
GUIDANCE = 3.0  # of the teacher; the samplers' default
USUAL = FlowEuler(bf16=True)  # with which the teacher is sampled, for comparison


@dataclass(frozen=True)
class ShapesMMDiT4(CaptionedShapes):
    name: ClassVar[str] = "shapes-mmdit-4"
    version: ClassVar[int] = 1
    family: ClassVar[Family] = "flow"
    borrowed: ClassVar[Mapping[str, str]] = captioned_shapes.JOINT  # as its teacher

    @property
    def parts(self) -> Path:
        return checkpoint.embedded(self, captioned_shapes.DRAWN)

    @property
    def teacher(self) -> Path:
        return checkpoint.embedded(self, TEACHER)

    def load(self) -> DiffusionModel:
        model = checkpoint.load(self.teacher / "model", self.lent())
        model.denoiser.load_state_dict(load_file(self.folder / WEIGHTS))
        return model

    def digest(self) -> str:
        both = f"{checkpoint.digest(self.teacher, self.shared())} {checkpoint.digest(self.folder)}"
        return hashlib.sha256(both.encode()).hexdigest()

    def build(
        self, out: Path, device: str = "cpu", steps: int = 800, trajectories: int = 1000,
        solving_steps: int = 4, batch: int = 16, lr: float = 5e-4, n: int = 400,
    ) -> dict[str, Any]:  # fmt: skip
        """Distils the transformer on `device`, writes its weights below `out`, returns the facts.

        A build that was stopped goes on where it was, with the same trajectories. solving_steps: of the teacher in a
        window. batch: rows per step. n: held-out captions on which the student and its teacher are measured.
        """
        model, neutral = checkpoint.load(self.teacher / "model", self.lent()).to(device), self.words()
        student, rng = model.clone(), generator(self.name, "distil")
        windows = piecewise_flow.Windows.of(model, STEPS)
        taught = piecewise_flow.Teacher(model, windows, solving_steps, GUIDANCE)

        @cache  # a build whose training was finished needs none
        def lessons() -> tuple[piecewise_flow.Trajectories, Tensor]:
            asked, drawn = training_captions(neutral), generator(self.name, "trajectories")
            rolled = piecewise_flow.Trajectories.of(taught, asked, trajectories, drawn, bf16=True)
            return rolled, captioned_shapes.contexts(model, [asked[i] for i in rolled.captions.tolist()])

        def loss() -> Tensor:
            rolled, contexts = lessons()
            rows, t = draw(batch, trajectories, rng), model.draw_t(batch, rng)
            z_t, v = rolled.lesson(rows, t)
            return piecewise_flow.error(student, z_t, t, contexts[rows.to(contexts.device)], v).mean()

        losses = minimize(
            loss, student.denoiser.parameters(), steps=steps, lr=lr, schedule="one-cycle", ema=0.99, bf16=True,
            phase="distil", kept=interrupted.Kept(out / interrupted.UNFINISHED / "distil.safetensors", rng),
        )  # fmt: skip
        student.denoiser.eval().requires_grad_(False)
        weights = student.to("cpu").denoiser.state_dict()
        save_file({name: tensor.half().contiguous() for name, tensor in weights.items()}, out / WEIGHTS)
        facts: dict[str, Any] = {"teacher": checkpoint.digest(self.teacher, self.shared()), "guidance": GUIDANCE}
        facts |= {"trajectories": trajectories, "solving_steps": solving_steps, "steps": steps, "batch": batch}
        facts["final_loss"] = sum(losses[-100:]) / len(losses[-100:])
        return facts | self.quality(model.to("cpu"), student, n)

    def quality(self, teacher: Any, student: Any, n: int) -> dict[str, Any]:
        """On n held-out captions: attribute accuracies of the student and of its teacher, with few steps and with the
        usual ones, and the mean squared difference of each one's images, in [-1, 1], from those of the teacher's usual
        sampling of the same noise."""
        judge, neutral = self.judge(), self.words()
        rng = generator(captioned_shapes.DRAWN, "quality")
        drawn = shapes.scenes(n, "test", rng, plain=True)
        prompts = tuple(shapes.caption(scene, rng, neutral) for scene in drawn)
        seeds = image_seeds(0, "quality", n)
        inputs = Inputs(image_noise(seeds, teacher.shape), prompts, seeds)
        usual = teacher.sample(inputs, USUAL)
        facts: dict[str, Any] = {"held_out_captions": n, "usual_steps": USUAL.steps}
        facts |= {f"usual_{name}": value for name, value in captioned_shapes.accuracies(judge, usual, drawn).items()}
        for which, model, guidance in (
            ("student", student, 1.0),
            ("teacher", teacher, 1.0),
            ("guided_teacher", teacher, GUIDANCE),
        ):
            images = model.sample(inputs, FlowEuler(steps=STEPS, guidance=guidance, bf16=True))
            found = captioned_shapes.accuracies(judge, images, drawn)
            difference = (images - usual).double().square().mean().item()
            facts |= {f"{which}_{name}": value for name, value in found.items()}
            facts[f"{which}_difference"] = difference
        return facts


def training_captions(neutral: Sequence[str], n: int = 6000) -> tuple[str, ...]:
    """Captions of n training drawings, as in the data of all models of drawn shapes."""
    rng = generator(captioned_shapes.DRAWN, "data")
    return tuple(shapes.caption(scene, rng, neutral) for scene in shapes.scenes(n, "train", rng))


@hookimpl
def models() -> list[type]:
    return [ShapesMMDiT4]
