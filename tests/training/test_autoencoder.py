"""The loss of an autoencoder."""

from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

pytest.importorskip("diffusers", reason="autoencoders are AutoencoderKL of diffusers")

from models.autoencoder import Autoencoder
from pipeline.codec_sections import AutoencoderConfig
from pipeline.config import make_config
from tests.toys import tiny
from tests.training.test_loop import ALONE, digits
from training.autoencoder import autoencoder_stage, autoencoder_start, reconstruction_objective
from training.starts import Run
from training.trainee import make_trainee


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_the_loss_is_that_of_the_images_and_the_divergence_per_pixel(tmp_path, loss):
    recipe = {"channels": [8, 8], "loss": loss, "kl_weight": 0.25}
    config = make_config(tiny(autoencoder=recipe), "x")
    run, stage = Run(config, "x", tmp_path, ALONE, digits()), autoencoder_stage(config)
    rng = torch.Generator().manual_seed(0)
    x, x_hat = torch.randn(2, 3, 1, 32, 32, generator=rng)
    eps, mean, logvar = torch.randn(3, 3, 4, 16, 16, generator=rng)
    seen = []

    def network(*given):
        seen.append(given)
        return x_hat, mean, logvar

    trainee = replace(make_trainee(torch.nn.Linear(1, 1), stage, ALONE), called=network)
    objective = reconstruction_objective(run, stage, trainee, autoencoder_start(run), None)
    assert objective.draw(rng, x.shape)["eps"].shape == eps.shape
    found, logsnr = objective.loss(x, {}, {"eps": eps})
    assert all(map(torch.equal, seen[0], (x, eps)))
    assert torch.isposinf(logsnr).all()
    prior = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    divergence = kl_divergence(Normal(mean, (0.5 * logvar).exp()), prior).sum((1, 2, 3))
    error = (x_hat - x).abs() if loss == "l1" else (x_hat - x) ** 2
    torch.testing.assert_close(found, error.mean((1, 2, 3)) + 0.25 * divergence / 1024)


def test_an_autoencoder_decodes_a_draw_of_its_distribution():
    torch.manual_seed(0)
    network = Autoencoder(AutoencoderConfig(channels=(8, 8)).sizes(1)).eval()
    x, eps = torch.randn(2, 1, 32, 32), torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        x_hat, mean, logvar = network(x, eps)
        torch.testing.assert_close(x_hat, network.decode(mean + logvar.exp().sqrt() * eps))
        assert not torch.allclose(x_hat, network.decode(mean))
