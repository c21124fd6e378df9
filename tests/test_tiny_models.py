import pytest
import torch
from tiny_models import causal_lm_types, tiny_config, tiny_model


def test_equal_seeds_give_equal_models_and_leave_the_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    one, other, third = tiny_model("llama"), tiny_model("llama"), tiny_model("llama", seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(next(one.parameters()), next(third.parameters()))


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "gemma3", "jamba", "deepseek_v3", "qwen3_next"])
def test_models_are_small_finite_and_in_float32(kind: str) -> None:
    model = tiny_model(kind)
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) < 2e6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.isfinite().all() and parameter.abs().max() > 0 for parameter in model.parameters())


def test_one_layer_of_each_type_stays() -> None:
    assert sorted(tiny_config("jamba").layer_types) == ["full_attention", "linear_attention"]
    assert set(tiny_config("gemma3_text").layer_types) == {"sliding_attention", "full_attention"}


def test_the_types_are_those_of_transformers() -> None:
    assert {"llama", "gpt2", "mixtral"} <= set(causal_lm_types())
