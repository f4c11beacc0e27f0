"""What MkDocs lacks for pages that live in a repository: see mkdocs.yml.

Pages link to files outside of docs/ by relative paths, as on a code host. Here such files become part of the site:
pages, pictures, notebooks as text, all else as listings. What a page would load from elsewhere fails the strict build,
and so does a public name without documentation.
"""

import ast
import json
import logging
import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
# Where the rest of the repository stands in the site.
REST = "repository/"
LINK = re.compile(r"\]\(([^)#\s]+)")
LOADED = re.compile(
    r"<(?:script|img|iframe|link|source|video|audio|embed|object)\b[^>]*?\b(?:src|srcset|href|data)=[\"']?((?:https?:)?//[^\"'\s>]+)"
    r"|(?:@import\s+[\"']|url\([\"']?)((?:https?:)?//[^\"')\s]+)"
)
log = logging.getLogger("mkdocs.hooks")


def _place(path: Path) -> str:
    """Returns where a file of the repository stands in the site, by MkDocs' name of its source."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    name = REST + path.relative_to(ROOT).as_posix()
    return name if path.suffix in (".md", ".png") else f"{name}.md"


def _path(uri: str) -> Path:
    """Returns the file of the repository that stands there in the site."""
    if not uri.startswith(REST):
        return DOCS / uri
    path = ROOT / uri.removeprefix(REST)
    return path if path.exists() else path.with_suffix("")


def _outside(path: Path, target: str) -> Path | None:
    """Returns the file outside of docs/ that a link in ``path`` leads to, if it does."""
    found = Path(os.path.normpath(path.parent / target))
    return found if found.is_file() and found.is_relative_to(ROOT) and not found.is_relative_to(DOCS) else None


def _text(path: Path) -> str:
    """Returns a file as a page."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    if path.suffix == ".ipynb":
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
        return "\n\n".join(f"```python\n{source}\n```" if kind == "code" else source for kind, source in cells)
    return f"# {path.relative_to(ROOT)}\n\n````{path.suffix[1:]}\n{text}\n````\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files that pages link to, and those that these link to."""
    pending = [_path(file.src_uri) for file in files.documentation_pages()]
    while pending:
        path = pending.pop()
        if path.suffix != ".md":
            continue
        for target in LINK.findall(path.read_text(encoding="utf-8")):
            found = _outside(path, target)
            if found is None or files.get_file_from_path(_place(found)):
                continue
            kind = {"abs_src_path": str(found)} if found.suffix == ".png" else {"content": _text(found)}
            files.append(File.generated(config, _place(found), inclusion=InclusionLevel.NOT_IN_NAV, **kind))
            pending.append(found)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links of the repository into links of the site."""
    uri = page.file.src_uri
    path = _path(uri)

    def link(match: re.Match[str]) -> str:
        found = Path(os.path.normpath(path.parent / match[1]))
        if not files.get_file_from_path(_place(found) if found.is_relative_to(ROOT) else ""):
            return match[0]
        return f"]({os.path.relpath(_place(found), Path(uri).parent)}"

    return LINK.sub(link, markdown) if path.suffix == ".md" else markdown


def _public(module: str) -> list[str]:
    """Returns what a module lists in ``__all__``, by whole names."""
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body if path.exists() else ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [f"{module}.{name}" for name in ast.literal_eval(node.value)]
    return []


def on_post_build(*, config: MkDocsConfig) -> None:
    """Warns, which fails a strict build, of what pages would load from the network, and of what the reference lacks."""
    site = Path(config.site_dir)
    for path in sorted(site.rglob("*")):
        if path.suffix in (".html", ".css"):
            for match in LOADED.finditer(path.read_text(encoding="utf-8")):
                log.warning("%s loads %s", path.relative_to(site), match[1] or match[2])
    shown, modules = set(), ["gsdd_jax"]
    for page in sorted((DOCS / "reference").glob("*.md")):
        modules += re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
        shown |= set(re.findall(r'id="([\w.]+)"', (site / f"reference/{page.stem}.html").read_text(encoding="utf-8")))
    for name in (name for module in modules for name in _public(module)):
        if name not in shown:
            log.warning("%s is public, and not in the reference: it needs a docstring", name)
