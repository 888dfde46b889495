"""What the documents show runs as it is written."""

import ast
import re
import shlex
import textwrap
import unicodedata
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import tyro

import jaxtta
import jaxtta.cli.main

ROOT = Path(__file__).parents[1]


PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "tpu/README.md")
    for path in ROOT.glob(pattern)
)
FENCE = re.compile(r"^( *)```(.*)\n((?:.|\n)*?)^\1```$", re.M)


def blocks_of(name, language="python"):
    """The blocks of a document in a language, by the heading that they stand under."""
    found, heading, end = [], "", 0
    text = (ROOT / name).read_text()
    for fence in FENCE.finditer(text):
        headings = re.findall(r"^#+ (.*)$", text[end : fence.start()], re.M)
        heading, end = headings[-1] if headings else heading, fence.end()
        if fence[2].split(" ")[0] == language:
            found.append((heading, textwrap.dedent(fence[3])))
    return found


RECIPES = dict(blocks_of("docs/recipes.md"))


@pytest.fixture
def small_model(short, towers, monkeypatch, tmp_path):
    """Documents load the bundled model or one of the hub: one-block models in their place."""
    load = jaxtta.load

    def load_small(name, **options):
        return towers["supervised"][:2] if "/vit-" in str(name) else load(short, **options)

    monkeypatch.setattr(jaxtta.assets, "MODEL", short)
    monkeypatch.setattr(jaxtta, "load", load_small)
    monkeypatch.chdir(tmp_path)


def run(code, names):
    exec(compile(code, "document", "exec"), names)
    return names


@pytest.mark.parametrize("heading", [h for h in RECIPES if h != "Recipes"])
def test_a_recipe_runs(small_model, heading, capsys):
    names = run(RECIPES["Recipes"], {})
    if heading.startswith("A data loader"):  # one compilation
        tent = jaxtta.adapters.tent
        counted = lambda *a, **k: (lambda x: x._replace(step=chex.assert_max_traces(x.step, 1)))(  # noqa: E731
            tent(*a, **k)
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jaxtta.adapters, "tent", counted)
            run(RECIPES[heading], names)
        chex.clear_trace_counter()
        assert int(names["state"].seen) == 21
        assert names["logits"].shape == (5, 3)
        return
    run(RECIPES[heading], names)
    last = names.get("prediction", names.get("predictions"))
    assert np.isfinite(last.logits).all()
    assert not np.any(last.metrics["skipped"])
    if heading.startswith("Swap"):
        assert np.any(last.metrics["update_norm"] > 0)
    elif heading.startswith("A stream"):
        step, state = jax.jit(names["adapter"].step), names["adapter"].init(names["params"])
        for batch, logits in zip(names["batches"], last.logits, strict=True):
            state, prediction = step(names["params"], state, batch)
            np.testing.assert_allclose(prediction.logits, logits, atol=1e-4)
    elif heading == "Many streams over many devices":
        assert last.logits.shape == (16, 8, 3)
        assert len(last.logits.sharding.device_set) == 8
        adapter, params = names["adapter"], names["params"]
        state, step = adapter.init(params), jax.jit(adapter.step)
        for batch in names["batches"]:
            state, prediction = step(params, state, batch)
        for logits in last.logits:
            np.testing.assert_allclose(logits, prediction.logits, atol=1e-4)
    elif heading.startswith("Many streams"):
        assert last.logits.shape == (4, 8, 3)
        width = names["model"].projection
        context = 3 * width * 4
        assert capsys.readouterr().out.endswith(f" {context} of context\n")  # once, not four times
    elif heading.startswith("Save"):
        adapter, params, step = names["adapter"], names["params"], names["step"]
        state, _ = step(params, adapter.init(params), names["batches"][0])
        state, expected = step(params, state, names["batches"][1])
        np.testing.assert_array_equal(last.logits, expected.logits)
        jax.tree.map(np.testing.assert_array_equal, names["state"], state)
    elif heading.startswith("A model of your own"):
        assert set(names["state"].adapted["layers"]["1"]) == {"scale", "bias"}
    elif heading == "bfloat16":
        dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(names["state"].adapted)}
        assert dtypes == {"float32"}
    elif heading.startswith("A batch over"):
        assert len(jax.devices()) == 8
        assert len(last.logits.sharding.device_set) == 8


@pytest.mark.parametrize("page", [p for p in PAGES if blocks_of(p) and "recipes" not in p])
def test_a_page_runs(small_model, page):
    """Its blocks one after the other."""
    names = {}
    for heading, code in blocks_of(page):
        try:
            run(code, names)
        except Exception as error:
            error.add_note(f"in {page}, {heading}:\n{code}")
            raise
    if hasattr(last := names.get("prediction"), "logits"):
        assert np.isfinite(last.logits).all()


def test_the_method_of_the_guide_keeps_the_laws(small_model):
    names = run(RECIPES["Recipes"], {})
    for _, code in blocks_of("docs/method.md"):
        if "adapter" not in names:
            run(code, names)
    adapter, params = names["adapter"], names["params"]
    few = names["batches"][0][:5]
    state, alone = adapter.step(params, adapter.init(params), few)
    _, padded = adapter.step(params, adapter.init(params), jaxtta.Batch.padded(few, 8))
    np.testing.assert_allclose(padded.logits[:5], alone.logits, atol=1e-4)
    assert state.adapted.keys() == {"vision_model"}


PROGRAMS = ("jaxtta ", "python experiments/", "python benchmarks/")


def commands():
    """Every command line of the documents and of the programs' docstrings, with a place of it."""
    texts = {page: "\n".join(code for _, code in blocks_of(page, "sh")) for page in PAGES}
    for folder in ("jaxtta/cli", "experiments", "benchmarks"):
        for path in sorted((ROOT / folder).glob("*.py")):
            source = path.read_text()
            if folder == "jaxtta/cli" or "run_script(" in source or "main([" in source:
                texts[f"{folder}/{path.name}"] = ast.get_docstring(ast.parse(source)) or ""
    found = {}
    for name, text in texts.items():
        text = text.replace("\\\n", " ").replace(".venv/bin/", "")
        for line in map(str.strip, re.split(r"\n| (?:\||&&) ", text)):
            if line.startswith(PROGRAMS) and "COMMAND" not in line:
                found.setdefault(re.split(r" [#>] ", f"{line} ")[0].strip(), name)
    return [(name, line) for line, name in found.items()]


@pytest.mark.parametrize("document, line", commands())
def test_a_command_in_a_document_parses(document, line, run_script, monkeypatch):
    program, *arguments = shlex.split(line)
    parsed = []

    def parse(options, main, doc, arguments=None, prog=None):
        parsed.append(tyro.cli(options, args=arguments, config=(tyro.conf.FlagCreatePairsOff,)))

    monkeypatch.setattr(jaxtta.cli, "run_script", parse)
    monkeypatch.setattr(jaxtta.cli.main, "run_script", parse)
    if program == "jaxtta":
        jaxtta.cli.main.main(arguments)
    else:
        code, _, err = run_script(ROOT / arguments[0], *arguments[1:])
        assert code == 0, err
    assert len(parsed) == 1


def prose_of(page):
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", (ROOT / page).read_text()))


def anchors_of(path):
    """The anchors of a page's headings, on GitHub and on the site."""
    text = FENCE.sub("", path.read_text())
    found = set(re.findall(r"\{ *#([\w.-]+)|<a (?:id|name)=\"([^\"]+)", text))
    found = {name for pair in found for name in pair if name}
    for heading in re.findall(r"^#+ (.*?)(?: \{.*\})?$", text, re.M):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip()
        plain = re.sub(r"[^\w\s-]", "", heading.lower()).strip()
        ascii_ = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        found |= {plain.replace(" ", "-"), re.sub(r"[-\s]+", "-", ascii_)}
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(<?([^)>\s]+)>?(?: \"[^\"]*\")?\)", prose_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), f"{page} links {target}, which is not there"
        if anchor and path.suffix == ".md" and "docs/api" not in path.as_posix():
            assert anchor in anchors_of(path), f"{page} links {target}, which is no heading"


def test_blocks_are_of_languages_that_are_tested():
    for page in PAGES:
        for fence in FENCE.finditer((ROOT / page).read_text()):
            assert fence[2].split(" ")[0] not in ("py", "bash", "shell", "console", "pycon"), page


def test_the_tables_are_those_of_the_result_files(run_script):
    code, _, err = run_script(ROOT / "docs" / "render.py", "--check")
    assert code == 0, err


def test_rendering_says_what_is_wrong(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import render
    import tables

    page = "gains <!-- value: gain mint reset -->9<!-- end --> points\n"
    assert re.fullmatch(r"gains <!-- .* -->\+1\.4<!-- end --> points\n", render.render(page))
    code = f"```text\n{page}```\n"
    assert render.render(code) == code  # shown as code
    table = render.render("<!-- table: which_method -->\nold\n<!-- end -->\n")
    assert "| `zero_shot` | nothing |" in table
    assert render.render(table) == table
    for text, said in (
        ("<!-- table: nothing --><!-- end -->", "unknown table 'nothing', expected one of"),
        ("<!-- table: _read x --><!-- end -->", "unknown table '_read'"),
        ("<!-- value: gain mint never --><!-- end -->", "gain mint never"),
        ("<!-- value: gain mint --><!-- end -->", "missing 1 required"),
        ("<!-- table: demo -->", "has no <!-- end -->"),
        ("<!-- table: demo --> <!-- table: demo --><!-- end -->", "has no <!-- end -->"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            render.render(text)
    monkeypatch.setattr(tables, "RESULTS", ROOT / "nowhere")
    with pytest.raises(ValueError, match=r"'leaderboard' needs .*leaderboard.csv, see docs/res"):
        render.render("<!-- table: leaderboard --><!-- end -->")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
