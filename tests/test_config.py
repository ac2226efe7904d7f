"""Configs: each way to get one wrong ends in one line that names the fault."""

from dataclasses import dataclass, field, make_dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from sparsejax import config
from sparsejax.config import ConfigError, FieldError, convert, override


@dataclass(frozen=True, kw_only=True)
class Dense:
    kind: Literal["dense"] = "dense"
    hidden: int = 8


@dataclass(frozen=True, kw_only=True)
class Experts:
    kind: Literal["experts"] = "experts"
    experts: int
    per_token: int = 1

    def __post_init__(self):
        config.require(
            self.per_token <= self.experts,
            "per_token",
            self.per_token,
            f"must be at most experts={self.experts}; lower it",
        )


@dataclass(frozen=True, kw_only=True)
class Optim:
    name: str = "adamw"
    rate: float = 0.1

    def __post_init__(self):
        config.choose("name", self.name, {"adamw": 0, "lion": 0})


@dataclass(frozen=True, kw_only=True)
class Plan:
    density: float = 0.5
    groups: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Run:
    steps: int
    seed: int = 0
    resume: bool = False
    nm: Literal[2, 4] = 4
    clip: float | None = None
    names: tuple[str, ...] = ()
    grid: tuple[int, int] = (1, 1)
    limit: int | Literal["all"] = "all"
    ffn: Dense | Experts = Dense()
    optim: Optim = Optim(name="lion", rate=0.01)
    plan: Plan | None = None
    blocks: tuple[Dense | Experts, ...] = ()
    total: int = field(default=0, init=False)


def run(**values):
    return convert(Run, {"steps": 1, **values})


def overridden(path, text, **values):
    values = {"steps": 1, **values}
    override(Run, values, path, text)
    return convert(Run, values)


def complaint(function, *args, **kwargs):
    """The one line that a user reads."""
    with pytest.raises(ConfigError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": 3}, "config.step: no such field; did you mean 'steps'?"),
        ({"xyzzy": 3}, "config.xyzzy: no such field; one of blocks, clip, ffn"),
        ({"total": 3}, "config.total: no such field"),
        ({"optim": {"rat": 1.0}}, "config.optim.rat: no such field; did you mean"),
        ({"steps": "ten"}, "config.steps='ten': expected int"),
        ({"steps": True}, "config.steps=True: expected int"),
        ({"steps": 1.0}, "config.steps=1.0: expected int"),
        ({"steps": None}, "config.steps=None: expected int"),
        ({"resume": 1}, "config.resume=1: expected bool"),
        ({"clip": "big"}, "config.clip='big': expected float or none"),
        ({"clip": True}, "config.clip=True: expected float or none"),
        ({"clip": float("nan")}, "config.clip=nan: must be finite"),
        ({"clip": float("inf")}, "config.clip=inf: must be finite"),
        ({"clip": 10**400}, "must be finite"),
        ({"nm": 3}, "config.nm=3: expected 2 or 4"),
        ({"nm": 4.0}, "config.nm=4.0: expected 2 or 4"),
        ({"limit": "none"}, "config.limit='none': expected int or"),
        ({"names": (1,)}, "config.names[0]=1: expected str"),
        ({"names": {"a": 1}}, "config.names={'a': 1}: expected tuple"),
        ({"grid": (1, 2, 3)}, "config.grid=(1, 2, 3): expected 2 values"),
        ({"grid": 3}, "config.grid=[3]: expected 2 values"),
        ({"optim": 3}, "config.optim=3: expected Optim"),
        ({"optim": None}, "config.optim=None: expected Optim"),
        ({"optim": {"name": "lino"}}, "config.optim.name='lino': no such name; did"),
        ({"plan": {"groups": {"a": "b"}}}, "config.plan.groups.a='b': expected float"),
        ({"ffn": {"kind": "expert"}}, "config.ffn.kind='expert': no such kind; did"),
        ({"ffn": {"kind": 3}}, "config.ffn.kind=3: no such kind; one of dense"),
        ({"ffn": {"kind": ["dense"]}}, "config.ffn.kind=['dense']: no such kind"),
        ({"ffn": {"kind": "experts"}}, "config.ffn.experts: missing; give it a value"),
        ({"ffn": {"experts": 2}}, "config.ffn.experts: no such field"),
        (
            {"ffn": {"kind": "experts", "experts": 2, "per_token": 3}},
            "config.ffn.per_token=3: must be at most experts=2; lower it",
        ),
        (
            {"blocks": [{"kind": "dense"}, {"kind": "dense", "hiden": 2}]},
            "config.blocks[1].hiden: no such field; did you mean 'hidden'?",
        ),
    ],
)
def test_convert_names_path_value_rule_and_remedy(values, message):
    assert message in complaint(run, **values)


def test_convert_refuses_what_is_missing():
    expected = "config.steps: missing; give it a value of type int"
    assert complaint(convert, Run, {}) == expected


def test_convert_lists_nothing_where_nothing_is_legal():
    @dataclass(frozen=True, kw_only=True)
    class Empty:
        pass

    assert complaint(convert, Empty, {"a": 1}) == "config.a: no such field"


def test_convert_fills_defaults_and_turns_sections_into_dataclasses():
    assert run() == Run(steps=1)
    assert run(optim={"rate": 1}).optim == Optim(name="adamw", rate=1.0)
    assert run(plan={}).plan == Plan()
    assert run(plan=None).plan is None


def test_convert_reads_a_config_dict_like_a_dict():
    values = {"steps": 2, "ffn": {"kind": "experts", "experts": 4}, "names": ("a",)}
    assert convert(Run, ConfigDict(values)) == convert(Run, values)


def test_convert_chooses_the_member_of_a_union_by_its_kind():
    assert run(ffn={"kind": "experts", "experts": 2}).ffn == Experts(experts=2)
    assert run(ffn={"kind": "dense", "hidden": 3}).ffn == Dense(hidden=3)


def test_convert_takes_the_first_member_of_a_union_without_a_kind():
    assert run(ffn={"hidden": 3}).ffn == Dense(hidden=3)


def test_convert_accepts_a_section_that_is_already_converted():
    assert run(ffn=Experts(experts=2)).ffn == Experts(experts=2)


@pytest.mark.parametrize("value", [("a",), ["a"], "a"])
def test_convert_reads_a_list_or_a_single_element_as_a_tuple(value):
    assert run(names=value).names == ("a",)


def test_convert_turns_an_int_into_a_float_where_a_float_is_meant():
    clip = run(clip=1).clip
    assert clip == 1.0
    assert type(clip) is float


def test_convert_lets_an_int_be_as_large_as_it_likes():
    assert run(seed=10**400).seed == 10**400


@pytest.mark.parametrize("value", ["all", 3])
def test_convert_tries_every_option_of_a_union(value):
    assert run(limit=value).limit == value


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("steps", "12", 12),
        ("steps", "1_000", 1000),
        ("clip", "1e-3", 1e-3),
        ("clip", "2", 2.0),
        ("clip", "none", None),
        ("clip", "None", None),
        ("resume", "true", True),
        ("resume", "False", False),
        ("nm", "2", 2),
        ("limit", "all", "all"),
        ("names", "('a', 'b')", ("a", "b")),
        ("names", "a, b", ("a", "b")),
        ("names", "a", ("a",)),
        ("names", "()", ()),
        ("grid", "2,3", (2, 3)),
        ("plan", "none", None),
        ("plan", "{'density': 0.25}", Plan(density=0.25)),
    ],
)
def test_override_parses_the_text_as_the_type_of_its_field(path, text, value):
    assert getattr(overridden(path, text), path) == value


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("stesp", "1", "config.stesp: no such field; did you mean 'steps'?"),
        ("", "1", "config.: no such field"),
        ("optim.rats", "1", "config.optim.rats: no such field; did you mean 'rate'?"),
        ("optin.rate", "1", "config.optin: no such field; did you mean 'optim'?"),
        ("steps.more", "1", "config.steps=1: not a section"),
        ("seed.more", "1", "config.seed: not a section, so it has no field 'more'"),
        ("steps", "ten", "config.steps=ten: expected int"),
        ("steps", "2 **", "config.steps=2 **: expected int"),
        ("steps", "{[]: 1}", "config.steps={[]: 1}: expected int"),
        ("steps", "(" * 10_000, "expected int"),
        ("steps", "1e3", "config.steps=1000.0: expected int"),
        ("clip", "nan", "config.clip=nan: expected float or none"),
        ("nm", "3", "config.nm='3': expected 2 or 4"),
        ("resume", "maybe", "config.resume=maybe: expected bool"),
        ("optim.name", "sgd", "config.optim.name='sgd': no such name; one of adamw"),
        ("ffn.kind", "sparse", "config.ffn.kind='sparse': no such kind"),
    ],
)
def test_override_names_the_fault(path, text, message):
    assert message in complaint(overridden, path, text)


def test_override_starts_from_the_default_of_a_section_that_the_file_leaves_out():
    assert overridden("optim.rate", "2").optim == Optim(name="lion", rate=2.0)


def test_override_keeps_the_rest_of_a_section_that_the_file_gives():
    optim = overridden("optim.rate", "2", optim={"name": "adamw"}).optim
    assert optim == Optim(name="adamw", rate=2.0)


@pytest.mark.parametrize("given_none", [True, False])
def test_override_opens_a_section_that_is_none(given_none):
    values = {"plan": None} if given_none else {}
    assert overridden("plan.density", "0.25", **values).plan == Plan(density=0.25)


def test_override_reaches_into_a_dict_of_named_values():
    assert overridden("plan.groups.mlp", "0.25").plan.groups == {"mlp": 0.25}


def test_override_refuses_to_open_what_is_no_section():
    message = complaint(overridden, "optim.rate", "2", optim=3)
    assert message == "config.optim=3: not a section"


def test_override_switches_a_union_to_another_kind():
    values = {"steps": 1, "ffn": {"kind": "dense"}}
    override(Run, values, "ffn.kind", "experts")
    override(Run, values, "ffn.experts", "4")
    assert convert(Run, values).ffn == Experts(experts=4)


def test_override_of_a_kind_refuses_fields_that_only_the_old_kind_has():
    message = complaint(overridden, "ffn.kind", "experts", ffn={"hidden": 3})
    assert "config.ffn.hidden: no such field" in message


def test_read_returns_nested_plain_dicts(tmp_path):
    path = tmp_path / "moe.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    return ConfigDict({'steps': 3, 'optim': {'rate': 0.5}})\n"
    )
    values = config.read(path)
    assert type(values["optim"]) is dict
    assert convert(Run, values) == Run(steps=3, optim=Optim(rate=0.5))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "AttributeError: module 'moe' has no attribute 'get_config'"),
        ("def get_config(): return 3", "get_config() must return a ConfigDict"),
        ("def get_config(): return None", "get_config() must return a ConfigDict"),
        ("def get_config(): return 1 / 0", "ZeroDivisionError: division by zero"),
        ("def get_config(:", "SyntaxError"),
        (
            "from ml_collections import ConfigDict, config_dict\n"
            "def get_config():\n"
            "    return ConfigDict({'a': config_dict.required_placeholder(int)})",
            "RequiredValueError",
        ),
    ],
)
def test_read_says_which_file_failed_and_how(tmp_path, text, message):
    path = tmp_path / "moe.py"
    path.write_text(text)
    found = complaint(config.read, path)
    assert found.startswith(f"--config={path}: ")
    assert message in found


def test_read_passes_a_config_error_of_the_file_on(tmp_path):
    path = tmp_path / "moe.py"
    path.write_text(
        "from sparsejax.config import ConfigError\n"
        "def get_config(): raise ConfigError('two of a kind')\n"
    )
    assert complaint(config.read, path) == "two of a kind"


def test_read_suggests_a_file_that_exists(tmp_path):
    (tmp_path / "quickstart.py").touch()
    message = complaint(config.read, tmp_path / "quikstart.py")
    assert message.endswith(f"no such file; did you mean '{tmp_path}/quickstart.py'?")


def test_read_suggests_nothing_in_an_empty_or_absent_folder(tmp_path):
    assert complaint(config.read, tmp_path / "no" / "a.py").endswith("no such file")


def test_read_refuses_what_is_not_python(tmp_path):
    path = tmp_path / "notes.md"
    path.write_text("# Notes")
    assert complaint(config.read, path) == f"--config={path}: not a Python file"


def test_read_takes_the_config_of_a_run(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"fingerprint": "0", "config": {"seed": 3}}')
    assert config.read(path) == {"seed": 3}
    path.write_text('{"model_type": "llama"}')
    said = f"--config={path}: not the config.json of a run"
    assert complaint(config.read, path) == said


def test_require_raises_with_field_value_and_rule():
    config.require(True, "rate", 1, "unused")
    with pytest.raises(FieldError, match="rate=-1: must be positive; raise it"):
        config.require(False, "rate", -1, "must be positive; raise it")


RUNS = st.builds(
    Run,
    steps=st.integers(),
    resume=st.booleans(),
    nm=st.sampled_from([2, 4]),
    clip=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    names=st.lists(st.text(max_size=3), max_size=3).map(tuple),
    limit=st.integers() | st.just("all"),
    ffn=st.builds(Dense) | st.builds(Experts, experts=st.integers(1, 9)),
    plan=st.none() | st.builds(Plan, density=st.floats(0, 1)),
    blocks=st.lists(st.builds(Dense, hidden=st.integers()), max_size=2).map(tuple),
)


def settable(run):
    return {k: v for k, v in config.to_dict(run).items() if k != "total"}


@given(run=RUNS)
def test_a_config_survives_json_and_keeps_its_fingerprint(run):
    again = convert(Run, settable(run))
    assert again == run
    assert config.fingerprint(again) == config.fingerprint(run)


@given(one=RUNS, other=RUNS)
def test_fingerprints_are_equal_for_equal_configs_only(one, other):
    equal = config.to_dict(one) == config.to_dict(other)
    assert (config.fingerprint(one) == config.fingerprint(other)) == equal


def test_a_field_added_later_changes_no_fingerprint_of_before():
    later = make_dataclass(
        "Dense", [("added", int, 7)], bases=(Dense,), frozen=True, kw_only=True
    )
    assert config.fingerprint(later(hidden=3)) == config.fingerprint(Dense(hidden=3))
    assert config.fingerprint(later(added=8)) != config.fingerprint(later())


def test_a_fingerprint_is_twelve_hexadecimal_digits_and_the_same_in_every_process():
    assert config.fingerprint(Dense()) == "b56acaf9442e"
