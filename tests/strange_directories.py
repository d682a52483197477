"""Model directories of strangers: hostile, broken and clumsy ones, each made from a tiny pipeline.

python -m tests.strange_directories OUT [NAME ...]      # write them, to try commands on them by hand

`CASES` says what `bench scan` must answer. `tests/test_strange_directories.py` runs all three commands on each.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from harness.diffusion import checkpoint
from harness.testing import tiny

Change = Callable[[Path], Any]
REFUSED, JUDGED, UNDECIDED, USAGE = 4, 0, 6, 2  # exit codes of bench scan
UNET, TEXT, VAE = "unet/config.json", "text_encoder/config.json", "vae/config.json"
TOKENS, SCHEDULE, INDEX = "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json", "model_index.json"
STEM = "diffusion_pytorch_model"
CANARY = "ran"  # the file beside a model that its code writes if anybody runs it


@dataclass(frozen=True)
class Case:
    """base: "noise" or "text", the pipeline that `change` spoils. code: the exit code of bench scan. says: what its
    line on stderr, or of a judged model its report, must match. where: what to name instead of the model's directory.
    based: whether it is scanned with the pipeline as --base."""

    base: str
    change: Change
    code: int
    says: str
    where: str = ""
    based: bool = False


def bases(root: Path) -> dict[str, Path]:
    """A tiny unconditional and a tiny text-to-image pipeline below `root`, with all settings as diffusers writes them,
    defaults too."""
    for kind in ("noise", "text"):
        model = tiny.model(kind)
        checkpoint.save(model, root / kind)
        model.scheduler.save_pretrained(root / kind / "scheduler")
    return {kind: root / kind for kind in ("noise", "text")}


def made(case: Case, saved: dict[str, Path], root: Path) -> Path:
    """Write a case below the empty folder `root`; what a user would name."""
    folder = root / "model"
    shutil.copytree(saved[case.base], folder)
    case.change(folder)
    return root / case.where if case.where else folder


# ---- changes --------------------------------------------------------------------------------------------------------


def weights(folder: Path, part: str = "unet") -> Path:
    return next((folder / part).glob("*.safetensors"))


def edited(place: str, *without: str, **changes: Any) -> Change:
    """Other values in a JSON file; `without`: names that are taken out."""

    def apply(folder: Path) -> None:
        facts = json.loads((folder / place).read_text())
        kept = {key: value for key, value in facts.items() if key not in without}
        (folder / place).write_text(json.dumps(kept | changes))

    return apply


def text_of(place: str, change: Callable[[str], str]) -> Change:
    def apply(folder: Path) -> None:
        before = (folder / place).read_text()
        after = change(before)
        assert after != before, f"nothing to change in {place}"
        (folder / place).write_text(after)

    return apply


def bytes_of(place: str, change: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / place).write_bytes(change((folder / place).read_bytes()))


def tensors_of(part: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """What `change` makes of the tensors of a part; None keeps what it did in place."""

    def apply(folder: Path) -> None:
        file = weights(folder, part)
        held = load_file(file)
        save_file(change(held) or held, file, {"format": "pt"})

    return apply


def cast(kind: torch.dtype) -> Change:
    return tensors_of("unet", lambda held: {name: value.to(kind) for name, value in held.items()})


def header_of(change: Callable[[dict[str, Any]], Any], length: int | None = None) -> Change:
    """Another header of the denoiser's weights, with the same bytes behind it. `change` may return bytes."""

    def apply(folder: Path) -> None:
        file = weights(folder)
        content = file.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        new = change(header) or header
        raw = new if isinstance(new, bytes) else json.dumps(new).encode()
        file.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + content[8 + size :])

    return apply


def rebuilt(part: str = "unet", **changes: Any) -> Change:
    """A part with another configuration, and random weights that fit it."""

    def apply(folder: Path) -> None:
        import diffusers

        facts = json.loads((folder / part / "config.json").read_text())
        owner: Any = getattr(diffusers, facts["_class_name"])
        shutil.rmtree(folder / part)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            owner.from_config(facts | changes).save_pretrained(folder / part)

    return apply


def scheduled(cls: str, **changes: Any) -> Change:
    """The schedule of another class, with the settings of the base's."""
    return all_of(edited(INDEX, scheduler=["diffusers", cls]), edited(SCHEDULE, _class_name=cls, **changes))


def all_of(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def written(place: str, content: str | bytes) -> Change:
    def apply(folder: Path) -> None:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(content if isinstance(content, bytes) else content.encode())

    return apply


def without(*places: str) -> Change:
    def apply(folder: Path) -> None:
        for place in places:
            for path in folder.glob(place):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return apply


def renamed(old: str, new: str) -> Change:
    return lambda folder: (folder / old).rename(folder / new)


def linked(place: str, to: str | Callable[[Path], Path]) -> Change:
    def apply(folder: Path) -> None:
        target = to if isinstance(to, str) else to(folder)
        if (folder / place).is_dir():
            shutil.rmtree(folder / place)
        (folder / place).unlink(missing_ok=True)
        (folder / place).symlink_to(target)

    return apply


def sharded(change: Callable[[dict[str, str], Path], Any] = lambda index, folder: None, parts: int = 2) -> Change:
    """The denoiser in shards; `change` gets the map of tensors to files and the folder of both."""

    def apply(folder: Path) -> None:
        file = weights(folder)
        held = load_file(file)
        names = sorted(held)
        files = {f"{STEM}-{i + 1:05}-of-{parts:05}.safetensors": names[i::parts] for i in range(parts)}
        for name, mine in files.items():
            save_file({key: held[key] for key in mine}, file.with_name(name), {"format": "pt"})
        file.unlink()
        index = {key: name for name, mine in files.items() for key in mine}
        index = change(index, file.parent) or index
        document = {"metadata": {"total_size": 1}, "weight_map": index}
        (file.parent / f"{STEM}.safetensors.index.json").write_text(json.dumps(document))

    return apply


class Harm:
    """A pickle that writes the canary when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.canary,)


def harmful(place: str, zipped: bool = False) -> Change:
    """A pickle at `place` that does harm when it is loaded."""

    def apply(folder: Path) -> None:
        harm = Harm(folder.parent / CANARY)
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        torch.save(harm, folder / place) if zipped else (folder / place).write_bytes(pickle.dumps(harm))

    return apply


def code(*places: str) -> Change:
    """Python modules that do harm when they are imported."""

    def apply(folder: Path) -> None:
        source = f"import os\nos.mkdir({str(folder.parent / CANARY)!r})\nMine = UNet2DModel = object\n"
        for place in places:
            written(place, source)(folder)

    return apply


def listening(place: str) -> Change:
    def apply(folder: Path) -> None:
        before = Path.cwd()
        os.chdir((folder / place).parent)  # the name of a socket has at most 107 characters
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(Path(place).name)
        finally:
            os.chdir(before)

    return apply


def variant(name: str, *parts: str) -> Change:
    """Weights with a variant in their names, in place of those without."""

    def apply(folder: Path) -> None:
        for part in parts:
            file = weights(folder, part)
            file.rename(file.with_name(f"{file.stem}.{name}.safetensors"))

    return apply


def adapter(a: torch.Tensor, b: torch.Tensor, alpha: torch.Tensor | None = None) -> Change:
    """The file a.safetensors beside the model: an adapter of one layer with these factors."""
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"
    held = {f"{layer}.lora_down.weight": a, f"{layer}.lora_up.weight": b}
    held |= {} if alpha is None else {f"{layer}.alpha": alpha}
    return lambda folder: save_file(held, folder.parent / "a.safetensors")


NUMBER = "num_train_timesteps"
CASES: dict[str, Case] = {
    # what could run code
    "a pickle alone": Case(
        "noise",
        all_of(without("unet/*.safetensors"), harmful(f"unet/{STEM}.bin")),
        REFUSED,
        rf"{STEM}.bin: a pickle can run code",
    ),
    "a pickle beside": Case("noise", harmful(f"unet/{STEM}.bin"), JUDGED, rf"not opened: unet/{STEM}.bin"),
    "a pickle with the name of safetensors": Case(
        "noise", harmful(f"unet/{STEM}.safetensors"), REFUSED, rf"{STEM}.safetensors: "
    ),
    "a zipped pickle with the name of safetensors": Case(
        "noise", harmful(f"unet/{STEM}.safetensors", True), REFUSED, rf"{STEM}.safetensors: "
    ),
    "pickles in the place of texts": Case("text", harmful("tokenizer/vocab.json"), REFUSED, "vocab.json: "),
    "a pipeline of its own": Case(
        "noise",
        all_of(edited(INDEX, _class_name=["pipeline", "Mine"]), code("pipeline.py")),
        REFUSED,
        "is no pipeline of diffusers",
    ),
    "a custom_pipeline": Case(
        "noise",
        all_of(edited(INDEX, custom_pipeline="pipeline"), code("pipeline.py")),
        REFUSED,
        "model_index.json: .*custom_pipeline",
    ),
    "auto_map in a network": Case(
        "noise",
        all_of(edited(UNET, auto_map={"AutoModel": "mine.Mine"}), code("unet/mine.py")),
        REFUSED,
        "config.json: has auto_map",
    ),
    "auto_map in the index": Case(
        "noise",
        all_of(edited(INDEX, auto_map={"AutoModel": "mine.Mine"}), code("mine.py")),
        REFUSED,
        "model_index.json: .*auto_map",
    ),
    "auto_map in a schedule": Case(
        "noise",
        all_of(edited(SCHEDULE, auto_map={"AutoModel": "mine.Mine"}), code("mine.py")),
        REFUSED,
        "scheduler_config.json: .*auto_map",
    ),
    "a class of the system for the pipeline": Case(
        "noise", edited(INDEX, _class_name="os.system"), REFUSED, "'os.system' is no"
    ),
    "a class of the system for a network": Case(
        "noise", edited(UNET, _class_name="subprocess.Popen"), REFUSED, "subprocess.Popen"
    ),
    "a class of the system for a schedule": Case(
        "noise", edited(SCHEDULE, _class_name="subprocess.Popen"), REFUSED, "subprocess.Popen"
    ),
    "a library that nobody has": Case(
        "noise", edited(INDEX, unet=["my_library", "UNet2DModel"]), REFUSED, "of the library 'my_library'"
    ),
    "a library in the directory": Case(
        "noise",
        all_of(edited(INDEX, unet=["unet", "UNet2DModel"]), code("unet/unet.py")),
        REFUSED,
        "of the library 'unet'",
    ),
    "the system for a library": Case("noise", edited(INDEX, unet=["os", "system"]), REFUSED, "unet is a 'system'"),
    "a part that nobody has": Case("noise", edited(INDEX, helper=["os", "system"]), REFUSED, "names a helper"),
    "modules with the names of libraries": Case(
        "noise", code("json.py", "torch.py", "diffusers/__init__.py", "sitecustomize.py"), JUDGED, "could run code"
    ),
    "attention from a hub": Case(
        "text", edited(TEXT, _attn_implementation="someone/kernel", attn_implementation="someone/kernel"), JUDGED, ""
    ),
    "a tokenizer with code": Case(
        "text",
        all_of(edited(TOKENS, auto_map={"AutoTokenizer": ["mine.Mine", None]}), code("tokenizer/mine.py")),
        REFUSED,
        "auto_map",
    ),
    "a tokenizer that names classes and files elsewhere": Case(
        "text",
        edited(
            TOKENS,
            tokenizer_file="/etc/passwd",
            vocab_file="/etc/passwd",
            merges_file="../../x",
            bos_token=5,
            tokenizer_class="mine.Mine",
            trust_remote_code=True,
        ),
        JUDGED,
        "",
    ),
    "a quantisation by configuration": Case(
        "noise", edited(UNET, quantization_config={"quant_method": "bitsandbytes"}), REFUSED, "quantization_config"
    ),
    # what leads elsewhere
    "a link out": Case("noise", linked(UNET, "/etc/hostname"), REFUSED, "config.json: is a link"),
    "a folder that is a link": Case("noise", linked("unet", "/etc"), REFUSED, "unet: is a link"),
    "a link inside": Case("noise", linked("unet/more.json", "config.json"), REFUSED, "more.json: is a link"),
    "a link that leads nowhere": Case("noise", linked("notes.txt", "nowhere"), REFUSED, "notes.txt: is a link"),
    "a link to itself": Case("noise", linked("unet/loop", "."), REFUSED, "loop: is a link"),
    "a directory that is a link": Case(
        "noise", lambda f: (f.parent / "alias").symlink_to(f), JUDGED, "", where="alias"
    ),
    "a pipe": Case("noise", all_of(without(UNET), lambda f: os.mkfifo(f / UNET)), REFUSED, "a pipe"),
    "a socket": Case("noise", listening("unet/talk"), REFUSED, "a socket"),
    # shards
    "shards": Case("noise", sharded(), JUDGED, ""),
    "shards that leave the directory": Case(
        "noise",
        sharded(
            lambda i, f: (
                shutil.copy(next(f.glob("*-00001-*")), f.parents[1] / "x.safetensors"),
                {k: v if "00002-of" in v else "../../x.safetensors" for k, v in i.items()},
            )[1]
        ),
        REFUSED,
        "names '../../x.safetensors'",
    ),
    "shards by an absolute path": Case(
        "noise", sharded(lambda i, f: {k: f"{f}/{v}" for k, v in i.items()}), REFUSED, "no safetensors file beside it"
    ),
    "shards in a folder below": Case(
        "noise", sharded(lambda i, f: {k: f"a/{v}" for k, v in i.items()}), REFUSED, "no safetensors file beside it"
    ),
    "a shard that is not there": Case(
        "noise", sharded(lambda i, f: next(f.glob("*-00002-*")).unlink()), REFUSED, "00002"
    ),
    "a shard that is no text": Case("noise", sharded(lambda i, f: {k: 7 for k in i}), REFUSED, "index.json: names '7'"),
    "a shard without a tensor": Case(
        "noise",
        sharded(
            lambda i, f: (
                i
                | {
                    "conv_in.weight": i["conv_in.bias"]
                    if i["conv_in.bias"] != i["conv_in.weight"]
                    else i["conv_out.weight"]
                }
            )
        ),
        REFUSED,
        "conv_in.weight is not in",
    ),
    "a tensor in two shards": Case(
        "noise",
        sharded(
            lambda i, f: (
                [
                    save_file(load_file(g) | {"conv_in.weight": torch.zeros(8, 1, 3, 3)}, g)
                    for g in f.glob("*.safetensors")
                ]
                and None
            )
        ),
        REFUSED,
        "hold",
    ),
    "a tensor that no index names": Case(
        "noise", sharded(lambda i, f: {k: v for k, v in i.items() if k != "conv_in.weight"}), REFUSED, "does not name"
    ),
    "an index of nothing": Case(
        "noise",
        all_of(sharded(), written(f"unet/{STEM}.safetensors.index.json", '{"weight_map": []}')),
        REFUSED,
        "names no weights",
    ),
    "an index and a file": Case("noise", written(f"unet/{STEM}.safetensors.index.json", "{}"), REFUSED, "remove one"),
    # headers of safetensors
    "an empty file": Case(
        "noise", bytes_of(f"unet/{STEM}.safetensors", lambda b: b""), REFUSED, f"{STEM}.safetensors: "
    ),
    "weights cut off": Case(
        "noise", bytes_of(f"unet/{STEM}.safetensors", lambda b: b[:-100]), REFUSED, f"{STEM}.safetensors: "
    ),
    "a header cut off": Case(
        "noise", bytes_of(f"unet/{STEM}.safetensors", lambda b: b[:60]), REFUSED, f"{STEM}.safetensors: "
    ),
    "bytes behind the weights": Case(
        "noise", bytes_of(f"unet/{STEM}.safetensors", lambda b: b + b"x" * 100), REFUSED, f"{STEM}.safetensors: "
    ),
    "a header of 2^63 bytes": Case("noise", header_of(lambda h: None, 2**63), REFUSED, f"{STEM}.safetensors: "),
    "a header longer than the file": Case("noise", header_of(lambda h: None, 10**6), REFUSED, f"{STEM}.safetensors: "),
    "a header of blanks": Case(
        "noise", header_of(lambda h: json.dumps(h).encode() + b" " * 2**25), REFUSED, f"{STEM}.safetensors: "
    ),
    "a header that is no JSON": Case("noise", header_of(lambda h: b"{" * 1000), REFUSED, f"{STEM}.safetensors: "),
    "a header that is deep": Case("noise", header_of(lambda h: b'{"a":' * 100000), REFUSED, f"{STEM}.safetensors: "),
    "a header that is a list": Case("noise", header_of(lambda h: b"[]"), REFUSED, f"{STEM}.safetensors: "),
    "tensors that overlap": Case(
        "noise",
        header_of(lambda h: h | {"conv_in.bias": h["conv_out.bias"] | {"shape": [1]}}),
        REFUSED,
        f"{STEM}.safetensors: ",
    ),
    "tensors that are one": Case(
        "noise",
        header_of(
            lambda h: {
                k: v | {"data_offsets": [0, v["data_offsets"][1] - v["data_offsets"][0]]} if k != "__metadata__" else v
                for k, v in h.items()
            }
        ),
        REFUSED,
        f"{STEM}.safetensors: ",
    ),
    "offsets outside": Case(
        "noise",
        header_of(lambda h: h | {"conv_in.bias": h["conv_in.bias"] | {"data_offsets": [10**9, 10**9 + 32]}}),
        REFUSED,
        f"{STEM}.safetensors: ",
    ),
    "offsets below 0": Case(
        "noise",
        header_of(lambda h: h | {"conv_in.bias": h["conv_in.bias"] | {"data_offsets": [-32, 0]}}),
        REFUSED,
        f"{STEM}.safetensors: ",
    ),
    "offsets backwards": Case(
        "noise",
        header_of(
            lambda h: (
                h | {"conv_in.bias": h["conv_in.bias"] | {"data_offsets": h["conv_in.bias"]["data_offsets"][::-1]}}
            )
        ),
        REFUSED,
        f"{STEM}.safetensors: ",
    ),
    "a shape that overflows": Case(
        "noise",
        header_of(lambda h: h | {"conv_in.bias": h["conv_in.bias"] | {"shape": [2**62, 2**62]}}),
        REFUSED,
        f"{STEM}.safetensors: ",
    ),
    "a tensor twice in the header": Case(
        "noise",
        header_of(
            lambda h: (
                json.dumps(h)[:-1].encode()
                + b',"conv_in.bias":'
                + json.dumps(h["conv_out.bias"] | {"shape": [1]}).encode()
                + b"}"
            )
        ),
        REFUSED,
        f"{STEM}.safetensors: ",
    ),
    "a type that nobody has": Case(
        "noise",
        header_of(lambda h: h | {"conv_in.bias": h["conv_in.bias"] | {"dtype": "Q4"}}),
        REFUSED,
        f"{STEM}.safetensors: ",
    ),
    "metadata that are no texts": Case(
        "noise", header_of(lambda h: h | {"__metadata__": {"format": [1]}}), REFUSED, f"{STEM}.safetensors: "
    ),
    "metadata of another library": Case(
        "noise", header_of(lambda h: h | {"__metadata__": {"format": "flax"}}), JUDGED, ""
    ),
    "no metadata": Case("noise", header_of(lambda h: {k: v for k, v in h.items() if k != "__metadata__"}), JUDGED, ""),
    # numbers in the weights
    "weights of NaN": Case(
        "noise", tensors_of("unet", lambda t: {k: v * float("nan") for k, v in t.items()}), REFUSED, "NaN"
    ),
    "one weight of infinity": Case(
        "noise", tensors_of("unet", lambda t: t["conv_out.bias"].fill_(float("inf")) and None), REFUSED, "infinity"
    ),
    "an autoencoder of NaN": Case(
        "text", tensors_of("vae", lambda t: {k: v * float("nan") for k, v in t.items()}), UNDECIDED, "NaN"
    ),
    "a text encoder of NaN": Case(
        "text", tensors_of("text_encoder", lambda t: {k: v * float("nan") for k, v in t.items()}), REFUSED, "NaN"
    ),
    "weights in fp16": Case("noise", cast(torch.float16), JUDGED, ""),
    "weights in bf16": Case("noise", cast(torch.bfloat16), JUDGED, ""),
    "weights in fp64": Case("noise", cast(torch.float64), JUDGED, ""),
    "weights in fp8": Case("noise", cast(torch.float8_e4m3fn), REFUSED, "of type F8"),
    "weights in int8": Case("noise", cast(torch.int8), REFUSED, "I8"),
    "weights in int64": Case("noise", cast(torch.int64), REFUSED, "I64"),
    "weights that are truth values": Case("noise", cast(torch.bool), REFUSED, "BOOL"),
    "weights in int8 with scales": Case(
        "noise",
        tensors_of(
            "unet", lambda t: {k: v.to(torch.int8) for k, v in t.items()} | {f"{k}.scale": torch.ones(1) for k in t}
        ),
        REFUSED,
        "scale|I8",
    ),
    "a shape with sides exchanged": Case(
        "noise",
        tensors_of("unet", lambda t: t | {"conv_in.weight": t["conv_in.weight"].transpose(0, 1).contiguous()}),
        REFUSED,
        "has the shape",
    ),
    "a weight that is a number": Case(
        "noise", tensors_of("unet", lambda t: t | {"conv_out.bias": torch.tensor(1.0)}), REFUSED, "has the shape"
    ),
    "a weight of no number": Case(
        "noise", tensors_of("unet", lambda t: t | {"conv_out.bias": torch.zeros(0)}), REFUSED, "has the shape"
    ),
    # bombs
    "channels by the million": Case("noise", edited(UNET, block_out_channels=[10**6, 10**6]), REFUSED, "unet"),
    "channels beyond any number": Case(
        "noise", edited(UNET, block_out_channels=[10**30, 8]), REFUSED, "block_out_channels"
    ),
    "a thousand blocks": Case("noise", edited(UNET, block_out_channels=[8] * 1000), REFUSED, "block_out_channels"),
    "a billion timesteps": Case("noise", edited(SCHEDULE, **{NUMBER: 10**9}), REFUSED, NUMBER),
    "a side of 10^4": Case("noise", edited(UNET, sample_size=10**4), REFUSED, "makes samples of"),
    "attention to many pixels": Case(
        "noise",
        all_of(
            rebuilt(
                sample_size=512,
                down_block_types=["AttnDownBlock2D"] * 2,
                up_block_types=["AttnUpBlock2D"] * 2,
                attention_head_dim=8,
            )
        ),
        REFUSED,
        "more work than",
    ),
    "transformers by the thousand": Case(
        "text", edited(UNET, transformer_layers_per_block=[256, 256]), REFUSED, "more layers than"
    ),
    "transformers in lists of lists": Case(
        "text", edited(UNET, transformer_layers_per_block=[[256] * 200, [256] * 200]), REFUSED, "text|layers|built"
    ),
    "a kernel of 10^6": Case("noise", edited(UNET, conv_in_kernel=10**6), JUDGED, "does not know: conv_in_kernel"),
    "a kernel of 10^6 that is read": Case("text", edited(UNET, conv_in_kernel=10**6), REFUSED, "unet"),
    "many classes": Case("noise", edited(UNET, num_class_embeds=10**6), REFUSED, "unet"),
    "configurations by the million": Case(
        "noise", edited(UNET, more=[[[1] * 256] * 200] * 10), REFUSED, "config.json: holds more than 10,000 values"
    ),
    "a text encoder by the gigabyte": Case(
        "text", edited(TEXT, hidden_size=2**19, intermediate_size=2**20), REFUSED, "text_encoder"
    ),
    "prompts by the gigabyte": Case("text", edited(TEXT, max_position_embeddings=2**20), REFUSED, "text_encoder"),
    "a padding of 10^4": Case("noise", rebuilt(downsample_padding=10**4), REFUSED, "more work than"),
    "an autoencoder that enlarges": Case(
        "text",
        rebuilt(
            "vae",
            block_out_channels=[4] * 11,
            down_block_types=["DownEncoderBlock2D"] * 11,
            up_block_types=["UpDecoderBlock2D"] * 11,
        ),
        REFUSED,
        "vae/config.json: makes images of",
    ),
    "pruned to nothing": Case(
        "noise", written("unet/pruned.json", json.dumps({"conv_in.weight": [8, 0, 3, 3]})), REFUSED, "pruned"
    ),
    "pruned to more": Case(
        "noise", written("unet/pruned.json", json.dumps({"conv_in.weight": [2**20, 2**20, 3, 3]})), REFUSED, "pruned"
    ),
    "pruned where nothing is": Case(
        "noise",
        written("unet/pruned.json", json.dumps({"x" * 10**5: [1]})),
        REFUSED,
        "pruned.json: describes no pruned",
    ),
    "pruned by a list": Case("noise", written("unet/pruned.json", "[]"), REFUSED, "pruned.json: a JSON list"),
    # JSON
    "a deep configuration": Case(
        "noise", written(UNET, '{"a":' + "[" * 10**5 + "]" * 10**5 + "}"), REFUSED, "config.json: not JSON"
    ),
    "a deep index": Case(
        "noise", written(INDEX, '{"a":' * 10**5 + "1" + "}" * 10**5), REFUSED, "model_index.json: not JSON"
    ),
    "a huge configuration": Case("noise", written(UNET, '{"a": "' + "x" * 2**23 + '"}'), REFUSED, "config.json: "),
    "a name twice": Case(
        "noise",
        text_of(UNET, lambda s: s.rstrip()[:-1] + ', "sample_size": 8}'),
        REFUSED,
        "config.json: .*sample_size.* twice",
    ),
    "a part twice": Case(
        "noise",
        text_of(INDEX, lambda s: s.rstrip()[:-1] + ', "unet": ["os", "system"]}'),
        REFUSED,
        "model_index.json: .*unet.* twice",
    ),
    "NaN in JSON": Case("noise", edited(SCHEDULE, beta_end=float("nan")), REFUSED, "NaN is no number"),
    "infinity by a large exponent": Case(
        "noise", text_of(SCHEDULE, lambda s: s.replace("0.02", "1e999")), REFUSED, "beta_end"
    ),
    "a number of ten thousand digits": Case(
        "noise",
        text_of(UNET, lambda s: s.rstrip()[:-1] + ', "x": 1' + "0" * 10**4 + "}"),
        REFUSED,
        "config.json: not JSON",
    ),
    "JSON in Latin-1": Case(
        "noise", bytes_of(UNET, lambda b: b.rstrip()[:-1] + b', "x": "\xe9"}'), REFUSED, "config.json: not JSON"
    ),
    "JSON in UTF-16": Case(
        "noise", bytes_of(UNET, lambda b: b.decode().encode("utf-16")), REFUSED, "config.json: not JSON"
    ),
    "a byte order mark": Case(
        "noise", bytes_of(UNET, lambda b: b"\xef\xbb\xbf" + b), JUDGED, "unet/config.json begins with a byte order mark"
    ),
    "byte order marks everywhere": Case(
        "text",
        lambda f: [p.write_bytes(b"\xef\xbb\xbf" + p.read_bytes()) for p in f.rglob("*.json")],
        JUDGED,
        "begin with a byte order mark",
    ),
    "JSON with a comma too many": Case(
        "noise", text_of(UNET, lambda s: s.rstrip()[:-1] + ",}"), REFUSED, "config.json: not JSON"
    ),
    "JSON with comments": Case("noise", text_of(UNET, lambda s: "// mine\n" + s), REFUSED, "config.json: not JSON"),
    "JSON of nothing": Case("noise", written(UNET, ""), REFUSED, "config.json: not JSON"),
    "JSON that is a list": Case("noise", written(UNET, "[]"), REFUSED, "config.json: a JSON list"),
    "JSON with half a character": Case("noise", edited(INDEX, unet=["diffusers", "\ud800"]), REFUSED, "unet is a"),
    "an index of nothing at all": Case("noise", written(INDEX, "{}"), REFUSED, "names no unet"),
    "an index of other things": Case("noise", edited(INDEX, unet=["diffusers", ["UNet2DModel"]]), REFUSED, "no pair"),
    "escapes in a class": Case(
        "noise", edited(INDEX, unet=["diffusers", "\x1b[2J\x1b[1;32mwell"]), REFUSED, "unet is a"
    ),
    "escapes in a name": Case("noise", edited(UNET, **{"\x1b[2J\x1b[1;32mwell": 1}), JUDGED, "does not know"),
    "lines in a name": Case("noise", edited(INDEX, **{"a\nbench: nothing found": ["x", "y"]}), REFUSED, "names a"),
    # numbers in configurations
    "a number as a text": Case(
        "noise", edited(UNET, in_channels="1"), REFUSED, "config.json: in_channels is '1'; give a number without quotes"
    ),
    "numbers as texts": Case("noise", edited(UNET, block_out_channels=["8", "8"]), REFUSED, "config.json"),
    "a small number as a text": Case("noise", edited(UNET, norm_eps="1e-5"), REFUSED, "norm_eps is"),
    "timesteps with a point": Case("noise", edited(SCHEDULE, **{NUMBER: 1000.0}), REFUSED, NUMBER),
    "negative channels": Case("noise", edited(UNET, block_out_channels=[-8, 8]), REFUSED, "unet"),
    "negative groups": Case("noise", edited(UNET, norm_num_groups=-4), REFUSED, "cannot be evaluated"),
    "negative heads": Case("text", edited(UNET, attention_head_dim=-1), REFUSED, "unet|evaluated"),
    "a negative side": Case("noise", edited(UNET, sample_size=-16), REFUSED, "sample_size"),
    "no side": Case("noise", edited(UNET, sample_size=None), REFUSED, "sample_size"),
    "a layer that nobody has": Case(
        "noise", edited(UNET, down_block_types=["DownBlock2D", "os.system"]), REFUSED, "os.system"
    ),
    "a function that nobody has": Case("noise", edited(UNET, act_fn="os.system"), REFUSED, "os.system"),
    "a function that nobody has in texts": Case("text", edited(TEXT, hidden_act="os.system"), REFUSED, "os.system"),
    "a text encoder that says what it returns": Case(
        "text",
        edited(
            TEXT,
            return_dict=False,
            output_hidden_states=True,
            output_attentions=True,
            torch_dtype="float16",
            dtype="mine",
            pruned_heads={"0": [0]},
            num_labels=10**5,
            model_type="bert",
            architectures=["BertModel"],
        ),
        JUDGED,
        "",
    ),
    "a newer version": Case(
        "noise",
        edited(UNET, _diffusers_version="9.9.9", new_setting=[1, 2]),
        JUDGED,
        "unet/config.json has settings that .* does not know: new_setting",
    ),
    "a newer schedule": Case(
        "noise",
        edited(SCHEDULE, new_setting=True),
        JUDGED,
        "scheduler_config.json has settings that .* does not know: new_setting",
    ),
    "a newer index": Case("noise", edited(INDEX, is_new=True, _new=3), JUDGED, ""),
    # schedules
    "no schedule": Case("noise", without("scheduler"), REFUSED, "scheduler: missing"),
    "no schedule in the index": Case("noise", edited(INDEX, "scheduler"), REFUSED, "no scheduler"),
    "a schedule that nobody has": Case(
        "noise", edited(INDEX, scheduler=["diffusers", "MyScheduler"]), REFUSED, "MyScheduler"
    ),
    "a schedule of another class": Case("noise", edited(SCHEDULE, _class_name="DDIMScheduler"), JUDGED, ""),
    "v-prediction": Case("noise", edited(SCHEDULE, prediction_type="v_prediction"), JUDGED, ""),
    "x0-prediction": Case(
        "noise", edited(SCHEDULE, prediction_type="sample"), REFUSED, "scheduler_config.json: .*'sample'"
    ),
    "a prediction that nobody has": Case(
        "noise", edited(SCHEDULE, prediction_type=["epsilon"]), REFUSED, "prediction_type"
    ),
    "no signal at the end, and epsilon": Case("noise", edited(SCHEDULE, rescale_betas_zero_snr=True), UNDECIDED, "NaN"),
    "no signal at the end, and v": Case(
        "noise", edited(SCHEDULE, rescale_betas_zero_snr=True, prediction_type="v_prediction"), JUDGED, ""
    ),
    "trained betas": Case("noise", edited(SCHEDULE, trained_betas=[0.01] * 1000), JUDGED, ""),
    "trained betas of another length": Case(
        "noise", edited(SCHEDULE, trained_betas=[0.01] * 999), REFUSED, "trained_betas"
    ),
    "trained betas of one": Case("noise", edited(SCHEDULE, trained_betas=[1.0] * 1000), UNDECIDED, "NaN|schedule"),
    "trained betas of zero": Case("noise", edited(SCHEDULE, trained_betas=[0.0] * 1000), REFUSED, "schedule|betas"),
    "trained betas as texts": Case("noise", edited(SCHEDULE, trained_betas=["0.01"] * 1000), REFUSED, "trained_betas"),
    "a kind of betas that is a list": Case(
        "noise", edited(SCHEDULE, beta_schedule=["linear"]), REFUSED, "beta_schedule"
    ),
    "a flow in a pipeline of noise": Case(
        "noise",
        all_of(
            edited(INDEX, scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]),
            edited(SCHEDULE, _class_name="FlowMatchEulerDiscreteScheduler"),
        ),
        JUDGED,
        "",
    ),
    **{
        f"a schedule of {cls}": Case("noise", scheduled(cls), JUDGED, "")
        for cls in (
            "HeunDiscreteScheduler",
            "KDPM2DiscreteScheduler",
            "KDPM2AncestralDiscreteScheduler",
            "DEISMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "LCMScheduler",
        )
    },
    "a schedule of EDM": Case(
        "noise",
        scheduled("EDMEulerScheduler"),
        REFUSED,
        "scheduler is a 'EDMEulerScheduler'; its noise levels are not those of betas; models of EDM",
    ),
    "a solver of a billion answers": Case(
        "noise", scheduled("DEISMultistepScheduler", solver_order=10**9), REFUSED, "solver_order is 1000000000"
    ),
    "betas with the levels of a flow": Case(
        "noise", scheduled("DEISMultistepScheduler", use_flow_sigmas=True), REFUSED, "use_flow_sigmas"
    ),
    "a consistency model without noise": Case(
        "noise", scheduled("LCMScheduler", timestep_scaling=0.1), REFUSED, "timestep_scaling is 0.1"
    ),
    "betas on a sigmoid": Case("noise", edited(SCHEDULE, beta_schedule="sigmoid"), JUDGED, ""),
    "no signal at the end, which its schedule does not know": Case(
        "noise", scheduled("HeunDiscreteScheduler", rescale_betas_zero_snr=True), JUDGED, ""
    ),
    # layouts
    "an empty directory": Case("noise", without("*"), REFUSED, "is empty"),
    "an empty part": Case("noise", all_of(without("unet/*")), REFUSED, "unet: missing"),
    "no configuration": Case("noise", without(UNET), REFUSED, "no config.json"),
    "no index": Case("noise", without(INDEX), REFUSED, "no model_index.json"),
    "no such directory": Case("noise", lambda f: None, REFUSED, "no such directory", where="nothing/here"),
    "a file that is no model": Case(
        "noise",
        lambda f: (f.parent / "notes.txt").write_text("x"),
        REFUSED,
        "notes.txt: give a diffusers directory",
        where="notes.txt",
    ),
    "a file that is empty": Case(
        "noise",
        lambda f: (f.parent / "x.safetensors").write_bytes(b""),
        REFUSED,
        "x.safetensors: ",
        where="x.safetensors",
    ),
    "a part alone": Case(
        "noise",
        lambda f: None,
        REFUSED,
        "unet: no model_index.json; it is the part unet of .*model: give that",
        where="model/unet",
    ),
    "one model in a folder": Case(
        "noise", lambda f: None, REFUSED, "no model_index.json; a model is in model: give", where="."
    ),
    "several models": Case(
        "noise",
        lambda f: shutil.copytree(f, f.parent / "second"),
        REFUSED,
        "no model_index.json; several models are in model, second: give",
        where=".",
    ),
    "a model beside a model": Case("noise", lambda f: shutil.copytree(f, f / "second"), JUDGED, "second/unet"),
    "averaged weights in a folder": Case(
        "noise", lambda f: shutil.copytree(f / "unet", f / "unet_ema"), JUDGED, "unet_ema"
    ),
    "averaged weights in a file": Case(
        "noise", lambda f: shutil.copy(weights(f), f / f"unet/{STEM}.ema.safetensors"), JUDGED, "ema.safetensors"
    ),
    "a checkpoint of Lightning": Case(
        "noise", all_of(without("*"), harmful("model.ckpt")), REFUSED, "model.ckpt: a pickle"
    ),
    "checkpoints in one file": Case(
        "noise",
        lambda f: (
            [(shutil.copy(weights(f), f / f"{n}.safetensors")) for n in "ab"] and without("unet", "scheduler", INDEX)(f)
        ),
        REFUSED,
        "a.safetensors",
    ),
    "a checkpoint in one file": Case(
        "noise",
        lambda f: shutil.copy(weights(f), f / "a.safetensors") and without("unet", "scheduler", INDEX)(f),
        REFUSED,
        "a.safetensors is a model or an adapter of its own, give this file",
    ),
    "half precision": Case("noise", all_of(cast(torch.float16), variant("fp16", "unet")), JUDGED, "variant fp16"),
    "bfloat precision": Case("noise", variant("bf16", "unet"), JUDGED, "variant bf16"),
    "not averaged": Case("noise", variant("non_ema", "unet"), JUDGED, "variant non_ema"),
    "two variants": Case(
        "noise",
        lambda f: (
            [shutil.copy(weights(f), f / f"unet/{STEM}.{v}.safetensors") for v in ("bf16", "non_ema")]
            and (f / f"unet/{STEM}.safetensors").unlink()
        ),
        REFUSED,
        "bf16.*non_ema",
    ),
    "half precision beside whole": Case(
        "noise", lambda f: shutil.copy(weights(f), f / f"unet/{STEM}.fp16.safetensors"), JUDGED, "fp16.safetensors"
    ),
    "shards of half precision": Case(
        "noise",
        all_of(sharded(), renamed(f"unet/{STEM}.safetensors.index.json", f"unet/{STEM}.safetensors.index.fp16.json")),
        JUDGED,
        "variant fp16",
    ),
    "weights of JAX": Case(
        "noise",
        all_of(without("unet/*.safetensors"), written("unet/diffusion_flax_model.msgpack", b"x")),
        REFUSED,
        "diffusion_flax_model.msgpack",
    ),
    "weights of ONNX": Case(
        "noise",
        all_of(
            without("unet/*"), written("unet/model.onnx", b"x"), edited(INDEX, unet=["diffusers", "OnnxRuntimeModel"])
        ),
        REFUSED,
        "OnnxRuntimeModel",
    ),
    "weights of ONNX for a network": Case(
        "noise", all_of(without("unet/*.safetensors"), written("unet/model.onnx", b"x")), REFUSED, "model.onnx"
    ),
    "weights of another name": Case(
        "noise", renamed(f"unet/{STEM}.safetensors", "unet/model.safetensors"), REFUSED, "model.safetensors"
    ),
    "a pipeline of JAX": Case("noise", edited(INDEX, _class_name="FlaxDDPMPipeline"), REFUSED, "FlaxDDPMPipeline"),
    "many files": Case("noise", lambda f: [(f / f"{i}.txt").touch() for i in range(1000)], JUDGED, ""),
    # names of directories
    "blanks in its name": Case("noise", lambda f: f.rename(f.parent / "my  model "), JUDGED, "", where="my  model "),
    "a line in its name": Case("noise", lambda f: f.rename(f.parent / "my\nmodel"), JUDGED, "", where="my\nmodel"),
    "letters in its name": Case("noise", lambda f: f.rename(f.parent / "模型-é"), JUDGED, "", where="模型-é"),
    "no letters in its name": Case(
        "noise",
        lambda f: f.rename(f.parent / os.fsdecode(b"m\xff\xfe")),
        REFUSED,
        "its name is no text in UTF-8; rename it",
        where=os.fsdecode(b"m\xff\xfe"),
    ),
    "escapes in its name": Case("noise", lambda f: f.rename(f.parent / "\x1b[31mred"), JUDGED, "", where="\x1b[31mred"),
    "a dash before its name": Case("noise", lambda f: f.rename(f.parent / "-o"), JUDGED, "", where="-o"),
    "a broken one with a line in its name": Case(
        "noise",
        lambda f: (without(INDEX)(f), f.rename(f.parent / "my\nmodel")),
        REFUSED,
        "no model_index.json",
        where="my\nmodel",
    ),
    "odd names of files": Case(
        "noise",
        lambda f: [
            (f / n).touch()
            for n in ("a\nb.py", os.fsdecode(b"\xff.safetensors"), "\x1b[2J.bin", "<script>.safetensors")
        ],
        JUDGED,
        "could run code",
    ),
    # other networks
    "classes": Case("noise", rebuilt(num_class_embeds=4), REFUSED, "takes a class"),
    "classes by a kind": Case("noise", rebuilt(class_embed_type="timestep"), REFUSED, "takes a class"),
    "the guidance scale as an input": Case("text", rebuilt(time_cond_proj_dim=8), REFUSED, "time_cond_proj_dim"),
    "two channels": Case("noise", rebuilt(in_channels=2, out_channels=2), JUDGED, ""),
    "four channels": Case("noise", rebuilt(in_channels=4, out_channels=4), JUDGED, ""),
    "not square": Case("noise", edited(UNET, sample_size=[8, 16]), JUDGED, ""),
    "sides that cannot be halved": Case("noise", edited(UNET, sample_size=15), REFUSED, "evaluated"),
    "one pixel": Case("noise", edited(UNET, sample_size=1), REFUSED, "evaluated"),
    "a scale of 0": Case("text", edited(VAE, scaling_factor=0), REFUSED, "vae/config.json: .*scaling_factor"),
    "a negative scale": Case("text", edited(VAE, scaling_factor=-0.18), REFUSED, "vae/config.json: .*scaling_factor"),
    "no scale": Case("text", edited(VAE, "scaling_factor"), JUDGED, ""),
    "an autoencoder of five colours": Case(
        "text", rebuilt("vae", out_channels=5), REFUSED, "vae/config.json: takes images of 3 channels and returns 5"
    ),
    "an autoencoder of one colour": Case("text", rebuilt("vae", out_channels=1, in_channels=1), JUDGED, ""),
    "an autoencoder of other latents": Case("text", rebuilt("vae", latent_channels=8), REFUSED, "latent channels"),
    "an autoencoder of another function": Case("text", edited(VAE, norm_num_groups=3), REFUSED, "vae"),
    "no autoencoder": Case("text", edited(INDEX, vae=[None, None]), REFUSED, "without vae"),
    "a safety checker": Case(
        "text",
        all_of(
            edited(
                INDEX,
                safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
                feature_extractor=["transformers", "CLIPImageProcessor"],
            ),
            harmful("safety_checker/pytorch_model.bin"),
            written("safety_checker/config.json", "{}"),
        ),
        JUDGED,
        "safety_checker",
    ),
    # tokenizers
    "a tokenizer of nothing": Case("text", without("tokenizer/*"), REFUSED, "tokenizer"),
    "a vocabulary by the million": Case(
        "text",
        all_of(
            without("tokenizer/tokenizer.json"),
            written("tokenizer/vocab.json", json.dumps({f"w{i}": i for i in range(6 * 10**5)})),
        ),
        REFUSED,
        "tokenizer",
    ),
    "merges that are no text": Case(
        "text", written("tokenizer/merges.txt", b"#version: 0.2\n\xff\xfe a\n"), REFUSED, "merges.txt: "
    ),
    "merges that are no pairs": Case(
        "text", written("tokenizer/merges.txt", "#version: 0.2\na b c\n"), REFUSED, "merges"
    ),
    "merges of no tokens": Case(
        "text", written("tokenizer/merges.txt", "#version: 0.2\nzzz qqq\n"), REFUSED, "tokenizer"
    ),
    "added tokens as a list": Case("text", edited(TOKENS, added_tokens_decoder=[1]), REFUSED, "added"),
    "added tokens as a number": Case("text", edited("tokenizer/tokenizer.json", added_tokens=5), REFUSED, "added"),
    "added tokens by the thousand": Case(
        "text",
        edited(TOKENS, added_tokens_decoder={str(i + 10**4): f"a{i}" for i in range(5000)}),
        REFUSED,
        "added token",
    ),
    "an added token far away": Case(
        "text", edited(TOKENS, added_tokens_decoder={"1" + "0" * 5000: "a"}), REFUSED, "added token"
    ),
    "a number that is no digit": Case("text", edited(TOKENS, added_tokens_decoder={"²": "a"}), REFUSED, "added token"),
    "half a character in a token": Case(
        "text", edited(TOKENS, added_tokens_decoder={"9999": "\ud800"}), REFUSED, "token"
    ),
    "a special token that is not there": Case("text", edited(TOKENS, bos_token="<none>"), REFUSED, "bos_token"),
    "prompts without an end": Case("text", edited(TOKENS, model_max_length=10**9), REFUSED, "model_max_length"),
    "a model of words that is a list": Case(
        "text", edited("tokenizer/tokenizer.json", model=[1]), REFUSED, "vocabulary"
    ),
    "words that are lists": Case(
        "text", edited("tokenizer/tokenizer.json", model={"vocab": {"a": [1]}, "merges": [[1]]}), REFUSED, "vocabulary"
    ),
    # adapters and embeddings
    "an adapter alone": Case(
        "noise",
        lambda f: (
            without("*")(f)
            or save_file(
                {
                    "unet.mid_block.x.lora_A.weight": torch.ones(1, 8),
                    "unet.mid_block.x.lora_B.weight": torch.ones(8, 1),
                },
                f / "pytorch_lora_weights.safetensors",
            )
        ),
        REFUSED,
        "--base",
    ),
    "an adapter beside": Case(
        "noise",
        lambda f: save_file({"unet.x.lora_A.weight": torch.ones(1, 8)}, f / "pytorch_lora_weights.safetensors"),
        JUDGED,
        "pytorch_lora_weights",
    ),
    "two adapters alone": Case(
        "noise",
        lambda f: (
            without("*")(f)
            or [save_file({"unet.mid_block.x.lora_A.weight": torch.ones(1, 8)}, f / f"{n}.safetensors") for n in "ab"]
        ),
        REFUSED,
        "a.safetensors",
    ),
    "an adapter of rank 0": Case(
        "text", adapter(torch.ones(0, 16), torch.ones(16, 0)), REFUSED, "no two factors", "a.safetensors", True
    ),
    "an adapter of two alphas": Case(
        "text", adapter(torch.ones(1, 16), torch.ones(16, 1), torch.ones(2)), REFUSED, "alpha", "a.safetensors", True
    ),
    "an adapter of NaN": Case(
        "text", adapter(torch.ones(1, 16), torch.ones(16, 1) * float("nan")), REFUSED, "NaN", "a.safetensors", True
    ),
    "an adapter of whole numbers": Case(
        "text",
        adapter(torch.ones(1, 16, dtype=torch.int8), torch.ones(16, 1)),
        REFUSED,
        "of type I8",
        "a.safetensors",
        True,
    ),
    "an embedding of no numbers": Case(
        "text",
        lambda f: save_file({"<x>": torch.ones(2, 0)}, f.parent / "a.safetensors"),
        REFUSED,
        "a.safetensors",
        "a.safetensors",
        True,
    ),
    "an adapter in its folder of no layer": Case(
        "noise",
        lambda f: (
            (f / "adapter").mkdir()
            or save_file(
                {"unet.x.lora_A.weight": torch.ones(1, 8), "unet.x.lora_B.weight": torch.ones(8, 1)},
                f / "adapter/pytorch_lora_weights.safetensors",
            )
        ),
        REFUSED,
        "adapter/pytorch_lora_weights",
    ),
}


def main(words: Iterable[str]) -> None:
    out, *names = words
    saved = bases(Path(out) / "bases")
    for name in names or CASES:
        root = Path(out) / name.replace(" ", "-").replace("/", "-")
        root.mkdir(parents=True)
        print(f"{CASES[name].code}  {made(CASES[name], saved, root)}")


if __name__ == "__main__":
    main(sys.argv[1:])
