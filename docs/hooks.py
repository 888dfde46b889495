"""What the site's build adds: pages of the repository's files, and links of notebooks.

A link like `../experiments/guard.py` is right where the repository is browsed, and leads out of the
site. Each such file becomes a page under `repository/`, and the link leads there.
"""

import logging
import posixpath
import re
from pathlib import Path

import jupyter_client
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from traitlets import CaselessStrEnum

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#|/)([^)\s#]+)(#[^)\s]*)?(?=\))")
PICTURES = (".png", ".svg")
LOG = logging.getLogger("mkdocs.hooks.links")


class LocalKernels(jupyter_client.AsyncKernelManager):
    """Starts notebooks' kernels on sockets of this machine: they warn of others."""

    transport = CaselessStrEnum(["tcp", "ipc"], default_value="ipc", config=True)


jupyter_client.AsyncKernelManager = LocalKernels


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the repository that pages link to, and those that these link to."""
    pages = [file for file in files.documentation_pages() if file.src_uri.endswith(".md")]
    while pages:
        page = pages.pop()
        for link in LINK.finditer(page.content_string):
            path = _outside(page.src_uri, link[1])
            if path is None or files.get_file_from_path(_place(path)) is not None:
                continue
            content = (ROOT / path).read_bytes()
            if path.endswith(PICTURES):
                files.append(File.generated(config, _place(path), content=content))
                continue
            text = content.decode()
            if not path.endswith(".md"):
                language = {".py": "python", ".sh": "sh"}.get(Path(path).suffix, "text")
                text = f"# {path}\n\n````{language}\n{text}\n````\n"
            added = File.generated(
                config, _place(path), content=f"---\nsearch:\n  boost: 0.5\n---\n{text}"
            )
            files.append(added)
            pages.append(added)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to files of the repository to their pages."""
    here = page.file.src_uri

    def lead(link: re.Match) -> str:
        path = _outside(here, link[1])
        if path is None:
            return link[0]
        return posixpath.relpath(_place(path), posixpath.dirname(here) or ".") + (link[2] or "")

    return LINK.sub(lead, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead notebooks' links to pages, which MkDocs does for pages in Markdown alone."""
    here = page.file.src_uri
    if not here.endswith(".ipynb"):
        return html

    def lead(link: re.Match) -> str:
        path, _, anchor = link[2].partition("#")
        found = files.get_file_from_path(
            posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
        )
        if found is None:
            LOG.warning("%s links to %s, which is no page", here, link[2])
            return link[0]
        return link[1] + found.url_relative_to(page.file) + (f"#{anchor}" if anchor else "") + '"'

    return re.sub(r'(<a [^>]*href=")(?!https?:|mailto:|#|/)([^"]+)"', lead, html)


def _outside(page: str, link: str) -> str | None:
    """The path in the repository of a file that a page of the site links to, outside docs/."""
    added = page.startswith("repository/")
    start = page.removeprefix("repository/") if added else f"docs/{page}"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(start), link))
    inside = path.startswith("docs/") and not path.endswith(".py")
    if path.startswith("..") or not (ROOT / path).is_file() or (inside and not added):
        return None
    return path


def _place(path: str) -> str:
    """Where the site has a file of the repository."""
    if path.startswith("docs/") and not path.endswith(".py"):
        return path.removeprefix("docs/")
    return f"repository/{path}" + ("" if path.endswith((".md", *PICTURES)) else ".md")
