"""The report of a run: one HTML file that can be opened anywhere and sent to anyone.

Pictures are embedded, the style is inline and nothing is fetched: a content security policy in the file itself forbids
it, and all scripts but the line that moves the slider and that of the gallery, which is a page within the page. The
template escapes whatever it is given, because names of classes, datasets and runs come from users.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from gsdd_jax import files, synset
from train import gallery, results, rundir, testset, yaml12
from train import pictures as draw

_MOST_CHARTS = 12
_CODEC_NAMES = {
    "gaussian": "Gaussian",
    "packed_gaussian": "packed Gaussian",
    "gaussian3d": "3D Gaussian",
    "packed_gaussian3d": "packed 3D Gaussian",
}
_PICTURES = {
    "images": ("Distilled images", "At their native resolution, magnified; one row per class."),
    "real": ("Real images", "Real are the training images that each was first fitted to."),
    "ellipses": (
        "The same images as Gaussians",
        "Each Gaussian as its one-sigma ellipse in its color times opacity; dashed red outlines take light away.",
    ),
}
_SCRIPT = """for (const input of document.querySelectorAll("input[type=range]"))
input.oninput = () => input.closest("figure").style.setProperty("--at", input.value + "%")"""
_POLICY = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {gallery.hash_of(_SCRIPT)}"


def finish(
    run: rundir.RunDir, result: dict[str, Any], pictures: Callable[[], Mapping[str, bytes]], more: str = ""
) -> None:
    """Writes what a run found: table.md, with more below the table, pictures, report.html, result.json."""
    files.write_bytes(run.path / "table.md", (results.table(result) + more).encode())
    if draw.drawable("pictures and report.html"):
        shown = pictures()
        for name, png in shown.items():
            files.write_bytes(run.path / f"{name}.png", png)
        write(run.path, result, shown)
    # Written last: its presence says that the run is finished.
    rundir.write_json(run.path / "result.json", result)


def place(path: Path) -> Path:
    """Returns the report of a run directory, or where a run could not draw one the directory."""
    return page if (page := path / "report.html").exists() else path


def write(path: Path, result: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Path:
    """Writes report.html into a run directory, from `result` and what the directory holds; returns its path.

    Args:
        path: The run directory. Its config.yaml, environment.json and metrics.jsonl are shown where they exist, and how
            to load its set.
        result: What result.json holds, or held in older runs: all but the name may be absent.
        pictures: PNGs of `train.pictures` by their titles. "images" stands beside the results, and where there is
            "real", of the same layout, a slider uncovers it; others follow.
    """
    import jinja2  # here, or every command line would wait for it

    config, starts = path / "config.yaml", rundir.read_environment(path)
    engine = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    engine.filters |= {"number": _number, "percent": _percent, "accuracy": _accuracy}
    budget = {"ipc, as the paper counts": result.get("paper_ipc")} | (result.get("budget") or {})
    # Several commands where a run was extended.
    commands = dict.fromkeys(start["command"] for start in starts if "command" in start)
    environment = {key: result.get(key) for key in ("device", "commit", "versions")}
    named = result.get("class_names") or [], result.get("test_images_per_class") or []
    viewer = gallery.of_run(path)
    page = engine.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")).render(
        policy=f"{_POLICY} {gallery.hash_of(gallery.script())}" if viewer else _POLICY,
        viewer=viewer,
        script=_SCRIPT,
        result=result,
        summary=summary(result),
        took=str(timedelta(seconds=round(seconds))) if (seconds := result.get("seconds")) else "",
        pictures={key: _picture(key, data) for key, data in pictures.items()},
        rows=[
            (entry := result.get(key) or {}) | {"label": label, "accuracy": _accuracy(entry)}
            for key, label in results.arms(result).items()
        ],
        classes=list(zip(*named, strict=False)),
        uneven=testset.uneven(result),
        notes=testset.notes(result),
        charts=_charts(rundir.read_metrics(path)),
        load=repr(str(path)) if (path / synset.EXPORT / synset.MANIFEST).exists() else None,
        texts={
            "Reproduce": "\n".join(commands),
            "Budget": "\n".join(f"{key}: {_number(value)}" for key, value in budget.items() if value is not None),
            "How accuracy was measured": yaml12.dump(rundir.plain(result.get("protocol") or {})),
            "Resolved config": config.read_text(encoding="utf-8") if config.exists() else "",
            "Environment": yaml12.dump(rundir.plain(environment | {"starts": starts})),
        },
    )
    return files.write_bytes(path / "report.html", page.encode())


def summary(result: Mapping[str, Any]) -> str:
    """Says in one sentence what a run reached, as plain text.

    Returns:
        Such as "10 classes × 6 Gaussian images in 256 bytes per class: 71.3 ± 0.6 % (5 networks), against
        55.0 ± 1.2 % for random real images and 97.1 ± 0.2 % for the full data."
    """
    codec = str(result.get("codec") or "synthetic")
    kind = _CODEC_NAMES.get(codec, codec.replace("_", " "))
    classes, gpc, size = (_number(result.get(key)) for key in ("num_classes", "gpc", "bytes_per_class"))
    head = f"{classes} classes × {gpc} {kind} {'image' if gpc == '1' else 'images'} in {size} bytes per class"
    if (own := _accuracy(result.get("accuracy"))) is None:
        return f"{head}: accuracy not measured."
    n = result["accuracy"].get("n")
    networks = f" ({n} {'network' if n == 1 else 'networks'})" if n else ""
    named = {"random real images": result.get("random_real"), "the full data": result.get("full_data")}
    rivals = [f"{accuracy} for {words}" for words, entry in named.items() if (accuracy := _accuracy(entry))]
    return f"{head}: {own}{networks}{', against ' if rivals else ''}{' and '.join(rivals)}."


def _charts(metrics: list[dict[str, Any]]) -> dict[str, str]:
    """One chart for each number that the phases log, in the order of their first appearance."""
    series: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for entry in metrics:
        for key, value in entry.items():
            if key not in ("phase", "step") and not rundir.is_wall_clock(key) and type(value) in (int, float):
                series.setdefault((entry["phase"], key), []).append((entry["step"], value))
    charts = {}
    for (phase, key), line in list(series.items())[:_MOST_CHARTS]:
        x, y = zip(*line, strict=True)
        log = "loss" in key and min(y) > 0 and max(y) > 5 * min(y)
        charts[f"{phase}: {key}{' (log scale)' if log else ''}"] = _uri("svg+xml", draw.curve(x, y, log=log))
    return charts


def _picture(key: str, data: bytes) -> dict[str, Any]:
    title, caption = _PICTURES.get(key, (key.replace("_", " ").capitalize(), ""))
    # The header says how many pixels there are.
    width = int.from_bytes(data[16:20]) // draw.DENSITY
    return {"title": title, "caption": caption, "width": width, "uri": _uri("png", data)}


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _accuracy(entry: Mapping[str, Any] | None) -> str | None:
    mean = (entry or {}).get("mean")
    if entry is None or mean is None or mean != mean:
        return None
    return f"{testset.percent(entry)} %".replace(" ", "\N{NO-BREAK SPACE}")


def _percent(fraction: float | None, digits: int = 2, unit: str = "%") -> str:
    return "–" if fraction is None else f"{100 * min(max(fraction, 0.0), 1.0):.{digits}f}{unit}"


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return "–" if value is None else str(value)
    return f"{value:,.0f}" if value == round(value) else f"{value:,g}"
