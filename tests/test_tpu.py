"""The check of programs for TPUs, with none attached: what it reads, computes and refuses."""

import csv
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EXPERIMENTS, errors_in
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtta import parallel
from jaxtta.flops import count_flops

TPU = EXPERIMENTS.with_name("tpu")
SCRIPT = "../tpu/aot_check.py"
LIBTPU = importlib.util.find_spec("libtpu") is not None
PROGRAM = """\
HloModule jit_step, input_output_alias={ {0}: (1, {}, may-alias), {1}: (2, {}, must-alias) }

%cut (param_0: f32[7,8], param_1: s32[]) -> f32[1,8] {
  %param_0 = f32[7,8]{1,0:T(8,128)} parameter(0)
  %param_1 = s32[]{:T(128)S(6)} parameter(1)
  ROOT %dynamic-slice.1 = f32[1,8]{1,0:T(8,128)} dynamic-slice(%param_0, %param_1)
}

%keep (param_0.1: f32[7,8], param_1.1: f32[1,8], param_2.1: s32[]) -> f32[7,8] {
  %param_0.1 = f32[7,8]{1,0:T(8,128)} parameter(0)
  %param_1.1 = f32[1,8]{1,0:T(8,128)S(1)} parameter(1)
  %param_2.1 = s32[]{:T(128)S(6)} parameter(2)
  %whole = f32[7,8]{1,0:T(8,128)} dynamic-update-slice(%param_0.1, %param_1.1, %param_2.1)
  ROOT %bitcast.1 = f32[7,8]{1,0:T(8,128)} bitcast(%whole)
}

%body (carried: (s32[], f32[7,8], /*index=2*/f32[7,8])) -> (s32[], f32[7,8], f32[7,8]) {
  %carried = (s32[]{:T(128)S(6)}, f32[7,8]{1,0:T(8,128)}, /*index=2*/f32[7,8]{1,0}) parameter(0)
  %turn = s32[]{:T(128)S(6)} get-tuple-element(%carried), index=0
  %read = f32[7,8]{1,0:T(8,128)} get-tuple-element(%carried), index=1
  %stack = f32[7,8]{1,0:T(8,128)} get-tuple-element(%carried), index=2
  %row = f32[1,8]{1,0:T(8,128)} fusion(%read, %turn), kind=kLoop, calls=%cut
  %fast = f32[1,8]{1,0:T(8,128)S(1)} multiply(%row, %row), metadata={op_name="jit(step)/mul"}
  %stacked = f32[7,8]{1,0:T(8,128)} fusion(%stack, %fast, %turn), kind=kLoop, calls=%keep
  %one = s32[]{:T(128)S(6)} constant(1)
  %next = s32[]{:T(128)S(6)} add(%turn, %one)
  ROOT %tuple.1 = (s32[], f32[7,8], f32[7,8]) tuple(%next, %read, %stacked)
}

%condition (carried.1: (s32[], f32[7,8], f32[7,8])) -> pred[] {
  %carried.1 = (s32[]{:T(128)S(6)}, f32[7,8]{1,0}, f32[7,8]{1,0}) parameter(0)
  %turn.1 = s32[]{:T(128)S(6)} get-tuple-element(%carried.1), index=0
  %limit = s32[]{:T(128)} constant(7)
  ROOT %less = pred[]{:T(512)} compare(%turn.1, %limit), direction=LT
}

ENTRY %main.1 (x.1: f32[7,8], y.1: f32[7,8]) -> (f32[7,8], f32[7,8]) {
  %x.1 = f32[7,8]{1,0:T(8,128)} parameter(0), metadata={op_name="params[\\'a (b)\\']"}
  %y.1 = f32[7,8]{1,0:T(8,128)} parameter(1)
  %zero = s32[]{:T(128)S(6)} constant(0)
  %copy-start = (f32[7,8]{1,0:T(8,128)S(1)}, f32[7,8]{1,0:T(8,128)}, u32[]) copy-start(%x.1)
  %copy-done = f32[7,8]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %part = ((f32[7,8]{1,0}), bf16[2,8]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%y.1)
  %tuple.2 = (s32[]{:T(128)S(6)}, f32[7,8], f32[7,8]) tuple(%zero, %x.1, %y.1)
  %while.1 = (s32[], f32[7,8], f32[7,8]) while(%tuple.2), condition=%condition, body=%body
  %last = f32[7,8]{1,0:T(8,128)} get-tuple-element(%while.1), index=2
  %sum = f32[7,8]{1,0:T(8,128)} add(%last, %copy-done)
  ROOT %tuple.3 = (f32[7,8], f32[7,8]) tuple(%sum, %last)
}
"""
ROW, MATRIX = 4 * 8, 4 * 7 * 8  # bytes


@pytest.fixture(autouse=True)
def keep_programs():
    """The script compiles anew; later tests take what was compiled."""
    before = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@pytest.fixture
def check(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(TPU)
    return importlib.import_module("aot_check")


@pytest.fixture
def hlo(check):
    """The module that reads a program's text."""
    return check.hlo


def compiled(hlo, function, *arguments, **options):
    """What is counted in a program for this machine."""
    lowered = jax.jit(function, **options).lower(*arguments)
    return hlo.counts(hlo.parse(lowered.compile().as_text()), lowered.as_text())


def test_bytes_of_main_memory_are_counted_with_all_turns_of_a_loop(hlo):
    program = hlo.parse(PROGRAM)
    assert program.entry == "main.1"
    turn = (ROW + ROW) + ROW + ROW  # a row is cut out, multiplied into fast memory, and stacked
    entry = MATRIX + 2 * 2 * 8 + (MATRIX + MATRIX)  # copied, a part in bfloat16, and the sum
    assert hlo.memory_bytes(program, "body") == turn
    assert hlo.memory_bytes(program) == 7 * turn + entry
    assert hlo.kernels(program) == 7 * 4 + 3
    named = PROGRAM.replace(
        "add(%last, %copy-done)", 'custom-call(), custom_call_target="AllocateBuffer"'
    )
    assert hlo.kernels(hlo.parse(named)) == 7 * 4 + 2
    scratch = "(f32[7,8]{1,0}, s8[4096]{0}) custom-call(%last, %copy-done), target="
    product = PROGRAM.replace("f32[7,8]{1,0:T(8,128)} add(%last, %copy-done)", scratch)
    product = product.replace("target=", 'custom_call_target="__cublas$lt$matmul"')
    assert hlo.memory_bytes(hlo.parse(product)) == hlo.memory_bytes(program)


def test_a_text_that_is_no_program_is_refused(hlo):
    with pytest.raises(ValueError, match="no entry computation"):
        hlo.parse("HloModule nothing\n")


def test_turns_of_a_compiled_loop(hlo):
    def step(carry, row):
        return jnp.tanh(carry @ carry.T @ carry) + row, carry.sum()

    lowered = jax.jit(lambda x, rows: jax.lax.scan(step, x, rows)).lower(
        jnp.ones((8, 16)), jnp.ones((5, 16))
    )
    program = hlo.parse(lowered.compile().as_text())
    (loop,) = (one for one in program.instructions if one.opcode == "while")
    assert hlo.trips(program, loop) == 5
    assert hlo.memory_bytes(program) > 5 * hlo.memory_bytes(program, loop.called("body")) > 0


def test_a_clean_program_holds_nothing_that_is_refused(hlo):
    def step(state, x):
        low = x @ x.T
        return state + 1, jnp.matmul(low, low, precision="highest")

    found = compiled(hlo, step, jnp.zeros(4), jnp.ones((4, 4)), donate_argnums=0)
    assert found == {
        **{"float64": 0, "callbacks": 0, "dynamic": 0, "collectives": 0, "scatters": 0},
        **{"aliased": 1, "products": 2, "highest": 1},
    }


def test_what_is_refused_is_found(hlo):
    def host(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    assert compiled(hlo, host, jnp.ones(3))["callbacks"] > 0
    with jax.enable_x64(True):
        assert compiled(hlo, jnp.sin, jnp.ones(3, jnp.float64))["float64"] > 0
    mesh = parallel.mesh()
    split = jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh, P("streams")))
    assert compiled(hlo, lambda x: x.sum(), split)["collectives"] > 0
    assert compiled(hlo, lambda x: 2 * x, split)["collectives"] == 0
    dynamic = PROGRAM.replace("ROOT %tuple.3", "%d = f32[<=4,2]{1,0} add(%x.1, %x.1)\n  ROOT %t")
    assert hlo.counts(hlo.parse(dynamic), "")["dynamic"] == 1
    assert hlo.counts(hlo.parse(PROGRAM), "tensor<4x?xf32>")["dynamic"] == 1
    sends = PROGRAM.replace("add(%last, %copy-done)", "send(%last), is_host_transfer=true")
    assert hlo.counts(hlo.parse(sends), "")["callbacks"] == 1
    scatter = PROGRAM.replace("add(%last, %copy-done)", "scatter(%last, %zero, %copy-done)")
    assert hlo.counts(hlo.parse(scatter), "")["scatters"] == 1


@pytest.mark.parametrize(
    ("name", "chip", "layout"),
    [
        ("v5litepod-8", "v5e", "2x4"),
        ("v5litepod-1", "v5e", "1x1"),
        ("v4-8", "v4", "2x2x1"),
        ("v6e-16", "v6e", "4x4"),
        ("v5e:2x4", "v5e", "2x4"),
        ("v4:2x2x2", "v4", "2x2x2"),
        ("h100-8", "h100", "1x1x8"),
    ],
)
def test_topologies_as_they_are_rented_and_as_they_are_laid_out(check, name, chip, layout):
    assert check.layout_of(name) == (chip, layout)


@pytest.mark.parametrize("name", ["v5litepod-5", "v9-8", "v9e:2x4", "v5e:8", "v5e", "2x4", ""])
def test_unknown_topologies_are_refused(check, name):
    with pytest.raises(ValueError, match=f"--topology '{name}' is unknown, expected v4-8"):
        check.layout_of(name)


@pytest.mark.parametrize(
    ("flops", "moved", "milliseconds"),
    [(197e12, 1, 1000), (1, 819e9, 1000), (197e9, 2 * 819e6, 2)],  # products, memory, the slower
)
def test_a_bound_is_the_slower_of_products_and_memory(check, flops, moved, milliseconds):
    row = check.bound(flops, moved, 64, 819, 197)
    assert row["bound ms"] == pytest.approx(milliseconds)
    assert row["images/s"] == pytest.approx(64e3 / milliseconds)
    assert row["FLOP/byte"] == flops / moved


def test_chip_hours(check):
    # 40 % of 197 TF/s for an hour, over the 750,000 images of 15 cells.
    flops = 0.4 * 197e12 * 3600 / 750_000
    assert check.hours_of(flops, 15, check.CHIPS["v5e"]) == pytest.approx(1)
    assert check.hours_of(flops, 75, check.CHIPS["v5e"]) == pytest.approx(5)
    assert check.hours_of(flops, 15, check.CHIPS["v4"]) == pytest.approx(197 / 275)


ROWS = {"need GB": 15.9, "of GB": 16, "mode": "streams", "dtype": "float32", "remat": "no"}
ROWS |= {"float64": 0, "callbacks": 0, "dynamic": 0, "collectives": 0, "adapter": "tent"}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "fits"),
        ({"need GB": 16.1}, "does not fit: try --remat or bfloat16 or a batch below 64"),
        ({"need GB": 20, "dtype": "bfloat16", "remat": "yes"}, "does not fit: try a batch below"),
        ({"float64": 1}, "holds float64"),
        ({"callbacks": 2}, "holds callbacks to the host"),
        ({"dynamic": 1}, "holds dynamic shapes"),
        ({"collectives": 1}, "holds collectives"),
        ({"collectives": 1, "mode": "batch"}, "fits"),
        ({"float64": 1, "dynamic": 1}, "holds float64; holds dynamic shapes"),
    ],
)
def test_what_a_row_says_of_its_program(check, changed, expected):
    assert check.verdict(ROWS | changed, 64).startswith(expected)


@pytest.mark.parametrize(
    ("message", "gigabytes"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.00G of 15.75G", 21.47),
        ("Ran out of memory on HBM, the total memory required for HLO (512.0M) exceeds", 0.537),
        ("INTERNAL: something else of 20.00G", None),
        ("UNIMPLEMENTED: no memory space", None),
    ],
)
def test_the_compilers_message_says_how_much_memory_is_needed(check, message, gigabytes):
    found = check.needed_memory(message)
    assert found == (gigabytes and pytest.approx(gigabytes, rel=1e-3))


@pytest.mark.parametrize(
    ("adapter", "mode"), [("zero_shot", "streams"), ("tent", "batch"), ("mgtta", "streams")]
)
def test_a_program_is_compiled_and_described(check, adapter, mode):
    case = check.Case("v5litepod-8", "tiny", adapter, mode, "bfloat16")
    options = check.Options(classes=5, batch=8, layers=1, scan=True, quick=True)
    row = check.compile_case(case, jax.devices(), options, remat=False)
    assert [*row] == [*check.FORMATS]
    assert row["verdict"] == "fits"
    done, _, leaves = row["aliased"].partition("/")
    assert done == leaves
    assert (row["collectives"] > 0) == (mode == "batch")
    assert 0 < row["arg GB"] <= row["peak GB"] and row["arg GB"] <= row["need GB"] < 0.1
    assert row["GF"] > 0 and row["HBM GB"] > 0 and row["images/s"] > 0
    assert row["how"] == "scan quick"
    assert "–" not in check.line(row)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Ran out of memory in memory space hbm. Used 20.0G of 15.7G", "does not fit: try --remat"),
        (
            "Ran out of memory in memory space vmem. Used 17.0M of 16.0M",
            "does not compile: Ran out",
        ),
        ("INTERNAL: something else", "does not compile: INTERNAL: something else"),
    ],
)
def test_a_program_that_does_not_compile_never_fits(check, monkeypatch, message, expected):
    class Program:
        jaxpr = jax.make_jaxpr(jnp.sin)(1.0)

        def lower(self):
            return self

        def compile(self, options):
            raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(check, "trace", lambda *given: (Program(), None))
    case = check.Case("v5litepod-8", "tiny", "tent", "streams", "float32")
    row = check.compile_case(case, jax.devices(), check.Options(), remat=False)
    assert row["verdict"].startswith(expected)
    assert row["verdict"] not in check.PASSED


def test_operations_of_a_chip_are_its_share(check):
    options = check.Options(classes=5, batch=8, layers=1)
    both = [
        count_flops(check.trace(case, jax.devices(), options)[0].jaxpr.jaxpr)
        for case in (
            check.Case("", "tiny", "zero_shot", mode, "float32") for mode in ("streams", "batch")
        )
    ]
    assert both[0] == both[1]  # streams: of one chip, with 8 images; batch: of all, with 8 images


def test_one_batch_of_tnt_is_not_split_and_no_failure(check):
    case = check.Case("v5litepod-8", "tiny", "tnt:steps=3", "batch", "bfloat16")
    row = check.compile_case(case, jax.devices(), check.Options(), remat=False)
    assert row["verdict"].startswith("not possible: TNT takes its images one by one")
    assert row["verdict"] in check.PASSED
    assert row["need GB"] is None


@pytest.mark.parametrize(
    ("remat", "adapter", "needs", "expected", "code"),
    [
        ("auto", "tent", (20, 10), ["no", "yes"], 0),
        ("auto", "tent", (20, 17), ["no", "yes"], 1),
        ("auto", "tent", (10,), ["no"], 0),
        ("auto", "zero_shot", (20,), ["no"], 1),
        ("no", "tent", (20,), ["no"], 1),
        ("yes", "tent", (10,), ["yes"], 0),
    ],
)
def test_what_does_not_fit_is_tried_with_recomputation(
    check, monkeypatch, tmp_path, capsys, remat, adapter, needs, expected, code
):
    left = [*needs]

    def compile_case(case, devices, options, remat):
        row = dict.fromkeys(check.FORMATS) | ROWS | case._asdict()
        row |= {"need GB": left.pop(0), "remat": "yes" if remat else "no"}
        return row | {"verdict": check.verdict(row, options.batch)}

    monkeypatch.setattr(check, "compile_case", compile_case)
    monkeypatch.setattr(check, "devices_of", lambda chip, layout: [None] * 8)
    file = tmp_path / "rows.csv"
    one = {"models": ("tiny",), "adapters": (adapter,), "dtypes": ("float32",)}
    options = check.Options(**one, modes=("streams",), remat=remat, output=file)
    assert check.main(options) == code
    rows = [*csv.DictReader(file.open())]
    assert [row["remat"] for row in rows] == expected
    assert [float(row["need GB"]) for row in rows] == [*needs]
    out = capsys.readouterr().out
    assert f"{1 - code} of 1 programs are as they should be" in out
    assert ("does not fit" in out) == (max(needs) > 16)


def test_the_chip_hours_are_computed_without_libtpu(run_script, check):
    options = ["--table", "--models", "ViT-B/16", "--layers", "1", "--classes", "5"]
    options += ["--adapters", "zero_shot", "tnt"]
    code, out, _ = run_script(SCRIPT, *options, "--topology", "v4-8", "v6e-8", "--price", "3.5")
    assert code == 0
    assert "Computed, not measured" in out
    rows = [line.split() for line in out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["v4-8", "v6e-8"] * 2
    flops, hours, cost, *_ = map(float, rows[2][3:])  # of TNT on a v4
    assert flops > 64 * float(rows[0][3]) > 0  # its views
    assert hours == pytest.approx(check.hours_of(1e9 * flops, 15, check.CHIPS["v4"]), abs=0.006)
    assert cost == pytest.approx(3.5 * hours, abs=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topology", "v5-8"], "--topology 'v5-8' is unknown"),
        (["--batch", "0"], "--batch is 0, expected at least 1"),
        (["--classes", "1"], "--classes is 1, expected at least 2"),
        (["--layers", "0"], "--layers is 0, expected at least 1"),
        (["--adapters", "tent", "tend"], "unknown adapter 'tend'"),
    ],
)
def test_bad_options(run_script, options, message):
    code, _, err = run_script(SCRIPT, *options)
    assert (code, errors_in(err)) == (1, 1)
    assert message in err


def test_a_batch_that_the_chips_cannot_share_is_refused(check, monkeypatch):
    monkeypatch.setattr(check, "devices_of", lambda chip, layout: [None] * 8)
    with pytest.raises(ValueError, match="--batch is 12, expected a multiple of the 8 chips"):
        check.main(check.Options(batch=12))


@pytest.mark.parametrize(
    "given",
    [
        {"dtypes": ("bfloat16",)},
        {"topology": ("h100-1",)},
        {"topology": ("h100-1",), "dtypes": ("bfloat16",), "table": True},
    ],
)
def test_fused_attention_of_other_programs_is_refused(check, given):
    with pytest.raises(ValueError, match="--fused-attention needs --topology h100-N and --dtypes"):
        check.main(check.Options(fused_attention=True, **given))


def test_without_jaxs_plugin_a_sentence_says_what_to_install(check, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    wanted = f"jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"
    with pytest.raises(ImportError, match=f"is missing: pip install {wanted}"):
        check.devices_of(*check.layout_of("h100-1"))


def test_without_libtpu_a_sentence_says_what_to_install(run_script, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else find(name, *a)
    )
    code, _, err = run_script(SCRIPT)
    assert (code, errors_in(err)) == (1, 1)
    assert "pip install 'libtpu==0.0.42.*'" in err


@pytest.mark.skipif(not LIBTPU, reason="needs libtpu, which make tpu-check installs")
def test_a_tiny_model_is_compiled_for_a_tpu(run_script):
    options = ["--models", "tiny", "--classes", "5", "--batch", "8", "--layers", "1"]
    options += ["--adapters", "zero_shot", "--dtypes", "bfloat16"]
    code, out, _ = run_script(SCRIPT, *options)
    assert code == 0
    assert "2 of 2 programs are as they should be" in out
    with_unknown = ["--topology", "v5e:3x5"]
    code, _, err = run_script(SCRIPT, *options, *with_unknown)
    assert code == 1
    assert "--topology v5e:3x5" in err
