"""The sections of a run's config, each with its fields' limits, and the rules between sections."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from enat_jax.config_file import limited, make_config, read_config, read_fields
from enat_jax.core.schedules import StrategyConfig, make_strategy
from enat_jax.models.autonat.config import AutoNATConfig
from enat_jax.models.enat.config import ENATConfig
from enat_jax.tokenizers.config import DiscriminatorConfig, PatchesConfig, VQGANConfig

Policy = Literal["replicated", "zero1", "zero2", "fsdp"]
Wants = Literal["token_ids", "floats", "uint8"]
# fields of the sections that say what a network is, `model` and `tokenizer`, which only say how it
# computes: of a checkpoint they may be changed
MAY_DIFFER = ("attention", "remat", "dtype", "reproject", "weights")


@dataclass(frozen=True)
class TokenizerConfig:
    """What turns token ids into images.

    Attributes:
        name: `vqgan`, `patches` (a codebook of small squares of pixels), `pixels` (grey levels are
            tokens), or `none`: token ids only.
        grid: rows and columns of tokens.
        weights: workdir of the VQGAN or the patches, made by `train_tokenizer`; of a VQGAN also by
            `convert --kind=vqgan`.
        dtype: of the VQGAN's activations; the reference encodes in float32.
    """

    name: Literal["vqgan", "patches", "pixels", "none"] = "none"
    grid: tuple[int, int] = limited((16, 16), at_least=1)
    weights: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class TextConfig:
    """What turns captions into token ids, and these into what a network reads.

    Attributes:
        name: `words` (a table of the training captions' words, learnt with the network), `clip`
            (CLIP's text tower, frozen), or `none`: classes.
        weights: workdir of the CLIP, made by `convert --kind=clip_text`.
        length: ids per caption; 0 takes the longest of the captions for `words`, and for `clip`
            what its tokenizer has.
    """

    name: Literal["none", "words", "clip"] = "none"
    weights: str = ""
    length: int = limited(0, at_least=0, at_most=4096)

    RULES = (
        ("weights name", lambda weights, name: weights or name != "clip",
         "must name the workdir of a text encoder (made by `convert --kind=clip_text`) for {1}"),
        ("length name", lambda length, name: not length or name == "words",
         "must be 0 for {1}"),
    )  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    """Which token records to read.

    Attributes:
        name: TFDS name of the data set.
        data_dir: Folder of the prepared data sets; the newest version of `name` in it is read.
        split: TFDS split, such as `train` or `train[:90%]`.
        cache: Decode all records into host memory once (1.3 GB for both orientations of ImageNet
            at 256 tokens) rather than each at every use.
        read_threads: Threads that read batches where they are not cached.
        prefetch_batches: Batches made ahead of their use.
    """

    name: str = "digits"
    data_dir: str = "data"
    split: str = "train"
    cache: bool = True
    read_threads: int = limited(4, at_least=1, at_most=1024)
    prefetch_batches: int = limited(4, at_least=0)


@dataclass(frozen=True)
class ImageConfig:
    """Which images to read, and how they become records.

    Attributes:
        folder: A folder with a folder of images for each class, or of images with captions; or
        name: TFDS name of a prepared data set with `image`, and `label` or `captions`.
        captions: Where the captions of the folder's images are, one or several of each. `beside`:
            in a `NAME.txt` beside each image, one a line. `tar`: the folder holds tar files with
            `KEY.jpg` and `KEY.txt`, as img2dataset writes them. Or a file: a `.csv` or `.jsonl`
            of `file` (relative to the folder) and `caption`, or COCO's annotations, a `.json`.
        data_dir: Folder of the prepared data sets.
        split: TFDS split, such as `train` or `train[:90%]`.
        max_unreadable: Share of all images that may be unreadable, in [0, 1); they are skipped.
        flips: Whether the mirror image of each image is recorded too; `auto` does so unless there
            are captions with the word left or right.
        shard_size: Images per shard: what a killed run repeats at most.
        read_threads: Threads that read and decode.
    """

    folder: str = ""
    name: str = ""
    captions: str = ""
    data_dir: str = "data"
    split: str = "train"
    max_unreadable: float = limited(0.01, at_least=0, below=1)
    flips: Literal["auto", True, False] = "auto"
    shard_size: int = limited(4096, at_least=1)
    read_threads: int = limited(8, at_least=1, at_most=1024)


@dataclass(frozen=True)
class OptimConfig:
    """ENAT's recipe by default (its section 5, "Setups", A.2, and code).

    Attributes:
        learning_rate: after the warm-up, for the config's own batch size.
        warmup_steps: steps of linear warm-up; the first two steps have rate 0, as the reference's.
        decay: `constant`, or `cosine` to 0 at the last step.
        weight_decay: decoupled, on every parameter.
        betas: Adam's averages of gradient and squared gradient.
        epsilon: added to the root of the second moment.
        max_grad_norm: clips the global gradient norm; 0 does not clip.
        ema_decay: of the moving average of parameters, used for features and for sampling.
    """

    learning_rate: float = limited(4e-4, at_least=0)
    warmup_steps: int = limited(5000, at_least=0)
    decay: Literal["constant", "cosine"] = "constant"
    weight_decay: float = limited(0.03, at_least=0)
    betas: tuple[float, float] = limited((0.99, 0.99), at_least=0, below=1)
    epsilon: float = limited(1e-8, at_least=0)
    max_grad_norm: float = limited(0.0, at_least=0)
    ema_decay: float = limited(0.9999, at_least=0, below=1)


@dataclass(frozen=True)
class LoopConfig:
    """What every kind of training run has in its `train` section.

    Attributes:
        seed: of everything random.
        steps: optimiser steps.
        batch_size: images per step, over all devices.
        log_every: steps between two lines of the log.
        sample_every: steps between two pictures; 0 makes none.
        checkpoint_every: steps between two checkpoints.
        keep: newest checkpoints kept.
        max_bad_steps: steps in a row with a loss, a gradient or new weights that are not finite,
            none of them applied, after which the run stops.
        profile_steps: first and last step, counted from 1, of a profiler trace that TensorBoard
            shows; (0, 0) traces nothing.
    """

    seed: int = limited(0, at_least=0, below=2**32)
    steps: int = limited(500_000, at_least=1)
    batch_size: int = limited(2048, at_least=1)
    log_every: int = limited(100, at_least=1)
    sample_every: int = limited(5000, at_least=0)
    checkpoint_every: int = limited(5000, at_least=1)
    keep: int = limited(3, at_least=1)
    max_bad_steps: int = limited(10, at_least=1)
    profile_steps: tuple[int, int] = limited((0, 0), at_least=0)

    RULES = (
        ("profile_steps", lambda steps: steps == (0, 0) or 1 <= steps[0] <= steps[1],
         "must be the first and the last step, from 1, or (0, 0)"),
    )  # fmt: skip


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """A training run; ENAT's recipe by default (its section 5, "Setups", and A.2).

    Attributes:
        accumulation: microbatches a step's gradient is averaged over.
        images_per_row: images packed into one row, each with its own stratum of the plans.
        programs: compiled training programs, each with its own strata.
        strata: `fixed` shows one plan of each, `drawn` draws another at every step, as the authors
            do: so all mask ratios and reuse fractions occur, at the price of padding, which is less
            with more images a row (and printed).
        mask_beta: the mask ratio's Beta distribution.
        reuse_probability: share of images trained with reused features.
        reuse_plans: how the tokens of these are shared out where they are drawn: `uniform` takes
            the paper's uniform fraction, `sampling` the steps of generation with 4 to 16 steps.
        class_dropout: share of images trained without their class.
        further_class_dropout: share of the rest without it for the network that learns, but not
            for the EMA whose features it reuses. The reference drops 0.15 in its data and a
            further 0.1 in its network: 0.235 in all.
        label_smoothing: of the cross-entropy.
        mean_over: `images` takes the mean of every image's mean loss, `tokens` counts every masked
            token of a row alike, as AutoNAT does.
    """

    accumulation: int = limited(1, at_least=1)
    images_per_row: int = limited(8, at_least=1)
    programs: int = limited(4, at_least=1, at_most=4)
    strata: Literal["fixed", "drawn"] = "fixed"
    mask_beta: tuple[float, float] = limited((12.0, 3.0), above=0)
    reuse_probability: float = limited(0.5, at_least=0, at_most=1)
    reuse_plans: Literal["uniform", "sampling"] = "uniform"
    class_dropout: float = limited(0.235, at_least=0, below=1)
    further_class_dropout: float = limited(0.0, at_least=0, below=1)
    label_smoothing: float = limited(0.1, at_least=0, below=1)
    mean_over: Literal["images", "tokens"] = "images"

    RULES = (
        ("batch_size images_per_row accumulation",
         lambda images, row, accumulation: images % (row * accumulation) == 0,
         "must be a multiple of {1} x {2}"),
        ("reuse_plans strata", lambda plans, strata: plans == "uniform" or strata == "drawn",
         "needs strata = 'drawn', not {1}"),
    )  # fmt: skip


@dataclass(frozen=True)
class SampleConfig:
    """How images are generated.

    Attributes:
        batch_size: images per call, over all devices.
        decode_batch_size: images that a device decodes at a time, because a VQGAN takes more
            memory per image than the network; 0 chooses: 1 on a CPU, 8 elsewhere. Pixels can
            differ by a level between one number and another, not between batch sizes.
        buckets: compiled step bodies; 0 chooses, see `plans.group_into_buckets`.
        max_padding: most extra FLOPs of the automatic choice, as a fraction.
    """

    batch_size: int = limited(64, at_least=1)
    decode_batch_size: int = limited(0, at_least=0)
    buckets: int = limited(0, at_least=0)
    max_padding: float = limited(0.15, at_least=0)


@dataclass(frozen=True)
class EvaluateConfig:
    """How a generator is scored.

    Attributes:
        metrics: `inception` (FID, sFID, Inception Score, precision and recall); `digits` (Frechet
            distance of pixels, and accuracy, on the digits data set); `emoji` (role, gender and
            tone of the emojis in the split that `images` names); or `package.module:function`, an
            importable function of all images and their class ids.
        inception: path of `pt_inception-2015-12-05-6726825d.pth`.
        inception_digest: how the file's SHA-256 begins; another only for weights of one's own.
        reference: path of the real images' statistics (`.npz` with `mu` and `sigma`), such as
            ADM's, U-ViT's, or made by the verb `statistics`.
        prompts: a file of captions, one a line, for a model of captions: image i is of caption i
            modulo their number.
        num_images: images to make; FID-50k has 50,000.
        protocol: `floats` takes images as they come from the decoder, as the reference does;
            `uint8` rounds them to 256 levels, as everybody does who saves them first; or `both`.
        precision_recall: also where the reference holds features of single images.
        batch_size: images that a device looks at at a time.
        save_every: images between two saves of what was added up.
    """

    metrics: str = "inception"
    inception: str = ""
    inception_digest: str = "6726825d"
    reference: str = ""
    prompts: str = ""
    num_images: int = limited(50_000, at_least=2, at_most=10**8)
    protocol: Literal["floats", "uint8", "both"] = "both"
    precision_recall: bool = True
    batch_size: int = limited(16, at_least=1)
    save_every: int = limited(5000, at_least=1)


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised.

    Attributes:
        name: `fid`; `digits` (Frechet distance of pixels, and accuracy, on the digits data set);
            `emoji` (role, gender and tone of the emojis in the split that `images` names); or
            `package.module:function`, an importable function of all token ids or images and their
            class ids that returns a number, less being better.
        output: what a function is given: token ids `[b n]`, images in [0, 1] or ones of 256 levels
            `[b y x 3]`. FID takes `floats` or `uint8`, see `evaluate.protocol`.
        inception: path of `pt_inception-2015-12-05-6726825d.pth`, for FID.
        inception_digest: how that file's SHA-256 begins.
        reference: path of the real images' statistics, for FID.
        batch_size: images that a device looks at at a time, for FID.
    """

    name: str = "fid"
    output: Wants = "floats"
    inception: str = ""
    inception_digest: str = "6726825d"
    reference: str = ""
    batch_size: int = limited(16, at_least=1)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 for one axis means all that are left.

    Attributes:
        data: copies of the model, each with its share of the batch.
        fsdp: shares of every large parameter, as `placement` says, and of the batch.
        tensor: shares of heads and of the MLP's hidden width.
        placement: what the axis `fsdp` shares out. `replicated`: nothing. `zero1`: the optimiser's
            state and the gradients. `zero2`: parameters and their moving average as well, gathered
            once at the start of a step, in the activations' type. `fsdp`: the same, but gathered
            layer by layer, each time they are used: the least memory.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    placement: Policy = "zero2"


@dataclass(frozen=True)
class TokenizerTrainConfig(LoopConfig):
    """A VQGAN's training run; its pictures are looks at held-out images, with their scores.

    Attributes:
        image_size: pixels per side.
        random_crops: crops of 0.8 to 1 of an image's shorter side; else its centre.
    """

    steps: int = limited(100_000, at_least=1)
    batch_size: int = limited(64, at_least=1)
    image_size: int = limited(256, at_least=1)
    random_crops: bool = True


@dataclass(frozen=True)
class HeldOutConfig:
    """The held-out images, which are looked at and never learnt from.

    Attributes:
        folder: a folder as `images.folder`; or
        captions: of its images, as `images.captions`.
        split: a split of the TFDS data set that `images` names. Neither: training images are
            looked at, and the log calls them so.
        images: at most so many, evenly out of all.
        pictures: of these in the log.
        batch_size: images per call, over all devices.
        inception: FID's published Inception weights, for rFID; empty leaves it out.
    """

    folder: str = ""
    captions: str = ""
    split: str = ""
    images: int = limited(1000, at_least=1)
    pictures: int = limited(16, at_least=1)
    batch_size: int = limited(64, at_least=1)
    inception: str = ""


@dataclass(frozen=True)
class LossConfig:
    """Weights of a VQGAN's losses (Esser et al. 2021, sections 3.1 and A), and of its codes' care.

    Attributes:
        l1: of the mean absolute error of the reconstruction, images in [0, 1].
        l2: of its mean squared error.
        codebook_start: the first step with a codebook, which then covers the encoder's outputs;
            steps before it train a plain autoencoder, whose outputs are worth covering.
        codebook: of the squared distance that draws codes to the encoder's outputs.
        commitment: of the one that draws the encoder's outputs to their codes.
        restart_after: a code that no token used for so many steps in a row is replaced by an
            output of the encoder; 0 leaves it.
        lpips: of the perceptual distance, where `lpips_weights` is given.
        lpips_weights: files of VGG16 and of LPIPS's linear layers; none leaves the distance out.
        adversarial: of the discriminator's opinion; 0 trains without one.
        adversarial_start: the first step with a discriminator.
    """

    l1: float = limited(1.0, at_least=0)
    l2: float = limited(1.0, at_least=0)
    codebook_start: int = limited(0, at_least=0)
    codebook: float = limited(1.0, at_least=0)
    commitment: float = limited(0.25, at_least=0)
    restart_after: int = limited(100, at_least=0)
    lpips: float = limited(0.1, at_least=0)
    lpips_weights: tuple[str, ...] = ()
    adversarial: float = limited(0.0, at_least=0)
    adversarial_start: int = limited(0, at_least=0)


def _feasible(strategy: StrategyConfig, length: int) -> bool:
    """Raises ValueError unless every step reveals a token and leaves the next something to do."""
    if strategy.rule != "file":  # a file is read where it is used
        try:
            make_strategy(strategy, length).masked_counts(length)
        except ValueError as error:
            raise ValueError(f"strategy: {error}") from error
    return True


_WARM_UP = (
    "optim.warmup_steps train.steps optim.decay",
    lambda warmup, steps, decay: decay == "constant" or warmup < steps,
    "must be below {1}",
)

_ONE_SOURCE = (
    "images.folder images.name",
    lambda folder, name: bool(folder) != bool(name),
    "or {1}: give one of them",
)


@dataclass(frozen=True)
class Config:
    """One experiment: a network that predicts tokens."""

    model: ENATConfig | AutoNATConfig = field(default_factory=ENATConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    text: TextConfig = field(default_factory=TextConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    images: ImageConfig = field(default_factory=ImageConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    RULES = (
        ("strategy.steps model.length", lambda steps, length: 1 <= steps <= length,
         "must be between 1 and {1}"),
        ("strategy model.length", _feasible, ""),
        ("model.length tokenizer.grid", lambda length, grid: length == grid[0] * grid[1],
         "must be the product of {1}"),
        ("model.codebook_size tokenizer.name",
         lambda size, name: name != "pixels" or size == 0 or 2 <= size <= 256,
         "must be 2 to 256 greys for {1}"),
        ("tokenizer.weights tokenizer.name", lambda weights, name: weights or name != "vqgan",
         "must name the workdir of a VQGAN (made by `train_tokenizer` or `convert --kind=vqgan`)"
         " for {1}"),
        ("tokenizer.weights tokenizer.name", lambda weights, name: weights or name != "patches",
         "must name the workdir of patches (made by `train_tokenizer`) for {1}"),
        ("train.reuse_probability model.carries_features",
         lambda probability, carries: carries or probability == 0,
         "must be 0 for a network that carries no features"),
        _WARM_UP,
    )  # fmt: skip


@dataclass(frozen=True)
class TokenizerRunConfig:
    """One VQGAN on one set of images."""

    model: VQGANConfig = field(default_factory=VQGANConfig)
    images: ImageConfig = field(default_factory=ImageConfig)
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(
        learning_rate=1e-4, betas=(0.9, 0.99), weight_decay=0.0, ema_decay=0.999
    ))  # fmt: skip
    train: TokenizerTrainConfig = field(default_factory=TokenizerTrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    RULES = (
        _ONE_SOURCE,
        ("held_out.folder held_out.split", lambda folder, split: not (folder and split),
         "and {1}: give one of them at most"),
        ("held_out.split images.name", lambda split, name: name or not split,
         "needs images.name: a folder has no splits, give held_out.folder"),
        ("train.image_size model.patch model.channel_multipliers",
         lambda size, patch, _: size % patch == 0, "must be a multiple of {1} for {2}"),
        ("loss.codebook_start train.steps", lambda start, steps: start < steps,
         "must be below {1}"),
        _WARM_UP,
    )  # fmt: skip


@dataclass(frozen=True)
class PatchesTrainConfig:
    """How patches are learnt.

    Attributes:
        seed: of everything random.
        image_size: pixels per side of the images that are cut into patches.
        images: at most so many, evenly out of all.
    """

    seed: int = limited(0, at_least=0, below=2**32)
    image_size: int = limited(24, at_least=1)
    images: int = limited(4000, at_least=1)


@dataclass(frozen=True)
class PatchesRunConfig:
    """One codebook of patches of one set of images."""

    model: PatchesConfig = field(default_factory=PatchesConfig)
    images: ImageConfig = field(default_factory=ImageConfig)
    train: PatchesTrainConfig = field(default_factory=PatchesTrainConfig)

    RULES = (
        _ONE_SOURCE,
        ("train.image_size model.patch", lambda size, patch: size % patch == 0,
         "must be a multiple of {1}"),
    )  # fmt: skip


def load_tokenizer_config(
    path: str, overrides: Sequence[str] = ()
) -> TokenizerRunConfig | PatchesRunConfig:
    """The config of a tokenizer's file, whose `model.name` says of which; see `make_config`."""
    fields = read_fields(path)
    of_patches = dict(fields.get("model", {})).get("name") == PatchesConfig.name
    return make_config(PatchesRunConfig if of_patches else TokenizerRunConfig, fields, overrides)


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """The config of a file after `section.field=value` overrides; see `make_config`."""
    return read_config(Config, path, overrides)


def config_from_dict(fields: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The config of nested mappings after `section.field=value` overrides; see `make_config`."""
    return make_config(Config, fields, overrides)
