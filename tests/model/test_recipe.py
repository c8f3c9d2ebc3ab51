"""The recipes: where they differ, and their schedules as functions of the epoch."""

import json
import math
from dataclasses import asdict, fields, replace

import pytest

from model.recipe import (
    LAYERS,
    PAPER,
    RECIPES,
    SOURCE2012,
    LayerLearningRates,
    PlateauState,
    learning_rates,
    lighting_noise,
    recipe,
)


def test_recipes_are_found_by_name_and_the_source_is_first() -> None:
    """Every recipe is found by its own name; the error for an unknown name lists the known ones."""
    assert all(recipe(name).name == name for name in RECIPES)
    assert next(iter(RECIPES)) == "source2012"
    with pytest.raises(ValueError, match="'caffe'; choose one of source2012, paper"):
        recipe("caffe")


def test_paper_and_source_differ_where_they_should() -> None:
    """Exactly the fields differ on which text and source disagree."""
    differing = {
        field.name for field in fields(SOURCE2012) if getattr(SOURCE2012, field.name) != getattr(PAPER, field.name)
    }
    expected = (
        "name layers lrn lrn_within_map epochs learning_rates plateau lighting lighting_noise_ends crop_positions"
    )
    assert differing == set(expected.split())
    assert PAPER.lrn == replace(SOURCE2012.lrn, alpha=5 * SOURCE2012.lrn.alpha)
    both = zip(SOURCE2012.layers, PAPER.layers, strict=True)
    assert [ours.name for ours, text in both if ours.weight_sd != text.weight_sd] == ["conv3", "conv4", "conv5"]
    assert [layer.weight_sd for layer in SOURCE2012.layers] == [0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01]
    assert {layer.weight_sd for layer in PAPER.layers} == {0.01}
    assert [layer.bias for layer in PAPER.layers] == [0, 1, 0, 1, 1, 1, 1, 0]
    for name in LAYERS:
        ours, text = SOURCE2012.layer(name), PAPER.layer(name)
        assert ours.bias == text.bias
        assert sorted(set(ours.after) - {"lrn_within_map"}) == sorted(text.after)
    assert SOURCE2012.layer("conv1").after.index("relu") > PAPER.layer("conv1").after.index("relu")


@pytest.mark.parametrize(
    ("epoch", "conv1", "others"),
    [
        (0, (0.01, 0.02), (0.01, 0.02)),
        (24, (0.01, 0.02), (0.01, 0.02)),
        (25, (0.001, 0.002), (0.001, 0.002)),
        (50, (0.001, 0.002), (0.001, 0.002)),
        (51, (0.0001, 0.002), (0.0001, 0.002)),
        (66, (0.0001, 0.002), (0.0001, 0.002)),
        (67, (0.00001, 0.002), (0.0001, 0.002)),
        (71, (0.00001, 0.002), (0.0001, 0.002)),
        (72, (0.0, 0.0), (0.0001, 0.002)),
        (78, (0.0, 0.0), (0.0001, 0.002)),
        (79, (0.0, 0.0), (0.00001, 0.002)),
        (90, (0.0, 0.0), (0.00001, 0.002)),
    ],
)
def test_source_schedule_is_the_table_of_2012(
    epoch: int, conv1: tuple[float, float], others: tuple[float, float]
) -> None:
    """A run of 91 epochs follows the run notes in layers-145.cfg; conv1 has its own learning rates."""
    now = learning_rates(SOURCE2012, epoch, 91)
    assert list(now) == list(LAYERS)
    assert now["conv1"] == LayerLearningRates(*conv1)
    assert all(now[name] == LayerLearningRates(*others) for name in LAYERS[1:])
    assert lighting_noise(SOURCE2012, epoch, 91) == (0.1 if epoch < 67 else 0.0)


@pytest.mark.parametrize("epochs", [1, 2, 7, 30, 91, 200])
def test_a_run_of_any_length_keeps_the_proportions(epochs: int) -> None:
    """A change comes within one epoch after its share of the run, never before it, and learning rates only fall."""
    history = [learning_rates(SOURCE2012, epoch, epochs) for epoch in range(epochs)]
    for layer, first_with in (("fc8", 25), ("conv1", 72)):
        whole = learning_rates(SOURCE2012, first_with, 91)[layer]
        shares = [epoch / epochs for epoch, now in enumerate(history) if now[layer].weight <= whole.weight]
        assert all(share >= first_with / 91 for share in shares)
        assert not shares or shares[0] < first_with / 91 + 1 / epochs
    for layer in LAYERS:
        weights = [now[layer].weight for now in history]
        assert weights == sorted(weights, reverse=True)
    assert history[0]["conv1"] == LayerLearningRates(0.01, 0.02)


def test_epochs_outside_the_run_are_refused() -> None:
    """Epochs count from 0 and end before `epochs`; others raise an error."""
    for epoch in (-1, 10):
        with pytest.raises(ValueError, match=f"epoch {epoch} is not in a run of 10"):
            learning_rates(SOURCE2012, epoch, 10)
        with pytest.raises(ValueError, match=f"epoch {epoch} is not in a run of 10"):
            lighting_noise(SOURCE2012, epoch, 10)


def test_paper_learning_rates_follow_only_the_reductions() -> None:
    """All parameters have one learning rate, a tenth after each reduction, in any epoch; lighting noise stays on."""
    for reductions in range(4):
        expected = pytest.approx(0.01 * 10**-reductions)
        for epoch in (0, 40, 89):
            now = learning_rates(PAPER, epoch, 90, reductions)
            assert {rate for layer in now.values() for rate in (layer.weight, layer.bias)} == {now["conv1"].weight}
            assert now["conv1"].weight == expected
            assert lighting_noise(PAPER, epoch, 90) == 0.1


@pytest.mark.parametrize("name", RECIPES)
def test_learning_rate_scale_is_a_factor_on_all_learning_rates(name: str) -> None:
    """Factor s gives s times the learning rates in every epoch; a factor that is not positive raises an error."""
    plain, scaled = recipe(name), replace(recipe(name), learning_rate_scale=0.25)
    for epoch in (0, 30, 70, 85):
        for layer, now in learning_rates(scaled, epoch, plain.epochs, 1).items():
            then = learning_rates(plain, epoch, plain.epochs, 1)[layer]
            assert (now.weight, now.bias) == pytest.approx((then.weight / 4, then.bias / 4))
    with pytest.raises(ValueError, match="learning_rate_scale"):
        replace(plain, learning_rate_scale=0.0)


def test_plateau_reduces_after_its_patience_up_to_the_maximum() -> None:
    """If the error never improves, a reduction comes every `patience_epochs`, up to `max_reductions`."""
    plateau = PAPER.plateau
    assert plateau is not None
    states = [PlateauState().step(0.5, plateau)]
    for _ in range(10 * plateau.patience_epochs):
        states.append(states[-1].step(0.5, plateau))
    first_at = [
        next(i for i, state in enumerate(states) if state.reductions == n) for n in range(1, plateau.max_reductions + 1)
    ]
    assert first_at == [n * plateau.patience_epochs for n in range(1, plateau.max_reductions + 1)]
    assert states[-1].reductions == plateau.max_reductions == 3


def test_plateau_waits_while_the_error_improves() -> None:
    """A new lowest error restarts the patience; an equal one or NaN does not. A reduction keeps the lowest error."""
    plateau = PAPER.plateau
    assert plateau is not None
    state = PlateauState()
    for epoch in range(50):
        state = state.step(0.9 - 0.01 * (epoch // (plateau.patience_epochs - 1)), plateau)
    assert state.reductions == 0
    best = state.best_error
    for _ in range(plateau.patience_epochs):
        state = state.step(best + 0.1, plateau)
    assert (state.best_error, state.reductions) == (best, 1)
    assert PlateauState(0.4, 2, 1).step(0.4, plateau) == PlateauState(0.4, 3, 1)
    assert PlateauState(0.4, 2, 1).step(math.nan, plateau) == PlateauState(0.4, 3, 1)


@pytest.mark.parametrize("state", [PlateauState(), PlateauState(0.375, 4, 2)])
def test_plateau_state_survives_json(state: PlateauState) -> None:
    """A checkpoint reads what it wrote, also before the first validation (infinity)."""
    assert PlateauState(**json.loads(json.dumps(asdict(state)))) == state


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_can_be_written_down(name: str) -> None:
    """Every field of a recipe can be written as JSON."""
    written = json.loads(json.dumps(asdict(recipe(name))))
    assert set(written) == {field.name for field in fields(SOURCE2012)}
    assert written["layers"][0]["after"] == list(recipe(name).layer("conv1").after)
