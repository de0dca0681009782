"""The training run of ENAT and AutoNAT: token records in, a workdir out."""

import dataclasses
from collections.abc import Callable

from enat_jax.checkpoints.caption_reader import CaptionReader, load_caption_reader
from enat_jax.checkpoints.tokenizer import load_tokenizer
from enat_jax.config import MAY_DIFFER, Config
from enat_jax.data.batches import RecordInfo, record_info, some_captions, training_batches
from enat_jax.errors import UserError
from enat_jax.files import Path
from enat_jax.models.networks import NetworkConfig
from enat_jax.parallel import hosts
from enat_jax.parallel.placement import Placement
from enat_jax.training.loop import training_loop
from enat_jax.training.programs import TrainingPrograms
from enat_jax.training.workdir import Workdir

_SHOWN = 25  # captions of a picture of what has been learnt


def train(config: Config, workdir: Path, *, log: Callable[[str], object] = print) -> None:
    """Trains, or goes on from the workdir's newest checkpoint; returns when all steps are done.

    Every host calls it, with the same arguments; they share the workdir, and one of them logs lines
    for the user. Told to stop by SIGTERM, it saves and returns.

    Raises:
        UserError: records or a workdir that do not fit the config, hosts that disagree, too many
            steps in a row that are not finite.
    """
    log = hosts.primary_only(log)
    info = record_info(config.data)
    placement = Placement.of(config.mesh)
    reader = load_caption_reader(config.text, info.text, placement)
    model = dataclasses.replace(  # what the config leaves to the records
        config.model,
        num_classes=config.model.num_classes or info.num_classes,
        codebook_size=config.model.codebook_size or info.codebook_size,
        **({} if reader is None else text_sizes(config.model, reader)),
    )
    config = dataclasses.replace(config, model=model)
    run = Workdir(
        workdir,
        config,
        metadata={
            "class_names": list(info.class_names),
            "tokenizer_digest": info.tokenizer_digest,
            **({} if reader is None else {"text": {**(info.text or {}), **reader.digests}}),
        },
        stream={
            "train.seed": config.train.seed,
            "data.name": config.data.name,
            "data.split": config.data.split,
            "records": info.num_records,
            **({} if reader is None else {"captions": reader.digests}),
        },
        sections=("model", "tokenizer"),
        may_differ=MAY_DIFFER,
        log=log,
    )
    _check_records(config, info)
    tokenizer = load_tokenizer(config.tokenizer, model.codebook_size, placement)
    if tokenizer is not None and info.tokenizer_digest not in ("", tokenizer.digest):
        raise UserError(
            f"config: tokenizer.weights = {config.tokenizer.weights!r} has digest"
            f" {tokenizer.digest[:12]}, the records {config.data.name} were made with"
            f" {info.tokenizer_digest[:12]}"
        )
    captions = () if reader is None else some_captions(config.data, _SHOWN)
    programs = TrainingPrograms(
        config, placement, tokenizer, info.class_names, reader=reader, captions=captions
    )
    if config.train.strata == "drawn":
        log(f"what pads the strata of {len(programs.rows)} programs adds"
            f" {100 * programs.padding:.1f}% FLOPs")  # fmt: skip
    with run:
        training_loop(
            programs,
            run,
            lambda share: training_batches(config.data, share, seed=config.train.seed),
            data=f"{info.num_records} records of {config.data.name}",
        )


def text_sizes(model: NetworkConfig, reader: CaptionReader) -> dict[str, int]:
    """The sizes of captions that a config leaves to their reader."""
    tokenizer, encoder = reader.tokenizer, reader.encoder
    if encoder is None:
        return {
            "text_length": model.text_length or tokenizer.length,
            "text_vocabulary": model.text_vocabulary or tokenizer.vocabulary,
        }
    return {
        "text_length": model.text_length or tokenizer.length,
        "text_width": model.text_width or encoder.width,
    }


def _check_records(config: Config, info: RecordInfo) -> None:
    """Refuses records that were made with something else than the config says."""
    pairs = {
        "tokenizer.name": (config.tokenizer.name, info.tokenizer),
        "tokenizer.grid": (config.tokenizer.grid, info.grid),
        "model.codebook_size": (config.model.codebook_size, info.codebook_size),
        "model.num_classes": (config.model.num_classes, info.num_classes),
    }
    condition, name = ("class", "none") if info.text is None else ("text", info.text["name"])
    pairs["model.condition"] = (config.model.condition, condition)
    pairs["text.name"] = (config.text.name, name)
    if info.text is not None and config.text.name != "none":
        length = info.text["length"]
        pairs["model.text_length"] = (config.model.text_length, length)
        pairs["text.length"] = (config.text.length or length, length)
    wrong = [
        f"{name} = {ours}, the records have {theirs}"
        for name, (ours, theirs) in pairs.items()
        if ours != theirs and (name, ours) != ("tokenizer.name", "none")
    ]
    if wrong:
        raise UserError(f"config does not fit the records {config.data.name}: {'; '.join(wrong)}")
