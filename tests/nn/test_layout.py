import pytest

from sparsejax.attention import AttentionConfig
from sparsejax.config import FieldError
from sparsejax.memory import MemoryConfig
from sparsejax.nn.config import GatedConfig, ModelConfig, runs


def model(depth, **changes):
    sizes = {"depth": depth, "width": 32, "heads": 4, "kv_heads": 2}
    return ModelConfig(**sizes, **{"ffn": GatedConfig(hidden=64), **changes})


def shape_of(config):
    return [(run.start, len(run.period), run.repeats) for run in runs(config)]


def test_equal_layers_are_one_scan():
    assert shape_of(model(24)) == [(0, 1, 24)]


def test_every_third_layer_dense_is_one_scan_of_period_three():
    window = AttentionConfig(
        pattern="sliding_window", arguments={"window": 4}, dense_every=3
    )
    config = model(12, attention=window)
    assert shape_of(config) == [(0, 3, 4)]
    assert [s.attention.pattern for s in runs(config)[0].period] == [
        "sliding_window",
        "sliding_window",
        "causal",
    ]


def test_a_memory_in_the_middle_cuts_the_stack_in_three():
    config = model(5, memory=MemoryConfig(sub_keys=8, per_head=4), memory_layers=(2,))
    assert shape_of(config) == [(0, 1, 2), (2, 1, 1), (3, 1, 2)]


def test_every_layer_is_in_exactly_one_run():
    memory = MemoryConfig(sub_keys=8, per_head=4)
    config = model(13, memory=memory, memory_layers=(1, 5, 9))
    layers = [
        run.start + n
        for run in runs(config)
        for n in range(len(run.period) * run.repeats)
    ]
    assert layers == list(range(13))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "kv_heads=3: must divide heads=4"),
        ({"width": 30}, "heads=4: must divide width=30"),
        ({"memory_layers": (1,)}, "must name at least one layer exactly if"),
        ({"remat": "ful"}, "did you mean 'full'"),
        ({"ffn": GatedConfig(hidden=8), "depth": 0}, "depth=0: must be positive"),
    ],
)
def test_a_model_that_cannot_be_is_refused(change, message):
    sizes = {"depth": 2, "width": 32, "heads": 4, "kv_heads": 2}
    fields = {**sizes, "ffn": GatedConfig(hidden=64), **change}
    with pytest.raises(FieldError, match=message):
        ModelConfig(**fields)


def test_a_memory_layer_beyond_the_depth_is_refused():
    with pytest.raises(FieldError, match=r"memory_layers=\(2,\): must be distinct"):
        model(2, memory=MemoryConfig(sub_keys=8, per_head=4), memory_layers=(2,))
