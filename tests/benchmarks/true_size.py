"""What a scan needs to load a released model's layout at its true size, and to evaluate it once, on the CPU.

    python -m tests.benchmarks.true_size [--layouts sd1 sdxl] [-o FILE] [--tiny] [--table]

For each layout of `single_file_layouts`, a pipeline with random weights in bf16 is written below a temporary folder
(7 GB for SDXL), which is removed at the end. A process of its own then reads it as `bench scan` does, and evaluates it:

- load: `checkpoint.load`, the strict reader, which gives fp32
- check: `hub.tried`, with which every scan begins: the text encoders and two latents, in fp32
- prediction: one latent under autocast to bf16, as detectors with bf16=True evaluate the network

seconds and cpu_seconds are those of the phase. peak_bytes: the most resident memory so far, with the pages of the
mapped files, which the system can drop. private_bytes: the most of it that it cannot drop, sampled during the phase.
One thread. Not measured is FLUX: `needs` counts its weights on no device. --tiny: small networks of the same classes.
--table: only write the table of docs/scan.md from FILE.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness.diffusion import networks
from harness.diffusion.single_file_layouts import LAYOUTS
from tests.tables import Place, markdown

Layout = Mapping[str, Mapping[str, Any]]
ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_suffix(".json")
PLACE = Place(ROOT / "docs" / "scan.md", "python -m tests.benchmarks.true_size --table")
NAMES = {"sd1": "Stable Diffusion 1", "sdxl": "SDXL", "flux": "FLUX.1-dev"}
PHASES = ("load", "check", "prediction")
HEAD = (
    "model", "weights, billions", "latents", "files, GB", "loading, CPU-seconds", "check, CPU-seconds",
    "prediction in bf16, CPU-seconds", "private memory, GB", "with mapped files, GB",
)  # fmt: skip
SMALL = {
    "unet": {
        "sample_size": 8, "block_out_channels": [8, 16, 16, 16], "cross_attention_dim": 8, "attention_head_dim": 2,
        "norm_num_groups": 4,
    },
    "vae": {"block_out_channels": [4, 4, 4, 4], "norm_num_groups": 2, "layers_per_block": 1},
    "text_encoder": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2},
}  # fmt: skip
SMALL_XL = SMALL | {
    "unet": SMALL["unet"] | {
        "block_out_channels": [8, 16, 16], "cross_attention_dim": 16, "attention_head_dim": [1, 2, 2],
        "transformer_layers_per_block": [1, 1, 2], "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 8 + 6 * 4,
    },
    "text_encoder_2": SMALL["text_encoder"] | {"projection_dim": 8},
}  # fmt: skip
FLUX: dict[str, dict[str, Any]] = {  # diffusers' own default is FLUX.1's size
    "transformer": {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
    "text_encoder": {"architectures": ["CLIPTextModel"], **LAYOUTS["sdxl"]["text_encoder"]},
    "text_encoder_2": {
        "architectures": ["T5EncoderModel"], "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240,
        "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu",
    },
    "vae": {**LAYOUTS["sd1"]["vae"], "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
}  # fmt: skip


def layout_of(name: str, tiny: bool) -> dict[str, dict[str, Any]]:
    """Part → configuration, with its class as `_class_name` or in `architectures`."""
    small = (SMALL_XL if name == "sdxl" else SMALL) if tiny else {}
    return {part: {**config, **small.get(part, {})} for part, config in LAYOUTS[name].items()}


def network(config: Mapping[str, Any]) -> Any:
    """The network of a configuration, with new weights in torch's default type."""
    cls = config.get("_class_name") or config["architectures"][0]
    return networks.built({key: value for key, value in config.items() if key != "_class_name"}, cls)


def needs(layout: Layout) -> dict[str, int]:
    """Part → number of its weights. Nothing is allocated."""
    import torch

    with torch.device("meta"):
        made = {part: network(config) for part, config in layout.items() if part != "scheduler"}
    return {part: sum(p.numel() for p in net.parameters()) for part, net in made.items()}


def write(layout: Layout, directory: Path) -> None:
    """A pipeline directory of random weights in bf16."""
    import diffusers
    import torch

    from harness.diffusion import checkpoint
    from harness.diffusion.model import DiffusionModel
    from harness.runs import stand_ins

    torch.manual_seed(0)
    settings = dict(layout["scheduler"])
    scheduler = getattr(diffusers, settings.pop("_class_name")).from_config(settings)
    tokens = stand_ins.tokenizer()
    torch.set_default_dtype(torch.bfloat16)
    parts = {part: network(config).requires_grad_(False) for part, config in layout.items() if part != "scheduler"}
    torch.set_default_dtype(torch.float32)
    second = (parts["text_encoder_2"], tokens) if "text_encoder_2" in parts else (None, None)
    model = DiffusionModel(
        parts["unet"], scheduler, parts["vae"], parts["text_encoder"], tokens, *second,
        empty_is_zero=second[0] is not None,
    )  # fmt: skip
    checkpoint.save(model, directory)


def read(directory: Path) -> dict[str, Any]:
    """The figures of each phase, and the model's shape."""
    import diffusers
    import torch
    from transformers.models.clip import modeling_clip, tokenization_clip

    from harness.diffusion import checkpoint
    from harness.judges import hub

    library: Any = diffusers  # imported ahead, as all that the reader uses: an import counts for no phase
    _ = library.UNet2DConditionModel, library.AutoencoderKL, library.DDIMScheduler, modeling_clip, tokenization_clip
    with measured() as load:
        model = checkpoint.load(directory)
    with measured() as check:
        hub.tried(model, directory)
    noise = torch.randn((1, *model.shape), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        context = model.embed(["a photo of a small dog"])
        with measured() as prediction, torch.autocast("cpu", torch.bfloat16):
            eps = model.eps(noise, torch.tensor([model.T // 2]), context)
    assert eps.shape == noise.shape and eps.isfinite().all()
    return {"shape": list(model.shape), "load": load, "check": check, "prediction": prediction}


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Figures that are filled in at the end."""
    figures: dict[str, float] = {}
    most, over = [private_bytes()], threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            most[0] = max(most[0], private_bytes())

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    wall, busy = time.monotonic(), time.process_time()
    yield figures
    figures |= {"seconds": round(time.monotonic() - wall, 2), "cpu_seconds": round(time.process_time() - busy, 2)}
    over.set()
    watching.join()
    figures |= {
        "private_bytes": max(most[0], private_bytes()),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def private_bytes() -> int:
    """Resident memory of this process that belongs to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def of_layout(name: str, tiny: bool) -> dict[str, Any]:
    """What one layout takes: written and read in processes of their own."""
    with tempfile.TemporaryDirectory(prefix="bench-true-size-") as folder:
        directory = Path(folder) / "model"
        _in_a_process("write", name, tiny, directory)
        told = json.loads(_in_a_process("read", name, tiny, directory).splitlines()[-1])
        files = sum(path.stat().st_size for path in directory.rglob("*.safetensors"))
    return {"weights": needs(layout_of(name, tiny)), "file_bytes": files, **told}


def _in_a_process(step: str, name: str, tiny: bool, directory: Path) -> str:
    words = [sys.executable, "-m", "tests.benchmarks.true_size", "--layouts", name, f"--{step}", str(directory)]
    done = subprocess.run([*words, *(["--tiny"] if tiny else [])], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    return done.stdout.decode()


def machine() -> dict[str, Any]:
    facts = Path("/proc/cpuinfo").read_text()
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    return {
        "python": platform.python_version(), "torch": version("torch"), "diffusers": version("diffusers"),
        "threads": 1, "bf16_in_hardware": "avx512_bf16" in facts or "amx_bf16" in facts,
        "memory_bytes": int(memory.split()[1]) * 1024,
    }  # fmt: skip


def table(record: Mapping[str, Any]) -> str:
    """Markdown: a row for each layout, and one for FLUX with what it needs."""
    rows = []
    for name, told in record["layouts"].items():
        last = told["prediction"]
        rows.append([
            NAMES[name], billions(told["weights"]), "×".join(map(str, told["shape"])), gigabytes(told["file_bytes"]),
            *(f"{told[phase]['cpu_seconds']:.0f}" for phase in PHASES),
            gigabytes(max(told[phase]["private_bytes"] for phase in PHASES)), gigabytes(last["peak_bytes"]),
        ])  # fmt: skip
    for name, weights in record["not_measured"].items():
        total = sum(weights.values())
        rows.append([
            NAMES[name], billions(weights), "not measured", gigabytes(2 * total), "", "", "",
            f"at least {gigabytes(4 * total)}", "",
        ])  # fmt: skip
    return markdown(HEAD, rows)


def billions(weights: Mapping[str, int]) -> str:
    """The denoiser's weights and, of all parts together, the sum."""
    denoiser = weights["unet"] if "unet" in weights else weights["transformer"]
    return f"{denoiser / 1e9:.2f} of {sum(weights.values()) / 1e9:.2f}"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f}"


def main(words: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    made.add_argument("-o", "--out", type=Path, default=FILE)
    made.add_argument("--tiny", action="store_true")
    made.add_argument("--table", action="store_true")
    steps: dict[str, Callable[..., Any]] = {"write": write, "read": read}
    for step in steps:
        made.add_argument(f"--{step}", type=Path, help=argparse.SUPPRESS)
    asked = made.parse_args(words)
    if asked.table:
        PLACE.write(table(json.loads(asked.out.read_text())))
        return
    import torch

    torch.set_num_threads(1)
    if asked.write is not None:
        write(layout_of(asked.layouts[0], asked.tiny), asked.write)
        return
    if asked.read is not None:
        print(json.dumps(read(asked.read)))
        return
    record = {
        "machine": machine(), "tiny": asked.tiny, "layouts": {}, "not_measured": {"flux": needs(FLUX)},
    }  # fmt: skip
    for name in asked.layouts:
        record["layouts"][name] = of_layout(name, asked.tiny)
        asked.out.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
