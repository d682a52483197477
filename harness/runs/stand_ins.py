"""What a rehearsal uses in the place of published weights, data and judges: the same sizes, made here.

Weights are random, drawn as the layers draw them when they are created. Images are smooth noise. Captions and prompts
are made of everyday words. A model that says no architecture, or whose directory is on this machine, is used as it is.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

from harness.capabilities import PublishedArchitecture, offers

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from harness.diffusion.model import DiffusionModel

IMAGES = 160  # made training images: a tenth of them is the least share of a defender
REFERENCES = 50
VOCABULARY = 49_408  # tokens of CLIP's tokenizer
LOOKS = (
    "bright", "calm", "cold", "dark", "early", "gentle", "happy", "large", "little", "new", "old", "plain", "quiet",
    "red", "small", "soft", "strong", "sweet", "warm", "wild", "wise", "yellow",
)  # fmt: skip
NOUNS = (
    "bird", "boat", "book", "bottle", "bus", "car", "cat", "chair", "child", "clock", "cow", "dog", "flower", "horse",
    "house", "man", "motorbike", "person", "picture", "plate", "sheep", "table", "train", "tree", "woman", "zebra",
)  # fmt: skip
PLACES = ("beach", "bridge", "city", "field", "forest", "garden", "hill", "kitchen", "lake", "market", "road", "room")


def captions() -> list[str]:
    """Distinct captions, thousands of them."""
    every = itertools.product(PLACES, LOOKS, NOUNS)
    return [f"a photo of a {look} {noun} in the {place}" for place, look, noun in every]


def stands_in(plugin: Any) -> bool:
    """Whether a rehearsal uses a stand-in for a model plugin: its weights are published and not on this machine."""
    from harness.judges.hub import Source

    if not offers(plugin, PublishedArchitecture) or not plugin.architecture:
        return False
    where = getattr(plugin, "path", None)
    try:
        return where is None or Source(where, getattr(plugin, "revision", "main")).directory is None
    except ValueError:  # neither a directory nor a hub id
        return True


class StandIn:
    """A model plugin with random weights, made data and judges with random weights. Everything else is the plugin's.

    features: what the judges' networks are called through, (network, images) → features; a rehearsal shortens it.
    """

    def __init__(self, plugin: Any, features: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> None:
        self._plugin, self._features = plugin, features

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plugin, name)

    def load(self) -> DiffusionModel:
        from harness.models.architectures import untrained

        return untrained(self._plugin.architecture, partial(tokenizer, tuple(self._plugin.words())))

    def data(self) -> Any:
        import torch

        from harness.types import Data

        texts = tuple(itertools.islice(itertools.cycle(captions()), IMAGES)) if self._plugin.conditional else None
        labels = None if self._plugin.conditional else torch.arange(IMAGES) % 10
        return Data(images(IMAGES, self._plugin.side, 0), texts, labels)

    def reference(self) -> Tensor:
        return images(REFERENCES, self._plugin.side, 1)

    def prompts(self, split: Literal["train", "test"], n: int, rng: torch.Generator) -> tuple[str, ...] | None:
        import torch

        if not self._plugin.conditional:
            return None
        every = captions()[0 if split == "train" else 1 :: 2]
        order = torch.randperm(len(every), generator=rng).tolist()
        return tuple(every[i] for i in itertools.islice(itertools.cycle(order), n))

    def judge(self) -> Any:
        return Judge(self._features) if getattr(self._plugin, "inception", "") else self._plugin.judge()

    def scorer(self) -> Any:
        return Scorer(self._features) if getattr(self._plugin, "clip", "") else self._plugin.scorer()


def images(n: int, side: int, seed: int) -> Tensor:
    """n smooth random images (n, 3, side, side) in [-1, 1]."""
    import torch

    from harness.diffusion.seeds import generator

    coarse = torch.rand((n, 3, 8, 8), generator=generator(seed, "made images")) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)


# ---- networks -------------------------------------------------------------------------------------------------------


@cache
def tokenizer(words: tuple[str, ...] = (), size: int = VOCABULARY) -> Any:
    """A CLIPTokenizer of `size` tokens (byte-pair encoding), which keeps `words` and those of made captions whole."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    known = sorted({word for text in (*captions(), *words) for word in text.split()})
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    options: Any = {"vocab_size": size, "end_of_word_suffix": "</w>", "show_progress": False}
    bpe.train_from_iterator(known, trainers.BpeTrainer(**options))
    learnt: list[Any] = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = {"".join(pair): pair for pair in learnt}
    kept = dict.fromkeys([*bytes_, *(b + "</w>" for b in bytes_), *merges])
    pairs = itertools.product([token for token in kept if not token.endswith("</w>")], list(kept))
    while len(kept) < size - 2:  # pairs of lower rank than those of the known words, which therefore stay whole
        pair = next(pairs)
        if "".join(pair) not in kept:
            kept["".join(pair)] = None
            merges["".join(pair)] = pair
    vocabulary = {word: i for i, word in enumerate([*kept, "<|startoftext|>", "<|endoftext|>"])}
    made: Any = CLIPTokenizer
    return made(vocabulary, list(merges.values()), model_max_length=77, pad_token="<|endoftext|>")


class Judge:
    """Inception-v3 with random weights, as in FID."""

    name = "inception-v3"

    def __init__(self, features: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> None:
        self._features = features

    def features(self, images: Tensor) -> Tensor:
        return self._features(_inception().features, images)

    def attributes(self, images: Tensor) -> Mapping[str, Tensor]:
        return {}


class Scorer:
    """CLIP ViT-B/32 with random weights."""

    name = "clip-vit-b32"

    def __init__(self, features: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> None:
        self._features = features

    def image_features(self, images: Tensor) -> Tensor:
        return self._features(_clip().image_features, images)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        return _clip().text_features(prompts)


@cache
def _inception() -> Any:
    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as library

    from harness.judges.pretrained_judges import POOL, InceptionJudge

    class Untrained(library.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: Any, **__: Any) -> Any:  # the library's constructor loads a checkpoint
            return None

    real = library.load_state_dict_from_url
    library.load_state_dict_from_url = lambda *_, **__: {}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network: Any = Untrained("inception-v3", [POOL])
    finally:
        library.load_state_dict_from_url = real
    return InceptionJudge(network.to("cuda" if torch.cuda.is_available() else "cpu"))


@cache
def _clip() -> Any:
    import torch
    from open_clip import SimpleTokenizer
    from open_clip.model import CLIP

    from harness.judges.pretrained_judges import OpenClip

    vision: Any = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}
    text: Any = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: Any = CLIP(512, vision, text, quick_gelu=True)
    network = network.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
    mean, std = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)
    return OpenClip("clip-vit-b32", network, SimpleTokenizer(context_length=77), 224, mean, std)
