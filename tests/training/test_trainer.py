from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_policy.config import PolicyConfig, TrainConfig, TransformerConfig, with_options
from diffusion_policy.datasets.windows import Windows
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.training.losses import denoising_loss, draw
from diffusion_policy.training.trainer import Diverged, Progress, Trainer, learning_rate_factor
from diffusion_policy.training.validation import action_errors

CONFIG = with_options(
    PolicyConfig(), prediction_horizon=8, action_horizon=4, widths=(16, 32), level_dim=32, noise_levels=20
)
BY_TRANSFORMER = replace(
    CONFIG, network=TransformerConfig(16, 2, 2, dropout=0.1, conditioning="cross-attention", level_dim=16)
)
RNG = np.random.default_rng(0)
DATA = {"state": RNG.normal(size=(60, 2)).astype(np.float32), "action": RNG.normal(size=(60, 2)).astype(np.float32)}
ENDS = np.array([20, 40, 60])


def new_trainer(data=DATA, by: PolicyConfig = CONFIG, **options) -> Trainer:
    torch.manual_seed(0)
    windows = Windows(data, ENDS, [0, 1], CONFIG.observation_horizon, CONFIG.prediction_horizon)
    validation = Windows(DATA, ENDS, [2], CONFIG.observation_horizon, CONFIG.prediction_horizon)
    policy = DiffusionPolicy.for_data(by, DATA)
    defaults = {"steps": 20, "batch_size": 32, "learning_rate": 2e-3, "warmup_steps": 5, "validate_every": 10}
    return Trainer.for_policy(policy, windows, validation, TrainConfig(**(defaults | options)))


def test_it_learns() -> None:
    trainer = new_trainer(steps=150)
    reports: list[Progress] = []
    trainer.run(reports.append)
    assert reports[-1].loss < 0.6 * reports[0].loss
    assert reports[-1].step == trainer.step == 150


def test_the_same_seed_gives_the_same_weights() -> None:
    trainers = [new_trainer(seed=3), new_trainer(seed=3), new_trainer(seed=4)]
    for trainer in trainers:
        trainer.run()
    a, b, c = (trainer.ema.state_dict() for trainer in trainers)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_validation_comes_at_its_steps_with_the_same_noise_each_time() -> None:
    trainer = new_trainer(steps=25)
    reports: list[Progress] = []
    trainer.run(reports.append, report_every=7)
    assert [report.step for report in reports] == [7, 10, 14, 20, 21, 25]
    assert [report.step for report in reports if report.validation_loss is not None] == [10, 20, 25]
    assert trainer.validate() == trainer.validate() == reports[-1][2:7]


def test_what_is_validated_loses_no_condition() -> None:
    config = replace(CONFIG, condition_dropout=0.9)
    windows = Windows(DATA, ENDS, [2], CONFIG.observation_horizon, CONFIG.prediction_horizon)
    policy = DiffusionPolicy.for_data(config, DATA)
    trainer = Trainer.for_policy(policy, windows, windows, TrainConfig(steps=1, batch_size=20))
    marks = []
    trainer.ema.network.register_forward_pre_hook(lambda _, inputs: marks.append(inputs[2][:, -1]))
    trainer.validate()
    assert (torch.cat(marks) == 1).all()  # the mark of a condition that is there


def test_the_averaged_policy_never_drops_out() -> None:
    policy = DiffusionPolicy.for_data(CONFIG, DATA)
    policy.network.out.append(torch.nn.Dropout(0.5))
    policy.network.out.append(torch.nn.BatchNorm1d(2))
    windows = Windows(DATA, ENDS, [0, 1, 2], CONFIG.observation_horizon, CONFIG.prediction_horizon)
    config = TrainConfig(steps=4, batch_size=32, validate_every=2)
    trainer = Trainer.for_policy(policy, windows, windows, config, roll_out=lambda policy: float(policy.training))
    trainer.run()
    assert policy.training
    assert not any(module.training for module in trainer.ema.modules())
    assert trainer.validate() == trainer.validate()
    mean = trainer.ema.state_dict()["network.out.3.running_mean"]
    assert torch.equal(mean, trainer.state()["weights.network.out.3.running_mean"])
    assert (mean != 0).any()  # in validation it is used, not learned


@pytest.mark.parametrize(
    "network",
    [CONFIG.network, TransformerConfig(64, 2, 2), TransformerConfig(64, 2, 2, conditioning="cross-attention")],
    ids=["unet", "adaln", "cross-attention"],
)
def test_the_least_memory_is_no_more_than_is_taken(network) -> None:
    """Counted by the tensors that autograd keeps of a batch."""
    kept = {}
    policy = DiffusionPolicy.for_data(replace(CONFIG, network=network), DATA)
    batch = Windows(DATA, ENDS, [0, 1, 2], CONFIG.observation_horizon, CONFIG.prediction_horizon).gather(np.arange(60))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x.nbytes}) or x, lambda x: x):
        denoising_loss(policy, batch, draw(policy, 60, torch.Generator().manual_seed(0)))
    weights = sum(weight.nbytes for weight in policy.parameters())
    needed = 60 * network.least_memory(CONFIG.prediction_horizon)
    assert sum(kept.values()) / 3 - weights < needed < sum(kept.values())


@pytest.mark.parametrize("horizons, keys", [((1, 8), DATA), ((2, 4), DATA), ((2, 8), {"other": DATA["state"]})])
def test_windows_that_do_not_fit_the_policy_are_refused_in_a_line(horizons: tuple[int, int], keys: dict) -> None:
    windows = Windows({"action": DATA["action"], **keys}, ENDS, [0, 1], *horizons)
    with pytest.raises(ValueError, match=r"the policy needs windows of \{'state': \(2, 2\), 'action': \(8, 2\)\}; got"):
        Trainer.for_policy(DiffusionPolicy.for_data(CONFIG, DATA), windows, None, TrainConfig())


def test_the_best_of_several_samples_is_nearer_than_they_are_on_average() -> None:
    trainer = new_trainer(steps=1)
    trainer.run()
    seen = trainer.validate()
    assert seen is not None
    assert 0 < seen.action_error_best < seen.action_error


def test_the_error_of_an_action_is_its_distance_in_raw_units_over_the_executed_steps(monkeypatch) -> None:
    trainer = new_trainer(steps=1)
    batch = Windows(DATA, ENDS, [2], CONFIG.observation_horizon, CONFIG.prediction_horizon).gather(np.arange(5))
    off = torch.zeros(5, 4, 8, 2)
    off[:, 0, 1:5] = torch.tensor([3.0, 4.0])  # the steps that are executed: To - 1 to To - 1 + Ta
    off[:, 1, [0, 5, 6, 7]] = 100.0  # the others
    monkeypatch.setattr(trainer.ema, "sample", lambda *_: batch.actions[:, None] + off)
    errors = action_errors(trainer.ema, batch, 0)
    torch.testing.assert_close(errors, torch.tensor([[5.0, 0, 0, 0]] * 5))


def test_the_error_of_an_angle_goes_round_the_circle(monkeypatch) -> None:
    config = replace(CONFIG, noise_levels=4)
    policy = DiffusionPolicy.for_data(config, DATA, angles={"action": (1,)})
    windows = Windows(DATA, ENDS, [0, 1], config.observation_horizon, config.prediction_horizon)
    trainer = Trainer.for_policy(policy, windows, None, TrainConfig(steps=1))
    batch = windows.gather(np.arange(3))
    turned = batch.actions[:, None] + torch.tensor([0.0, 2 * np.pi - 0.1])
    monkeypatch.setattr(trainer.ema, "sample", lambda *_: turned)
    torch.testing.assert_close(action_errors(trainer.ema, batch, 0), torch.full((3, 1), 0.1), atol=1e-4, rtol=0)


def test_rollouts_come_at_their_steps_and_change_nothing() -> None:
    plain = new_trainer()
    plain.run()
    trainer = new_trainer(rollout_every=7)
    trainer._roll_out = lambda policy: float(policy is trainer.ema)
    reports: list[Progress] = []
    trainer.run(reports.append)
    assert [report.step for report in reports if report.success_rate == 1.0] == [7, 14, 20]
    assert same_weights(plain, trainer)


# The same training, however it is interrupted or divided


def same_weights(a: Trainer, b: Trainer) -> bool:
    """Bit by bit: EMA weights and all else that training holds."""
    states = [{**trainer.state(), **trainer.ema.state_dict()} for trainer in (a, b)]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("steps", [[7], [10], [3, 8, 19]])
def test_what_goes_on_from_a_state_is_the_same_training_bit_by_bit(steps: list[int], precision: str) -> None:
    whole, reports = new_trainer(precision=precision), []
    whole.run(reports.append)
    trainer, pieces = new_trainer(precision=precision), []
    for stop in steps:
        trainer.run(pieces.append, should_stop=lambda stop=stop: trainer.step == stop)  # noqa: B023
        step, averaged, state = trainer.step, trainer.ema.state_dict(), trainer.state()
        trainer = new_trainer(precision=precision)
        trainer.restore(step, averaged, state)
    trainer.run(pieces.append)
    assert same_weights(whole, trainer)
    assert [report[:-1] for report in pieces] == [report[:-1] for report in reports]  # all but its speed


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_transformer_with_dropout_goes_on_as_the_same_training_too(precision: str) -> None:
    options = {"by": BY_TRANSFORMER, "precision": precision, "accumulation": 2}
    whole, trainer, again = (new_trainer(**options) for _ in range(3))
    whole.run()
    trainer.run(should_stop=lambda: trainer.step == 7)
    again.restore(7, trainer.ema.state_dict(), trainer.state())
    again.run()
    assert same_weights(whole, again)


def test_a_state_of_another_policy_or_precision_is_refused() -> None:
    trainer = new_trainer(steps=2)
    trainer.run()
    averaged, state = trainer.ema.state_dict(), trainer.state()
    with pytest.raises(ValueError, match="is not that of the precision fp16"):
        new_trainer(precision="fp16").restore(2, averaged, state)
    with pytest.raises(ValueError, match="is not that of this policy"):
        new_trainer().restore(2, averaged, state | {"weights.network.out.1.bias": torch.zeros(7)})
    del state["optimizer.network.out.1.bias.exp_avg"]
    with pytest.raises(ValueError, match=r"lacks what the optimizer knew of network\.out\.1\.bias"):
        new_trainer().restore(2, averaged, state)


@pytest.mark.parametrize("dropout", [None, 0.0, 0.1], ids=["unet", "transformer", "with dropout"])
def test_parts_of_a_batch_add_up_to_it_but_for_dropout(dropout: float | None) -> None:
    by = CONFIG if dropout is None else with_options(BY_TRANSFORMER, dropout=dropout)
    whole, parts = new_trainer(by=by), new_trainer(by=by, accumulation=3)
    for trainer in (whole, parts):
        trainer.run()
    pairs = [*zip(whole.ema.parameters(), parts.ema.parameters(), strict=True)]
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in pairs) == (not dropout)
    assert not same_weights(whole, parts)  # they differ in rounding: it was divided


def test_a_batch_is_not_divided_into_more_parts_than_it_has_windows() -> None:
    with pytest.raises(ValueError, match="accumulation must be at most the batch-size; got 33"):
        new_trainer(accumulation=33)


@pytest.mark.parametrize("precision, allowed", [("bf16", 0.05), pytest.param("fp16", 0.02, marks=pytest.mark.slow)])
@pytest.mark.parametrize("by", [CONFIG, with_options(BY_TRANSFORMER, dropout=0.0)], ids=["unet", "transformer"])
def test_half_precision_learns_the_same_within_its_rounding(precision: str, allowed: float, by: PolicyConfig) -> None:
    losses = []
    for name in ("fp32", precision):
        trainer, reports = new_trainer(steps=60, precision=name, by=by), []
        trainer.run(reports.append)
        losses.append(reports[-1].validation_loss)
        assert {weight.dtype for weight in trainer.ema.parameters()} == {torch.float32}
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=allowed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside torch.compile
@pytest.mark.parametrize("by", [CONFIG, with_options(BY_TRANSFORMER, dropout=0.0)], ids=["unet", "transformer"])
def test_a_compiled_network_learns_the_same(by: PolicyConfig) -> None:
    plain, compiled = new_trainer(steps=5, by=by), new_trainer(steps=5, by=by, compile=True)
    for trainer in (plain, compiled):
        trainer.run()
    for (name, a), (other, b) in zip(plain.state().items(), compiled.state().items(), strict=True):
        assert name == other
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_a_report_comes_whenever_a_checkpoint_is_due() -> None:
    trainer = new_trainer(steps=20, checkpoint_every=7, validate_every=100)
    reports: list[Progress] = []
    trainer.run(reports.append, report_every=100)
    assert [report.step for report in reports] == [7, 14, 20]


def test_it_stops_between_two_steps_when_asked() -> None:
    trainer = new_trainer()
    trainer.run(should_stop=lambda: trainer.step == 7)
    assert trainer.step == 7


def test_averaged_weights_follow_the_recurrence() -> None:
    trainer = new_trainer(steps=1)
    name = "network.out.1.bias"
    expected = None
    for step in range(1, 6):
        trainer.config = TrainConfig(steps=step)
        trainer.run()
        current = trainer.state()[f"weights.{name}"].clone()
        keep = min(trainer.config.ema_max_decay, 1 - (1 + step - 1) ** -trainer.config.ema_power)
        expected = current if expected is None else keep * expected + (1 - keep) * current
    torch.testing.assert_close(trainer.ema.state_dict()[name], expected)


def test_averaged_weights_are_the_weighted_sum_of_all_that_there_were() -> None:
    trainer = new_trainer(steps=6, ema_max_decay=0.6)  # reached at step 3
    weights = []

    def remember() -> bool:
        weights.append({name: weight.detach().clone() for name, weight in trainer._model.named_parameters()})
        return False

    trainer.run(should_stop=remember)
    remember()
    kept = [min(0.6, 1 - (1 + step) ** -0.75) for step in range(6)]
    shares = [(1 - kept[i]) * np.prod(kept[i + 1 :]) for i in range(6)]
    assert sum(shares) == pytest.approx(1)
    for name, averaged in trainer.ema.named_parameters():
        expected = sum(share * after[name] for share, after in zip(shares, weights[1:], strict=True))
        torch.testing.assert_close(averaged.detach(), expected)


def test_the_fused_optimizer_does_what_the_plain_one_does() -> None:
    fused, plain = new_trainer(weight_decay=0.1), new_trainer(weight_decay=0.1)
    assert fused._optimizer.defaults["fused"]
    groups = [{**group, "fused": False, "foreach": False} for group in plain._optimizer.param_groups]
    plain._optimizer = torch.optim.AdamW(groups)
    for trainer in (fused, plain):
        trainer.run()
    for a, b in zip(fused.ema.parameters(), plain.ema.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    fused.restore(plain.step, plain.ema.state_dict(), plain.state())  # as from a checkpoint of an older version
    assert same_weights(fused, plain)


class Reads(TorchDispatchMode):
    """Hears of each number that is read from a tensor: `item`, `bool`, `float`, and what has a shape that depends on
    numbers."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in str(func) for word in self.WAITING):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("by", [CONFIG, BY_TRANSFORMER], ids=["unet", "transformer"])
def test_a_step_reads_no_number_from_the_device(precision: str, by: PolicyConfig) -> None:
    config = replace(by, condition_dropout=0.2, condition_on_mode=True)
    windows = Windows(DATA, ENDS, [0, 1, 2], 2, 8, labels=np.array([0, 1, 0]))
    policy = DiffusionPolicy.for_data(config, DATA, ("a", "b"), {"state": (1,)})
    options = TrainConfig(steps=100, batch_size=32, accumulation=2, precision=precision)
    trainer, reads = Trainer.for_policy(policy, windows, None, options), Reads()
    with reads:
        trainer.run(should_stop=lambda: trainer.step == 9)
        assert reads.seen == []
        trainer._optimizer = torch.optim.AdamW(trainer._model.parameters(), fused=False)  # which does read numbers
        trainer.run(should_stop=lambda: trainer.step == 11)
    assert reads.seen


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.5, 0.0], ids=["data on the device", "data on the host"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_never_waits_for_the_gpu(
    precision: str, share: float, monkeypatch: pytest.MonkeyPatch, never_waiting
) -> None:
    monkeypatch.setattr("diffusion_policy.datasets.windows.DEVICE_SHARE", share)
    config = replace(CONFIG, condition_dropout=0.2, condition_on_mode=True)
    windows = Windows(DATA, ENDS, [0, 1, 2], 2, 8, labels=np.array([0, 1, 0]), device="cuda")
    policy = DiffusionPolicy.for_data(config, DATA, ("a", "b")).cuda()
    trainer = Trainer.for_policy(policy, windows, None, TrainConfig(steps=100, batch_size=32, precision=precision))
    trainer.run(should_stop=lambda: trainer.step == 2)  # warm up
    votes = torch.zeros((), device="cuda")
    with never_waiting():
        for _ in range(3):
            trainer._train_step(votes)


def test_what_the_network_spares_takes_no_weight_decay_and_a_state_knows_its_names() -> None:
    name, trainers = "network.out.1.bias", []
    for spared in (False, True):
        policy = DiffusionPolicy.for_data(CONFIG, DATA)
        torch.nn.init.ones_(policy.get_parameter(name))
        policy.network.undecayed_parameters = lambda p=policy, s=spared: [p.get_parameter(name)] if s else []
        windows = Windows(DATA, ENDS, [0, 1], CONFIG.observation_horizon, CONFIG.prediction_horizon)
        config = TrainConfig(steps=4, batch_size=32, learning_rate=1e-3, weight_decay=200.0)
        trainers.append(Trainer.for_policy(policy, windows, None, config))
        trainers[-1].run()
    decayed, kept = (trainer.state()[f"weights.{name}"].abs().max() for trainer in trainers)
    assert decayed < 0.7 < 0.95 < kept
    state = trainers[1].state()
    for weight, value in trainers[1]._model.named_parameters():
        assert state[f"optimizer.{weight}.exp_avg"].shape == value.shape


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    config = TrainConfig(steps=100, warmup_steps=10)  # a tenth, the most that is allowed
    factors = [learning_rate_factor(step, config) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == 1
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0)
    assert learning_rate_factor(0, TrainConfig(steps=5, warmup_steps=200)) == 1


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    trainer = new_trainer(learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=r"at step \d+ the loss became .*, its gradient's norm"):
        trainer.run()


@pytest.mark.parametrize("report_every", [1, 10])
def test_the_batch_that_brought_what_is_not_finite_is_named(report_every: int) -> None:
    trainer = new_trainer({key: rows.copy() for key, rows in DATA.items()}, batch_size=8)
    trainer._source._data["state"][3] = torch.nan  # of the windows of now = 3 and 4
    with pytest.raises(Diverged) as caught:
        trainer.run(report_every=report_every)
    assert {3, 4} & set(caught.value.rows.tolist())
    assert caught.value.step <= 5
    before = Windows(DATA, ENDS, [0, 1], CONFIG.observation_horizon, CONFIG.prediction_horizon).batches(8, 0)
    batches = [next(before).rows for _ in range(caught.value.step)]
    np.testing.assert_array_equal(batches[-1], caught.value.rows)
    assert not any({3, 4} & set(rows.tolist()) for rows in batches[:-1])


def test_no_state_is_left_that_is_not_finite() -> None:
    trainer = new_trainer(learning_rate=1e30)
    with pytest.raises(Diverged):
        trainer.run(should_stop=lambda: trainer.step == 9, report_every=100)


def test_the_state_names_every_weight_and_its_moments() -> None:
    trainer = new_trainer(steps=2)
    trainer.run()
    state = trainer.state()
    assert {"weights.network.out.1.bias", "optimizer.network.out.1.bias.exp_avg"} <= state.keys()
    assert state["optimizer.network.out.1.bias.step"].item() == 2


def test_the_modes_of_the_windows_reach_the_network() -> None:
    config = replace(CONFIG, condition_on_mode=True)
    horizons = config.observation_horizon, config.prediction_horizon
    modes = np.array([1, 0, 1])
    windows, validation = (Windows(DATA, ENDS, episodes, *horizons, labels=modes) for episodes in ([0, 1], [2]))
    policy = DiffusionPolicy.for_data(config, DATA, ("a", "b"))
    seen = []
    policy.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2][:, -2:]))
    trainer = Trainer.for_policy(policy, windows, validation, TrainConfig(steps=1, batch_size=40))
    trainer.run()
    assert seen[0].sum(dim=0).tolist() == [20, 20]
    seen.clear()
    trainer.ema.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2][:, -2:]))
    trainer.validate()
    assert torch.cat(seen).unique(dim=0).tolist() == [[0.0, 1.0]]
