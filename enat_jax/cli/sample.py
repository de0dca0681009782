"""Images of given classes or captions from a workdir."""

import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from absl import flags

from enat_jax.cli import host_flags
from enat_jax.cli.shared_flags import generates, restored, whole_number, whole_numbers
from enat_jax.errors import UserError

_MOST_IMAGES = 10**8  # of one call: class ids alone take 800 MB


def define(values: flags.FlagValues) -> None:
    generates(values, out="a .png, a folder, or a .npz")
    flags.DEFINE_enum("format", "grid", ["grid", "png", "npz", "tokens"],
                      "a labelled grid, single PNGs, the ADM suite's npz, or token ids",
                      values)  # fmt: skip
    flags.DEFINE_list("classes", [], "class ids, such as 3,7; all by default", values)
    flags.DEFINE_multi_string("prompt", [], "a caption, in place of classes; may be repeated",
                              flag_values=values)  # fmt: skip
    flags.DEFINE_string("prompts", "", "a file of captions, one a line", values)
    flags.DEFINE_string("negative_prompt", "", "a caption that guidance leads away from", values)
    whole_number(values, "per_class", 10, "images of each class or caption")
    host_flags.define(values)


def run(args: flags.FlagValues, overrides: list[str]) -> int:
    host_flags.connect(args)
    import numpy as np

    from enat_jax.data import pictures as images
    from enat_jax.files import write_arrays
    from enat_jax.parallel.hosts import is_primary
    from enat_jax.sampling.sampler import sampler_of

    classes, prompts = whole_numbers(args, "classes"), _prompts(args)
    run = restored(args, overrides)
    if run.config.model.condition == "class" and not prompts:
        classes = classes or list(range(run.config.model.num_classes))
    kinds, what = (prompts, "captions") if prompts else (classes, "classes")
    if (total := len(kinds) * args.per_class) > _MOST_IMAGES:
        raise UserError(f"{len(kinds)} {what} x --per_class={args.per_class} = {total} images,"
                        f" must be at most {_MOST_IMAGES}")  # fmt: skip
    sampler = sampler_of(run)
    wanted = np.repeat(np.arange(len(prompts)) if prompts else classes, args.per_class)
    asked: dict[str, Any] = {"class_ids": wanted, "negative_prompt": args.negative_prompt}
    if prompts:
        asked |= {"class_ids": classes, "prompts": [prompts[number] for number in wanted]}
    out = pathlib.Path(args.out)
    if args.format in ("npz", "tokens") and out.suffix != ".npz":
        raise UserError(f"--out={out} must end in .npz for --format={args.format}")
    make = sampler.token_batches if args.format == "tokens" else sampler.image_batches
    batches = make(**asked, seed=args.seed)
    if not is_primary():  # the work is shared, the writing is not
        for _ in batches:
            pass
        return 0
    print(sampler.describe())
    out.parent.mkdir(parents=True, exist_ok=True)
    batches = _watched(batches, len(wanted))
    if args.format == "tokens":
        labels = {"prompts": np.array(asked["prompts"])} if prompts else {"class_ids": wanted}
        write_arrays(out, {"token_ids": np.concatenate(list(batches)), **labels})
    elif args.format == "grid":
        names = prompts or [*sampler.class_names, "any"]
        made = np.concatenate(list(batches))  # which refuses numbers of no class
        grid = images.image_grid(made, [names[c] for c in wanted], wrap=bool(prompts))
        images.write_png(out, grid)
    elif args.format == "png":
        images.write_pngs(out, batches, wanted, "prompt" if prompts else "class")
    else:
        images.write_npz(out, batches, wanted)
    print(f"wrote {len(wanted)} images to {out}")
    return 0


def _prompts(args: flags.FlagValues) -> list[str]:
    """The captions of both flags."""
    from enat_jax.data.captions import read_prompts

    return [*args.prompt, *(read_prompts(args.prompts) if args.prompts else ())]


def _watched(batches: Iterable[Any], total: int) -> Iterator[Any]:
    """Passes batches on under a progress bar."""
    from tqdm import tqdm

    with tqdm(total=total, unit="image", disable=None) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))
