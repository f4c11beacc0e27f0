import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Interval, Le, Len, Lt
from typing_extensions import Doc

from gsdd_jax.schema import Registered
from train import yaml12
from train.config import ConfigError, RunConfig, compare, describe, load, to_yaml
from train.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussSpec:
    name: Literal["gauss"] = "gauss"
    images_per_class: Annotated[int, Ge(1), Doc("Gaussian images per class.")]
    bits: Literal[16, 32] = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelSpec:
    name: Literal["pixel"] = "pixel"
    scale: Annotated[float, Gt(0), Le(1), Doc("Share of the side that is stored.")] = 1.0


Spec = Annotated[Any, Registered({"gauss": GaussSpec, "pixel": PixelSpec})]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSpec:
    iterations: Annotated[int, Ge(1), Doc("Outer steps.")] = 1000
    lr: Annotated[float, Gt(0)] = 0.1
    log_every: int = 10
    donate: bool = True

    def __post_init__(self):
        if self.log_every > self.iterations:
            raise ValueError(f"log_every: found {self.log_every}, allowed at most iterations = {self.iterations}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    name: str
    seed: Annotated[int, Ge(0), Lt(2**31)] = 0
    whiten: Literal["zca", "meanstd", "none"] = "zca"
    codec: Annotated[Spec, Doc("The parameterization.")]
    distill: StepSpec = StepSpec()
    warmup: StepSpec = StepSpec(iterations=50)
    baselines: tuple[Spec, ...] = ()
    rival: Spec | None = None
    widths: Annotated[tuple[Annotated[int, Ge(1)], ...], Len(1, 3)] = (8, 8)
    batch: Annotated[int, Ge(1)] | None = None
    clip: Annotated[float, Interval(gt=0, le=10)] | None = None


GOOD = "name: a\ncodec: {name: gauss, images_per_class: 3}\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        Path("x.yaml").write_text(text, encoding="utf-8")
        return "x.yaml"

    return write


@pytest.fixture
def read(write):
    def read(text: str, *overrides: str, smoke: bool = False) -> Config:
        return load(write(text), overrides, smoke=smoke, cls=Config)

    return read


def message(read, text: str, *overrides: str, smoke: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text, *overrides, smoke=smoke)
    return str(caught.value)


# Values


def test_missing_settings_take_the_defaults_of_the_class(read):
    assert read(GOOD) == Config(name="a", codec=GaussSpec(images_per_class=3))


def test_tag_chooses_the_spec_class(read):
    config = read("name: a\ncodec: {name: pixel, scale: 0.5}\nrival: {name: gauss, gpc: 2}\nbaselines: [{name: pixel}]")
    assert config.codec == PixelSpec(scale=0.5)
    assert config.rival == GaussSpec(images_per_class=2)
    assert config.baselines == (PixelSpec(),)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", ".001"])
def test_every_spelling_of_a_number_is_a_number(read, text):
    assert read(GOOD + f"distill: {{lr: {text}}}").distill.lr == 1e-3
    assert type(read(GOOD + "distill: {lr: 1}").distill.lr) is float


@pytest.mark.parametrize(("text", "value"), [("010", 10), ("0x10", 16), ("0o10", 8)])
def test_integers_are_decimal_unless_marked(read, text, value):
    assert read(GOOD + f"seed: {text}").seed == value


@pytest.mark.parametrize("text", ["on", "no", "y", "2024-01-01", "12:30", "<<", "'1'"])
def test_words_that_yaml_1_1_converts_stay_text(read, text):
    assert read(f"name: {text}\ncodec: {{name: gauss, images_per_class: 3}}").name == text.strip("'")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: '3'", "seed: expected an integer >= 0 and < 2147483648, found '3'"),
        ("seed: true", "seed: expected an integer >= 0 and < 2147483648, found true"),
        ("seed: 3.0", "seed: expected an integer >= 0 and < 2147483648, found 3.0"),
        ("seed: 2147483648", "seed: expected an integer >= 0 and < 2147483648, found 2147483648"),
        ("whiten: zac", "whiten: expected one of zca, meanstd, none, found 'zac'"),
        ("distill: {donate: yes}", "distill.donate: expected true or false, found 'yes'"),
        ("distill: {lr: 0}", "distill.lr: expected a number > 0, found 0"),
        ("distill: {lr: .inf}", "distill.lr: expected a finite number > 0, found Infinity"),
        ("distill: {iterations: many}", "distill.iterations: expected an integer >= 1, found 'many'"),
        ("distill: 3", "distill: expected a section with the keys iterations, lr, log_every, donate, found 3"),
        ("widths: 3", "widths: expected a list of length >= 1 and of length <= 3, each an integer >= 1, found 3"),
        ("widths: [1, 0]", "widths.1: expected an integer >= 1, found 0"),
        ("batch: 0", "batch: expected an integer >= 1 or null, found 0"),
        ("rival: 3", "rival: expected a section whose name is one of gauss, pixel or null, found 3"),
        ("warmup: {iterations: 5}", "warmup: log_every: found 10, allowed at most iterations = 5"),
    ],
)
def test_bad_value_is_one_line_with_key_found_and_allowed(read, text, expected):
    assert message(read, GOOD + text) == f"{expected} (in x.yaml)"


# Tagged unions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("codec: {images_per_class: 3}", "codec.name: missing; expected one of gauss, pixel"),
        ("codec: {name: guass}", "codec.name: expected one of gauss, pixel, found 'guass'"),
        ("codec: {name: gauss}", "codec.images_per_class: missing; expected an integer >= 1"),
        ("codec: gauss", "codec: expected a section whose name is one of gauss, pixel, found 'gauss'"),
        (
            "codec: {name: pixel, images_per_class: 3}",
            "codec.images_per_class: unknown key; known only when codec.name is gauss; allowed: name, scale",
        ),
        (
            "codec: {name: gauss, image_per_class: 3}",
            "codec.image_per_class: unknown key; did you mean images_per_class? allowed: name, images_per_class, bits",
        ),
    ],
)
def test_tagged_section_reports_in_terms_of_the_chosen_spec(read, text, expected):
    # The second error of the misspelled key is that images_per_class is missing.
    assert message(read, f"name: a\n{text}").replace(" (and 1 more)", "") == f"{expected} (in x.yaml)"


# Keys


def test_unknown_and_missing_keys_name_the_nearest_where_it_stands_and_all_allowed(read):
    assert message(read, GOOD + "distill: {iteratons: 3}") == (
        "distill.iteratons: unknown key; did you mean iterations? "
        "allowed: iterations, lr, log_every, donate (in x.yaml)"
    )
    text = message(read, GOOD + "iterations: 3")
    assert "iterations: unknown key; did you mean distill.iterations or warmup.iterations? allowed: name," in text
    assert message(read, GOOD + "dstill: {lr: 1}").startswith("dstill: unknown key; did you mean distill? ")
    assert message(read, "codec: {name: gauss, images_per_class: 3}") == "name: missing; expected text (in x.yaml)"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: a\nseed: 1\nname: b", 'x.yaml, line 3: .*duplicate key "name"'),
        ("1: a", "1: unknown key; allowed: name, "),
        ("[a, b]: 1", "x.yaml: keys must be str"),
        ("name: [1, 2", r"x.yaml, line 1: while parsing a flow sequence, expected ',' or '\]'"),
        ("name: a\n\tseed: 1", "x.yaml, line 2: while scanning"),
        ("name: a\n---\nname: b", "x.yaml, line 2: expected a single document"),
        ("name: !!python/name:os.system", "x.yaml, line 1: could not .* the tag '.*python/name:os.system'"),
        ("name: &a [*a]", "x.yaml: Circular reference"),
        ("- name", r'x.yaml: expected keys with values, found \["name"\]'),
        ("", "x.yaml: expected keys with values, found null"),
    ],
)
def test_malformed_yaml_names_file_and_line(read, text, problem):
    with pytest.raises(ConfigError, match=problem):
        read(text)


# Several errors


def test_one_error_unknown_keys_before_missing_ones_and_the_number_of_others(read):
    text = "name: a\ndistill: {lr: -1, iterations: 0}\ncodec: {name: gauss, image_per_class: 0}\n"
    found = message(read, text)
    assert found.startswith("codec.image_per_class: ") and found.endswith(" (and 3 more) (in x.yaml)")


# Overrides and the smoke block


def test_overrides_replace_values_and_create_sections(read):
    config = read(GOOD, "distill.iterations=100", "codec.images_per_class=30", "distill.lr=1e-3", "whiten=none")
    assert config == Config(
        name="a", whiten="none", codec=GaussSpec(images_per_class=30), distill=StepSpec(iterations=100, lr=1e-3)
    )


def test_former_names_of_settings_are_read(read):
    text = "name: a\ncodec: {name: gauss, gpc: 3}\nbaselines: [{name: gauss, lpc: 4}]\nsmoke: {codec: {gpc: 1}}\n"
    assert read(text) == read(GOOD + "baselines: [{name: gauss, images_per_class: 4}]")
    assert read(text, smoke=True).codec == read(text, "codec.gpc=1").codec == GaussSpec(images_per_class=1)
    assert read(text, "codec={name: gauss, ipc: 2}", "baselines.0.gpc=9").baselines[0].images_per_class == 9
    twice = "codec.images_per_class: expected once, found as gpc and images_per_class (in "
    assert message(read, "name: a\ncodec: {name: gauss, gpc: 3, images_per_class: 3}").startswith(twice)
    assert message(read, GOOD, "codec={name: gauss, gpc: 3, images_per_class: 3}").startswith(twice)
    # The root's own keys keep their names.
    assert "ipc: unknown key" in message(read, GOOD + "ipc: 3")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "codec.images_per_class=many",
            "codec.images_per_class: expected an integer >= 1, found 'many' (in x.yaml with codec.images_per_class=m",
        ),
        (
            "dstill.iterations=3",
            "dstill: unknown key; did you mean distill? allowed: name, seed, whiten, codec, distill, warmup, "
            "baselines, rival, widths, batch, clip (in x.yaml with dstill.iterations=3)",
        ),
        (
            "warmup.iterations=5",
            "warmup: log_every: found 10, allowed at most iterations = 5 (in x.yaml with warmup.iterations=5)",
        ),
        ("seed", "override 'seed': expected section.key=value, such as distill.iterations=100"),
        ("a..b=3", "override 'a..b=3': expected section.key=value, such as distill.iterations=100"),
        ("seed=[1", "override 'seed=[1', line 1: while parsing a flow sequence"),
    ],
)
def test_bad_override_names_itself(read, override, expected):
    assert message(read, GOOD, override).startswith(expected)


FULL = "name: a\ncodec: {name: gauss, images_per_class: 3, bits: 32}\nsmoke: {codec: {images_per_class: 8}}\n"


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("name", ["codec.name=pixel", "codec.name= pixel "])
def test_another_spec_begins_its_section_anew_without_what_file_and_smoke_block_say_of_the_former(read, name, smoke):
    assert read(FULL, name, smoke=smoke).codec == PixelSpec()


@pytest.mark.parametrize(
    "overrides", [("codec.name=pixel", "codec.scale=0.5"), ("codec.scale=0.5", "codec.name=pixel")]
)
def test_overrides_of_a_section_that_begins_anew_hold_in_any_order(read, overrides):
    assert read(FULL, *overrides).codec == PixelSpec(scale=0.5)
    assert read(FULL, *overrides, smoke=True).codec == PixelSpec(scale=0.5)


def test_sections_begin_anew_alone_by_the_last_name_and_one_without_a_name_is_completed(read):
    rivals = GOOD + "baselines: [{name: pixel, scale: 0.5}, {name: gauss, gpc: 3}]\nrival: {name: gauss, gpc: 2}\n"
    found = read(rivals, "baselines.1.name=pixel", "rival.name=pixel")
    assert found.baselines == (PixelSpec(scale=0.5), PixelSpec())
    assert (found.rival, found.codec) == (PixelSpec(), GaussSpec(images_per_class=3))
    kept = GaussSpec(images_per_class=3, bits=32)
    assert read(FULL, "codec.name=pixel", "codec.name=gauss").codec == kept
    assert read(FULL, "codec.name=gauss", "codec.name=pixel").codec == PixelSpec()
    assert read("name: a\ncodec: {scale: 0.5}", "codec.name=pixel").codec == PixelSpec(scale=0.5)
    assert read(GOOD + "rival: null", "rival.name=pixel").rival == PixelSpec()
    text = message(read, "name: a\ncodec: {name: pixel, scale: 0.5}\n", "codec.bits=32", "codec.name=gauss")
    assert (
        text
        == "codec.images_per_class: missing; expected an integer >= 1 (in x.yaml with codec.bits=32, codec.name=gauss)"
    )


def test_the_same_spec_keeps_what_the_file_says_of_it(read):
    assert read(FULL, "codec.name=gauss").codec == GaussSpec(images_per_class=3, bits=32)
    assert read(FULL, "codec.name=gauss", smoke=True).codec == GaussSpec(images_per_class=8, bits=32)
    assert read(FULL, "codec.name=gauss", "codec.images_per_class=5").codec == GaussSpec(images_per_class=5, bits=32)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["codec.name=pixel", "codec.images_per_class=3"],
            "codec.images_per_class: unknown key; known only when codec.name is gauss; allowed: name, scale ",
        ),
        (
            ["codec.name=pixel", "codec.scale=2"],
            "codec.scale: expected a number > 0 and <= 1, found 2 ",
        ),
        (["codec.name=wavelet"], "codec.name: expected one of gauss, pixel, found 'wavelet' "),
    ],
)
@pytest.mark.parametrize("smoke", [False, True])
def test_error_in_a_section_that_begins_anew_names_the_overrides(read, overrides, expected, smoke):
    where = "its smoke block, " * smoke + ", ".join(overrides)
    assert message(read, FULL, *overrides, smoke=smoke) == f"{expected}(in x.yaml with {where})"


SMOKE = GOOD + "distill: {iterations: 500, lr: 2}\nsmoke:\n  distill: {iterations: 20}\n  widths: [1]\n"


def test_smoke_block_is_merged_deeply_when_asked_for_and_dropped_otherwise(read):
    full = Config(name="a", codec=GaussSpec(images_per_class=3), distill=StepSpec(iterations=500, lr=2.0))
    assert read(SMOKE) == full
    small = dataclasses.replace(full, distill=StepSpec(iterations=20, lr=2.0), widths=(1,))
    assert read(SMOKE, smoke=True) == small
    assert read(SMOKE, "distill.iterations=30", smoke=True).distill.iterations == 30
    text = message(read, GOOD + "smoke: {distill: {iterations: 0}}", smoke=True)
    assert text == "distill.iterations: expected an integer >= 1, found 0 (in x.yaml with its smoke block)"


@pytest.mark.parametrize("text", [GOOD, GOOD + "smoke: 3", GOOD + "smoke:"])
def test_smoke_run_without_a_smoke_block_is_refused(read, text):
    with pytest.raises(ConfigError, match="x.yaml: a smoke test needs the block 'smoke:'"):
        read(text, smoke=True)


# Writing and describing


@pytest.mark.parametrize(
    "value", ["yes", "null", "1e-3", "0o7", "010", "12:30", "a: b", "2024-01-01", "", " x ", "é", "<<", "~"]
)
def test_text_survives_writing_whatever_it_looks_like(value):
    assert yaml12.parse(yaml12.dump({"a": value, "b": [value]}), source="text") == {"a": value, "b": [value]}


@pytest.mark.parametrize("value", [1e-5, 1e300, 0.1 + 0.2, -0.0, 3.0, 12345678901234567890, True, None])
def test_numbers_survive_writing_to_the_bit(value):
    found = yaml12.parse(yaml12.dump({"a": value}), source="text")["a"]
    assert type(found) is type(value) and found == value
    if isinstance(value, float):
        assert math.copysign(1.0, found) == math.copysign(1.0, value)


def test_written_config_loads_back_equal(read):
    config = Config(
        name="1e-3",
        codec=PixelSpec(scale=1e-5),
        distill=StepSpec(iterations=20, lr=1e-7, donate=False),
        baselines=(GaussSpec(images_per_class=1, bits=32), PixelSpec()),
        rival=GaussSpec(images_per_class=9),
        batch=4,
        clip=0.5,
    )
    assert read(to_yaml(config)) == config
    assert to_yaml(read(to_yaml(config))) == to_yaml(config)


def test_description_lists_every_setting_with_type_default_and_sentence():
    lines = [line.split("  ") for line in describe(Config).splitlines()]
    lines = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    rows = {line[0]: line[1:] for line in lines}
    assert rows["name"] == ["text", "required"]
    assert rows["seed"] == ["integer >= 0 and < 2147483648", "0"]
    assert rows["codec.name"] == ["one of gauss, pixel", "required", "The parameterization."]
    assert rows["codec.images_per_class"] == ["integer >= 1", "required", "Gaussian images per class."]
    assert rows["codec.scale"] == ["number > 0 and <= 1", "1.0", "Share of the side that is stored."]
    assert rows["distill.iterations"] == ["integer >= 1", "1000", "Outer steps."]
    assert rows["warmup.iterations"] == ["integer >= 1", "50", "Outer steps."]
    assert rows["rival.name"] == ["one of gauss, pixel", "null"]
    assert rows["widths"][-1] == "[8, 8]"
    assert "when codec.name is gauss:" in rows


def test_every_setting_of_a_run_is_described():
    lines = [line for line in describe(RunConfig).splitlines() if not line.startswith("when ")]
    assert len(lines) > 10
    for line in lines:
        cells = [cell for cell in line.split("  ") if cell.strip()]
        assert len(cells) == 4 and " " in cells[3], line


# The config of a run directory

RUN = "name: a\nipc: 1\ndata: {per_class: 9}\ncodec: {name: pixel, lr: 0.1, gpc: 0}\ndistill: {iterations: 10}\n"


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (RUN, ["codec.lr=0.2"], r"codec.lr is 0.1 there and 0.2 now\. Put the old values back"),
        (RUN, ["codec.lr=0.2"], "; add --extend to go on with the new values"),
        (RUN, ["data.per_class=8", "codec.lr=0.2"], "data.per_class is 9 there and 8 now; codec.lr is 0.1 there and"),
        (RUN, ["codec={name: gaussian}"], 'codec.name is "pixel" there and "gaussian" now; .* is not set there and'),
        (RUN, ["distill.devices=2", "seed=1"], r"config: seed is 0 .*\(free to change: distill.devices, name\)"),
        # It came later, and has its default; what was left open is filled in, but not otherwise.
        (RUN.replace("gpc: 0", "gpc: 3"), [], "codec.images_per_class is 3 there and 5 now"),
    ],
)
def test_another_config_is_refused_with_both_values(write, text, overrides, expected):
    with pytest.raises(UserError, match=expected) as caught:
        compared(write, text, overrides)
    assert "\n" not in str(caught.value) and "devices is" not in str(caught.value)


def compared(write, text, overrides=(), extend=False):
    held, asked = load(write(text)), load(write(RUN), overrides)
    resolved = dataclasses.replace(asked, codec=dataclasses.replace(asked.codec, images_per_class=5))
    rules = {"may_change": ("name", "distill.devices"), "extendable": ("codec.lr*",), "extend": extend}
    return compare(Path("run"), held, resolved, asked=asked, **rules)


def test_config_of_an_older_version_and_what_may_change_is_accepted(write):
    assert compared(write, RUN, ["name=b", "distill.devices=0", "mmd.weight=0"]) == {}
    assert compared(write, RUN, ["codec.lr=0.2"], extend=True) == {"codec.lr": (0.1, 0.2)}
    assert compared(write, RUN.replace("gpc: 0", "gpc: 5")) == {}
    with pytest.raises(UserError, match=r"seed is 0 there and 1 now\..*; --extend takes codec.lr\*"):
        compared(write, RUN, ["codec.lr=0.2", "seed=1"], extend=True)
