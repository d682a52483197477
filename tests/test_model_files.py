"""Directories of strangers: what is refused, in one line that names the file, before anything of it is used."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.diffusion import checkpoint
from harness.diffusion.model_files import MOST_ENTRIES, CheckpointError, ModelFiles
from harness.judges import hub
from harness.testing import tiny
from tests import strange_directories

SECONDS = 2.0  # of a processor, to refuse anything
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny unconditional and a tiny text-to-image pipeline on disk."""
    return strange_directories.bases(tmp_path_factory.mktemp("models"))


def weights(folder: Path, part: str = "unet") -> Path:
    return next((folder / part).glob("*.safetensors"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_second_encoder(directory: Path) -> None:
    """A UNet pipeline that names a second text encoder, as SDXL has."""
    shutil.copytree(directory / "text_encoder", directory / "text_encoder_2")
    edited("model_index.json", text_encoder_2=["transformers", "CLIPTextModelWithProjection"])(directory)


def edited(place: str, **changes: Any) -> Change:
    return lambda folder: edit(folder / place, **changes)


def retensored(part: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """A change of the tensors of a part; what `change` returns replaces them, None keeps what it did in place."""

    def apply(folder: Path) -> None:
        file = weights(folder, part)
        tensors = load_file(file)
        save_file(change(tensors) or tensors, file, {"format": "pt"})

    return apply


def sharded(where: str) -> Change:
    """Every tensor in the file `where`, by an index."""

    def apply(folder: Path) -> None:
        file = weights(folder)
        tensors = load_file(file)
        torch.save(tensors, folder / "unet" / "other.bin")
        file.rename(
            folder.parent / f"{folder.name}-outside.safetensors"
            if "/" in where
            else file.with_name("decoy.safetensors")
        )
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, where.replace("NAME", folder.name))}
        (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))

    return apply


def replaced(place: str, make: Callable[[Path], Any]) -> Change:
    def apply(folder: Path) -> None:
        (folder / place).unlink(missing_ok=True)
        make(folder / place)

    return apply


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # the name of a socket has at most 107 characters
        server.bind(path.name)


UNET, TEXT, TOKENS = "unet/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json"
SCHEDULE = "scheduler/scheduler_config.json"
REFUSED: dict[str, tuple[str, Change, str]] = {
    "an index that names a pickle": ("noise", sharded("other.bin"), "names 'other.bin', which is no safetensors"),
    "a pipeline with code of its own": (
        "noise",
        edited("model_index.json", _class_name=["my_pipeline", "Mine"]),
        "is no pipeline of diffusers",
    ),
    "a pipeline that nobody has": (
        "text",
        edited("model_index.json", _class_name="MinePipeline\n"),
        "is no pipeline of diffusers",
    ),
    "a tokenizer with code of its own": (
        "text",
        edited("tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Mine", None]}),
        "has auto_map",
    ),
    "a scale in words": ("text", edited("vae/config.json", scaling_factor="0.18"), "scaling_factor is '0.18'"),
    "no scale": ("text", edited("vae/config.json", scaling_factor=0), "scaling_factor is 0"),
    "a shift in words": ("text", edited("vae/config.json", shift_factor="0.1"), "shift_factor is '0.1'"),
    "an index that leaves the directory": (
        "noise",
        sharded("../../NAME-outside.safetensors"),
        "no safetensors file beside",
    ),
    "an index that names a file that is not there": (
        "noise",
        sharded("model-2.safetensors"),
        "no safetensors file beside",
    ),
    "an index and a file": (
        "noise",
        lambda f: (f / "unet/diffusion_pytorch_model.safetensors.index.json").write_text("{}"),
        "remove one of the two",
    ),
    "three tensors missing": (
        "noise",
        retensored("unet", lambda t: {k: v for k, v in t.items() if k not in sorted(t)[:3]}),
        "lack 3 of",
    ),
    "half of the tensors missing": (
        "noise",
        retensored("unet", lambda t: dict(list(t.items())[::2])),
        r"lack \d+ of \d+ tensors",
    ),
    "a tensor too many": (
        "noise",
        retensored("unet", lambda t: t | {"more": torch.zeros(2)}),
        "hold 1 tensors that no",
    ),
    "a tensor of another shape": (
        "noise",
        retensored("unet", lambda t: t | {"conv_in.bias": torch.zeros(3)}),
        "its config asks for",
    ),
    "layers of an adapter": (
        "text",
        retensored("unet", lambda t: {k.replace("to_q.weight", "to_q.base_layer.weight"): v for k, v in t.items()}),
        "weights lack",
    ),
    "weights of integers that fit nothing": (
        "noise",
        retensored("unet", lambda t: t | {"more": torch.zeros(2, dtype=torch.complex64)}),
        "of type|damaged",
    ),
    "a text encoder of another naming": (
        "text",
        retensored("text_encoder", lambda t: {f"mine.{k}": v for k, v in t.items()}),
        "text_encoder: its weights lack",
    ),
    "an adapter that transformers would apply": (
        "text",
        lambda f: (f / "text_encoder/adapter_config.json").write_text("{}"),
        "an adapter",
    ),
    "weights elsewhere by configuration": (
        "text",
        edited(TEXT, transformers_weights="x.bin"),
        "has transformers_weights",
    ),
    "code by configuration": ("text", edited(TEXT, auto_map={"AutoModel": "x.Y"}), "has auto_map"),
    "no vocabulary": (
        "text",
        lambda f: [p.unlink() for p in (f / "tokenizer").iterdir() if p.name != "tokenizer_config.json"],
        "no vocabulary",
    ),
    "a vocabulary with one number twice": (
        "text",
        lambda f: (
            [p.unlink() for p in (f / "tokenizer").glob("tokenizer.json")],
            (f / "tokenizer/vocab.json").write_text('{"a": 1, "b": 1}'),
        )[1],
        "number of its own|no bos_token",
    ),
    "a token without an embedding": ("text", edited(TEXT, vocab_size=8), "shape|embeddings"),
    "prompts of a billion tokens": ("text", edited(TOKENS, model_max_length=10**9), "model_max_length is 1000000000"),
    "prompts of no token": ("text", edited(TOKENS, model_max_length=-1), "model_max_length is -1"),
    "prompts longer than the encoder takes": ("text", edited(TOKENS, model_max_length=1000), "takes 2 to"),
    "a wide network": ("noise", edited(UNET, block_out_channels=[8192, 8192]), "shape|cannot be built|can be built"),
    "a wide network without weights": (
        "noise",
        lambda f: (
            edit(f / UNET, block_out_channels=[8192, 8192]),
            (f / "unet/pruned.json").write_text("{}"),
            weights(f).unlink(),
        )[2],
        "no diffusion_pytorch_model.safetensors",
    ),
    "many blocks": ("noise", edited(UNET, block_out_channels=[16] * 200, layers_per_block=200), "more layers than"),
    "a wide text encoder": ("text", edited(TEXT, hidden_size=4096, num_hidden_layers=200), "more layers than"),
    "a vocabulary of a million": ("text", edited(TEXT, vocab_size=10**6), "shape"),
    "a billion timesteps": ("noise", edited(SCHEDULE, num_train_timesteps=10**9), "num_train_timesteps is 1000000000"),
    "fifty million timesteps of a cosine": (
        "noise",
        edited(SCHEDULE, num_train_timesteps=5 * 10**7, beta_schedule="squaredcos_cap_v2"),
        "num_train_timesteps",
    ),
    "no timestep": ("noise", edited(SCHEDULE, num_train_timesteps=0), "num_train_timesteps is 0"),
    "one timestep": ("noise", edited(SCHEDULE, num_train_timesteps=1), "num_train_timesteps is 1"),
    "a true timestep": ("noise", edited(SCHEDULE, num_train_timesteps=True), "num_train_timesteps is True"),
    "betas above one": ("noise", edited(SCHEDULE, beta_end=1.5), "beta_end is 1.5"),
    "betas that are no numbers": (
        "noise",
        strange_directories.text_of(SCHEDULE, lambda text: text.replace("0.02", "NaN")),
        "NaN is no",
    ),
    "trained betas of another number": ("noise", edited(SCHEDULE, trained_betas=[0.1] * 7), "trained_betas should be"),
    "a schedule of another class": ("noise", edited(SCHEDULE, beta_schedule="mine"), "no beta_schedule 'mine'"),
    "a prediction that no model here has": (
        "noise",
        edited(SCHEDULE, prediction_type="sample"),
        "prediction_type 'sample' is not supported",
    ),
    "a learned variance": ("noise", lambda f: rebuilt(f, out_channels=2), "takes 1 channels and returns 2"),
    "nine channels of inpainting": ("text", lambda f: rebuilt(f, in_channels=9), "takes 9 channels and returns"),
    "no text encoder": ("text", edited("model_index.json", text_encoder=[None, None]), "without text_encoder"),
    "a second text encoder without projection": (
        "text",
        edited("model_index.json", text_encoder_2=["transformers", "CLIPTextModel"]),
        "text_encoder_2 is a 'CLIPTextModel'; supported: CLIPTextModelWithProjection",
    ),
    "two text encoders": (
        "text",
        lambda f: with_second_encoder(f),
        "without tokenizer_2 is not supported",
    ),
    "a side of text": ("noise", edited(UNET, sample_size="16"), "sample_size is '16'"),
    "no side": ("noise", edited(UNET, sample_size=0), "sample_size is 0"),
    "a negative side": ("noise", edited(UNET, sample_size=-16), "sample_size is -16"),
    "three sides": (
        "noise",
        edited(UNET, sample_size=[4, 4, 4]),
        r"sample_size is \[4, 4, 4\]|sample_size is \(4, 4, 4\)",
    ),
    "a link for a label": ("noise", replaced("bench.json", lambda p: p.symlink_to("/proc/self/environ")), "is a link"),
    "a link for weights": (
        "noise",
        lambda f: (f / "unet" / "x.safetensors").symlink_to(weights(f)),
        "is a link",
    ),
    "a link for a folder": ("noise", lambda f: (f / "more").symlink_to("/etc"), "is a link"),
    "a pipe for a configuration": ("noise", replaced(UNET, os.mkfifo), "is no regular file but a pipe"),
    "a socket": ("noise", replaced("unet/talk", listening), "is no regular file but a socket"),
    "a device behind a link": ("noise", replaced(UNET, lambda p: p.symlink_to("/dev/zero")), "is a link"),
    "a configuration of many megabytes": (
        "noise",
        replaced(UNET, lambda p: p.write_text('{"a": "' + "x" * 2**23 + '"}')),
        "at most 4,194,304 are read",
    ),
    "a configuration that is deep": (
        "noise",
        replaced(UNET, lambda p: p.write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")),
        "not JSON",
    ),
    "a configuration that is a list": ("noise", replaced(UNET, lambda p: p.write_text("[]")), "a JSON list"),
    "an index of parts that is a text": ("noise", edited("model_index.json", unet=["diffusers"]), "no pair of library"),
    "a class that is a text with escapes": (
        "noise",
        edited("model_index.json", unet=["diffusers", "\x1b[2Jwell"]),
        r"unet is a '\\x1b\[2Jwell'",
    ),
    "weights cut off": (
        "noise",
        lambda f: weights(f).write_bytes(weights(f).read_bytes()[:-100]),
        "truncated or damaged",
    ),
    "weights that are none": ("noise", lambda f: weights(f).write_bytes(b"\xff" * 64), "no safetensors file"),
    "a network of NaN": (
        "noise",
        retensored("unet", lambda t: {k: torch.full_like(v, float("nan")) for k, v in t.items()}),
        "returns NaN",
    ),
    "too many files": (
        "noise",
        lambda f: [(f / str(i)).touch() for i in range(MOST_ENTRIES)],
        "holds more than",
    ),
    "folders in folders": ("noise", lambda f: (f / "/".join("abcdefghijkl")).mkdir(parents=True), "nested too deep"),
}


def rebuilt(folder: Path, **changes: Any) -> None:
    """The denoiser with another configuration, and weights that fit it."""
    net = checkpoint.load(folder).denoiser
    config = {**dict(net.config), **changes}  # type: ignore[call-overload]
    type(net).from_config(config).save_pretrained(folder / "unet")  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_line_and_at_once(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    kind, change, says = REFUSED[name]
    folder = tmp_path / "model"
    shutil.copytree(saved[kind], folder)
    change(folder)
    hub.load(hub.Source(str(saved[kind])))  # what the libraries import is not counted
    start = time.process_time()
    with pytest.raises(CheckpointError, match=says) as caught:
        hub.load(hub.Source(str(folder)))
    assert time.process_time() - start < SECONDS
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def half(folder: Path) -> None:
    file = weights(folder)
    save_file(
        {k: v.half() for k, v in load_file(file).items()}, file.with_name("diffusion_pytorch_model.fp16.safetensors")
    )
    file.unlink()


def in_shards(folder: Path) -> None:
    file = weights(folder)
    tensors = load_file(file)
    names = sorted(tensors)
    parts = {f"part-{i}.safetensors": names[i::2] for i in range(2)}
    for part, held in parts.items():
        save_file({name: tensors[name] for name in held}, file.with_name(part), {"format": "pt"})
    index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()


def without_tokenizer_json(folder: Path) -> None:
    whole = folder / "tokenizer" / "tokenizer.json"
    model = json.loads(whole.read_text())["model"]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    whole.unlink()


def in_the_hubs_cache(folder: Path) -> None:
    """As huggingface_hub keeps it: links into the blobs of the repository."""
    blobs = folder.parents[1] / "blobs"
    blobs.mkdir()
    for i, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        path.rename(blobs / f"{i:040x}")
        path.symlink_to(blobs / f"{i:040x}")


LOADS: dict[str, tuple[str, Change]] = {
    "as saved": ("noise", lambda folder: None),
    "text to image": ("text", lambda folder: None),
    "only fp16": ("noise", half),
    "shards": ("noise", in_shards),
    "vocabulary and merges in their own files": ("text", without_tokenizer_json),
    "names of an older text encoder": (
        "text",
        retensored("text_encoder", lambda t: {f"text_model.{k.removeprefix('text_model.')}": v for k, v in t.items()}),
    ),
    "position ids of an older text encoder": (
        "text",
        retensored("text_encoder", lambda t: t | {"embeddings.position_ids": torch.arange(4)[None]}),
    ),
    "not square": ("noise", edited(UNET, sample_size=[8, 16])),
    "twenty timesteps": ("noise", edited(SCHEDULE, num_train_timesteps=20)),
    "the hub's cache": ("noise", in_the_hubs_cache),
    "pickles and code beside it": (
        "noise",
        lambda f: ((f / "unet" / "evil.bin").write_bytes(b"x"), (f / "pipeline.py").write_text("1/0"))[1],
    ),
}


@pytest.mark.parametrize("name", LOADS)
def test_it_loads_with_the_weights_that_were_saved(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    kind, change = LOADS[name]
    folder = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    shutil.copytree(saved[kind], folder)
    change(folder)
    found, wanted = hub.load(hub.Source(str(folder))), checkpoint.load(saved[kind])
    exact = 1e-3 if name == "only fp16" else 0.0
    for (_, a), (_, b) in zip(sorted(found.components().items()), sorted(wanted.components().items()), strict=True):
        tensors = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
        assert all(x.dtype == torch.float32 and torch.allclose(x, y, rtol=0, atol=exact) for x, y in tensors)
    if kind == "text":
        texts = ["a red circle", "\u200b A Red", "don't", "  two   words", "", "\u0440\u043e 1234"]
        assert found.tokenizer(texts).input_ids == wanted.tokenizer(texts).input_ids  # type: ignore[misc]


def test_tokens_that_were_added_keep_their_numbers(tmp_path: Path) -> None:
    model = tiny.model("text")
    tokenizer: Any = model.tokenizer
    tokenizer.add_tokens(["<mine>", "<yours>"])
    model.text_encoder.resize_token_embeddings(len(tokenizer))  # type: ignore[union-attr]
    checkpoint.save(model, tmp_path / "m")
    again = checkpoint.load(tmp_path / "m")
    texts = ["a <mine> dog", "<yours><mine>", "a dog"]
    assert again.tokenizer(texts).input_ids == tokenizer(texts).input_ids  # type: ignore[misc]
    assert torch.equal(again.embed(texts), model.embed(texts))


def test_the_tokenizer_is_that_of_the_library(saved: dict[str, Path]) -> None:
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    theirs: Any = CLIPTokenizer.from_pretrained(saved["text"] / "tokenizer", local_files_only=True)
    ours: Any = checkpoint.load(saved["text"]).tokenizer
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(32, 1500, (200, 12), generator=rng).tolist()
    texts = ["".join(chr(c) for c in row) for row in codes] + ["a  b", "\u200b x", "<|endoftext|>"]
    assert ours(texts).input_ids == theirs(texts).input_ids
    assert ours.model_max_length == theirs.model_max_length and ours.padding_side == theirs.padding_side


def test_a_network_with_random_parameters_is_never_filled_in(saved: dict[str, Path]) -> None:
    """Two loads agree, also where the global generator stands elsewhere."""
    torch.manual_seed(1)
    one = checkpoint.load(saved["noise"]).denoiser.state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    two = checkpoint.load(saved["noise"]).denoiser.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(state, torch.get_rng_state()), "loading draws nothing from the global generator"


def test_the_identity_follows_every_file_that_is_read_and_no_other(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(saved["text"], folder)
    source = hub.Source(str(folder))
    before = source.identity()
    (folder / "unet" / "evil.bin").write_bytes(b"1")
    (folder / "bench.json").write_text("{}")
    assert source.identity() == before
    for place in ("model_index.json", UNET, TEXT, TOKENS, SCHEDULE, "tokenizer/tokenizer.json"):
        path = folder / place
        kept = path.read_bytes()
        path.write_bytes(kept.replace(b"{", b"{ ", 1))
        assert source.identity() != before, place
        path.write_bytes(kept)
    assert source.identity() == before
    retensored("vae", lambda t: t | {sorted(t)[0]: t[sorted(t)[0]] + 1})(folder)
    assert source.identity() != before


@pytest.mark.parametrize(
    "name",
    [
        "unet_ema/diffusion_pytorch_model.safetensors", "ema_unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.ema.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors", "ema_model.safetensors", "model.EMA.SAFETENSORS",
        "pytorch_lora_weights.safetensors", "lora/adapter_model.safetensors", "learned_embeds.safetensors",
        "controlnet/diffusion_pytorch_model.safetensors", "checkpoint-1000/unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_flax_model.msgpack", "unet/model.onnx", "vae/tf_model.h5", "model-q4.gguf",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["noise", "text"])
def test_weights_beside_the_model_are_named_as_not_examined(
    name: str, kind: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(saved[kind], folder)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    save_file({"x": torch.zeros(1)}, folder / name)
    assert hub.ignored(folder).weights == (name,)
    (line,) = hub.ignored(folder).sentences()
    assert name in line and "were not examined" in line and "\n" not in line


def test_of_many_weights_ten_are_named_and_the_rest_counted(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(saved["noise"], folder)
    for i in range(13):
        save_file({"x": torch.zeros(1)}, folder / f"ema_{i:02}.safetensors")
    (folder / "safety_checker").mkdir()
    save_file({"x": torch.zeros(1)}, folder / "safety_checker" / "model.safetensors")
    (line,) = hub.ignored(folder).sentences()
    assert line.endswith("ema_08.safetensors, ema_09.safetensors and 3 more.")


def test_what_was_not_read_is_named(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(saved["text"], folder)
    assert hub.ignored(folder).sentences() == []
    save_file({"x": torch.zeros(1)}, folder / "pytorch_lora_weights.safetensors")
    save_file({"x": torch.zeros(1)}, folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    (folder / "pipeline.py").write_text("1/0")
    code, adapters = hub.ignored(folder).sentences()
    assert "pipeline.py" in code
    assert "pytorch_lora_weights.safetensors" in adapters and "non_ema" in adapters


def test_links_of_the_hubs_cache_lead_into_its_own_blobs_only(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    shutil.copytree(saved["noise"], folder)
    in_the_hubs_cache(folder)
    assert ModelFiles(folder).json("model_index.json")["unet"]
    (folder / "more.json").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="is a link"):
        ModelFiles(folder)


def test_no_file_outside_the_directory_is_opened(saved: dict[str, Path]) -> None:
    """Python's own opens; safetensors' are of paths that the listing gave."""
    import sys

    checkpoint.load(saved["text"])
    seen: list[str] = []
    watching = [True]
    sys.addaudithook(lambda event, args: seen.append(str(args[0])) if watching[0] and event == "open" else None)
    checkpoint.load(saved["text"])
    watching[0] = False
    library = (
        sys.prefix,
        sys.base_prefix,
        "/proc/",
        "/sys/",
        "/dev/null",
        str(Path(checkpoint.__file__).parents[2] / "harness"),
    )
    foreign = [name for name in seen if not name.isdigit() and not name.startswith((*library, str(saved["text"])))]
    assert foreign == []
