"""The report of a run: one HTML file that can be opened anywhere and sent to anyone.

Pictures are embedded, the style is inline, there is no script and nothing is fetched: a content security policy in the
file itself forbids it. All text passes through `_e`, because names of classes, datasets and runs come from users.
"""

from __future__ import annotations

import base64
import html
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gsdd_jax import files
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
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write(
    run_dir_path: str | os.PathLike[str],
    result: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    *,
    curves: Mapping[str, bytes] | None = None,
    command: str | None = None,
) -> Path:
    """Writes report.html into a run directory, from `result` and what the directory holds.

    Args:
        run_dir_path: The run directory. Its config.yaml, environment.json and metrics.jsonl are shown where they exist.
        result: What result.json holds: name, codec, objective, dataset, bytes_per_class, paper_ipc, gpc, num_points,
            seconds, device, versions, commit, protocol, budget, and accuracy, random_real, fit_only, pixel, full_data,
            each {"mean", "std", "n", "seeds"} with fractions in [0, 1], or None for "not run". An optional num_classes
            is named in the summary; optional bytes_per_class, label_bytes_per_class, images_per_class and
            training_flops of an arm are shown in its row.
        pictures: Title -> PNG bytes, drawn at `train.pictures.DENSITY`; "images" and "ellipses" get their captions.
        curves: Title -> SVG or PNG bytes; None draws one for each metric of each phase in metrics.jsonl.
        command: The command that reproduces the run; None takes that of the first entry of environment.json.

    Returns:
        The path of report.html.

    Raises:
        ValueError: `result` has no name, or a picture is neither PNG nor SVG.
        OSError: The file cannot be written.
    """
    path = Path(run_dir_path)
    if not result.get("name"):
        raise ValueError("result has no name: result['name'] titles the report")
    environments = rundir.read_environment(path)
    if curves is None:
        curves = _curves_of(rundir.read_metrics(path))
    if command is None and environments:
        # Several where a run was extended.
        command = "\n".join(dict.fromkeys(entry["command"] for entry in environments if "command" in entry))
    config = path / "config.yaml"
    sections = [
        _header(result),
        _results(result),
        _figures(pictures),
        _charts(curves),
        _columns(_budget(result), _protocol(result)),
        _command(command),
        _config(config.read_text(encoding="utf-8") if config.exists() else None),
        _environment(result, environments),
    ]
    title = _e(result["name"])
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n{''.join(s for s in sections if s)}</main>\n</body>\n</html>\n"
    )
    return files.write_bytes(path / "report.html", page.encode())


def summary(result: Mapping[str, Any]) -> str:
    """Says in one sentence what a run reached, as plain text.

    Args:
        result: See `write`.

    Returns:
        Such as "10 classes × 6 Gaussian images in 256 bytes per class: 71.3 ± 0.6 % (5 networks), against
        55.0 ± 1.2 % for random real images and 97.1 % for the full data."
    """
    kind = _CODEC_NAMES.get(str(result.get("codec")), str(result.get("codec") or "synthetic").replace("_", " "))
    classes, gpc, size = result.get("num_classes"), result.get("gpc"), result.get("bytes_per_class")
    images = f"{_number(gpc)} {kind} {'image' if gpc == 1 else 'images'}" if gpc is not None else f"{kind} images"
    head = f"{_number(classes)} classes × {images}" if classes is not None else f"{images} per class"
    head += f" in {_number(size)} bytes{' per class' if classes is not None else ''}" if size is not None else ""
    if _mean(result.get("accuracy")) is None:
        return f"{head}: accuracy not measured."
    n = result["accuracy"].get("n")
    networks = f" ({_number(n)} {'network' if n == 1 else 'networks'})" if n else ""
    rivals = [
        f"{_accuracy(result[key])} for {words}"
        for key, words in (("random_real", "random real images"), ("full_data", "the full data"))
        if _mean(result.get(key)) is not None
    ]
    against = f", against {' and '.join(rivals)}" if rivals else ""
    return f"{head}: {_accuracy(result['accuracy'])}{networks}{against}."


def _header(result: Mapping[str, Any]) -> str:
    facts = [
        ("dataset", result.get("dataset")),
        ("codec", result.get("codec")),
        ("objective", result.get("objective")),
        ("device", result.get("device")),
        ("time", _duration(result.get("seconds"))),
    ]
    chips = "".join(f"<li><span>{_e(k)}</span> {_e(v)}</li>" for k, v in facts if v)
    return (
        f"<header>\n<h1>{_e(result['name'])}</h1>\n"
        f'<p class="summary">{_e(summary(result))}</p>\n<ul class="facts">{chips}</ul>\n</header>\n'
    )


def _results(result: Mapping[str, Any]) -> str:
    own = "GSDD" if result.get("codec") == "gaussian" else str(result.get("codec") or "Distilled")
    how = ", ".join(f"{result[k]} {k}" for k in ("codec", "objective") if result.get(k))
    entry = result.get("accuracy") or {}
    written = entry.get("bytes_per_class") or result.get("bytes_per_class")
    uneven = testset.uneven(result)
    rows = [_row(own, how, entry, written, result.get("gpc"), "own", uneven)]
    for key, (label, note) in _BASELINES.items():
        entry = result.get(key) or {}
        size, images = entry.get("bytes_per_class"), entry.get("images_per_class")
        if key == "fit_only":
            if result.get("initial_set"):
                label, note = "Initial set", "where distillation started from, a set that was there"
            size, images = size or result.get("bytes_per_class"), images or result.get("gpc")
        elif key != "full_data":
            images = images or result.get("paper_ipc")
        elif images is None:
            images = "all"
        rows.append(_row(label, note, entry, size, images, key.replace("_", "-"), uneven))
    heads = ("Training set", "Test accuracy", "", "Networks", "Bytes per class", "Images per class")
    head = "".join(f'<th scope="col"{"" if i in (0, 2) else _RIGHT}>{h}</th>' for i, h in enumerate(heads))
    caption = "Mean ± standard deviation over freshly initialized networks; the bar spans 0 to 100 %. "
    caption += "TFLOP: the training of one network, three forward passes per image seen."
    tests = (result.get("accuracy") or {}).get("tests")
    if tests:
        caption += f" Protocol paper: distilled rows are the best of {tests} tests on the test set, biased upwards."
    caption = " ".join([caption, *testset.notes(result)])
    return (
        '<section>\n<h2>Results</h2>\n<div class="scroll"><table class="results">\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(rows)}</tbody>\n</table></div>\n"
        f'<p class="note">{_e(caption)}</p>\n</section>\n'
    )


def _row(label: str, note: str, entry: Mapping[str, Any] | None, size: Any, images: Any, css: str, uneven: bool) -> str:
    mean = _mean(entry)
    first = f'<th scope="row">{_e(label)}<small>{_e(note)}</small></th>'
    if entry is None or mean is None:
        missing = '<td class="num missing">not run</td><td></td><td class="num missing">–</td>'
        return f'<tr class="{css}">{first}{missing}{_cell(size)}{_cell(images)}</tr>\n'
    n, flops, label_bytes = entry.get("n"), entry.get("training_flops"), entry.get("label_bytes_per_class")
    if label_bytes:
        size = f"{_number(size)}, labels {_number(label_bytes)}"
    cost = "" if flops is None else f"<small>{flops / 1e12:.3g} TFLOP each</small>"
    seeds = entry.get("seeds")
    title = f' title="seeds {_e(seeds)}"' if seeds else ""
    std = entry.get("std") if n != 1 else None
    whisker = ""
    if std:
        low, high = max(0.0, mean - std), min(1.0, mean + std)
        whisker = f'<i style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></i>'
    width = 100 * min(max(mean, 0.0), 1.0)
    bar = f'<td class="bar"><div><b style="width:{width:.2f}%"></b>{whisker}</div></td>'
    classes = (
        f"<small>mean over classes {100 * entry['balanced']:.1f} %</small>" if uneven and "balanced" in entry else ""
    )
    value = f'<td class="num value">{_e(_accuracy(entry))}{classes}</td>'
    return (
        f'<tr class="{css}">{first}{value}{bar}<td class="num"{title}>{_e(_number(n))}{cost}</td>'
        f"{_cell(size)}{_cell(images)}</tr>\n"
    )


def _figures(pictures: Mapping[str, bytes]) -> str:
    figures = []
    for key, data in pictures.items():
        title, caption = _PICTURES.get(key, (key.replace("_", " ").capitalize(), ""))
        width = _width(data)
        size = f' style="width:{width}px"' if width else ""
        words = f" <span>{_e(caption)}</span>" if caption else ""
        figures.append(
            f"<figure{size}>\n<h2>{_e(title)}</h2>\n"
            f'<img src="{_data_uri(data)}" alt="{_e(f"{title}. {caption}".strip())}">\n'
            f"<figcaption>{words}</figcaption>\n</figure>\n"
        )
    return f'<section class="pictures">\n{"".join(figures)}</section>\n' if figures else ""


def _charts(curves: Mapping[str, bytes]) -> str:
    charts = "".join(
        f"<figure>\n<figcaption>{_e(title)}</figcaption>\n"
        f'<img src="{_data_uri(data)}" alt="{_e(title)}, a line chart">\n</figure>\n'
        for title, data in curves.items()
    )
    return (
        f'<section>\n<h2>Course of the run</h2>\n<div class="charts">\n{charts}</div>\n</section>\n' if charts else ""
    )


def _columns(*sections: str) -> str:
    return f'<div class="columns">\n{"".join(sections)}</div>\n' if any(sections) else ""


def _budget(result: Mapping[str, Any]) -> str:
    rows = {k: result.get(k) for k in ("bytes_per_class", "gpc", "num_points", "paper_ipc")}
    rows |= _flat(result.get("budget") or {})
    rows = {k: v for k, v in rows.items() if v is not None}
    if not rows:
        return ""
    note = (
        "Bytes are counted exactly as written to disk. The paper's accounting, num_points = floor(3·res²·ipc·2 / "
        "(gpc·9)), sets bf16 Gaussians against fp32 pixels; the factor 2 is that difference in precision."
    )
    return f'<section>\n<h2>Budget</h2>\n{_pairs(rows)}<p class="note">{_e(note)}</p>\n</section>\n'


def _protocol(result: Mapping[str, Any]) -> str:
    protocol = _flat(result.get("protocol") or {})
    if not protocol:
        return ""
    warning = ""
    if "paper" in (protocol.get("protocol"), protocol.get("name")):
        warning = (
            '<p class="warning">Paper protocol: the best of repeated tests on the test set, as published tables report '
            "it. It is optimistic; compare it only with numbers of the same kind.</p>\n"
        )
    return f"<section>\n<h2>How accuracy was measured</h2>\n{warning}{_pairs(protocol)}</section>\n"


def _command(command: str | None) -> str:
    if not command:
        return ""
    return f"<section>\n<h2>Reproduce</h2>\n<pre>{_e(command)}</pre>\n</section>\n"


def _config(text: str | None) -> str:
    if text is None:
        return ""
    return f"<details>\n<summary>Resolved config</summary>\n<pre>{_e(text)}</pre>\n</details>\n"


def _environment(result: Mapping[str, Any], environments: list[dict[str, Any]]) -> str:
    rows = dict(environments[-1]) if environments else {}
    for key in ("device", "commit", "versions"):
        if result.get(key) is not None:
            rows[key] = result[key]
    rows.pop("command", None)
    if len(environments) > 1:
        rows["starts"] = ", ".join(str(e.get("started", "?")) for e in environments)
        rows.pop("started", None)
    if not rows:
        return ""
    versions = rows.pop("versions", None) or {}
    shown = rows | {f"version of {name}": version or "not installed" for name, version in versions.items()}
    return f"<details>\n<summary>Environment</summary>\n{_pairs(_flat(shown))}</details>\n"


def _curves_of(metrics: list[dict[str, Any]]) -> dict[str, bytes]:
    """One chart for each number that the phases log, in the order of their first appearance."""
    series: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for entry in metrics:
        for key, value in entry.items():
            if key in ("phase", "step") or rundir.is_wall_clock(key) or isinstance(value, bool):
                continue
            if isinstance(value, (int, float)):
                x, y = series.setdefault((str(entry.get("phase", "")), key), ([], []))
                x.append(entry.get("step", len(x)))
                y.append(value)
    charts = {}
    for (phase, key), (x, y) in list(series.items())[:_MOST_CHARTS]:
        positive = [v for v in y if v > 0]
        log = "loss" in key and len(positive) == len(y) and max(positive) > 5 * min(positive)
        title = f"{_words(key)}, {phase}" + (" (log scale)" if log else "")
        charts[title] = draw.curves({key: (x, y)}, xlabel="step", ylabel="", log=log)
    return charts


def _pairs(rows: Mapping[str, Any]) -> str:
    body = "".join(
        f'<tr><th scope="row">{_e(_LABELS.get(k, _words(k)))}</th><td>{_e(_number(v))}</td></tr>\n'
        for k, v in rows.items()
    )
    return f'<div class="scroll"><table class="pairs"><tbody>\n{body}</tbody></table></div>\n'


def _words(key: str) -> str:
    parts = (" ".join(_WORDS.get(word, word) for word in part.split("_")) for part in key.split("."))
    text = " · ".join(parts)
    return text[:1].upper() + text[1:]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _mean(entry: Mapping[str, Any] | None) -> float | None:
    value = entry.get("mean") if entry else None
    return value if isinstance(value, (int, float)) and value == value else None


def _accuracy(entry: Mapping[str, Any]) -> str:
    std = entry.get("std")
    spread = f" ± {100 * std:.1f}" if isinstance(std, (int, float)) and entry.get("n") != 1 else ""
    return f"{100 * entry['mean']:.1f}{spread} %".replace(" ", "\N{NO-BREAK SPACE}")


def _cell(value: Any) -> str:
    return f'<td class="num">{_e(_number(value))}</td>'


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_number, value))
    return str(value)


def _duration(seconds: Any) -> str | None:
    if not isinstance(seconds, (int, float)) or seconds != seconds:
        return None
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _is_png(data: bytes) -> bool:
    return data.startswith(b"\x89PNG\r\n\x1a\n")


def _width(data: bytes) -> int | None:
    """The width to show a PNG at, in CSS pixels: its header says how many it has."""
    return struct.unpack(">I", data[16:20])[0] // draw.DENSITY if _is_png(data) else None


def _data_uri(data: bytes) -> str:
    if not _is_png(data) and b"<svg" not in data[:1000]:
        raise ValueError("a picture is neither PNG nor SVG: pass what train.pictures returns")
    kind = "image/png" if _is_png(data) else "image/svg+xml"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _e(value: Any) -> str:
    return html.escape(str(value), quote=True)


_RIGHT = ' class="num"'
_STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--text:#1b1f24;--soft:#5c6570;--line:#e1e5ea;--accent:#2f6fed;
--bar:#b3bdc9;--code:#f1f3f6;--warn:#fff3d6;--warn-text:#6b4b00}
@media (prefers-color-scheme:dark){:root{--page:#0f1216;--card:#171b21;--text:#e8ebef;--soft:#9aa4b0;--line:#2a3038;
--accent:#6ea1ff;--bar:#56616f;--code:#0f1318;--warn:#3a2f12;--warn-text:#f2d48a}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:48px 24px 80px}
header{margin-bottom:32px}
h1{font-size:32px;line-height:1.2;letter-spacing:-.02em;margin:0 0 12px;overflow-wrap:anywhere}
h2{font-size:17px;margin:0 0 14px}
.summary{font-size:20px;line-height:1.5;margin:0 0 18px;max-width:46em;text-wrap:pretty}
.facts{display:flex;flex-wrap:wrap;gap:8px;list-style:none;margin:0;padding:0;font-size:14px}
.facts li{padding:4px 12px;border:1px solid var(--line);border-radius:16px;background:var(--card);
overflow-wrap:anywhere}
.facts span{color:var(--soft);margin-right:4px}
section,details{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:22px 24px;
margin:0 0 20px;min-width:0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:9px 12px;text-align:left;vertical-align:middle;font-weight:400}
th:first-child{padding-left:0}
td:last-child,th:last-child{padding-right:0}
thead th{font-size:13px;color:var(--soft);border-bottom:1px solid var(--line);white-space:nowrap;padding-top:0}
tbody tr+tr>*{border-top:1px solid var(--line)}
.num{text-align:right;white-space:nowrap}
.results tbody th{min-width:230px}
.results small{display:block;color:var(--soft);font-size:13px;line-height:1.35;font-weight:400}
.results .own th,.results .own .value{font-weight:650}
.missing{color:var(--soft);font-style:italic}
.bar{width:20%;min-width:110px}
.bar div{position:relative;height:12px;border-radius:3px;background:var(--code)}
.bar b{position:absolute;inset:0 auto 0 0;border-radius:3px;background:var(--bar)}
.own .bar b{background:var(--accent)}
.bar i{position:absolute;top:4px;height:4px;min-width:2px;background:var(--text);border-radius:1px}
.pictures{display:flex;flex-wrap:wrap;gap:32px 64px}
figure{margin:0;max-width:100%}
figure img{display:block;width:100%;height:auto}
.note,figcaption{color:var(--soft);font-size:14px}
.note{margin:14px 0 0;max-width:60em}
.pictures figcaption{margin-top:10px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:22px 28px}
.charts figcaption{color:var(--text);margin-bottom:4px}
.charts figure{max-width:500px}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:0 20px;align-items:start}
.pairs th{color:var(--soft);padding-right:24px}
.pairs td{overflow-wrap:break-word}
.pairs th,.pairs td{padding-top:6px;padding-bottom:6px;font-size:15px}
.warning{background:var(--warn);color:var(--warn-text);border-radius:8px;padding:10px 14px;margin:0 0 14px;
font-size:15px}
pre{margin:0;padding:14px 16px;background:var(--code);border-radius:8px;overflow-x:auto;
font:13.5px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
summary{cursor:pointer;font-size:17px;font-weight:650}
details[open]>summary{margin-bottom:14px}
@media (max-width:640px){main{padding:28px 14px 48px}section,details{padding:18px 16px}h1{font-size:26px}
.summary{font-size:18px}.results tbody th{min-width:150px}
.results :is(th,td):nth-child(3){display:none}}
@media print{body{background:none}section,details{break-inside:avoid}}
"""
