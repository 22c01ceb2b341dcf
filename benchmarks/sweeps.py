"""The sweeps of benchmarks/sweep.py: what is trained, and by which variants of its recipe."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sweep:
    """Variants of a recipe that are compared in equal CPU time.

    variants: by name the values of the config that each one sets, after the common ones. base:
    the config of base models; None for students. teacher: of the students, by default. seconds:
    of CPU time for each variant. count: images of each that are measured. samplers, steps: of
    base models, and of the students that are measured (all if empty). repeated: how
    many of the best variants are trained once more, with another seed. compared_with: the variant
    from which the others' differences are told. held_out: whether students are also measured by
    their loss on test images. students: the ladder that every base model teaches, in as much CPU
    time again.

    Stages of a ladder get updates in proportion to distillation.updates_per_stage.
    """

    about: str
    variants: dict[str, list[str]]
    common: list[str]
    seconds: int
    count: int
    base: Path | None = None
    teacher: Path | None = None
    samplers: tuple[str, ...] = ("ddim",)
    steps: tuple[int, ...] = ()
    repeated: int = 0
    compared_with: str = ""
    held_out: bool = False
    students: "Sweep | None" = None


SMALL = Path("configs/mnist_small.yaml")


def training(**values: object) -> list[str]:
    """Overrides of keys of the section training."""
    return [f"training.{key}={value}" for key, value in values.items()]


def model(**values: object) -> list[str]:
    """Overrides of keys of the section model."""
    return [f"model.{key}={value}" for key, value in values.items()]


def distillation(**values: object) -> list[str]:
    """Overrides of keys of the section distillation."""
    return [f"distillation.{key}={value}" for key, value in values.items()]


DEEP = model(channels=24, blocks_per_level=2)
EXPERIMENTS = Sweep(
    about="recipes for a teacher",
    base=SMALL,
    common=[
        *model(channels=32, blocks_per_level=1),
        *training(batch_size=32, learning_rate=0.001, learning_rate_decay="linear", warmup=200),
    ],
    variants={
        "base32": [],
        "b16": training(batch_size=16),
        "b64": training(batch_size=64),
        "c48": model(channels=48),
        "c24b2": DEEP,
        "c32b2": model(blocks_per_level=2),
        "c24b3": model(channels=24, blocks_per_level=3),
        "c24b2_rate2": [*DEEP, *training(learning_rate=0.002)],
        "c24b2_attend4": [*DEEP, *model(attention_resolutions=[4])],
        "c24b2_b16_rate2": [*DEEP, *training(batch_size=16, learning_rate=0.002)],
        "c32_124": model(channel_multipliers=[1, 2, 4]),
        "c16p1": model(patch_size=1, channels=16, channel_multipliers=[1, 2, 4, 4]),
        "uniform": training(times="uniform"),
        "trunc": ["diffusion.loss_weight=snr_trunc"],
        "rate2": training(learning_rate=0.002),
        "ema999": training(ema_decay=0.999),
    },
    seconds=600,
    count=1000,
    steps=(32,),
)

ABLATION = Sweep(
    about="output types and loss weights, as in the paper's first table",
    base=SMALL,
    common=[
        *model(channels=24, blocks_per_level=1, attention_resolutions=[4]),
        *training(batch_size=32, learning_rate=0.001, learning_rate_decay="linear", warmup=200),
        *training(times="stratified"),
    ],
    variants={
        f"{output}-{weight}": [f"diffusion.prediction={output}", f"diffusion.loss_weight={weight}"]
        for output in ("x", "eps", "v", "both")
        for weight in ("snr", "snr_trunc", "snr_plus_one")
    },
    seconds=360,
    count=1000,
    samplers=("ddim", "ancestral"),
    steps=(64,),
    repeated=4,
)

TEACHERS = Sweep(
    about="outputs and loss weights of a teacher, and the noise that they leave in the background",
    base=SMALL,
    common=training(learning_rate_decay="linear", times="stratified", warmup=200),
    variants={
        f"{output}-{weight}": [f"diffusion.prediction={output}", f"diffusion.loss_weight={weight}"]
        for output, weight in (
            ("v", "snr_plus_one"),
            ("dual", "snr_capped"),
            ("v", "snr_capped"),
            ("x", "snr_capped"),
            ("dual", "constant"),
            ("x", "constant"),
            ("both", "constant"),
            ("v", "constant"),
        )
    }
    | {"v-snr_plus_one-features": model(input_features=[7, 8])}
    | {
        f"{output}-{weight}-clip": [
            f"diffusion.prediction={output}",
            f"diffusion.loss_weight={weight}",
            "diffusion.clip=true",
        ]
        for output, weight in (
            ("v", "snr_plus_one"),
            ("x", "constant"),
            ("v", "constant"),
            ("dual", "constant"),
        )
    },
    seconds=900,
    count=2000,
    steps=(64,),
)

STAGES = Sweep(
    about="recipes for one stage that halves a student's steps",
    common=distillation(
        learning_rate=0.0005,
        batch_size=32,
        loss_weight="snr_trunc",
        losses="null",
        time_exponent=1.0,
        method="progressive",
    ),
    variants={
        "rate5": [],
        "rate05": distillation(learning_rate=0.00005),
        "rate1": distillation(learning_rate=0.0001),
        "rate2": distillation(learning_rate=0.0002),
        "rate10": distillation(learning_rate=0.001),
        "b16": distillation(batch_size=16),
        "b64": distillation(batch_size=64),
        "plus_one": distillation(loss_weight="snr_plus_one"),
        "constant": distillation(loss_weight="constant"),
        "rate1_late": distillation(learning_rate=0.0001, time_exponent=3.0),
        "rate2_late": distillation(learning_rate=0.0002, time_exponent=3.0),
        "rate5_late": distillation(time_exponent=3.0),
        "rate2_later": distillation(learning_rate=0.0002, time_exponent=6.0),
        "rate2_late_b64": distillation(learning_rate=0.0002, time_exponent=3.0, batch_size=64),
    },
    seconds=300,
    count=1000,
    held_out=True,
)

# Later stages are harder, and get more updates, as in configs/mnist_small.yaml.
HALVED = distillation(ladder=[64, 32, 16, 8, 4, 2, 1], updates_per_stage=[1, 1, 3, 4, 3, 2])
# The network of configs/mnist_small.yaml with half its channels, a quarter of its parameters.
HALF_WIDTH = (
    "{channels: 16, channel_multipliers: [1, 2, 2], blocks_per_level: 2, "
    "attention_resolutions: [8], attention_heads: 2, dropout: 0.0, resample: conv, patch_size: 2}"
)
METHODS = Sweep(
    about="methods of distillation on one teacher",
    teacher=Path("pretrained/mnist-teacher.safetensors"),
    common=distillation(
        learning_rate=0.0002,
        batch_size=32,
        loss_weight="snr_trunc",
        losses="null",
        time_exponent=1.0,
        method="progressive",
        grid="uniform",
        ema_decay="null",
    ),
    variants={
        "progressive": HALVED,
        "progressive_energy": [*HALVED, *distillation(losses="{snr_trunc: 1.0, energy: 0.3}")],
        "four_to_one": distillation(ladder=[64, 16, 4, 1], updates_per_stage=[1, 2, 2]),
        "straight_8": distillation(ladder=[64, 8]),
        "adaptive_8": distillation(ladder=[64, 8], grid="adaptive"),
        "tract_8": distillation(ladder=[64, 8], method="tract", ema_decay=0.999),
        "tract_1": distillation(ladder=[64, 1], method="tract", ema_decay=0.999),
        "consistency": distillation(ladder=[64, 1], method="consistency", ema_decay=0.999),
        "progressive_consistency": [
            *distillation(ladder=[64, 32, 16, 8, 1], updates_per_stage=[1, 1, 3, 7]),
            "distillation.method=[progressive, progressive, progressive, consistency]",
            *distillation(ema_decay=0.999),
        ],
        "half_width": [
            *distillation(ladder=[64, 64, 32, 16, 8, 4, 2, 1], student=HALF_WIDTH),
            # Most weights begin afresh: the match stage is a training of its own.
            *distillation(updates_per_stage=[20, 1, 1, 3, 4, 3, 2]),
            *distillation(learning_rate=[0.002, *[0.0002] * 6]),
        ],
        "coloured_data": [*HALVED, *distillation(data="colored_mnist")],
        "inverted_data": [*HALVED, *distillation(data="inverted_mnist")],
        "straight_1": distillation(ladder=[64, 1]),
        "straight_4": distillation(ladder=[64, 4]),
        "straight_2": distillation(ladder=[64, 2]),
    },
    seconds=600,
    count=5000,
    steps=(8, 4, 2, 1),
    compared_with="progressive",
)

# The networks of configs/mnist_dit.yaml and configs/mnist_latent.yaml.
DIT = (
    "model={name: dit, channels: 128, depth: 6, attention_heads: 4, mlp_ratio: 4.0, "
    "patch_size: 4, dropout: 0.0}"
)
LATENT_UNET = (
    "model={channels: 64, channel_multipliers: [1, 2], blocks_per_level: 2, "
    "attention_resolutions: [8, 4], attention_heads: 2, dropout: 0.0, resample: conv}"
)
AUTOENCODER = "codec={name: autoencoder, file: output/autoencoder/autoencoder.safetensors}"
NETWORKS = Sweep(
    about="networks: base model and ladder",
    base=SMALL,
    common=training(learning_rate_decay="linear", times="stratified", warmup=200),
    variants={
        "unet": [],
        "dit": [DIT, *training(learning_rate=0.001)],
        "latent_unet": [
            *(LATENT_UNET, AUTOENCODER, "sampling.clip=false"),
            *training(learning_rate=0.001),
        ],
    },
    seconds=900,
    count=2000,
    steps=(64,),
    students=Sweep(
        about="their students",
        common=[*METHODS.common, *HALVED],
        variants={},
        seconds=900,
        count=2000,
        steps=(8, 4, 2, 1),
    ),
)

SWEEPS = {
    "experiments": EXPERIMENTS,
    "ablation": ABLATION,
    "teachers": TEACHERS,
    "stages": STAGES,
    "methods": METHODS,
    "networks": NETWORKS,
}
