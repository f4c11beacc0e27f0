"""The report of a run: one HTML file that can be opened anywhere and sent to anyone.

Pictures are embedded, the style is inline and nothing is fetched: a content security policy in the file itself forbids
it, and all scripts but the line that moves the slider. The template escapes whatever it is given, because names of
classes, datasets and runs come from users.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gsdd_jax import files, synset
from train import pictures as draw
from train import rundir, testset

_MOST_CHARTS = 12
_CODEC_NAMES = {"gaussian": "Gaussian", "packed_gaussian": "packed Gaussian"}
_BASELINES = {
    "fit_only": ("Fit only", "the same parameterization fitted to real images, without distillation"),
    "pixel": ("Pixels", "distilled pixel images in the same budget"),
    "random_real": ("Random real images", "as many as the budget holds in pixels"),
    "full_data": ("Full data", "the whole training set: the upper end"),
}
_PICTURES = {
    "images": ("Distilled images", "At their native resolution, magnified; one row per class."),
    "real": ("Real images", "Real are the training images that each was first fitted to."),
    "ellipses": (
        "The same images as Gaussians",
        "Each Gaussian as its one-sigma ellipse in its color times opacity; dashed red outlines take light away.",
    ),
}
_LABELS = {
    "bytes_per_class": "Bytes per class, as written",
    "bytes_total": "Bytes in total, as written",
    "paper_ipc": "Budget, the paper's accounting (IPC)",
    "gpc": "Images per class",
    "num_points": "Gaussians per image (num_points)",
}
_WORDS = {"lr": "learning rate", "std": "standard deviation"} | {
    w: w.upper() for w in ("dsa", "zca", "psnr", "ipc", "cpu")
}
_SCRIPT = """for (const input of document.querySelectorAll("input[type=range]"))
input.oninput = () => input.closest("figure").style.setProperty("--at", input.value + "%")"""
_HASH = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
_POLICY = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'"


def write(run_dir_path: str | os.PathLike[str], result: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Path:
    """Writes report.html into a run directory, from `result` and what the directory holds.

    Args:
        run_dir_path: The run directory. Its config.yaml, environment.json and metrics.jsonl are shown where they exist,
            and how to load its set.
        result: What result.json holds, or held in older runs: all but the name may be absent. Accuracies are fractions
            in [0, 1]; an arm that is None was not run.
        pictures: Title -> PNG bytes of `train.pictures`. "images" stands beside the results, and where there is "real",
            of the same layout, a slider uncovers it; others follow.

    Returns:
        The path of report.html.

    Raises:
        ValueError: `result` has no name, or a picture is no PNG.
        OSError: The file cannot be written.
    """
    import jinja2  # here, or every command line would wait for it

    path = Path(run_dir_path)
    if not result.get("name"):
        raise ValueError("result has no name: result['name'] titles the report")
    config, starts = path / "config.yaml", rundir.read_environment(path)
    budget = {key: result.get(key) for key in ("bytes_per_class", "gpc", "num_points", "paper_ipc")}
    environment = (starts[-1] if starts else {}) | {key: result.get(key) for key in ("device", "commit", "versions")}
    versions = {name: version or "not installed" for name, version in (environment["versions"] or {}).items()}
    environment |= {"versions": versions, "started": [start.get("started", "?") for start in starts], "command": None}
    engine = jinja2.Environment(autoescape=True, trim_blocks=True)
    engine.filters |= {
        "number": _number,
        "percent": _percent,
        "accuracy": _accuracy,
        "words": _words,
        "duration": _duration,
    }
    page = engine.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")).render(
        policy=_POLICY,
        script=_SCRIPT,
        result=result,
        summary=summary(result),
        pictures={key: _picture(key, data) for key, data in pictures.items()},
        rows=_rows(result),
        uneven=testset.uneven(result),
        notes=testset.notes(result),
        charts=_charts(rundir.read_metrics(path)),
        load=repr(str(path)) if (path / synset.EXPORT / synset.MANIFEST).exists() else None,
        budget=_known(budget | (result.get("budget") or {})),
        # Several where a run was extended.
        command="\n".join(dict.fromkeys(start["command"] for start in starts if "command" in start)),
        config=config.read_text(encoding="utf-8") if config.exists() else None,
        environment=_known(environment),
    )
    return files.write_bytes(path / "report.html", page.encode())


def summary(result: Mapping[str, Any]) -> str:
    """Says in one sentence what a run reached, as plain text.

    Returns:
        Such as "10 classes × 6 Gaussian images in 256 bytes per class: 71.3 ± 0.6 % (5 networks), against
        55.0 ± 1.2 % for random real images and 97.1 % for the full data."
    """
    kind = _CODEC_NAMES.get(str(result.get("codec")), str(result.get("codec") or "synthetic").replace("_", " "))
    classes, gpc, size = result.get("num_classes"), result.get("gpc"), result.get("bytes_per_class")
    images = f"{_number(gpc)} {kind} {'image' if gpc == 1 else 'images'}" if gpc is not None else f"{kind} images"
    head = f"{_number(classes)} classes × {images}" if classes is not None else f"{images} per class"
    head += f" in {_number(size)} bytes{' per class' if classes is not None else ''}" if size is not None else ""
    if (own := _accuracy(result.get("accuracy"))) is None:
        return f"{head}: accuracy not measured."
    n = result["accuracy"].get("n")
    networks = f" ({_number(n)} {'network' if n == 1 else 'networks'})" if n else ""
    named = {"random real images": result.get("random_real"), "the full data": result.get("full_data")}
    rivals = [f"{accuracy} for {words}" for words, entry in named.items() if (accuracy := _accuracy(entry))]
    return f"{head}: {own}{networks}{', against ' if rivals else ''}{' and '.join(rivals)}."


def _rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arms in the order of the table; what an older result does not know of one is that of the whole run."""
    own = "GSDD" if result.get("codec") == "gaussian" else str(result.get("codec") or "Distilled")
    how = ", ".join(f"{result[key]} {key}" for key in ("codec", "objective") if result.get(key))
    named = {key: (entry["label"], "") for key, entry in result.items() if isinstance(entry, dict) and "label" in entry}
    arms = {"accuracy": (own, how)} | _BASELINES | named
    if result.get("initial_set"):
        arms["fit_only"] = "Initial set", "where distillation started from, a set that was there"
    size, gpc = result.get("bytes_per_class"), result.get("gpc")
    whole = {"accuracy": (size, gpc), "fit_only": (size, gpc), "full_data": (None, "all")}
    rows = []
    for key, (label, note) in arms.items():
        entry, known = result.get(key) or {}, whole.get(key, (None, result.get("paper_ipc")))
        row = dict(zip(("bytes_per_class", "images_per_class"), known, strict=True)) | entry
        rows.append(row | {"label": label, "note": note, "accuracy": _accuracy(entry)})
    return rows


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value not in (None, [], {})}


def _charts(metrics: list[dict[str, Any]]) -> dict[str, str]:
    """One chart for each number that the phases log, in the order of their first appearance."""
    series: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for entry in metrics:
        for key, value in entry.items():
            if key not in ("phase", "step") and not rundir.is_wall_clock(key) and type(value) in (int, float):
                line = series.setdefault((key, str(entry.get("phase", ""))), [])
                line.append((entry.get("step", len(line)), value))
    charts = {}
    for (key, phase), line in list(series.items())[:_MOST_CHARTS]:
        x, y = zip(*line, strict=True)
        log = "loss" in key and min(y) > 0 and max(y) > 5 * min(y)
        title = f"{_words(key)}, {phase}" + (" (log scale)" if log else "")
        charts[title] = _uri("svg+xml", draw.curve(x, y, log=log))
    return charts


def _picture(key: str, data: bytes) -> dict[str, Any]:
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"picture {key!r} is no PNG: pass what train.pictures returns")
    title, caption = _PICTURES.get(key, (key.replace("_", " ").capitalize(), ""))
    # The header says how many pixels there are.
    width = int.from_bytes(data[16:20]) // draw.DENSITY
    return {"title": title, "caption": caption, "width": width, "uri": _uri("png", data)}


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _words(key: str) -> str:
    text = " ".join(_WORDS.get(word, word) for word in key.split("_"))
    return _LABELS.get(key, text[:1].upper() + text[1:])


def _accuracy(entry: Mapping[str, Any] | None) -> str | None:
    mean = (entry or {}).get("mean")
    if entry is None or mean is None or mean != mean:
        return None
    return f"{testset.percent(entry)} %".replace(" ", "\N{NO-BREAK SPACE}")


def _percent(fraction: float, digits: int = 2, unit: str = "%") -> str:
    return f"{100 * min(max(fraction, 0.0), 1.0):.{digits}f}{unit}"


def _number(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_number, value))
    if value is None or isinstance(value, bool):
        return "–" if value is None else "yes" if value else "no"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value == round(value, 0) and abs(value) < 1e15 else f"{value:.6g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours = f"{minutes // 60} h {minutes % 60} min"
    return f"{seconds:.1f} s" if seconds < 60 else f"{minutes} min {rest} s" if minutes < 60 else hours
