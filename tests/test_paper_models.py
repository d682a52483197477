"""Published models and data: directories in the hub's own layouts, read, checked, attacked and measured."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from harness import registry
from harness.diffusion import checkpoint
from harness.diffusion.checkpoint import CheckpointError
from harness.diffusion.images import to_uint8
from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import DDIM
from harness.diffusion.seeds import generator, image_noise, image_seeds
from harness.judges import hub, image_folders
from harness.runs import estimates, execution, planning, suite as suites
from harness.runs.store import Store
from harness.types import Inputs
from plugins.models.ddpm_cifar10 import DDPMCifar10
from tests.oracles import tiny_ncsn, tiny_sd, tiny_unet


def flat(model: DiffusionModel, directory: Path, pipeline: str = "DDPMPipeline") -> Path:
    """`model` as google/ddpm-cifar10-32 and google/ncsnpp-celebahq-256 are laid out: everything beside the index."""
    net: Any = model.denoiser
    net.save_pretrained(directory)
    model.scheduler.save_pretrained(directory)
    parts = {"unet": type(net).__name__, "scheduler": type(model.scheduler).__name__}
    index = {"_class_name": pipeline, **{name: ["diffusers", cls] for name, cls in parts.items()}}
    (directory / "model_index.json").write_text(json.dumps(index))
    return directory


def encoded(value: int, side: tuple[int, int] = (32, 32)) -> bytes:
    """A PNG whose red channel is `value`, green the column, blue 7."""
    picture = Image.new("RGB", side)
    picture.putdata([(value, x, 7) for _ in range(side[1]) for x in range(side[0])])
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def parquet(path: Path, values: range, **columns: list[Any]) -> Path:
    """A parquet file as the hub writes image data sets: a struct of bytes and path, the features in the metadata."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": encoded(v), "path": f"{v}.png"} for v in values]
    table = pyarrow.table({"img": images, **columns})
    features = {"info": {"features": {"img": {"_type": "Image"}}}}
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)
    return path


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images in the layout of uoft-cs/cifar10: six for training, two for testing."""
    root = tmp_path_factory.mktemp("cifar10")
    parquet(root / "plain_text/test-00000-of-00001.parquet", range(100, 102), label=[3, 4])
    parquet(root / "plain_text/train-00000-of-00001.parquet", range(6), label=[5, 1, 0, 2, 9, 7])
    return root


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flat(tiny_unet(3, 32), tmp_path_factory.mktemp("ddpm-cifar10-32"))


@pytest.fixture(scope="module")
def plugins() -> registry.Registry:
    return registry.load(strict=True)


# ---- models ---------------------------------------------------------------------------------------------------------


def test_the_flat_layout_of_the_hubs_ddpm_gives_the_same_images(unet: Path) -> None:
    model, seeds = tiny_unet(3, 32), image_seeds(0, "x", 2)
    inputs = Inputs(image_noise(seeds, model.shape), None, seeds)
    again = hub.load(hub.Source(str(unet)))
    assert torch.equal(again.sample(inputs, DDIM(steps=2)), model.sample(inputs, DDIM(steps=2)))


def test_the_flat_layout_of_the_hubs_ncsn_is_a_model_whose_variance_explodes(tmp_path: Path, cifar: Path) -> None:
    directory = flat(tiny_ncsn(3, 32), tmp_path / "ncsn", "ScoreSdeVePipeline")
    plugin = registry.load(strict=True).build(
        "models", f"ncsn-celebahq(path={str(directory)!r}, data_path={str(cifar)!r})"
    )
    assert plugin.load().family == "ve"


def test_latents_of_a_vq_model_without_a_factor_are_not_scaled_and_stock_diffusers_agrees(tmp_path: Path) -> None:
    from diffusers import LDMPipeline  # type: ignore[attr-defined]
    from diffusers.models.autoencoders.vq_model import VQModel

    torch.manual_seed(0)
    vqvae: Any = VQModel
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "mid_block_add_attention": False}
    vqvae = vqvae(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=32,
        num_vq_embeddings=16, **blocks,
    )  # fmt: skip
    model = tiny_unet(3, 16)
    checkpoint.save(DiffusionModel(model.denoiser, model.scheduler, vqvae), tmp_path / "ldm")
    config = tmp_path / "ldm" / "vqvae" / "config.json"
    facts = json.loads(config.read_text())
    del facts["scaling_factor"]  # CompVis/ldm-celebahq-256 is older than the factor
    config.write_text(json.dumps(facts))

    again = hub.load(hub.Source(str(tmp_path / "ldm")))
    images = torch.rand(2, 3, 32, 32, generator=generator(0, "x")) * 2 - 1
    assert again.encode(images).shape == (2, 3, 16, 16)
    assert torch.equal(again.encode(images), vqvae.encode(images).latents)
    assert torch.equal(again.decode(again.encode(images)), vqvae.decode(vqvae.encode(images).latents).sample)
    checkpoint.save(again, tmp_path / "saved")
    pipeline = LDMPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert pipeline.vqvae.config.scaling_factor == 1.0


def test_a_model_of_another_family_is_refused_by_name(unet: Path, cifar: Path, plugins: registry.Registry) -> None:
    for name, says in (("ncsn-celebahq", "variance explode"), ("ldm-celebahq", "latents"), ("sd-v1-4", "prompts")):
        plugin = plugins.build("models", f"{name}(path={str(unet)!r}, data_path={str(cifar)!r})")
        with pytest.raises(CheckpointError, match=says):
            plugin.load()


def test_hostile_and_damaged_directories_are_refused_in_words(tmp_path: Path, unet: Path) -> None:
    def refused(directory: Path, says: str) -> None:
        with pytest.raises(CheckpointError, match=says):
            hub.load(hub.Source(str(directory)))

    def copied(name: str, **changed: Any) -> Path:
        directory = shutil.copytree(unet, tmp_path / name)
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | changed))
        return directory

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is empty")
    refused(tmp_path / "nowhere" / "else" / "x", "no such directory")
    refused(copied("shapes", block_out_channels=[8, 16]), "its weights lack 2 of")
    refused(copied("greedy", block_out_channels=[1024, 2048]), r"its weights lack|its config asks for")
    refused(copied("layers", layers_per_block=10**9), "layers_per_block = 1,000,000,000 is not a network's")
    refused(copied("canvas", sample_size=2**13), "makes samples of")
    refused(copied("sheet", sample_size=2**19), "sample_size is 524288")
    refused(copied("sideless", sample_size=None), "sample_size is None")
    cut = copied("cut") / "diffusion_pytorch_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    refused(cut.parent, "diffusion_pytorch_model.safetensors: truncated or damaged")
    pickled = copied("pickled")
    (pickled / "diffusion_pytorch_model.safetensors").rename(pickled / "diffusion_pytorch_model.bin")
    refused(pickled, "a pickle can run code")
    (copied("text") / "config.json").write_text("[]")
    refused(tmp_path / "text", "not an object")


# ---- the hub --------------------------------------------------------------------------------------------------------


def test_of_a_repository_only_what_is_safe_and_needed_is_fetched() -> None:
    from huggingface_hub.utils import filter_repo_objects

    wanted = [
        "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json", "unet/config.json",
        "text_encoder/model.safetensors", "tokenizer/merges.txt", "tokenizer/vocab.json",
        "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.safetensors", "config.json", "scheduler_config.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
    ]  # fmt: skip
    others = [
        "diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.bin", "unet/model.py", "pipeline.py",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "sd-v1-4.ckpt", "v1-5-pruned.safetensors", "safety_checker/model.safetensors",
    ]  # fmt: skip
    options: Any = {"allow_patterns": hub.MODEL_FILES, "ignore_patterns": [*hub.PASSED_OVER, hub.HALF]}
    assert set(filter_repo_objects(wanted + others, **options)) == set(wanted)
    options["ignore_patterns"] = hub.PASSED_OVER  # where nothing else is there
    half = "unet/diffusion_pytorch_model.fp16.safetensors"
    assert set(filter_repo_objects(wanted + others, **options)) == {*wanted, half}


def test_a_hub_id_is_fetched_at_its_revision_and_known_by_its_commit(
    monkeypatch: pytest.MonkeyPatch, unet: Path
) -> None:
    import huggingface_hub

    asked: list[tuple[str, str, str]] = []

    def snapshot(where: str, *, repo_type: str, revision: str, **_: Any) -> str:
        asked.append((where, repo_type, revision))
        return str(unet)

    class Api:
        def repo_info(self, where: str, *, revision: str, repo_type: str) -> Any:
            return type("Info", (), {"sha": "c" * 40})

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    source = hub.Source("google/ddpm-cifar10-32", "refs/pr/1")
    assert source.fetch() == unet and asked == [("google/ddpm-cifar10-32", "model", "refs/pr/1")]
    assert source.identity() == f"hub:model:google/ddpm-cifar10-32@{'c' * 40}"
    assert hub.load(source).shape == (3, 32, 32)


def test_without_the_hub_a_pinned_commit_still_has_an_identity_and_a_branch_says_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    def gone(*_: Any, **__: Any) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gone)
    monkeypatch.setattr(huggingface_hub, "HfApi", gone)
    assert hub.Source("a/b", "0" * 40).identity() == f"hub:model:a/b@{'0' * 40}"
    with pytest.raises(CheckpointError, match=r"a/b at main cannot be had from the hub .*give a local directory"):
        hub.Source("a/b").identity()
    with pytest.raises(CheckpointError, match="a local directory has no revision 'v2'"):
        hub.Source(str(tmp_path), "v2").fetch()


# ---- data -----------------------------------------------------------------------------------------------------------


def test_parquet_in_the_hubs_layout_gives_exact_pixels_and_labels_in_order(cifar: Path) -> None:
    data = image_folders.read(cifar, ("train", "test"), 32)
    pixels = to_uint8(data.images)
    assert pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 100, 101]
    assert pixels[0, 1, 5].tolist() == list(range(32)) and pixels[3, 2].unique().tolist() == [7]
    assert data.labels is not None and data.labels.tolist() == [5, 1, 0, 2, 9, 7, 3, 4]
    assert data.captions is None and len(image_folders.read(cifar, ("train",), 32, most=4)) == 4


def test_what_distances_refer_to_is_never_trained_on(cifar: Path, tmp_path: Path) -> None:
    """The split for tests where there is one, and otherwise every tenth image."""
    plugin = DDPMCifar10(data_path=str(cifar))
    assert to_uint8(plugin.data().images)[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert to_uint8(plugin.reference())[:, 0, 0, 0].tolist() == [100, 101]
    parquet(tmp_path / "train-00000-of-00001.parquet", range(25))
    whole = DDPMCifar10(data_path=str(tmp_path))
    assert to_uint8(whole.reference())[:, 0, 0, 0].tolist() == [9, 19]
    assert to_uint8(whole.data().images)[:, 0, 0, 0].tolist() == [i for i in range(25) if i not in (9, 19)]
    assert len(DDPMCifar10(data_path=str(tmp_path), images=4, references=1).data()) == 4


def test_shards_the_converted_branch_and_folders_of_pictures_are_read_too(tmp_path: Path) -> None:
    for shard in range(2):
        parquet(tmp_path / f"data/train-0000{shard}-of-00002.parquet", range(3 * shard, 3 * shard + 3))
    assert to_uint8(image_folders.read(tmp_path / "data", ("train",), 32).images)[:, 0, 0, 0].tolist() == list(range(6))
    parquet(tmp_path / "converted/default/train/0000.parquet", range(2))
    assert len(image_folders.read(tmp_path / "converted", ("train",), 32)) == 2
    (tmp_path / "faces").mkdir()
    for name, side in (("b.png", (48, 32)), ("a.png", (32, 32))):
        (tmp_path / "faces" / name).write_bytes(encoded(9, side))
    pixels = to_uint8(image_folders.read(tmp_path / "faces", ("train", "validation"), 32).images)
    assert pixels[0, 1, 0].tolist() == list(range(32)) and pixels[1, 1, 0].tolist() == list(range(8, 40))
    wide = to_uint8(image_folders.read(tmp_path / "faces", ("train",), (32, 48)).images)
    assert wide.shape == (2, 3, 32, 48) and wide[1, 1, 0].tolist() == list(range(48))


def test_data_that_cannot_be_read_says_where_and_why(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    with pytest.raises(image_folders.DataError, match="no images of train"):
        image_folders.read(tmp_path, ("train",), 32)
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(image_folders.DataError, match=r"train\.parquet: not a parquet file"):
        image_folders.read(tmp_path, ("train",), 32)
    for raw, says in ((None, "names an image file"), (b"no image", "row 0: not an image")):
        pyarrow.parquet.write_table(pyarrow.table({"image": [{"bytes": raw, "path": "x.png"}]}), path)
        with pytest.raises(image_folders.DataError, match=says):
            image_folders.read(tmp_path, ("train",), 32)


def test_a_published_model_is_known_by_weights_configuration_and_data_and_not_by_where_they_lie(
    tmp_path: Path, unet: Path, cifar: Path, plugins: registry.Registry
) -> None:
    def digest(path: Path, data: Path, more: str = "") -> str:
        spec = f"ddpm-cifar10(path={str(path)!r}, data_path={str(data)!r}, inception='', clip=''{more})"
        return plugins.build("models", spec).digest()

    moved, other = shutil.copytree(unet, tmp_path / "unet"), shutil.copytree(cifar, tmp_path / "cifar")
    assert digest(unet, cifar) == digest(moved, other)
    parquet(other / "plain_text/test-00000-of-00001.parquet", range(7))
    assert digest(unet, cifar) != digest(moved, other)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"freq_shift": 1}))
    assert digest(unet, cifar) != digest(moved, cifar)


def test_stable_diffusion_learns_from_captions_that_fit_and_is_asked_for_others(
    tmp_path: Path, plugins: registry.Registry
) -> None:
    checkpoint.save(tiny_sd(tmp_path / "tokens"), tmp_path / "sd")
    long = " ".join(["a red circle"] * 20)
    parquet(
        tmp_path / "laion/data/train-00000-of-00001.parquet", range(3), text=["a red circle", long, "a blue square"]
    )
    asked = [["a red square on white", "second"], [long, "third"], ["a green circle", "fourth"]]
    parquet(tmp_path / "coco/data/validation-00000-of-00001.parquet", range(3), caption=asked)
    paths = {name: str(tmp_path / folder) for name, folder in
             {"path": "sd", "data_path": "laion", "prompts_path": "coco"}.items()}  # fmt: skip
    spec = "sd-v1-4(" + ", ".join(f"{k}={v!r}" for k, v in paths.items()) + ", inception='', clip='')"
    plugin = plugins.build("models", spec)
    assert plugin.load().conditional and plugin.data().captions == ("a red circle", "a blue square")
    prompts = plugin.prompts("test", 2, generator(0, "x"))
    assert set(prompts) == {"a red square on white", "a green circle"}
    assert prompts[:1] == plugin.prompts("test", 1, generator(0, "x"))
    assert plugin.reference().shape == (3, 3, 512, 512) and len(plugin.digest()) == 64
    with pytest.raises(ValueError, match="2 different captions that fit; 5 prompts"):
        plugin.prompts("test", 5, generator(0, "x"))


# ---- judges ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Inception-v3 with random weights as a safetensors file, and the library's own network with the same weights."""
    from safetensors.torch import save_file
    from torch_fidelity import feature_extractor_inceptionv3 as library

    patch, cls = pytest.MonkeyPatch(), library.FeatureExtractorInceptionV3
    torch.manual_seed(0)
    with patch.context() as p:
        p.setattr(library, "load_state_dict_from_url", lambda *_, **__: {})
        p.setattr(cls, "load_state_dict", lambda *_: None)
        network: Any = cls("x", ["2048"])
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path)
    return path, network


@pytest.mark.slow
def test_the_inception_judge_gives_the_librarys_features_and_reads_tensors_only(
    inception: tuple[Path, Any], tmp_path: Path
) -> None:
    from harness.judges.pretrained_judges import inception_identity, load_inception

    path, network = inception
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator(0, "x"))
    judge = load_inception(str(path))
    assert judge.name == "inception-v3-other" and judge.attributes(pixels.float()) == {}
    assert torch.equal(judge.features(pixels.float() / 127.5 - 1), network(pixels)[0])
    bad = tmp_path / "weights.pth"
    torch.save({"x": print}, bad)  # a pickle that names a function is not loaded
    with pytest.raises(CheckpointError, match=r"cannot be had .*inception=''"):
        load_inception(str(bad))
    torch.save({"x": torch.zeros(1)}, bad)
    with pytest.raises(CheckpointError, match="not the weights of FID's Inception-v3"):
        load_inception(str(bad))
    assert inception_identity(str(bad)) != inception_identity(str(path)) and inception_identity("") == ""


def test_clip_is_read_from_the_layout_of_the_hub_and_never_goes_on_with_random_weights(tmp_path: Path) -> None:
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    from harness.judges.pretrained_judges import load_clip

    cfg = {
        "embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
        "quick_gelu": True,
    }  # fmt: skip
    torch.manual_seed(0)
    network: Any = CLIP(cfg["embed_dim"], cfg["vision_cfg"], cfg["text_cfg"], quick_gelu=True).eval()
    pre = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": pre}))
    with pytest.raises(CheckpointError, match=r"open_clip_model\.safetensors is missing; clip=''"):
        load_clip(hub.Source(str(tmp_path)))
    save_file(network.state_dict(), tmp_path / "open_clip_model.safetensors")
    scorer = load_clip(hub.Source(str(tmp_path)))
    images = (torch.rand(3, 3, 32, 32, generator=generator(0, "x")) * 2 - 1).requires_grad_(True)
    found = scorer.image_features(images)
    torch.testing.assert_close(found, network.encode_image(images, normalize=True))
    (gradient,) = torch.autograd.grad(found.sum(), images)
    assert gradient.abs().sum() > 0  # trigger inversions go through it
    text = scorer.text_features(["a cat", "a dog " * 100])
    torch.testing.assert_close(text.norm(dim=1), torch.ones(2))


# ---- suites ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_papers_suite_runs_end_to_end_on_directories_of_ones_own(
    tmp_path: Path, unet: Path, cifar: Path, inception: tuple[Path, Any], plugins: registry.Registry
) -> None:
    model = f"ddpm-cifar10(path={str(unet)!r}, data_path={str(cifar)!r}, inception={str(inception[0])!r}, "
    model += "clip='', references=2)"
    sets = [
        f"model={model}", "n=2", "controls=[]", "sampler=ddpm(steps=2)", "defense=finetune(steps=1, batch=2)",
        "attack=baddiffusion(steps=1, batch=2, schedule='cosine')", "trigger=box(size=14, gap=2)",
        "metrics=['asr', 'frechet', 'drift']",
    ]  # fmt: skip
    suite = suites.load_suite("paper-cifar10", plugins, only=["target=hat"], sets=sets)
    store = Store(tmp_path / "store")
    plan = planning.plan(suite, plugins)
    for key, job in plan.jobs.items():
        store.publish(key, lambda out, job=job: execution.execute(job.spec, store, out), {"kind": job.kind})
    scores = json.loads((store.open_artifact(plan.cells[0].key) / "scores.json").read_text())
    for name in ("inception-v3-other", "efficientnet-lite0"):  # random weights are not those of FID
        assert scores[f"fd[{name}]"]["value"] > 0 and scores[f"fd[{name}]"]["n"] == 2
    assert 0 <= scores["asr"]["value"] <= 1 and scores["drift"]["value"] > 0


def test_the_work_of_ddpm_cifar10_is_that_of_the_published_architecture(plugins: registry.Registry) -> None:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        published = UNet2DModel(
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None,  # type: ignore[arg-type]
        )
        noise, t = torch.randn(1, 3, 32, 32), torch.zeros(1)
    with FlopCounterMode(display=False) as counter:
        published(noise, t)
    work = plugins.build("models", "ddpm-cifar10").work
    assert sum(p.numel() for p in published.parameters()) == work.parameters
    assert counter.get_total_flops() / 2e9 == pytest.approx(work.gmacs, abs=0.05)


def test_a_plan_says_hours_and_memory_before_anything_is_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from harness.cli import call

    monkeypatch.setattr(hub.Source, "commit", lambda self: (_ for _ in ()).throw(CheckpointError("no hub")))
    words = [
        "plan",
        "paper-cifar10",
        "--only",
        "defense=none",
        "--only",
        "attack=baddiffusion",
        "--store",
        str(tmp_path),
    ]
    assert call([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    attack = 3 * 23438 * 128 * 2 * 6.2e9  # operations: forward and backward, 128 rows, 6.2e9 multiply-additions each
    sampled = 5 * 10_000 * 1000 * 2 * 6.2e9  # clean model on clean and triggered inputs, attacked one on wrong ones too
    assert told["gpu"]["hours"] == pytest.approx((attack + sampled) / estimates.SUSTAINED / 3600, rel=0.01)
    assert "ddpm-cifar10 is not here" in told["absent"][0] and "no hub" in told["absent"][0]
    assert told["gpu"]["gpu_bytes"] > 5 * 4 * 35_746_307
    assert call(words) == 0 and "with the published networks, on one GPU: about" in capsys.readouterr().out
