"""For each built-in defense the attack that knows it, and the sentence that says what the attack exploits.

`bench list adaptive` shows these declarations and those of other distributions. A defense against which no attack is
declared stands here with the reason. A declaration is no measurement: the suites `adaptive-uncond` and `adaptive-t2i`
measure what is left of a defense. Other parameters of the specs have their
defaults; the suites have the sizes of the embedded models.
"""

from __future__ import annotations

from harness import Adaptive, hookimpl

ORDINARY = "text(text='well indeed simply')"
TWO = "text(text='sks', other='mignneko')"
SMALL = "zero-mean(strength=0.35)"

LAST = "It looks at the last timesteps alone, and there it is trained on the clean model's answers."
PRUNED = "It cuts few channels, and under random channel dropout no few channels carry the backdoor."
TUNED = "It trains on clean data, and the backdoor was trained at weights that such training reaches."
GIVEN = "It unlearns the trigger that it is given, and the model has a second one."
MAPS = (
    "It compares attention maps, and the MMD term of TwT makes those of prompts with the trigger like the clean ones."
)


@hookimpl
def adaptive() -> list[Adaptive]:
    return [
        *(Adaptive(name, "baddiffusion(spare=10)", LAST) for name in ("elijah", "terd", "bias-scan")),
        *(
            Adaptive(name, "villandiffusion(solver='ode', drop=0.125)", PRUNED)
            for name in ("diff-pruning", "fine-pruning", "anp", "clp", "magnitude-pruning", "random-pruning")
        ),
        Adaptive(
            "diff-cleanse", "villandiffusion(solver='ode', adaptive_weight=0.1)",
            "It prunes channels that answer the trigger otherwise than clean inputs, and appendix G of its paper keeps "
            "the two answers near.",
        ),
        Adaptive(
            "diff-cleanse", "villandiffusion(solver='ode')",
            "A search for the trigger ends at one pattern, and the model has several.", trigger="several",
        ),
        Adaptive("finetune", "villandiffusion(solver='ode', rehearse=100)", TUNED),
        *(
            Adaptive(name, "badt2i", GIVEN, trigger=TWO, target="patch")
            for name in ("skd", "skd-cag", "finetune-reversal")
        ),
        Adaptive(
            "drop-trigger", "badt2i", "It takes one text out of the prompt, and the model has a second trigger.",
            trigger=TWO, target="patch",
        ),
        Adaptive(
            "sau", "badt2i", "It mends the masked places of an image, and a style has no place.",
            trigger="text(text='sks')", target="style",
        ),
        Adaptive(
            "textual-perturbation", "badt2i",
            "Its default mode turns look-alikes into Latin letters, and the trigger consists of Latin letters.",
            trigger="text(text='sks')", target="patch",
        ),
        Adaptive(
            "vocabulary-scan", "rickrolling(decoys=0.4)",
            "It tries single words and pairs, and the trigger is a phrase of three ordinary words that act together.",
            trigger=ORDINARY, target="prompt",
        ),
        *(
            Adaptive(name, "villandiffusion(solver='ode')", why, trigger=SMALL)
            for name, why in (
                ("ufid", "A trigger of small norm does not shift the noise so far that images lose their variety."),
                ("disdet", "It looks at the values of the noise, and a small trigger of zero mean hardly moves them."),
            )
        ),
        *(
            Adaptive(name, "iba", MAPS, trigger="syntax", target="prompt") for name in ("t2ishield", "daa")
        ),
        Adaptive(
            "navit2i", "iba", "It masks one token after another, and a sentence form is carried by no single token.",
            trigger="syntax", target="prompt",
        ),
        Adaptive(
            "ufid-prompts", "", "No attack is written: its target would have to let the images of one trigger vary.",
        ),
        Adaptive(
            "blackmirror", "badt2i", "It names attributes of drawn shapes, and a patch is none of them.",
            trigger="text(text='sks')", target="patch",
        ),
        Adaptive(
            "amdet", "badt2i", "It looks at the text encoder alone, and this backdoor is in the denoiser.",
            trigger="text(text='sks')", target="patch",
        ),
        Adaptive(
            "tnc", "", "No attack is written: its loss would have to keep the prediction steady from step to step.",
        ),
        Adaptive(
            "set", "", "No attack is written: its loss would have to cover attention that is scaled.",
        ),
        Adaptive("clip", "", "No attack is written: the backdoor would have to stay within the range of images."),
        Adaptive("perflow", "", "It defends against nothing: it makes a model faster, on clean examples."),
        Adaptive("none", "", "It defends against nothing."),
    ]  # fmt: skip
