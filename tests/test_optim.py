"""The schedule in performed steps, the learning-rate rules and who decays."""

import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from sslmed.optim import OptimConfig, build_optimizer, clip_each, decay_groups, half_cosine, scheduled, warmup_cosine
from sslmed.training.trainer import TrainConfig, build_trainer


def test_warm_up_climbs_from_zero_and_the_cosine_ends_at_the_final_rate() -> None:
    factor = warmup_cosine(OptimConfig(warmup=0.1, final_lr=0.2), total_steps=100)
    assert [factor(step) for step in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert factor(55) == pytest.approx(0.2 + 0.8 * 0.5)
    assert factor(100) == pytest.approx(0.2)
    assert factor(200) == pytest.approx(0.2), "never up again"


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert warmup_cosine(OptimConfig(warmup=0), 10)(0) == 1.0


@pytest.mark.parametrize(("rule", "expected"), [("constant", 0.3), ("linear", 0.3 * 4), ("sqrt", 0.3 * 2)])
def test_learning_rate_rules(rule: str, expected: float) -> None:
    assert OptimConfig(lr=0.3, lr_rule=rule).peak_lr(1024) == pytest.approx(expected)


def test_simclr_reference_square_root_rule() -> None:
    # arXiv 2002.05709, appendix B.1: 0.075 x sqrt(batch), which is 1.2 x sqrt(batch / 256)
    assert OptimConfig(lr=1.2, lr_rule="sqrt").peak_lr(4096) == pytest.approx(0.075 * math.sqrt(4096))


def test_biases_and_norm_layers_do_not_decay() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    decayed, spared = decay_groups([network], 0.1)
    assert {tuple(p.shape) for p in decayed["params"]} == {(4, 1, 3, 3), (2, 4)}
    assert len(spared["params"]) == 4
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)


def test_frozen_parameters_get_no_group() -> None:
    layer = nn.Linear(2, 2).requires_grad_(False)
    assert all(not group["params"] for group in decay_groups([layer], 0.1))


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_weight_decay_alone_shrinks_weights_and_spares_biases(name: str) -> None:
    layer = nn.Linear(3, 3)
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer = build_optimizer(OptimConfig(name=name, lr=0.1), decay_groups([layer], 0.5), 256)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert layer.weight.norm() < before[0].norm()
    assert torch.equal(layer.bias, before[1])


# step: rate, gradient; then |p|, |g + wd p|, q = trust |p| / |g + wd p|, momentum and weights after it, worked out by
# hand for p = (3, 4), weight decay 0.5, trust 0.1, momentum 0.9. The rate changes, so its place shows.
LARS_TABLE = [
    (1.0, (1.5, -2.0), (2.5, 4.0)),  # |p| 5, |(3, 0)| 3, q 1/6, mu (0.5, 0)
    (0.5, (-1.25, 0.0), (2.275, 3.7641504717)),  # 4.7169905660, |(0, 2)| 2, 0.2358495283, (0.45, 0.4716990566)
    # 4.3982330286, |(2.1375, 2.8820752359)| 3.5882117991, 0.1225745099, (0.6670030150, 0.7777981106)
    (0.25, (1.0, 1.0), (2.1082492462, 3.5697009440)),
]


def test_three_steps_of_lars_equal_a_table_worked_out_by_hand() -> None:
    weight, bias = nn.Parameter(torch.tensor([[3.0, 4.0]]).double()), nn.Parameter(torch.ones(2).double())
    config = OptimConfig(name="lars", lr=1.0, trust=0.1)
    groups = [{"params": [weight], "weight_decay": 0.5}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = build_optimizer(config, groups, 256)
    expected_bias, momentum = 1.0, 0.0
    for rate, gradient, expected in LARS_TABLE:
        for group in optimizer.param_groups:
            group["lr"] = rate
        weight.grad, bias.grad = torch.tensor([gradient]).double(), torch.full((2,), 0.1, dtype=torch.float64)
        optimizer.step()
        assert weight.tolist()[0] == pytest.approx(expected, abs=1e-7)
        momentum = 0.9 * momentum + 0.1  # neither decayed nor adapted
        expected_bias -= rate * momentum
        assert bias.tolist() == pytest.approx([expected_bias] * 2, abs=1e-12)


@pytest.mark.parametrize("zero", ["weight", "gradient"])
def test_lars_takes_a_plain_step_where_a_norm_is_zero(zero: str) -> None:
    weight = nn.Parameter(torch.zeros(1, 2) if zero == "weight" else torch.ones(1, 2))
    weight.grad = torch.ones(1, 2) if zero == "weight" else torch.zeros(1, 2)
    optimizer = build_optimizer(OptimConfig(name="lars", lr=0.5), [{"params": [weight], "weight_decay": 0.0}], 256)
    optimizer.step()
    assert weight.tolist() == ([[-0.5, -0.5]] if zero == "weight" else [[1.0, 1.0]])


def test_lars_resumes_from_its_state() -> None:
    def run(steps: int, optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> None:
        for step in range(steps):
            weight.grad = torch.full_like(weight, 1.0 + step)
            optimizer.step()

    whole, parted = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    config = OptimConfig(name="lars", lr=0.5)
    first, second = (build_optimizer(config, [{"params": [p], "weight_decay": 0.1}], 256) for p in (whole, parted))
    run(1, first, whole)
    run(1, second, parted)
    third = build_optimizer(config, [{"params": [parted], "weight_decay": 0.1}], 256)
    third.load_state_dict(second.state_dict())
    run(2, first, whole)
    run(2, third, parted)
    assert torch.equal(whole, parted)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("rule", ["constant", "linear", "sqrt"])
def test_the_rate_of_every_performed_step_is_the_closed_form(accumulate: int, rule: str) -> None:
    """Through Lightning: first, warm-up, middle, last; in performed steps, whatever is accumulated."""
    total, batch_size, rates = 20, 64, []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.layer(batch).sum()

        def configure_optimizers(self) -> object:
            settings = OptimConfig(lr=0.1, lr_rule=rule, warmup=0.25, final_lr=0.1)
            return scheduled(settings, decay_groups([self], 0.0), batch_size, total)

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    config = TrainConfig(max_steps=total, batch_size=batch_size, accumulate=accumulate, precision=32, devices="cpu")
    build_trainer(config, total, []).fit(Module(), DataLoader(torch.ones(total * accumulate, 1)))
    peak = {"constant": 0.1, "linear": 0.025, "sqrt": 0.05}[rule]
    assert len(rates) == total
    assert rates[:6] == pytest.approx([peak * step / 5 for step in range(6)])
    for step in (10, 19):
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 5) / 15))
        assert rates[step] == pytest.approx(peak * cosine)


def rates_of(config: OptimConfig, groups: list[dict[str, object]], total: int) -> list[list[float]]:
    """The rate of each group in each step."""
    made = scheduled(config, groups, 256, total)
    found = []
    for _ in range(total):
        found.append([group["lr"] for group in made["optimizer"].param_groups])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    return found


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_a_group_may_have_a_share_of_the_rate_and_begin_later(name: str) -> None:
    total, begin, share, lr = 20, 8, 0.3, 0.1
    config = OptimConfig(name=name, lr=lr, warmup=0.25, final_lr=0.1)
    own = {"share": share}, {"begin": begin}, {"share": share, "begin": begin}
    groups = [{"params": [nn.Parameter(torch.ones(1))], **each} for each in ({}, *own)]

    def closed(step: int, steps: int) -> float:
        warmup = round(0.25 * steps)
        if step < warmup:
            return lr * step / warmup
        return lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))

    for step, (plain, less, later, both) in enumerate(rates_of(config, groups, total)):
        assert plain == pytest.approx(closed(step, total))
        assert less == pytest.approx(share * closed(step, total))
        expected = closed(step - begin, total - begin) if step >= begin else 0.0
        assert later == pytest.approx(expected), "a warm-up of its own, and the same end"
        assert both == pytest.approx(share * expected)


def test_before_it_begins_a_group_does_not_move() -> None:
    early, late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups = [
        {"params": [early], "weight_decay": 0.5},
        {"params": [late], "weight_decay": 0.5, "begin": 3},
    ]
    made = scheduled(OptimConfig(lr=0.1, warmup=0), groups, 256, 10)
    for step in range(5):
        early.grad, late.grad = torch.ones(2), torch.ones(2)
        before = late.detach().clone()
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
        assert torch.equal(before, late) == (step < 3)
    assert (early < late).all()


def test_a_schedule_with_groups_of_their_own_resumes() -> None:
    def made() -> dict[str, object]:
        groups = [{"params": [nn.Parameter(torch.ones(1))], "begin": begin, "share": 0.5} for begin in (0, 4)]
        return scheduled(OptimConfig(lr=0.1, warmup=0.2), groups, 256, 12)

    whole, first, second = made(), made(), made()
    for each, steps in ((whole, 7), (first, 5)):
        for _ in range(steps):
            each["optimizer"].step()
            each["lr_scheduler"]["scheduler"].step()
    second["optimizer"].load_state_dict(first["optimizer"].state_dict())
    second["lr_scheduler"]["scheduler"].load_state_dict(first["lr_scheduler"]["scheduler"].state_dict())
    for _ in range(2):
        second["optimizer"].step()
        second["lr_scheduler"]["scheduler"].step()
    rates = [[group["lr"] for group in each["optimizer"].param_groups] for each in (whole, second)]
    assert rates[0] == rates[1]
    assert rates[0][1] > 0


def test_a_constant_group_keeps_its_rate() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(1))], **own} for own in ({}, {"constant": True, "share": 0.5})]
    rates = rates_of(OptimConfig(lr=0.1, warmup=0.25), groups, 8)
    assert [constant for _, constant in rates] == [0.05] * 8
    assert rates[0][0] == 0.0


def decays_of(made: dict[str, object], steps: int) -> list[list[float]]:
    found = []
    for _ in range(steps):
        found.append([group["weight_decay"] for group in made["optimizer"].param_groups])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    return found


def test_weight_decay_follows_a_cosine_where_there_is_one_and_resumes() -> None:
    config = OptimConfig(weight_decay=0.04, final_weight_decay=0.4)

    def made() -> dict[str, object]:
        return scheduled(config, decay_groups([nn.Linear(2, 2)], config.weight_decay), 256, 10)

    whole, first, second = made(), made(), made()
    found = decays_of(whole, 11)
    for step, (decayed, spared) in enumerate(found):
        assert decayed == pytest.approx(0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * step / 10)) / 2)
        assert spared == 0
    assert (found[0][0], found[10][0]) == (pytest.approx(0.04), pytest.approx(0.4))
    decays_of(first, 4)
    second["optimizer"].load_state_dict(first["optimizer"].state_dict())
    second["lr_scheduler"]["scheduler"].load_state_dict(first["lr_scheduler"]["scheduler"].state_dict())
    assert decays_of(second, 7) == found[4:]
    still = scheduled(OptimConfig(weight_decay=0.04), decay_groups([nn.Linear(2, 2)], 0.04), 256, 10)
    assert {decayed for decayed, _ in decays_of(still, 10)} == {0.04}


def test_half_a_cosine_ends_and_stays() -> None:
    assert [half_cosine(1.0, 3.0, step, 4) for step in (0, 2, 4, 9)] == pytest.approx([1, 2, 3, 3])


def test_each_gradient_is_clipped_by_itself() -> None:
    large, small, without = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    large.grad, small.grad = torch.tensor([30.0, 40.0]), torch.tensor([0.3, 0.4])
    clip_each([large, small, without], 3.0)
    torch.testing.assert_close(large.grad, torch.tensor([1.8, 2.4]))
    torch.testing.assert_close(small.grad, torch.tensor([0.3, 0.4]))
    clip_each([without], 3.0)
    assert without.grad is None


def test_a_decay_that_could_not_climb_is_refused() -> None:
    with pytest.raises(ValueError, match=r"final_weight_decay is 0\.4 and weight_decay 0.*allowed: a weight_decay"):
        OptimConfig(weight_decay=0, final_weight_decay=0.4)
    OptimConfig(weight_decay=0, final_weight_decay=0)
