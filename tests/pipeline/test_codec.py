"""Codecs: the contract of every entry of CODECS, files of autoencoders, and what is refused."""

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipeline.build import image_shape, pixel_shape
from pipeline.checkpoint import digest
from pipeline.codec import CODECS, PIXELS, open_codec
from pipeline.config import make_config
from pipeline.data import MemoryDataset
from pipeline.network import build_network
from tests.toys import tiny
from utils.command import InputError

CPU = torch.device("cpu")
IMAGES = torch.randint(
    0, 256, (40, 1, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
)
SIZES = {"channels": (8, 8, 16), "latent_channels": 3}


def stored(seed=0, **sizes):
    """An untrained autoencoder with the scale of its latents."""
    pytest.importorskip("diffusers", reason="autoencoders are AutoencoderKL of diffusers")
    from models.autoencoder import Autoencoder
    from pipeline.autoencoder_file import StoredAutoencoder
    from pipeline.codec_sections import AutoencoderConfig
    from pipeline.latents import latent_scale

    torch.manual_seed(seed)
    known = AutoencoderConfig(**{**SIZES, **sizes}).sizes(1)
    network = Autoencoder(known)
    scale = latent_scale(network, MemoryDataset(IMAGES, torch.arange(40) % 10, 10), CPU)
    return StoredAutoencoder(known, *scale, network.kl.state_dict())


@pytest.fixture
def file(tmp_path):
    """A file of an autoencoder."""
    autoencoder = stored()
    from pipeline.autoencoder_file import write_autoencoder

    path = tmp_path / "autoencoder.safetensors"
    write_autoencoder(path, autoencoder)
    return path


def latent_config(file, **sections):
    """A config whose model works on the file's latents, as a YAML file would have it."""
    codec = {"name": "autoencoder", "file": str(file)}
    model = {**tiny()["model"], "patch_size": 1, "attention_resolutions": [4]}
    sampling = {"steps": 8, "grid": 2, "clip": False}
    return tiny(**{"codec": codec, "model": model, "sampling": sampling, **sections})


def completed(values):
    from pipeline.latents import with_codec

    return with_codec(make_config(values, "x.yaml"), "x.yaml")


def line(call, *arguments):
    with pytest.raises(InputError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_keeps_the_contract(name, request):
    values = tiny() if name == "pixels" else latent_config(request.getfixturevalue("file"))
    config = completed(values)
    codec = open_codec(config.codec, CPU)
    x = codec.encode(IMAGES)
    assert x.dtype == torch.float32
    assert x.shape[1:] == image_shape(config) == codec.shape(32, 1)
    assert not x.requires_grad
    assert x.isfinite().all()
    made = codec.decode(x)
    assert made.dtype == torch.uint8
    assert made.shape == IMAGES.shape
    assert made.shape[1:] == pixel_shape(config)
    assert codec.decode(100 * torch.randn(3, *x.shape[1:])).dtype == torch.uint8
    torch.testing.assert_close(codec.encode(IMAGES[:3]), x[:3], rtol=1e-4, atol=1e-4)
    network = build_network(config, CPU)
    assert network(x[:2], torch.zeros(2)).shape == x[:2].shape


def test_pixels_come_back_exactly():
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(PIXELS.decode(PIXELS.encode(every)), every)


def test_a_decoded_image_is_what_the_autoencoder_makes_of_it(file):
    """The scale of the latents is taken off again. 40 images are decoded in two parts."""
    from pipeline.autoencoder_file import build_autoencoder, read_autoencoder

    codec = open_codec(completed(latent_config(file)).codec, CPU)
    found = read_autoencoder(file)
    network = build_autoencoder(found.sizes, found.weights, CPU)
    with torch.no_grad():
        wanted = PIXELS.decode(network.decode(network.moments(PIXELS.encode(IMAGES))[0]))
    made = codec.decode(codec.encode(IMAGES))
    assert made.float().std() > 1
    assert (made.int() - wanted.int()).abs().max() <= 1


def test_latents_have_mean_0_and_variance_1(file):
    x = open_codec(completed(latent_config(file)).codec, CPU).encode(IMAGES)
    std, mean = torch.std_mean(x, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(std, torch.ones(3), atol=1e-4, rtol=0)


def test_a_file_keeps_everything(file):
    from pipeline.autoencoder_file import read_autoencoder

    before, after = stored(), read_autoencoder(file)
    assert (after.sizes, after.mean, after.std) == (before.sizes, before.mean, before.std)
    assert after.digest == before.digest != stored(seed=1).digest
    assert before._replace(mean=(0.0, 0.0, 0.0)).digest != before.digest, "the scale counts too"


def test_a_config_is_completed_from_the_file_and_stays_what_it_is(file):
    config = completed(latent_config(file))
    assert (config.codec.latent_channels, config.codec.downsampling) == (3, 4)
    assert completed(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"codec": {"name": "vae"}}, "codec.name: 'vae' is not one of pixels, autoencoder"),
        ({"codec": {"name": "autoencoder"}}, "codec.file: missing"),
        ({"codec": {"name": "pixels", "file": "x"}}, "codec.file: unknown key"),
        ({"codec": {"name": "autoencoder", "file": "x", "fil": 1}}, "did you mean file?"),
        ({"codec": 3}, "codec: not a section"),
        ({"sampling": {"clip": True}}, "sampling.clip: true, but latents have no fixed range"),
        ({"diffusion": {"clip": True}}, "diffusion.clip: true, but latents have no fixed range"),
        ({"data": {"image_size": 30}}, "data.image_size: 30 is not divisible by the downsampling"),
        ({"data": {"channels": 3}}, "data.channels: 3, but the autoencoder in"),
        ({"model": {"attention_resolutions": [16]}}, "latents are images of 8x8 to the network"),
        ({"autoencoder": {"loss": "l3"}}, "autoencoder.loss: input should be 'l1' or 'l2'"),
    ],
)
def test_a_config_of_latents_is_checked(changes, said, file):
    values = latent_config(file)
    values |= {
        k: {**values.get(k, {}), **v} if isinstance(v, dict) else v for k, v in changes.items()
    }
    values |= {"codec": changes["codec"]} if "codec" in changes else {}
    assert said in line(completed, values)


def test_an_empty_section_is_that_of_pixels():
    assert make_config({"codec": None}, "x").codec == make_config({"codec": {}}, "x").codec
    assert make_config({}, "x").codec.name == "pixels"


# --- files that are not what they should be -------------------------------------------------------


def test_another_autoencoder_under_the_same_name_is_refused(file):
    from pipeline.autoencoder_file import write_autoencoder

    section = completed(latent_config(file)).codec
    write_autoencoder(file, stored(seed=1))
    assert "not the autoencoder that the model was trained with" in line(open_codec, section, CPU)
    file.unlink()
    open_codec.cache_clear()
    assert "autoencoder.safetensors: no such autoencoder" in line(open_codec, section, CPU)


def test_files_that_are_no_autoencoder_are_refused(file):
    content = file.read_bytes()
    values = latent_config(file)
    for wrong, said in (
        (content[: len(content) // 2], "not an autoencoder of this project, or damaged"),
        (b"\x80\x02}q\x00.", "not an autoencoder of this project, or damaged"),
        (content[:-4] + b"\0\0\0\0", "damaged, its content is not what was saved"),
        (safetensors.torch.save({"a": torch.zeros(1)}), "not an autoencoder; take a file of"),
    ):
        file.write_bytes(wrong)
        assert said in line(completed, values)


def altered(file, **entries):
    """Changes the header of a file, and its digest with it."""
    from pipeline.autoencoder_file import FORMAT, HEADER, read_autoencoder

    known = read_autoencoder(file)
    content = {**known.header, **{k: v for k, v in entries.items() if k in known.header}}
    own = digest({**content, "weights": known.weights})
    header = {"format": FORMAT, "format_version": 1, "digest": own, **content, **entries}
    file.write_bytes(safetensors.torch.save(known.weights, {HEADER: json.dumps(header)}))


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"format_version": 2}, "format version 2; this code reads 1"),
        ({"std": [1.0, 0.0, 1.0]}, "std.1: Input should be greater than 0"),
        ({"mean": [1.0, float("nan"), 1.0]}, "mean.1: Input should be a finite number"),
        ({"sizes": 3}, "sizes"),
        ({"digest": "0" * 64}, "damaged"),
    ],
)
def test_a_header_is_checked(entries, said, file):
    altered(file, **entries)
    assert said in line(completed, latent_config(file))


def test_sizes_larger_than_any_memory_are_refused(file):
    from pipeline.autoencoder_file import read_autoencoder

    sizes = read_autoencoder(file).sizes.model_dump(mode="json")
    altered(file, sizes={**sizes, "layers_per_block": 10**9})
    assert "layers_per_block" in line(completed, latent_config(file))


def test_sizes_of_another_network_than_the_weights_are_refused(file):
    from pipeline.autoencoder_file import read_autoencoder

    sizes = read_autoencoder(file).sizes.model_dump(mode="json")
    altered(file, sizes={**sizes, "block_out_channels": [2**20] * 3})
    assert "not the AutoencoderKL of its config: " in line(completed, latent_config(file))


# --- folders of diffusers -------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """An AutoencoderKL as diffusers saves it."""
    diffusers = pytest.importorskip("diffusers", reason="it writes the folder")
    torch.manual_seed(0)
    path = tmp_path / "kl"
    diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=2,
    ).save_pretrained(path)
    return path


def test_a_folder_of_diffusers_is_measured_once_and_stored(folder, tmp_path, monkeypatch):
    from pipeline.latents import with_folder_measured
    from utils.processes import World

    dataset = MemoryDataset(IMAGES, torch.arange(40) % 10, 10)
    model = {**tiny()["model"], "patch_size": 2}
    config = completed(latent_config(folder, model=model))
    assert image_shape(config) == (2, 16, 16)
    arguments = (config, "x.yaml", tmp_path, dataset, World(CPU))
    first = with_folder_measured(*arguments)
    assert first.codec.file == str(tmp_path / "codec.safetensors")
    x = open_codec(first.codec, CPU).encode(IMAGES)
    assert x.std().item() == pytest.approx(1.0, abs=1e-3)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.latents.latent_scale", lambda *_: pytest.fail("measured twice"))
        assert with_folder_measured(*arguments) == first


def test_its_latents_are_those_of_diffusers(folder, tmp_path):
    import diffusers

    from pipeline.autoencoder_file import build_autoencoder, read_folder

    network = build_autoencoder(*read_folder(folder), CPU)
    theirs = diffusers.AutoencoderKL.from_pretrained(folder)
    x = PIXELS.encode(IMAGES[:4])
    with torch.no_grad():
        torch.testing.assert_close(network.moments(x)[0], theirs.encode(x).latent_dist.mean)


def test_folders_that_are_no_autoencoder_are_refused(folder):
    config, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    values, text = latent_config(folder), config.read_text()
    for wrong, said in (
        (text.replace("AutoencoderKL", "UNet2DModel"), "_class_name: 'UNet2DModel'"),
        (text.replace('"latent_channels": 2', '"latent_channels": 3'), "of another shape"),
        (text.replace('"norm_num_groups": 4', '"norm_num_groups": 3'), "norm_num_groups"),
        (text.replace("DownEncoderBlock2D", "AttnDownBlock2D"), "down_block_types"),
        ("{}", "_class_name"),
        ("[1]", "not a mapping"),
        ("{", "not JSON"),
    ):
        assert wrong != text
        config.write_text(wrong)
        assert said in line(completed, values), said
    config.write_text(text)
    weights.rename(weights.with_suffix(".bin"))
    message = line(completed, values)
    assert "diffusion_pytorch_model.bin may run code and is not read" in message
    config.unlink()
    assert "config.json: no such file" in line(completed, values)


def test_an_autoencoder_of_an_early_diffusers_is_read(folder):
    """Its attention has other names."""
    from pipeline.autoencoder_file import read_folder

    _, weights = read_folder(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    early = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = re.compile(rf"\.({'|'.join(map(re.escape, early))})\.")
    old = {renamed.sub(lambda m: f".{early[m[1]]}.", name): t for name, t in weights.items()}
    assert old.keys() != weights.keys()
    safetensors.torch.save_file(old, path)
    _, again = read_folder(folder)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_a_missing_diffusers_is_one_line(file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    assert "pip install diffusers" in line(completed, latent_config(file))


def test_the_file_is_looked_for_beside_the_checkpoint(file, tmp_path):
    section = completed(latent_config(file)).codec
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert section.found_from(elsewhere) == section
    file.rename(elsewhere / file.name)
    found = section.found_from(elsewhere)
    assert Path(found.file) == elsewhere / file.name
    assert found.digest == section.digest
