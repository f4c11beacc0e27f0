"""What damaged and hostile sets do to the reader: nothing but a ValueError.

    python -m benchmarks.fuzz [--count 20000] [--seed 0] [--out FILE] [--keep DIR]

Sets of every codec are mutated: bits, lengths, slices and headers of the file of arrays; numbers, types, keys and
nesting of the manifest; files of two sets mixed; other shapes with random bytes in arrays that fit them. So that more
than the first check is reached, two thirds of the mutants get the sizes and the sum that belong to their file, or the
first format, which has no sum. Each is read as `gsdd_jax.load` and as `gsdd_jax.decode_numpy` read it, in a process
whose address space is limited to ``ROOM`` more than it had before (``RLIMIT_AS``), and whose Python and NumPy
allocations are traced (``tracemalloc``).

Counted as read: *identical* to the set that was mutated; *other*, a set with differences that no check can tell from
intent, such as another class name. Counted as refused: ValueError and FileNotFoundError. Anything else is a failure:
another exception, a dead process, more than ``SECONDS`` of CPU, an allocation of more than ``MEMORY`` and four times
the files, arrays that do not belong to the sum, or a set that JAX reads and NumPy refuses. Failures are kept.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import functools
import hashlib
import json
import math
import resource
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gsdd_jax
from benchmarks import record
from gsdd_jax import SynSet, codecs, decode_numpy, exchange, labels, synset
from gsdd_jax.codecs import stored
from gsdd_jax.manifest import manifest_of
from train.errors import exit_cleanly

CLASSES, BUDGET, SHAPE, VIDEO = 2, 1152, (6, 8, 3), (2, 4, 6, 1)
# One of each codec, and of each way in which one is written; the latent codec cannot draw SHAPE.
SETS: tuple[tuple[codecs.CodecSpec, tuple[int, ...]], ...] = (
    (codecs.GaussianSpec(images_per_class=2, num_points=3, start="uniform"), SHAPE),
    (codecs.PackedGaussianSpec(images_per_class=2, num_points=5, start="uniform"), SHAPE),
    (
        codecs.PackedGaussianSpec(
            images_per_class=1, num_points=3, order="kept", bits_mean=7, bits_chroma=4, start="uniform"
        ),
        SHAPE,
    ),
    (codecs.PixelSpec(dtype="bfloat16", images_per_class=2), SHAPE),
    (codecs.DownscaleSpec(factor=2), SHAPE),
    (codecs.FrequencySpec(coefficients=5, images_per_class=3), SHAPE),
    (codecs.FrequencySpec(coefficients=9, images_per_class=2), SHAPE),
    (codecs.NeuralFieldSpec(layers=2, width=3, images_per_class=2), SHAPE),
    (codecs.FactorSpec(hallucinators=1, base_channels=1, images_per_class=1, dtype="bfloat16"), SHAPE),
    (codecs.MemorySpec(bases=3, images_per_class=3), SHAPE),
    (
        codecs.SparseEpitomeSpec(
            patch=2, width=5, blocks=1, heads=1, tokens=3, nonzeros=9, images_per_class=2, dtype="bfloat16"
        ),
        SHAPE,
    ),
    (codecs.SpectralSpec(matrices=1, rank_height=3, rank_width=4, images_per_class=2), SHAPE),
    (codecs.LatentSpec(decoder="small", width=4, latent_dim=3, images_per_class=2), (8, 8, 3)),
    (codecs.PackedFrequencySpec(coefficients=7, images_per_class=3, bits=5), SHAPE),
    (codecs.PixelSpec(dtype="uint8", images_per_class=3), SHAPE),
    (codecs.DownscaleSpec(factor=2, dtype="uint8", images_per_class=8), SHAPE),
    (codecs.PaletteSpec(bits=3, images_per_class=2), SHAPE),
    (codecs.Gaussian3DSpec(images_per_class=2, num_points=3, start="uniform"), VIDEO),
    (codecs.PackedGaussian3DSpec(images_per_class=2, num_points=4, start="uniform"), VIDEO),
    (codecs.StaticDynamicSpec(images_per_class=1, factor=2), VIDEO),
)
# Which of them have soft labels, and how these are written: precision and top_k.
SOFT = {2: ("uint8", 1), 3: ("bfloat16", 0), 6: ("uint8", 0)}
# Those that are mutated.
PLACES = tuple(range(len(SETS)))
HOSTILE: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 16, 17, 255, 4096, 65535, 65536, 2**31, 2**32, 2**53, 2**63, 10**30, 10**5000),
    *(0.0, -0.0, 0.5, 1.0, 1e-320, 1e308, math.nan, math.inf, -math.inf),
    *(None, True, False, "", "x", "1", "\ud800", "\0", "é" * 3000, [], {}, [1], [[]], {"a": 1}, [0] * 500),
)
SECONDS, MEMORY, ROOM = 20.0, 64 << 20, 1 << 30
# What a process has compiled stays in its memory, which is limited.
PER_PROCESS = 4000
# Decoding is tried where it is cheap: the size of images is no business of the reader.
DECODED = 1 << 20
OUT = record.RESULTS / "fuzz.json"


@dataclasses.dataclass
class Files:
    """The two files of a set."""

    manifest: bytes
    arrays: bytes

    def write(self, folder: Path) -> None:
        """Writes them as a set is written."""
        (folder / synset.MANIFEST).write_bytes(self.manifest)
        (folder / synset.ARRAYS).write_bytes(self.arrays)

    def document(self) -> dict[str, Any]:
        """Returns the manifest as a document."""
        return json.loads(self.manifest)

    def header(self) -> tuple[dict[str, Any], bytes]:
        """Returns the header of the arrays as a document, and the bytes behind it."""
        stop = 8 + struct.unpack("<Q", self.arrays[:8])[0]
        return json.loads(self.arrays[8:stop]), self.arrays[stop:]


@functools.cache
def original(place: int) -> tuple[Files, SynSet]:
    """Makes the set of a place in ``SETS``: as files, and as it is read back."""
    spec, shape = SETS[place]
    codec = codecs.make(spec, image_shape=shape, num_classes=CLASSES, bytes_per_class=BUDGET)
    images = np.random.default_rng(place).uniform(0, 1, (codec.num_images, *shape)).astype(np.float32)
    params = codec.dequantize(codec.quantize(jax.jit(codec.init)(jax.random.key(place), images)))
    meta = {"dataset": "toy", "channel_mean": [0.5, 0.25, 0.125], "versions": {"jax": "0"}}
    with tempfile.TemporaryDirectory() as folder:
        made = SynSet(codec, params, BUDGET, ("cat", "naïve 犬"), meta, _soft_labels(place, codec.num_images))
        made.save(folder)
        files = Files(*((Path(folder) / name).read_bytes() for name in (synset.MANIFEST, synset.ARRAYS)))
        return files, gsdd_jax.load(folder)


def _soft_labels(place: int, count: int) -> labels.SoftLabels | None:
    """Gives some sets soft labels, of all classes or of the likeliest."""
    if place not in SOFT:
        return None
    first = np.random.default_rng(place).uniform(0, 1, count)
    dtype, top_k = SOFT[place]
    spec = labels.LabelSpec(kind="soft", dtype=dtype, top_k=top_k)  # type: ignore[arg-type]
    return labels.pack(np.stack([first, 1 - first], 1), spec)


# Mutations


def flip(rng: np.random.Generator, raw: bytes) -> bytes:
    """Flips one to eight bits."""
    changed = bytearray(raw)
    for _ in range(rng.integers(1, 9)):
        changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def cut(rng: np.random.Generator, raw: bytes) -> bytes:
    """Keeps the first bytes."""
    return raw[: rng.integers(len(raw))]


def extend(rng: np.random.Generator, raw: bytes) -> bytes:
    """Appends bytes."""
    return raw + rng.bytes(int(rng.integers(1, 5000)))


def splice(rng: np.random.Generator, raw: bytes, other: bytes) -> bytes:
    """Puts a slice of another file somewhere, in place of as much or of nothing."""
    start, count = int(rng.integers(len(other))), int(rng.integers(1, 200))
    place = int(rng.integers(len(raw)))
    return raw[:place] + other[start : start + count] + raw[place + count * int(rng.integers(2)) :]


def relength(rng: np.random.Generator, raw: bytes) -> bytes:
    """Says another length of the header."""
    length = int(HOSTILE[rng.integers(18)]) if rng.integers(2) else int(rng.integers(len(raw)))
    return struct.pack("<Q", length % 2**64) + raw[8:]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yields container and key of everything in a document."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def change_value(rng: np.random.Generator, document: Any) -> None:
    """Replaces values, numbers often by a neighbor."""
    for _ in range(rng.integers(1, 4)):
        every = list(places(document))
        container, key = every[rng.integers(len(every))]
        value = container[key]
        if type(value) is int and rng.integers(2):
            container[key] = int((value + 1, value - 1, value * 2, value // 2, value * 1000)[rng.integers(5)])
        else:
            container[key] = copy.deepcopy(HOSTILE[rng.integers(len(HOSTILE))])


def change_key(rng: np.random.Generator, document: Any) -> None:
    """Removes, renames or adds a key."""
    every = [(container, key) for container, key in places(document) if isinstance(container, dict)]
    container, key = every[rng.integers(len(every))]
    value = container.pop(key) if rng.integers(3) else container[key]
    if rng.integers(2):
        container[("", "x", f"{key}x", "images", "__metadata__")[rng.integers(5)]] = value


def text_of(rng: np.random.Generator, document: Any) -> bytes:
    """Writes a document; sometimes with a key twice, or nested deeply."""
    text = dumps(document)
    if rng.integers(8) == 0:
        text = text.replace("{", '{"format": "gsdd_jax/2", "format": 1,', int(rng.integers(1, 3)))
    if rng.integers(8) == 0:
        deep = int(10 ** rng.uniform(0, 5.5))
        text = text.replace('"toy"', "[" * deep + "]" * deep * int(rng.integers(2)))
    return text.encode(errors="surrogatepass")


def dumps(document: Any) -> str:
    """Writes JSON with integers of any length."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(document)
    finally:
        sys.set_int_max_str_digits(limit)


def refit(rng: np.random.Generator, files: Files) -> Files:
    """Changes shapes and counts, and fills a file of random bytes with just the arrays that they ask for."""
    document = files.document()
    sides = len(document["image_shape"])
    document["image_shape"] = [int(side) for side in rng.integers(1, 13, sides)] if rng.integers(4) else [64, 64, 3]
    if document["codec"]["name"] == "latent" or rng.integers(2):
        document["image_shape"][-2] = document["image_shape"][-3]
    document["bytes_per_class"] = 1 << 20
    for key, value in document["codec"].items():
        if type(value) is int and rng.integers(2):
            document["codec"][key] = int(rng.integers(0, 3 * value + 2))
    text = dumps(document)
    try:
        manifest = manifest_of(document)
        codec = codecs.make(
            stored.spec_of(manifest.codec),
            image_shape=manifest.image_shape,
            num_classes=CLASSES,
            bytes_per_class=manifest.bytes_per_class,
        )
        arrays = exchange.described(codec.layout()) | manifest.label_arrays
    except ValueError:
        return Files(text.encode(), files.arrays)
    header, end = {}, 0
    for name, array in arrays.items():
        dtype = next(code for code, known in exchange.CODES.items() if known == array.dtype)
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [end, end := end + array.nbytes]}
    document["images_per_class"] = codec.images_per_class
    document["codec"] = dataclasses.asdict(codec.spec)
    head = json.dumps(header).encode()
    # Half of them zeros: no bits beyond the last code, no NaN.
    payload = rng.bytes(end) if rng.integers(2) else bytes(end)
    return Files(dumps(document).encode(), struct.pack("<Q", len(head)) + head + payload)


def mutate(rng: np.random.Generator, kind: str = "") -> tuple[str, str, Files, int]:
    """Draws a set, a mutation unless it is given, and a repair.

    Returns:
        The names of mutation and repair, the files, and the place of the set.
    """
    place, other = (PLACES[rng.integers(len(PLACES))] for _ in range(2))
    files, foreign = dataclasses.replace(original(place)[0]), original(other)[0]
    kind = kind or KINDS[rng.integers(len(KINDS))]
    in_arrays = bool(rng.integers(2))
    name = "arrays" if in_arrays else "manifest"
    if kind == "swap":
        setattr(files, name, getattr(foreign, name))
    elif kind == "refit":
        files, name = refit(rng, files), "both"
    elif kind == "length":
        files.arrays = relength(rng, files.arrays)
    elif kind in ("values", "keys"):
        change: Callable[[np.random.Generator, Any], None] = change_value if kind == "values" else change_key
        if in_arrays:
            document, payload = files.header()
            change(rng, document)
            text = text_of(rng, document)
            files.arrays = struct.pack("<Q", len(text)) + text + payload
        else:
            document = files.document()
            change(rng, document["codec"] if kind == "values" and rng.integers(2) else document)
            files.manifest = text_of(rng, document)
    else:
        raw, strange = getattr(files, name), getattr(foreign, name)
        mutations = {"flip": flip, "cut": cut, "extend": extend}
        setattr(files, name, splice(rng, raw, strange) if kind == "splice" else mutations[kind](rng, raw))
    repair = REPAIRS[rng.integers(len(REPAIRS))]
    return f"{kind} of {name}", repair, repaired(files, repair), place


KINDS = ("flip", "cut", "extend", "splice", "swap", "length", "values", "values", "values", "keys", "refit")
REPAIRS = ("none", "sum", "first format")


def repaired(files: Files, repair: str) -> Files:
    """Makes the manifest say of the file of arrays what is true, so far as both can be understood."""
    if repair == "none":
        return files
    try:
        document = files.document()
        length = 8 + struct.unpack("<Q", files.arrays[:8])[0]
        size = len(files.arrays)
        document["sizes"] = {"payload": max(size - length, 0), "header": length, "file": size}
        document["sha256"] = hashlib.sha256(files.arrays).hexdigest()
        if repair == "first format":
            document["format"] = "gsdd_jax/1"
            del document["sha256"]
        return Files(dumps(document).encode(), files.arrays)
    except (ValueError, TypeError, KeyError, RecursionError, struct.error):
        return files


# Reading


class TooSlow(BaseException):
    """A limit of time was reached; no handler of errors catches it."""


def attempt(read: Callable[[], Any]) -> tuple[Any, str, str]:
    """Returns what was read, or None, an outcome and a message."""
    try:
        return read(), "read", ""
    except (ValueError, FileNotFoundError) as error:
        return None, "refused", f"{type(error).__name__}: {error}"[:300]
    except (Exception, TooSlow) as error:
        return None, "failure", f"{type(error).__name__}: {error}"[:300]


def same(a: SynSet, b: SynSet) -> bool:
    """Tells whether two sets are one."""
    said = [(x.codec.spec, x.codec.image_shape, x.bytes_per_class, x.class_names, dumps(x.meta)) for x in (a, b)]
    leaves = [[np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(x.params)] for x in (a, b)]
    soft = [None if x.soft is None else {k: v.tobytes() for k, v in x.soft.arrays.items()} for x in (a, b)]
    return said[0] == said[1] and leaves[0] == leaves[1] and soft[0] == soft[1]


def complete(document: dict[str, Any], found: SynSet) -> bool:
    """Tells whether a manifest has every setting: NumPy knows no defaults."""
    return document["codec"].keys() >= {field.name for field in dataclasses.fields(found.codec.spec)}


def read_by_numpy(folder: Path) -> bool:
    """Reads a set without JAX, and draws it where it is small."""
    manifest, _, arrays = synset.read(folder, decode_numpy.decoder_of)
    # Every number may touch every pixel of its image.
    if sum(array.size for array in arrays.values()) * math.prod(manifest.image_shape) <= DECODED:
        decode_numpy.load(folder)
    return True


def judge(index: int, seed: int, folder: Path, kind: str = "") -> dict[str, Any]:
    """Makes a mutant in ``folder``, reads it and says what happened."""
    kind, repair, files, place = mutate(np.random.default_rng([seed, index]), kind)
    files.write(folder)
    name = SETS[place][0].name
    tracemalloc.reset_peak()
    before, began = tracemalloc.get_traced_memory()[0], time.process_time()
    found, outcome, message = attempt(lambda: gsdd_jax.load(folder))
    light, light_outcome, light_message = attempt(lambda: read_by_numpy(folder))
    peak = tracemalloc.get_traced_memory()[1] - before
    allowed = MEMORY + 4 * (len(files.manifest) + len(files.arrays))
    if outcome == "read":
        outcome = "identical" if same(found, original(place)[1]) else "other"
        document = files.document()
        if document["format"] != "gsdd_jax/1" and document["sha256"] != hashlib.sha256(files.arrays).hexdigest():
            outcome, message = "failure", "arrays that do not belong to the sum"
        elif found.codec.name in decode_numpy.DECODERS and not light and complete(document, found):
            outcome, message = "failure", f"read by JAX, but by NumPy {light_message}"
    if light_outcome == "failure":
        outcome, message = "failure", f"by NumPy {light_message}"
    if peak > allowed:
        outcome, message = "failure", f"{peak} bytes allocated, {allowed} allowed"
    seconds = time.process_time() - began
    return {
        "index": index,
        "codec": name,
        "kind": kind,
        "repair": repair,
        "outcome": outcome,
        "message": message,
        "seconds": seconds,
        "peak": peak,
    }


def work(start: int, stop: int, seed: int, keep: Path) -> None:
    """Judges mutants under the limits, a line of JSON each."""
    for place in PLACES:
        original(place)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))

    def slow(*_: Any) -> None:
        raise TooSlow(f"{SECONDS} s of CPU")

    signal.signal(signal.SIGPROF, slow)
    tracemalloc.start()
    for index in range(start, stop):
        folder = keep / str(index)
        folder.mkdir(parents=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        verdict = judge(index, seed, folder)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if verdict["outcome"] != "failure":
            shutil.rmtree(folder)
        print(json.dumps(verdict), flush=True)


def verdicts(count: int, seed: int, keep: Path) -> Iterator[dict[str, Any]]:
    """Lets processes judge mutants; a process that dies or hangs is the verdict on the one it was at."""
    index = 0
    while index < count:
        stop = min(index + PER_PROCESS, count)
        command = [sys.executable, "-m", "benchmarks.fuzz", "--seed", str(seed), "--keep", str(keep)]
        command += ["--count", str(stop), "--start", str(index)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=record.ROOT) as child:
            assert child.stdout is not None
            selector = selectors.DefaultSelector()
            selector.register(child.stdout, selectors.EVENT_READ)
            # The first line takes as long as making the sets does.
            patience = 60 * SECONDS
            while selector.select(patience) and (line := child.stdout.readline()):
                yield json.loads(line)
                index, patience = index + 1, 6 * SECONDS
            child.kill()
        if index < stop:
            yield {"index": index, "outcome": "failure", "message": f"the process ended with {child.wait()}"}
            index += 1


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts outcomes."""

    def counts(key: str) -> dict[str, dict[str, int]]:
        table: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for verdict in found:
            table[verdict.get(key, "unknown")][verdict["outcome"]] += 1
        return {name: dict(row) for name, row in sorted(table.items())}

    return {
        "outcomes": dict(collections.Counter(verdict["outcome"] for verdict in found)),
        "by_codec": counts("codec"),
        "by_kind": counts("kind"),
        "by_repair": counts("repair"),
        "longest_s": max(verdict.get("seconds", 0) for verdict in found),
        "largest_allocation": max(verdict.get("peak", 0) for verdict in found),
        "failures": [verdict for verdict in found if verdict["outcome"] == "failure"],
    }


def main() -> int:
    """Runs the command line; returns 1 if a mutant was a failure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--keep", type=Path, help="where failures are kept; default: beside --out")
    parser.add_argument("--start", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start is not None:
        work(args.start, args.count, args.seed, args.keep)
        return 0
    keep = (args.keep or args.out.with_suffix(".failures")).resolve()
    shutil.rmtree(keep, ignore_errors=True)
    found = list(verdicts(args.count, args.seed, keep))
    if keep.is_dir() and not any(keep.iterdir()):
        keep.rmdir()
    results = summary(found)
    limits = {"seconds": SECONDS, "memory": MEMORY, "room": ROOM}
    record.write(args.out, results, seed=args.seed, n=args.count, sets=len(SETS), limits=limits)
    print(json.dumps(results["outcomes"]))
    return int(bool(results["failures"]))


if __name__ == "__main__":
    sys.exit(exit_cleanly()(main)())
