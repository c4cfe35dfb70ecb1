"""Information gain: exact against a plain loop, fast against exact, and the way back to the bit."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn.attention import SDPBackend, sdpa_kernel

from perplexit.checkpoints.module_identity import module_fingerprint
from perplexit.errors import UsageError
from perplexit.igf.gain_measures import DirectionalGain, ExactGain, FirstOrderGain, gain_measure
from perplexit.igf.losses import ContextScorer, context_losses
from perplexit.igf.optimizer_step import StepRule, objective_gradient, stepped
from tests.tiny_models import TINY_MODELS

SGD = StepRule("sgd", learning_rate=1e-2, clip_norm=None)


def contexts(count: int, seed: int, length: int = 12) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(2, 320, (count, length)))


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.set_num_threads(1)
    return TINY_MODELS[request.param]().eval()


def naive_gain(model: torch.nn.Module, objective, context, optimizer_of, clip) -> float:
    """A copy of the model, a real optimizer, the objective row by row: the dull oracle."""

    def loss_of(copied: torch.nn.Module, row: torch.Tensor) -> torch.Tensor:
        logits = copied(input_ids=row[None]).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, row[1:])

    def loss_on(copied: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(torch.stack([loss_of(copied, row) for row in objective]).mean())

    copied = copy.deepcopy(model).eval()
    before = loss_on(copied)
    optimizer = optimizer_of(copied.parameters())
    loss_of(copied, context).backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(copied.parameters(), clip)
    optimizer.step()
    return before - loss_on(copied)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_exact_gain_is_that_of_a_real_optimizer_on_a_copy(model, clip) -> None:
    model = model.double()
    objective, candidates = contexts(7, 1), contexts(3, 2)
    adamw = StepRule(learning_rate=1e-3, clip_norm=clip)
    found = ExactGain(model, objective, adamw).gains(candidates)
    expected = [
        naive_gain(
            model,
            objective,
            c,
            lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-8, weight_decay=0.0),
            clip,
        )
        for c in candidates
    ]
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)
    sgd = StepRule("sgd", learning_rate=1e-2, clip_norm=clip)
    found = ExactGain(model, objective, sgd).gains(candidates)
    expected = [
        naive_gain(model, objective, c, lambda p: torch.optim.SGD(p, lr=1e-2), clip)
        for c in candidates
    ]
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert np.abs(expected).max() > 1e-5  # so the tolerance would show a gain that is missing


@pytest.mark.parametrize("mode", ["exact", "first-order", "directional"])
def test_weights_are_bit_identical_after_every_pair(model, mode) -> None:
    before = module_fingerprint(model)
    storage = [p.data_ptr() for p in model.parameters()]
    measure = gain_measure(model, contexts(5, 1), mode=mode)
    for context in contexts(4, 2):
        measure.gains(context[None])
        assert module_fingerprint(model) == before
    assert [p.data_ptr() for p in model.parameters()] == storage
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


def test_weights_come_back_after_an_exception_inside_the_step(model) -> None:
    before = module_fingerprint(model)
    context = contexts(1, 3)

    def interrupted() -> None:
        with stepped(model, lambda: context_losses(model, context)[0], StepRule()):
            assert module_fingerprint(model) != before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert module_fingerprint(model) == before


def test_first_order_ranks_contexts_as_the_exact_step_does(model) -> None:
    objective, candidates = contexts(20, 4), contexts(40, 5)
    rule = StepRule(learning_rate=1e-5)
    exact = ExactGain(model.double(), objective, rule).gains(candidates)
    fast = FirstOrderGain(model, objective, rule).gains(candidates)
    assert stats.spearmanr(exact, fast).statistic > 0.99
    assert fast == pytest.approx(exact, rel=0.1, abs=2e-5)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_first_order_sgd_is_the_gradients_product(model, clip) -> None:
    model = model.double()
    objective, candidates = contexts(6, 6), contexts(3, 7)
    gradient = objective_gradient(model, objective)
    expected = []
    for context in candidates:
        model.zero_grad()
        context_losses(model, context[None])[0].backward()
        scale = 1.0
        if clip is not None:
            scale = clip / (
                float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])) + 1e-6
            )
        pairs = zip(gradient, model.parameters(), strict=True)
        expected.append(1e-2 * scale * sum(float((g * p.grad).sum()) for g, p in pairs))
    model.zero_grad()
    rule = StepRule("sgd", learning_rate=1e-2, clip_norm=clip)
    assert FirstOrderGain(model, objective, rule).gains(candidates) == pytest.approx(expected)


class _Losses(torch.nn.Module):
    """Contexts' losses as a module's output, so that `functional_call` can replace weights."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, contexts_BT: torch.Tensor) -> torch.Tensor:
        return context_losses(self.model, contexts_BT)


def forward_mode_gains(model, objective: torch.Tensor, candidates: torch.Tensor) -> np.ndarray:
    """The same derivative by dual numbers, which is exact: the dull oracle."""
    named = [(f"model.{name}", p) for name, p in model.named_parameters()]
    gradient = objective_gradient(model, objective)
    along = {name: g for (name, _), g in zip(named, gradient, strict=True) if g is not None}
    point = {name: p.detach() for name, p in named if name in along}

    def losses(dual: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(_Losses(model), dual, (candidates,))

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no dual form
        slopes = torch.func.jvp(losses, (point,), (along,))[1]
    return SGD.learning_rate * slopes.double().numpy()


def test_directional_gain_is_the_gradients_product_and_forward_mode_agrees(model) -> None:
    model = model.double()
    objective, candidates = contexts(6, 6), contexts(9, 7)
    product = FirstOrderGain(model, objective, SGD).gains(candidates)
    central = DirectionalGain(model, objective, SGD, shift=1e-3).gains(candidates)
    forward = forward_mode_gains(model, objective, candidates)
    assert forward == pytest.approx(product, rel=1e-6, abs=1e-12)
    assert central == pytest.approx(product, rel=1e-2, abs=1e-6)
    assert stats.spearmanr(central, product).statistic > 0.99


def test_gains_do_not_depend_on_the_batch_they_come_in(model) -> None:
    objective, candidates = contexts(6, 6), contexts(5, 7)
    measure = gain_measure(model, objective, mode="directional")
    together = measure.gains(candidates)
    alone = np.concatenate([measure.gains(c[None]) for c in candidates])
    assert together == pytest.approx(alone, rel=1e-3, abs=1e-7)


def test_first_order_holds_one_gradient_at_a_time(model) -> None:
    measure = FirstOrderGain(model, contexts(4, 1), StepRule())
    most = 0
    original = measure._add

    def watched(direction: torch.Tensor, gradient: torch.Tensor) -> None:
        nonlocal most
        most = max(most, sum(p.grad is not None for p in model.parameters()))
        original(direction, gradient)

    measure._add = watched
    measure.gains(contexts(1, 2))
    assert most == 0  # the one in use is out of its place already, every other one is freed


def test_only_trainable_parameters_are_stepped(model) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name or "ln" in name)
    frozen = ExactGain(model, contexts(6, 6), StepRule(learning_rate=1e-3)).gains(contexts(3, 7))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    free = ExactGain(model, contexts(6, 6), StepRule(learning_rate=1e-3)).gains(contexts(3, 7))
    assert np.abs(frozen - free).min() > 1e-5


def test_a_model_with_nothing_to_train_is_refused(model) -> None:
    model.requires_grad_(False)
    with pytest.raises(UsageError, match="all frozen"):
        gain_measure(model, contexts(3, 1), mode="exact").gains(contexts(1, 2))


def test_directional_refuses_adamw_clipping_and_dropout(model) -> None:
    with pytest.raises(UsageError, match="SGD without clipping"):
        gain_measure(model, contexts(3, 1), mode="directional", rule=StepRule())
    with pytest.raises(UsageError, match="no dropout"):
        gain_measure(model, contexts(3, 1), mode="directional", dropout=True)
    with pytest.raises(UsageError, match="exact, first-order, directional"):
        gain_measure(model, contexts(3, 1), mode="quick")  # type: ignore[arg-type]


@pytest.mark.trap(25)
def test_dropout_is_off_while_measuring_unless_switched_on() -> None:
    gpt2 = TINY_MODELS["gpt2"]()
    gpt2.train()
    objective, candidates = contexts(4, 1), contexts(3, 2)
    rule = StepRule(learning_rate=1e-3)
    first = ExactGain(gpt2, objective, rule).gains(candidates)
    assert np.array_equal(first, ExactGain(gpt2, objective, rule).gains(candidates))
    torch.manual_seed(0)
    dropped = ExactGain(gpt2, objective, rule, dropout=True).gains(candidates)
    assert not np.allclose(first, dropped, atol=1e-5)


def test_measured_losses_are_the_models_own_whatever_the_batch(model) -> None:
    rows = contexts(9, 8)
    with torch.no_grad():
        expected = [float(model(input_ids=r[None], labels=r[None]).loss) for r in rows]
    for batch_ids in (1, 30, 1000):
        scorer = ContextScorer(model, batch_ids=batch_ids)
        assert scorer.losses(rows) == pytest.approx(expected, rel=1e-5)
    assert ContextScorer(model).mean_loss(rows) == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [("learning_rate", 0.0), ("clip_norm", -1.0), ("epsilon", 0.0), ("optimizer", "lion")],
)
def test_step_rules_out_of_range_are_refused(field: str, value: object) -> None:
    with pytest.raises(UsageError, match="expected"):
        StepRule(**{field: value})  # type: ignore[arg-type]
