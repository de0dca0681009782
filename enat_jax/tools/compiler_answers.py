"""What a compiler says of a program, kept so that the same one is not compiled twice."""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from enat_jax.files import atomic

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# Triton's products have tile sizes that are found by trying them on the GPU: without one, cuBLAS
_OPTIONS = {"gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}}


@dataclass(frozen=True)
class Memory:
    """Bytes of one device's memory.

    Attributes:
        arguments: what the program is given.
        outputs: what it returns.
        aliased: outputs that lie where arguments were.
        temporaries: what it needs besides.
        code: the program itself.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        """All of it at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclass(frozen=True)
class Answer:
    """A compiler's answer.

    Attributes:
        text: the compiled program's HLO; None where it does not fit the device's memory.
        memory: what it needs; None where it does not fit.
        problem: why it does not fit.
        needed: bytes of memory that it needs, as far as the compiler names them.
        seconds: the compilation.
        kept: whether it was answered before.
    """

    text: str | None
    memory: Memory | None
    problem: str
    needed: int | None
    seconds: float
    kept: bool = False


def answers_folder() -> pathlib.Path:
    """Where answers are kept between processes."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(folder) / "enat_jax" / "compiler_answers"


def ask_compiler(
    lowered: jax.stages.Lowered, devices: Sequence[Any], folder: pathlib.Path | None = None
) -> Answer:
    """Compiles a program, or reads what the compiler said of it before.

    JAX's own cache of compiled programs does not serve here: it writes those for described
    devices, but cannot read them, for which it wants the real ones.

    Args:
        lowered: the program.
        devices: what it was lowered for.
        folder: where answers are kept; None keeps none.

    Raises:
        jax.errors.JaxRuntimeError: whatever the compiler complains about but memory.
    """
    path = folder / _key(lowered, devices) if folder else None
    if path and path.with_suffix(".json").exists():
        return _read(path)
    start = time.perf_counter()
    try:
        options = _OPTIONS.get(devices[0].platform) if devices else None
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        message = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        seconds = time.perf_counter() - start
        answer = Answer(None, None, message[:300], needed_bytes(message), seconds)
    else:
        seconds = time.perf_counter() - start
        memory = _memory(compiled.memory_analysis())
        answer = Answer(compiled.as_text() or "", memory, "", memory.peak, seconds)
    if path:
        _write(path, answer)
    return answer


def needed_bytes(message: str) -> int | None:
    """The bytes of memory that a compiler's refusal names; None where it names none."""
    found = re.search(r"(?:Used |\()([\d.]+)([KMGT]?)(?: of|\) exceeds)", message)
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def _memory(analysis: Any) -> Memory:
    return Memory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        aliased=analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
    )


def _key(lowered: jax.stages.Lowered, devices: Sequence[Any]) -> str:
    """A digest of all that the answer depends on."""
    versions = [_version(package) for package in _COMPILERS]
    where = [(d.device_kind, d.id, d.process_index, getattr(d, "slice_index", None))
             for d in devices]  # fmt: skip
    flags = [os.environ.get(name, "") for name in _FLAGS]
    digest = hashlib.sha256(json.dumps([versions, where, flags]).encode())
    digest.update(lowered.as_text().encode())
    return digest.hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _write(path: pathlib.Path, answer: Answer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if answer.text is not None:
        with gzip.open(path.with_suffix(".hlo.gz"), "wt", encoding="utf-8") as file:
            file.write(answer.text)
    fields = dataclasses.asdict(dataclasses.replace(answer, text=None))
    # this is written last, and by any number of processes
    with atomic(path.with_suffix(".json"), partial=f"{path.name}.{os.getpid()}") as part:
        part.write_text(json.dumps(fields), encoding="utf-8")


def _read(path: pathlib.Path) -> Answer:
    fields = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    fields["kept"] = True
    if fields["memory"] is not None:
        fields["memory"] = Memory(**fields["memory"])
        with gzip.open(path.with_suffix(".hlo.gz"), "rt", encoding="utf-8") as file:
            fields["text"] = file.read()
    return Answer(**fields)
